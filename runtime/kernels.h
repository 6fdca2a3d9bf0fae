/* What the kernels have in common: threads, and instructions of x86-64 processors with AVX-512. */

#ifndef SDRT_KERNELS_H
#define SDRT_KERNELS_H

#include <immintrin.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>

/* For the functions alone, so that what asks whether the processor has all this runs on any. */
#define TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,amx-tile,amx-bf16")))
#define INLINE TARGET static inline __attribute__((always_inline))

/* Run work(job, index, count) on up to `threads` threads, the caller among them, and wait for all. They stay for the
 * next call, which waits for its turn. */
void run_on_threads(void (*work)(void *job, int index, int count), void *job, int threads);

/* Memory that begins at a cache line, for the calling thread alone and until it asks the next time; NULL if there is
 * none. */
void *memory_of_thread(size_t bytes);

/* Make all eight tiles of 16 rows of 64 bytes. */
INLINE void configure_tiles(void) {
    struct {
        uint8_t palette, start, reserved[14];
        uint16_t row_bytes[16];
        uint8_t rows[16];
    } shape = {.palette = 1};
    for (int i = 0; i < 8; i++) shape.row_bytes[i] = 64, shape.rows[i] = 16;
    _tile_loadconfig(&shape);
}

/* 16 numbers of bf16. */
INLINE __m512 load_bf16(const uint16_t *from) {
    const __m256i halves = _mm256_loadu_si256((const void *)from);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
}

/* 2^x: scalef takes the integer below x as it is, and the rest is a polynomial, within 7.5e-5 for bf16's 2e-3. */
INLINE __m512 exp2_of(__m512 x) {
    const __m512 rest = _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF);
    __m512 y = _mm512_set1_ps(0.078024432f);
    y = _mm512_fmadd_ps(y, rest, _mm512_set1_ps(0.226067305f));
    y = _mm512_fmadd_ps(y, rest, _mm512_set1_ps(0.695833445f));
    y = _mm512_fmadd_ps(y, rest, _mm512_set1_ps(0.999925256f));
    return _mm512_scalef_ps(y, x);
}

/* What the kernels do stands where each is defined. */
int sdrt_attention(const uint16_t *q, const uint16_t *k, const uint16_t *v, uint16_t *o, int64_t batch, int64_t queries,
                   int64_t keys, int64_t heads, int64_t dim, float scale, int threads);
int sdrt_group_norm(const uint16_t *x, const float *scale, const float *shift, uint16_t *y, int64_t rows,
                    int64_t pixels, int64_t channels, int64_t groups, float epsilon, int silu, int threads);
int sdrt_layer_norm(const uint16_t *x, const float *scale, const float *shift, uint16_t *y, int64_t rows,
                    int64_t channels, float epsilon, int threads);
int sdrt_product(const uint16_t *x, const uint8_t *weights, const float *bias, const uint16_t *residual, uint16_t *y,
                 int64_t batch, int64_t height, int64_t width, int64_t channels, int64_t outputs, int64_t side,
                 int64_t resize, int64_t biases, int gated, int threads);

#endif
