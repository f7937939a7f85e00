/* 8-bit codes of numbers, and powers of two: for one number, and for sixteen where the CPU has AVX-512. */

#ifndef ERRATA_CODES_H
#define ERRATA_CODES_H

#include <math.h>
#include <stdint.h>

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__)
#define HAS_AVX512 1
#include <immintrin.h>
#else
#define HAS_AVX512 0
#endif

#define LANES 16
#define DOWN (_MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC)
#define LOG2_E 1.44269504f
/* 2^f for |f| <= 1/2: the polynomial is that of Cephes' exp2f, relative error below 2e-7. */
#define EXP2_6 1.535336188319500e-4f
#define EXP2_5 1.339887440266574e-3f
#define EXP2_4 9.618437357674640e-3f
#define EXP2_3 5.550332471162809e-2f
#define EXP2_2 2.402264791363012e-1f
#define EXP2_1 6.931472028550421e-1f

/* 2^u, as 2^n 2^f with |f| <= 1/2. */
static inline float power_of_two(float u)
{
    u = u < -126.0f ? -126.0f : u > 126.0f ? 126.0f : u;
    union { float value; int32_t bits; } shifted = { u + 12582912.0f }; /* 1.5 * 2^23: n in the low bits */
    float f = u - (shifted.value - 12582912.0f);
    float p = EXP2_6;
    p = p * f + EXP2_5;
    p = p * f + EXP2_4;
    p = p * f + EXP2_3;
    p = p * f + EXP2_2;
    p = p * f + EXP2_1;
    p = p * f + 1.0f;
    union { float value; int32_t bits; } power = { p };
    power.bits += (int32_t)((uint32_t)shifted.bits << 23);
    return power.value;
}

static inline uint8_t code(float y, float inverse_scale, float zero_point)
{
    float q = rintf(y * inverse_scale) + zero_point;
    q = q > 0.0f ? q : 0.0f; /* NaN too becomes 0 */
    q = q < 255.0f ? q : 255.0f;
    return (uint8_t)(int32_t)q;
}

#if HAS_AVX512
/* 2^u, likewise; u within the range of exponents, or NaN, which stays. */
static inline __m512 powers_of_two(__m512 u)
{
    __m512 n = _mm512_roundscale_ps(u, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    __m512 f = _mm512_sub_ps(u, n), p = _mm512_set1_ps(EXP2_6);
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(EXP2_5));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(EXP2_4));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(EXP2_3));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(EXP2_2));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(EXP2_1));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.0f));
    return _mm512_scalef_ps(p, n);
}

/* The lanes of so many numbers, at most all. */
static inline __mmask16 first_lanes(int64_t count)
{
    return count >= LANES ? 0xffff : (__mmask16)((1u << count) - 1);
}

/* The codes of those lanes; `codes` has room for these. */
static inline void store_some_codes(uint8_t *codes, __mmask16 lanes, __m512 y, __m512 inverse_scale,
                                    __m512i zero_point)
{
    __m512 q = _mm512_min_ps(_mm512_set1_ps(1024.0f), _mm512_mul_ps(y, inverse_scale)); /* NaN stays */
    __m512i whole = _mm512_add_epi32(_mm512_cvtps_epi32(q), zero_point); /* NaN becomes the least integer */
    whole = _mm512_max_epi32(whole, _mm512_setzero_si512());
    _mm_mask_storeu_epi8(codes, lanes, _mm512_cvtusepi32_epi8(whole));
}

/* Sixteen codes. */
static inline void store_codes(uint8_t *codes, __m512 y, __m512 inverse_scale, __m512i zero_point)
{
    store_some_codes(codes, 0xffff, y, inverse_scale, zero_point);
}
#endif

#endif
