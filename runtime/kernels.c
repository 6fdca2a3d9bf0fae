/* Whether the kernels run here, and the threads that they run on; kernels.py loads the library. */

#define _GNU_SOURCE
#include "kernels.h"

#include <cpuid.h>
#include <linux/futex.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

enum {
    MOST_THREADS = 256,
    SPINS = 1 << 10, /* of waiting, some tens of microseconds: as long as it takes from one operation to the next */
};

static cpu_set_t processors;
static pthread_once_t once = PTHREAD_ONCE_INIT;
static int ready = -1;

static void make_ready(void);

/* Make ready, once a process: 0, or -1 where this cannot run. Not from a thread that is bound to one processor. */
int sdrt_prepare(void) {
    enum { REQUEST_PERMISSION = 0x1023, TILE_DATA = 18 }; /* of arch_prctl */
    unsigned a, b, c, d;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return -1;
    const unsigned avx512 = bit_AVX512F | bit_AVX512BW | bit_AVX512DQ | bit_AVX512VL;
    if ((b & avx512) != avx512 || !(d & 1u << 22 /* AMX-BF16 */) || !(d & 1u << 24 /* AMX-TILE */)) return -1;
    if (!__get_cpuid_count(7, 1, &a, &b, &c, &d) || !(a & 1u << 5 /* AVX512-BF16 */)) return -1;
    if (sched_getaffinity(0, sizeof processors, &processors)) return -1;
    pthread_once(&once, make_ready);
    if (ready) return -1;
    return syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) ? -1 : 0;
}

/* One computation at a time: others wait, for more threads than processors would be slower, and each result is summed
 * by as many threads as the last one, so that it is the same to the last bit. */
static pthread_mutex_t turn = PTHREAD_MUTEX_INITIALIZER;
static pthread_t others[MOST_THREADS];
static int started, avoided = -1; /* the others; the processor that they leave to the caller */

/* What there is to do; the number of the computation changes last, and the others wait for that. */
static struct {
    void (*work)(void *job, int index, int count);
    void *job;
    int count;
    atomic_int left;
    atomic_uint number;
    atomic_int asleep;
} task;

/* Numbers from before each was started, which may be late to the next one. */
static unsigned first_seen[MOST_THREADS];

static void futex(int operation, unsigned value) {
    syscall(SYS_futex, &task.number, operation | FUTEX_PRIVATE_FLAG, value, NULL, NULL, 0);
}

/* Numbers too small for a full mantissa are noughts, for processors take a hundred times as long for them. */
static void compute(int index) {
    enum { FLUSH_TO_ZERO = 0x8000, DENORMALS_ARE_ZERO = 0x40 };
    const unsigned before = _mm_getcsr();
    _mm_setcsr(before | FLUSH_TO_ZERO | DENORMALS_ARE_ZERO);
    task.work(task.job, index, task.count);
    _mm_setcsr(before);
}

static void *attend(void *given) {
    const int index = (int)(intptr_t)given;
    for (unsigned seen = first_seen[index];;) {
        for (int spins = 0; spins < SPINS && atomic_load_explicit(&task.number, memory_order_relaxed) == seen; spins++)
            _mm_pause();
        while (atomic_load(&task.number) == seen) {
            atomic_fetch_add(&task.asleep, 1);
            futex(FUTEX_WAIT, seen);
            atomic_fetch_sub(&task.asleep, 1);
        }
        seen = atomic_load(&task.number);
        if (index < task.count) compute(index);
        /* All have to have looked before there is something else. */
        atomic_fetch_sub(&task.left, 1);
    }
    return NULL;
}

static void before_fork(void) { pthread_mutex_lock(&turn); }
static void after_fork(void) { pthread_mutex_unlock(&turn); }
static void in_child(void) {
    started = 0;
    avoided = -1;
    atomic_store(&task.asleep, 0);
    pthread_mutex_unlock(&turn);
}

/* OpenVINO binds its threads to a processor each: that of the caller is left to it. */
static void leave_processor_of_caller(void) {
    cpu_set_t mine;
    if (sched_getaffinity(0, sizeof mine, &mine) || CPU_COUNT(&mine) != 1) return;
    int bound = 0;
    while (!CPU_ISSET(bound, &mine)) bound++;
    if (bound == avoided || !CPU_ISSET(bound, &processors) || CPU_COUNT(&processors) < 2) return;
    cpu_set_t rest = processors;
    CPU_CLR(bound, &rest);
    for (int i = 0; i < started; i++) pthread_setaffinity_np(others[i], sizeof rest, &rest);
    avoided = bound;
}

static void start_others(int wanted) {
    pthread_attr_t attributes;
    if (wanted <= started || pthread_attr_init(&attributes)) return;
    pthread_attr_setaffinity_np(&attributes, sizeof processors, &processors);
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before); /* signals are for the program's threads */
    for (; started < wanted; started++) {
        first_seen[started + 1] = atomic_load(&task.number);
        if (pthread_create(&others[started], &attributes, attend, (void *)(intptr_t)(started + 1))) break;
    }
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    pthread_attr_destroy(&attributes);
    avoided = -1;
}

void run_on_threads(void (*work)(void *job, int index, int count), void *job, int threads) {
    pthread_mutex_lock(&turn);
    start_others((threads < MOST_THREADS ? threads : MOST_THREADS) - 1);
    if (threads > started + 1) threads = started + 1;
    task.work = work;
    task.job = job;
    task.count = threads;
    if (threads > 1) {
        leave_processor_of_caller();
        atomic_store(&task.left, started);
        atomic_fetch_add(&task.number, 1);
        if (atomic_load(&task.asleep)) futex(FUTEX_WAKE, MOST_THREADS);
    }
    compute(0);
    for (int spins = 0; threads > 1 && atomic_load(&task.left); spins++) {
        if (spins < SPINS)
            _mm_pause();
        else
            sched_yield();
    }
    pthread_mutex_unlock(&turn);
}

/* Memory of a thread, which it keeps for what it computes next. */
typedef struct {
    size_t bytes;
    char *memory;
} kept_t;

static pthread_key_t key;

static void forget(void *given) {
    kept_t *kept = given;
    free(kept->memory);
    free(kept);
}

void *memory_of_thread(size_t bytes) {
    enum { HUGE = 1 << 21 };
    kept_t *kept = pthread_getspecific(key);
    if (!kept) {
        kept = calloc(1, sizeof *kept);
        if (!kept || pthread_setspecific(key, kept)) {
            free(kept);
            return NULL;
        }
    }
    if (kept->bytes < bytes) {
        free(kept->memory);
        kept->bytes = (bytes + HUGE - 1) / HUGE * HUGE;
        kept->memory = aligned_alloc(HUGE, kept->bytes);
        if (!kept->memory) {
            kept->bytes = 0;
            return NULL;
        }
        madvise(kept->memory, kept->bytes, MADV_HUGEPAGE); /* fewer misses of the table of pages */
    }
    return kept->memory;
}

static void make_ready(void) {
    ready = pthread_key_create(&key, forget) || pthread_atfork(before_fork, after_fork, in_child) ? -1 : 0;
}
