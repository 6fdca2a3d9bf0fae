/* What the kernels have in common: threads, and instructions of x86-64 processors with AVX-512. */

#ifndef SDRT_KERNELS_H
#define SDRT_KERNELS_H

#include <immintrin.h>
#include <stdatomic.h>
#include <stdint.h>

/* For the functions alone, so that what asks whether the processor has all this runs on any. */
#define TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,amx-tile,amx-bf16")))
#define INLINE TARGET static inline __attribute__((always_inline))

/* Run work(job, index) on up to `threads` threads, the caller among them, and wait for all. How many they are is put in
 * `count` once it is known; they may find a nought there before. */
void run_on_threads(void (*work)(void *job, int index), void *job, int threads, atomic_int *count);

/* 2^x: scalef takes the integer below x as it is, and the rest is a polynomial, within 7.5e-5 for bf16's 2e-3. */
INLINE __m512 exp2_of(__m512 x) {
    const __m512 rest = _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF);
    __m512 y = _mm512_set1_ps(0.078024432f);
    y = _mm512_fmadd_ps(y, rest, _mm512_set1_ps(0.226067305f));
    y = _mm512_fmadd_ps(y, rest, _mm512_set1_ps(0.695833445f));
    y = _mm512_fmadd_ps(y, rest, _mm512_set1_ps(0.999925256f));
    return _mm512_scalef_ps(y, x);
}

#endif
