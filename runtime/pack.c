/* Weights in the order in which product.c reads them. */

#define _GNU_SOURCE
#include "kernels.h"

#include <sys/mman.h>
#include <unistd.h>

#ifndef MADV_POPULATE_READ
#define MADV_POPULATE_READ 22 /* from Linux 5.14 on; others refuse it, which does no harm */
#endif

enum {
    TILE = 16,   /* outputs in a tile, and pairs of channels */
    PAIRED = 32, /* channels */
    TILE_BYTES = 1024,
    LINE = 64, /* bytes */
};

typedef struct {
    const float *from;
    uint8_t *to;
    int64_t channels, outputs, taps, by_output, by_channel, by_tap, first, apart;
    atomic_llong taken;
} packing_t;

TARGET static void pack(void *given, int index, int count) {
    (void)index, (void)count;
    packing_t *job = given;
    const int64_t steps = job->channels / PAIRED * job->taps;
    const int beside = job->by_output == 1;
    const __m512i lanes = _mm512_mullo_epi32(_mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15),
                                             _mm512_set1_epi32((int)job->by_output));
    for (;;) {
        const int64_t taken = atomic_fetch_add_explicit(&job->taken, 1, memory_order_relaxed);
        if (taken >= job->outputs / TILE) return;
        const int64_t first = taken * TILE, column = job->first + taken * job->apart;
        uint8_t *to = job->to + (column / 2 * steps * 2 + column % 2) * TILE_BYTES;
        for (int64_t c = 0; c < job->channels; c += PAIRED)
            for (int64_t tap = 0; tap < job->taps; tap++, to += 2 * TILE_BYTES) {
                const float *from = job->from + first * job->by_output + c * job->by_channel + tap * job->by_tap;
                for (int64_t r = 0; r < TILE; r++, from += 2 * job->by_channel) {
                    const float *after = from + job->by_channel;
                    const __m512 even = beside ? _mm512_loadu_ps(from) : _mm512_i32gather_ps(lanes, from, 4);
                    const __m512 odd = beside ? _mm512_loadu_ps(after) : _mm512_i32gather_ps(lanes, after, 4);
                    const __m512i low = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(even));
                    const __m512i high = _mm512_slli_epi32(_mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(odd)), 16);
                    _mm512_storeu_si512(to + r * LINE, _mm512_or_si512(low, high));
                }
            }
    }
}

/* Tell the system of pages that lie within some bytes as a whole. */
static void advise(const void *begin, size_t bytes, int advice) {
    const uintptr_t page = (uintptr_t)sysconf(_SC_PAGESIZE), at = (uintptr_t)begin;
    const uintptr_t from = (at + page - 1) / page * page, to = (at + bytes) / page * page;
    if (to > from) madvise((void *)from, to - from, advice);
}

/* Pack bf16 of fp32 weights. Of `outputs` of them each 16 become a column of tiles, the first is `first`; there
 * are `apart` from one to the next, two where values and their gates take turns. 0 always. */
int sdrt_pack(const float *from, uint8_t *to, int64_t channels, int64_t outputs, int64_t taps, int64_t by_output,
              int64_t by_channel, int64_t by_tap, int64_t first, int64_t apart, int threads) {
    const size_t numbers = (size_t)(channels * outputs * taps);
    /* Weights come from memory at each step, and are found faster in huge pages; those of a file are mapped at once. */
    advise(to, 2 * numbers * (size_t)apart, MADV_HUGEPAGE);
    advise(from, 4 * numbers, MADV_POPULATE_READ);
    packing_t job = {from, to, channels, outputs, taps, by_output, by_channel, by_tap, first, apart};
    run_on_threads(pack, &job, threads);
    return 0;
}
