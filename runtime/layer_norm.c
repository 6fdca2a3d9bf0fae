/* Layer normalisation in bf16 (Ba, Kiros and Hinton, "Layer Normalization", 2016): a row at a time, which stays in the
 * first cache. */

#include "kernels.h"

#include <math.h>

enum {
    LANES = 16,
    WORTH_A_THREAD = 1 << 16, /* of the numbers */
};

typedef struct {
    const uint16_t *x; /* [rows, channels] */
    const float *scale, *shift;
    uint16_t *y;
    int64_t rows, channels;
    float epsilon;
} job_t;

TARGET static void work(void *given, int index, int threads) {
    const job_t *job = given;
    const int64_t channels = job->channels, end = job->rows * (index + 1) / threads;
    const float share = 1 / (float)channels;
    for (int64_t row = job->rows * index / threads; row < end; row++) {
        const uint16_t *x = job->x + row * channels;
        uint16_t *y = job->y + row * channels;
        __m512 sum = _mm512_setzero_ps(), squares = _mm512_setzero_ps();
        for (int64_t c = 0; c < channels; c += LANES) sum = _mm512_add_ps(sum, load_bf16(x + c));
        const __m512 mean = _mm512_set1_ps(_mm512_reduce_add_ps(sum) * share);
        for (int64_t c = 0; c < channels; c += LANES) {
            const __m512 beyond = _mm512_sub_ps(load_bf16(x + c), mean);
            squares = _mm512_fmadd_ps(beyond, beyond, squares);
        }
        const __m512 by = _mm512_set1_ps(1 / sqrtf(_mm512_reduce_add_ps(squares) * share + job->epsilon));
        for (int64_t c = 0; c < channels; c += LANES) {
            const __m512 normal = _mm512_mul_ps(_mm512_sub_ps(load_bf16(x + c), mean), by);
            const __m512 scale = _mm512_loadu_ps(job->scale + c), shift = _mm512_loadu_ps(job->shift + c);
            const __m512 result = _mm512_fmadd_ps(normal, scale, shift);
            _mm256_storeu_si256((void *)(y + c), (__m256i)_mm512_cvtneps_pbh(result));
        }
    }
}

/* Normalise each of the rows of x [rows, channels], then scale and shift [channels] it. x and y are bf16, and channels
 * a multiple of 16. 0 always. */
int sdrt_layer_norm(const uint16_t *x, const float *scale, const float *shift, uint16_t *y, int64_t rows,
                    int64_t channels, float epsilon, int threads) {
    const int64_t worth = rows * channels / WORTH_A_THREAD + 1;
    job_t job = {x, scale, shift, y, rows, channels, epsilon};
    run_on_threads(work, &job, threads < worth ? threads : (int)worth);
    return 0;
}
