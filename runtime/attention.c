/* Attention in bf16 on the matrix units (AMX) of x86-64 processors.
 *
 * softmax(scale q k^T) v, without the scores ever being in memory as a whole: a block of queries goes over the keys in
 * pieces, and what it has summed is scaled down when a score turns up that is greater by far (Milakov and Gimelshein,
 * "Online normalizer calculation for softmax", 2018; Dao et al., "FlashAttention", 2022). Products are of bf16 and sums
 * in fp32, as is all between them. The sums of the exponentials come out of the second product, from a column of ones
 * beside the values.
 *
 * The tiles are those of Intel's "Architecture Instruction Set Extensions Programming Reference": 16 rows of 64 bytes,
 * where a right operand holds each two rows of its matrix interleaved.
 */

#include "kernels.h"

#include <math.h>
#include <string.h>

enum {
    TILE = 16,   /* rows of a tile, and fp32 in each of them */
    PAIRED = 32, /* bf16 in a row */
    TILE_SIZE = TILE * PAIRED,
    QUERIES = 2 * TILE, /* in a block */
    KEYS = 96,          /* in a piece: scores and weights of a block stay in half of the first cache */
    BF16_ONE = 0x3f80,
    UNITS_A_THREAD = 2,       /* so that the last one to finish is not long alone */
    WORTH_A_THREAD = 1 << 22, /* products */
};

/* In powers of two: how far a score may be above the greatest at first before the sums are scaled. */
static const float SLACK = 8;

typedef struct {
    const uint16_t *q, *k, *v;
    uint16_t *o;
    int64_t batch, queries, keys, heads, dim;
    float scale;
    int64_t groups;     /* parts that the queries of a head are cut into; each is a unit of work */
    atomic_llong taken; /* units */
} job_t;

/* What a thread works in; tiles of right operands one after the other, all else by rows. */
typedef struct {
    uint16_t *keys, *values; /* of a head: [keys / 16][depth] and [keys / 32][width] tiles */
    uint16_t *queries;       /* [QUERIES][depth * 32] */
    float *scores;           /* [QUERIES][KEYS] */
    uint16_t *weights;       /* [QUERIES][KEYS] */
    float *sums;             /* [QUERIES][width * 16], the sum of the weights behind those of the values */
} space_t;

/* A mask of the first of 16, as many as there are. */
INLINE __mmask16 first_of(int64_t there) {
    return there >= TILE ? 0xffff : there <= 0 ? 0 : (__mmask16)((1u << there) - 1);
}

/* 32 numbers of a row; zeros where there are less. */
INLINE __m512i row_of(const uint16_t *row, int64_t there) {
    const __mmask32 mask = there >= PAIRED ? 0xffffffff : there <= 0 ? 0 : (1u << there) - 1;
    return _mm512_maskz_loadu_epi16(mask, row);
}

INLINE void pack_keys(const job_t *job, const uint16_t *k, int64_t stride, int64_t depth, uint16_t *tile) {
    const __m512i column = _mm512_slli_epi32(
        _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15), 4);
    const int64_t padded = (job->keys + PAIRED - 1) / PAIRED * PAIRED;
    uint32_t rows[TILE * TILE] __attribute__((aligned(64)));
    for (int64_t first = 0; first < padded; first += TILE)
        for (int64_t t = 0; t < depth; t++, tile += TILE_SIZE) {
            for (int64_t n = 0; n < TILE; n++) {
                const int64_t there = first + n < job->keys ? job->dim - t * PAIRED : 0;
                _mm512_store_si512(rows + n * TILE, row_of(k + (first + n) * stride + t * PAIRED, there));
            }
            for (int64_t r = 0; r < TILE; r++)
                _mm512_store_si512(tile + r * PAIRED, _mm512_i32gather_epi32(column, rows + r, 4));
        }
}

/* One row of 16 values as the low halves of 32 bits, with a one where the sum of the weights is to come. */
INLINE __m512i values_of(const job_t *job, const uint16_t *v, int64_t stride, int64_t key, int64_t t) {
    if (key >= job->keys) return _mm512_setzero_si512();
    const __mmask16 there = first_of(job->dim - t * TILE);
    const __mmask16 one = (__mmask16)(first_of(job->dim + 1 - t * TILE) & ~there);
    const __m256i row = _mm256_maskz_loadu_epi16(there, v + key * stride + t * TILE);
    return _mm512_cvtepu16_epi32(_mm256_mask_mov_epi16(row, one, _mm256_set1_epi16(BF16_ONE)));
}

INLINE void pack_values(const job_t *job, const uint16_t *v, int64_t stride, int64_t width, uint16_t *tile) {
    for (int64_t first = 0; first < job->keys; first += PAIRED)
        for (int64_t t = 0; t < width; t++)
            for (int64_t key = first; key < first + PAIRED; key += 2, tile += PAIRED) {
                const __m512i odd = _mm512_slli_epi32(values_of(job, v, stride, key + 1, t), 16);
                _mm512_store_si512(tile, _mm512_or_si512(values_of(job, v, stride, key, t), odd));
            }
}

/* Scores of a block with `count` keys, a multiple of 32. */
INLINE void score(const space_t *space, const uint16_t *k, int64_t count, const int64_t depth) {
    const int64_t row = depth * PAIRED;
    const uint16_t *upper = space->queries, *lower = upper + TILE * row;
    for (int64_t n = 0; n < count; n += 2 * TILE, k += 2 * depth * TILE_SIZE) {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
        for (int64_t t = 0; t < depth; t++) {
            _tile_loadd(4, upper + t * PAIRED, row * 2);
            _tile_loadd(6, k + t * TILE_SIZE, PAIRED * 2);
            _tile_loadd(5, lower + t * PAIRED, row * 2);
            _tile_loadd(7, k + (depth + t) * TILE_SIZE, PAIRED * 2);
            _tile_dpbf16ps(0, 4, 6);
            _tile_dpbf16ps(1, 5, 6);
            _tile_dpbf16ps(2, 4, 7);
            _tile_dpbf16ps(3, 5, 7);
        }
        float *to = space->scores + n;
        _tile_stored(0, to, KEYS * 4);
        _tile_stored(1, to + TILE * KEYS, KEYS * 4);
        _tile_stored(2, to + TILE, KEYS * 4);
        _tile_stored(3, to + TILE * KEYS + TILE, KEYS * 4);
    }
}

/* Weights from scores, of which there are `count`, and `there` if those of no key are left out; 2^(by score - top). */
INLINE void weigh(const space_t *space, float by, float *top, int is_first, int64_t count, int64_t there,
                  int64_t width) {
    const __m512 factor = _mm512_set1_ps(by);
    for (int64_t m = 0; m < QUERIES; m++) {
        float *scores = space->scores + m * KEYS, *sums = space->sums + m * width * TILE;
        for (int64_t n = there; n < count; n++) scores[n] = -INFINITY;
        __m512 most = _mm512_load_ps(scores), other = _mm512_load_ps(scores + TILE);
        for (int64_t n = PAIRED; n < count; n += PAIRED) {
            most = _mm512_max_ps(most, _mm512_load_ps(scores + n));
            other = _mm512_max_ps(other, _mm512_load_ps(scores + n + TILE));
        }
        most = _mm512_max_ps(most, other);
        if (is_first) {
            top[m] = by * _mm512_reduce_max_ps(most);
        } else if (_mm512_cmp_ps_mask(_mm512_mul_ps(most, factor), _mm512_set1_ps(top[m] + SLACK), _CMP_GT_OQ)) {
            const float now = by * _mm512_reduce_max_ps(most);
            const __m512 less = exp2_of(_mm512_set1_ps(top[m] - now));
            for (int64_t n = 0; n < width * TILE; n += TILE)
                _mm512_store_ps(sums + n, _mm512_mul_ps(_mm512_load_ps(sums + n), less));
            top[m] = now;
        }
        const __m512 from = _mm512_set1_ps(top[m]);
        for (int64_t n = 0; n < count; n += PAIRED) {
            const __m512 low = exp2_of(_mm512_fmsub_ps(_mm512_load_ps(scores + n), factor, from));
            const __m512 high = exp2_of(_mm512_fmsub_ps(_mm512_load_ps(scores + n + TILE), factor, from));
            _mm512_store_si512(space->weights + m * KEYS + n, (__m512i)_mm512_cvtne2ps_pbh(high, low));
        }
    }
}

/* Add to the sums of a block the values of `count` keys, a multiple of 32. */
INLINE void add(const space_t *space, const uint16_t *values, int64_t count, const int64_t width) {
    const int64_t row = width * TILE;
    const uint16_t *upper = space->weights, *lower = upper + TILE * KEYS;
    int64_t t = 0;
    for (; t + 3 <= width; t += 3) {
        float *to = space->sums + t * TILE, *below = to + TILE * row;
        _tile_loadd(0, to, row * 4);
        _tile_loadd(1, to + TILE, row * 4);
        _tile_loadd(2, to + 2 * TILE, row * 4);
        _tile_loadd(3, below, row * 4);
        _tile_loadd(4, below + TILE, row * 4);
        _tile_loadd(5, below + 2 * TILE, row * 4);
        for (int64_t n = 0; n < count; n += PAIRED) {
            const uint16_t *v = values + (n / PAIRED * width + t) * TILE_SIZE;
            _tile_loadd(6, upper + n, KEYS * 2);
            _tile_loadd(7, v, PAIRED * 2);
            _tile_dpbf16ps(0, 6, 7);
            _tile_loadd(7, v + TILE_SIZE, PAIRED * 2);
            _tile_dpbf16ps(1, 6, 7);
            _tile_loadd(7, v + 2 * TILE_SIZE, PAIRED * 2);
            _tile_dpbf16ps(2, 6, 7);
            _tile_loadd(6, lower + n, KEYS * 2);
            _tile_dpbf16ps(5, 6, 7);
            _tile_loadd(7, v + TILE_SIZE, PAIRED * 2);
            _tile_dpbf16ps(4, 6, 7);
            _tile_loadd(7, v, PAIRED * 2);
            _tile_dpbf16ps(3, 6, 7);
        }
        _tile_stored(0, to, row * 4);
        _tile_stored(1, to + TILE, row * 4);
        _tile_stored(2, to + 2 * TILE, row * 4);
        _tile_stored(3, below, row * 4);
        _tile_stored(4, below + TILE, row * 4);
        _tile_stored(5, below + 2 * TILE, row * 4);
    }
    for (; t < width; t++) {
        float *to = space->sums + t * TILE, *below = to + TILE * row;
        _tile_loadd(0, to, row * 4);
        _tile_loadd(1, below, row * 4);
        for (int64_t n = 0; n < count; n += PAIRED) {
            _tile_loadd(6, values + (n / PAIRED * width + t) * TILE_SIZE, PAIRED * 2);
            _tile_loadd(4, upper + n, KEYS * 2);
            _tile_loadd(5, lower + n, KEYS * 2);
            _tile_dpbf16ps(0, 4, 6);
            _tile_dpbf16ps(1, 5, 6);
        }
        _tile_stored(0, to, row * 4);
        _tile_stored(1, below, row * 4);
    }
}

/* One block, of at most QUERIES queries. */
INLINE void attend(const job_t *job, const space_t *space, const uint16_t *q, uint16_t *o, int64_t count,
                   int64_t stride, const int64_t depth, const int64_t width) {
    const float by = job->scale * (float)M_LOG2E;
    float top[QUERIES];
    for (int64_t m = 0; m < QUERIES; m++)
        for (int64_t t = 0; t < depth; t++) {
            const int64_t there = m < count ? job->dim - t * PAIRED : 0;
            _mm512_store_si512(space->queries + (m * depth + t) * PAIRED, row_of(q + m * stride + t * PAIRED, there));
        }
    memset(space->sums, 0, sizeof(float) * (size_t)(QUERIES * width * TILE));
    for (int64_t first = 0; first < job->keys; first += KEYS) {
        const int64_t there = job->keys - first < KEYS ? job->keys - first : KEYS;
        const int64_t padded = (there + PAIRED - 1) / PAIRED * PAIRED;
        score(space, space->keys + first * depth * PAIRED, padded, depth);
        weigh(space, by, top, first == 0, padded, there, width);
        add(space, space->values + first / PAIRED * width * TILE_SIZE, padded, width);
    }
    for (int64_t m = 0; m < count; m++) {
        const float *sums = space->sums + m * width * TILE;
        const __m512 share = _mm512_set1_ps(1 / sums[job->dim]);
        for (int64_t n = 0; n < job->dim; n += TILE) {
            const __m512 mean = _mm512_mul_ps(_mm512_load_ps(sums + n), share);
            _mm256_mask_storeu_epi16(o + m * stride + n, first_of(job->dim - n), (__m256i)_mm512_cvtneps_pbh(mean));
        }
    }
}

/* Take units until there are none left. */
INLINE void work_in(job_t *job, const space_t *space, const int64_t depth, const int64_t width) {
    const int64_t stride = job->heads * job->dim, blocks = (job->queries + QUERIES - 1) / QUERIES;
    for (int64_t packed = -1;;) {
        const int64_t unit = atomic_fetch_add_explicit(&job->taken, 1, memory_order_relaxed);
        const int64_t head = unit / job->groups, group = unit % job->groups;
        if (head >= job->batch * job->heads) return;
        const int64_t row = head / job->heads, column = head % job->heads * job->dim;
        if (packed != head) {
            pack_keys(job, job->k + row * job->keys * stride + column, stride, depth, space->keys);
            pack_values(job, job->v + row * job->keys * stride + column, stride, width, space->values);
            packed = head;
        }
        for (int64_t b = blocks * group / job->groups; b < blocks * (group + 1) / job->groups; b++) {
            const int64_t first = b * QUERIES, left = job->queries - first;
            const int64_t at = (row * job->queries + first) * stride + column;
            attend(job, space, job->q + at, job->o + at, left < QUERIES ? left : QUERIES, stride, depth, width);
        }
    }
}

TARGET static void work(void *given, int index, int count) {
    (void)index, (void)count;
    job_t *job = given;
    const int64_t depth = (job->dim + PAIRED - 1) / PAIRED, width = job->dim / TILE + 1;
    const int64_t padded = (job->keys + PAIRED - 1) / PAIRED * PAIRED;
    space_t space;
    struct {
        void **part;
        int64_t bytes; /* all multiples of 64, as tiles and vectors are */
    } parts[] = {
        {(void **)&space.keys, padded * depth * PAIRED * 2}, {(void **)&space.values, padded * width * TILE * 2},
        {(void **)&space.queries, QUERIES * depth * PAIRED * 2}, {(void **)&space.scores, QUERIES * KEYS * 4},
        {(void **)&space.weights, QUERIES * KEYS * 2}, {(void **)&space.sums, QUERIES * width * TILE * 4},
    };
    enum { COUNT = sizeof parts / sizeof *parts };
    int64_t bytes = 0;
    for (int i = 0; i < COUNT; i++) bytes += parts[i].bytes;
    char *memory = memory_of_thread((size_t)bytes);
    if (!memory) return; /* the others go on */
    char *at = memory;
    for (int i = 0; i < COUNT; at += parts[i++].bytes) *parts[i].part = at;
    configure_tiles();
    if (depth == 2 && width == 3)
        work_in(job, &space, 2, 3); /* Stable Diffusion's 40, with all loops over tiles unrolled */
    else
        work_in(job, &space, depth, width);
    _tile_release();
}

/* o = softmax(scale q k^T) v for each head. q and o are [batch, queries, heads * dim], k and v [batch, keys, heads *
 * dim], all bf16 and without gaps, and the scale is positive. Up to `threads` threads, the caller among them. 0, or -1
 * for want of memory. */
int sdrt_attention(const uint16_t *q, const uint16_t *k, const uint16_t *v, uint16_t *o, int64_t batch, int64_t queries,
                   int64_t keys, int64_t heads, int64_t dim, float scale, int threads) {
    const int64_t all = batch * heads, blocks = (queries + QUERIES - 1) / QUERIES;
    const int64_t worth = all * queries * keys * dim / WORTH_A_THREAD + 1;
    if (threads > worth) threads = (int)worth;
    int64_t groups = (UNITS_A_THREAD * threads + all - 1) / all;
    if (groups > blocks) groups = blocks;
    job_t job = {q, k, v, o, batch, queries, keys, heads, dim, scale, .groups = groups};
    run_on_threads(work, &job, threads);
    return atomic_load(&job.taken) ? 0 : -1;
}
