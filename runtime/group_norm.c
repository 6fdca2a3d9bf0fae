/* Group normalisation and SiLU in bf16 (Wu and He, "Group Normalization", 2018), on numbers whose channels lie side by
 * side, which is how convolutions give and take them: once over them for the sums, and once for the result. */

#include "kernels.h"

#include <math.h>
#include <sched.h>
#include <stdlib.h>
#include <string.h>

enum {
    LANES = 16,
    STRIP = 4 * LANES,       /* channels that are summed at once */
    PIXELS = 32,             /* that go through the first cache together; few enough to be summed in fp32 */
    WORTH_A_THREAD = 1 << 17, /* of the numbers */
};

typedef struct {
    const uint16_t *x; /* [rows, pixels, channels] */
    const float *scale, *shift;
    uint16_t *y;
    int64_t rows, pixels, channels, groups;
    float epsilon;
    int silu;
    float *sums; /* [threads][rows][2][channels]: of what is beyond the row's first pixel, and of its squares */
    atomic_int summed, failed;
} job_t;

/* Add up `count` pixels of `vectors` times 16 channels. */
INLINE void add_strip(const uint16_t *x, const uint16_t *first, int64_t count, int64_t channels, float *sums,
                      const int vectors) {
    __m512 from[STRIP / LANES], sum[STRIP / LANES], squares[STRIP / LANES];
    for (int i = 0; i < vectors; i++) {
        from[i] = load_bf16(first + i * LANES);
        sum[i] = squares[i] = _mm512_setzero_ps();
    }
    for (int64_t p = 0; p < count; p++, x += channels)
        for (int i = 0; i < vectors; i++) {
            const __m512 beyond = _mm512_sub_ps(load_bf16(x + i * LANES), from[i]);
            sum[i] = _mm512_add_ps(sum[i], beyond);
            squares[i] = _mm512_fmadd_ps(beyond, beyond, squares[i]);
        }
    for (int i = 0; i < vectors; i++) {
        float *to = sums + i * LANES;
        _mm512_storeu_ps(to, _mm512_add_ps(_mm512_loadu_ps(to), sum[i]));
        _mm512_storeu_ps(to + channels, _mm512_add_ps(_mm512_loadu_ps(to + channels), squares[i]));
    }
}

TARGET static void add(const job_t *job, int64_t row, int64_t begin, int64_t end, float *sums) {
    const int64_t channels = job->channels;
    const uint16_t *first = job->x + row * job->pixels * channels;
    for (int64_t p = begin; p < end; p += PIXELS) {
        const int64_t count = end - p < PIXELS ? end - p : PIXELS;
        const uint16_t *x = first + p * channels;
        int64_t c = 0;
        for (; c + STRIP <= channels; c += STRIP) add_strip(x + c, first + c, count, channels, sums + c, STRIP / LANES);
        for (; c < channels; c += LANES) add_strip(x + c, first + c, count, channels, sums + c, 1);
    }
}

/* What a row's numbers are multiplied by, and what is added then, from the sums of all threads. */
static void factors(const job_t *job, int threads, int64_t row, float *by, float *plus) {
    const int64_t channels = job->channels, size = channels / job->groups;
    const uint16_t *first = job->x + row * job->pixels * channels;
    const double pixels = (double)job->pixels;
    for (int64_t group = 0; group < channels; group += size) {
        double mean = 0, variance = 0;
        for (int pass = 0; pass < 2; pass++)
            for (int64_t c = group; c < group + size; c++) {
                const uint32_t bits = (uint32_t)first[c] << 16;
                float from;
                memcpy(&from, &bits, sizeof from);
                double sum = 0, squares = 0;
                for (int64_t t = 0; t < threads; t++) {
                    const float *sums = job->sums + (t * job->rows + row) * 2 * channels + c;
                    sum += sums[0], squares += sums[channels];
                }
                const double apart = from - mean;
                if (pass == 0)
                    mean += (from + sum / pixels) / (double)size;
                else
                    variance += (squares / pixels + apart * (2 * sum / pixels + apart)) / (double)size;
            }
        const double each = 1 / sqrt(variance + (double)job->epsilon);
        for (int64_t c = group; c < group + size; c++) {
            by[c] = (float)(job->scale[c] * each);
            plus[c] = (float)(job->shift[c] - mean * job->scale[c] * each);
        }
    }
}

INLINE void apply(const job_t *job, int64_t row, int64_t begin, int64_t end, const float *by, const float *plus,
                  const int silu) {
    const int64_t at = (row * job->pixels + begin) * job->channels;
    const uint16_t *x = job->x + at;
    uint16_t *y = job->y + at;
    for (int64_t p = begin; p < end; p++, x += job->channels, y += job->channels)
        for (int64_t c = 0; c < job->channels; c += LANES) {
            __m512 z = _mm512_fmadd_ps(load_bf16(x + c), _mm512_loadu_ps(by + c), _mm512_loadu_ps(plus + c));
            if (silu) { /* z / (1 + e^-z); the reciprocal is within 2^-14 */
                const __m512 falling = exp2_of(_mm512_mul_ps(z, _mm512_set1_ps(-(float)M_LOG2E)));
                z = _mm512_mul_ps(z, _mm512_rcp14_ps(_mm512_add_ps(falling, _mm512_set1_ps(1))));
            }
            _mm256_storeu_si256((void *)(y + c), (__m256i)_mm512_cvtneps_pbh(z));
        }
}

TARGET static void work(void *given, int index, int threads) {
    job_t *job = given;
    const int64_t begin = job->pixels * index / threads, end = job->pixels * (index + 1) / threads;
    float *factor = malloc(sizeof(float) * 2 * (size_t)job->channels);
    if (!factor) atomic_store(&job->failed, 1);
    for (int64_t row = 0; row < job->rows; row++)
        add(job, row, begin, end, job->sums + (index * job->rows + row) * 2 * job->channels);
    atomic_fetch_add(&job->summed, 1);
    while (atomic_load(&job->summed) < threads) sched_yield();
    for (int64_t row = 0; factor && row < job->rows; row++) {
        factors(job, threads, row, factor, factor + job->channels);
        if (job->silu)
            apply(job, row, begin, end, factor, factor + job->channels, 1);
        else
            apply(job, row, begin, end, factor, factor + job->channels, 0);
    }
    free(factor);
}

/* Normalise x [rows, pixels, channels] over each of the groups that a row's channels fall into, then scale and shift
 * [channels] it, and with `silu` let that follow. x and y are bf16, and channels a multiple of 16 and of the groups. 0,
 * or -1 for want of memory. */
int sdrt_group_norm(const uint16_t *x, const float *scale, const float *shift, uint16_t *y, int64_t rows,
                    int64_t pixels, int64_t channels, int64_t groups, float epsilon, int silu, int threads) {
    const int64_t worth = rows * pixels * channels / WORTH_A_THREAD + 1;
    if (threads > worth) threads = (int)worth;
    job_t job = {x, scale, shift, y, rows, pixels, channels, groups, epsilon, silu, NULL, 0, 0};
    job.sums = calloc((size_t)(threads * rows * 2 * channels), sizeof *job.sums);
    if (!job.sums) return -1;
    run_on_threads(work, &job, threads);
    free(job.sums);
    return atomic_load(&job.failed) ? -1 : 0;
}
