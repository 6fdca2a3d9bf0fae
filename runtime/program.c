/* A sequence of kernels, run in one call. */

#include "kernels.h"

#include <string.h>

enum { OPERANDS = 5, NUMBERS = 9, WORTH_A_THREAD = 1 << 18 /* bytes */ };

/* One kernel's call. An operand is a place in the arena, twice its offset, or one of the other addresses, twice its
 * index and one, or none, -1. */
typedef struct {
    int64_t kernel, operands[OPERANDS], numbers[NUMBERS];
    double value;
} step_t;

enum { COPY, ATTENTION, GROUP_NORM, LAYER_NORM, PRODUCT };

typedef struct {
    const char *from;
    char *to;
    int64_t rows, bytes, apart;
} copy_t;

static void copy_rows(void *given, int index, int threads) {
    const copy_t *job = given;
    for (int64_t row = job->rows * index / threads; row < job->rows * (index + 1) / threads; row++)
        memcpy(job->to + row * job->apart, job->from + row * job->bytes, (size_t)job->bytes);
}

/* Copy rows of some bytes to where there are `apart` from each to the next, from `first` on. */
static int copy(const void *from, char *to, const int64_t *n, int threads) {
    copy_t job = {from, to + n[3], n[0], n[1], n[2]};
    const int64_t worth = job.rows * job.bytes / WORTH_A_THREAD + 1;
    run_on_threads(copy_rows, &job, threads < worth ? threads : (int)worth);
    return 0;
}

static int run(const step_t *step, void *const *at, int threads) {
    const int64_t *n = step->numbers;
    const float value = (float)step->value;
    switch (step->kernel) {
    case COPY:
        return copy(at[0], at[1], n, threads);
    case ATTENTION:
        return sdrt_attention(at[0], at[1], at[2], at[3], n[0], n[1], n[2], n[3], n[4], value, threads);
    case GROUP_NORM:
        return sdrt_group_norm(at[0], at[1], at[2], at[3], n[0], n[1], n[2], n[3], value, (int)n[4], threads);
    case LAYER_NORM:
        return sdrt_layer_norm(at[0], at[1], at[2], at[3], n[0], n[1], value, threads);
    case PRODUCT:
        return sdrt_product(at[0], at[1], at[2], at[3], at[4], n[0], n[1], n[2], n[3], n[4], n[5], n[6], n[7],
                            (int)n[8], threads);
    default:
        return -1;
    }
}

/* Run steps one after the other. 0, or -1 as soon as one has no memory. */
int sdrt_run(const step_t *steps, int64_t count, char *arena, void *const *others, int threads) {
    for (const step_t *step = steps; step < steps + count; step++) {
        void *at[OPERANDS];
        for (int i = 0; i < OPERANDS; i++) {
            const int64_t operand = step->operands[i];
            at[i] = operand < 0 ? NULL : operand % 2 ? others[operand / 2] : arena + operand / 2;
        }
        if (run(step, at, threads)) return -1;
    }
    return 0;
}
