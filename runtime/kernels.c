/* Whether the kernels run here, and the threads that they run on; kernels.py loads the library. */

#define _GNU_SOURCE
#include "kernels.h"

#include <cpuid.h>
#include <pthread.h>
#include <sched.h>
#include <sys/syscall.h>
#include <unistd.h>

enum { MOST_THREADS = 256 };

static cpu_set_t processors;

/* Make ready, once a process: 0, or -1 where this cannot run. Not from a thread that is bound to one processor. */
int sdrt_prepare(void) {
    enum { REQUEST_PERMISSION = 0x1023, TILE_DATA = 18 }; /* of arch_prctl */
    unsigned a, b, c, d;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return -1;
    const unsigned avx512 = bit_AVX512F | bit_AVX512BW | bit_AVX512DQ | bit_AVX512VL;
    if ((b & avx512) != avx512 || !(d & 1u << 22 /* AMX-BF16 */) || !(d & 1u << 24 /* AMX-TILE */)) return -1;
    if (!__get_cpuid_count(7, 1, &a, &b, &c, &d) || !(a & 1u << 5 /* AVX512-BF16 */)) return -1;
    if (sched_getaffinity(0, sizeof processors, &processors)) return -1;
    return syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) ? -1 : 0;
}

typedef struct {
    void (*work)(void *job, int index);
    void *job;
    int index;
} start_t;

static void *begin(void *given) {
    const start_t *start = given;
    start->work(start->job, start->index);
    return NULL;
}

void run_on_threads(void (*work)(void *job, int index), void *job, int threads, atomic_int *count) {
    pthread_t others[MOST_THREADS];
    start_t starts[MOST_THREADS];
    pthread_attr_t attributes;
    int all = 1;
    if (threads > MOST_THREADS) threads = MOST_THREADS;
    if (threads > 1 && !pthread_attr_init(&attributes)) {
        /* OpenVINO binds its threads to a processor each: that of the caller is not to be inherited, but left to it. */
        cpu_set_t mine, free_for_others = processors;
        if (!sched_getaffinity(0, sizeof mine, &mine) && CPU_COUNT(&mine) == 1) {
            CPU_XOR(&mine, &mine, &processors); /* all others, for the caller's is one of them */
            if (CPU_COUNT(&mine) < CPU_COUNT(&processors) && CPU_COUNT(&mine)) free_for_others = mine;
        }
        pthread_attr_setaffinity_np(&attributes, sizeof free_for_others, &free_for_others);
        for (; all < threads; all++) {
            starts[all] = (start_t){work, job, all};
            if (pthread_create(&others[all], &attributes, begin, &starts[all])) break;
        }
        pthread_attr_destroy(&attributes);
    }
    atomic_store(count, all);
    work(job, 0);
    for (int i = 1; i < all; i++) pthread_join(others[i], NULL);
}
