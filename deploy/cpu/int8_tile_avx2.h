/* A tile of int8_product.c, by AVX-VNNI or AVX2: output pixels by sixteen output channels at a time, two registers.
 *
 * AVX2 has one instruction that multiplies codes by weights, but it adds pairs in 16 bits, where they saturate. So the
 * even and the odd bytes of both are widened to 16 bits, and multiplied by the instruction that adds pairs in 32.
 */

#ifndef ERRATA_INT8_TILE_AVX2_H
#define ERRATA_INT8_TILE_AVX2_H

#include "int8_product.h"
#include <immintrin.h>
#include <string.h>

#define VECTORS 4

/* Of the sixteen registers, PIXELS x 2 hold sums. */
#if defined(__AVXVNNI__)
#define PIXELS 6
#define DOT_NAME "AVX-VNNI"
typedef __m256i Weights;
typedef __m256i Four;

static inline Weights load_weights(const int8_t *weight)
{
    return _mm256_load_si256((const __m256i *)weight);
}

static inline Four four_of(int32_t codes)
{
    return _mm256_set1_epi32(codes);
}

static inline __m256i dot(__m256i sums, Four codes, Weights weights)
{
    return _mm256_dpbusd_avx_epi32(sums, codes, weights);
}
#else
#define PIXELS 4
#define DOT_NAME "AVX2"
typedef struct {
    __m256i even, odd;
} Weights;
typedef Weights Four;

static inline Weights load_weights(const int8_t *weight)
{
    __m256i bytes = _mm256_load_si256((const __m256i *)weight);
    Weights of = { _mm256_srai_epi16(_mm256_slli_epi16(bytes, 8), 8), _mm256_srai_epi16(bytes, 8) };
    return of;
}

static inline Four four_of(int32_t codes)
{
    __m256i even = _mm256_set1_epi32(codes & 0x00ff00ff), odd = _mm256_set1_epi32((codes >> 8) & 0x00ff00ff);
    Four of = { even, odd };
    return of;
}

static inline __m256i dot(__m256i sums, Four codes, Weights weights)
{
    __m256i even = _mm256_madd_epi16(codes.even, weights.even), odd = _mm256_madd_epi16(codes.odd, weights.odd);
    return _mm256_add_epi32(sums, _mm256_add_epi32(even, odd));
}
#endif

#define OFFSET 0
#include "int8_tile_sixteen.h"

static inline void multiply_sixteen(Tile *tile, int64_t taps, int64_t channels, const int8_t *weight, int wide, int v)
{
    __m256i sums[PIXELS][2];
#pragma GCC unroll 6
    for (int p = 0; p < PIXELS; p++)
        sums[p][0] = sums[p][1] = _mm256_setzero_si256();
    const uint8_t **rows = tile->rows;
    for (int64_t tap = 0; tap < taps; tap++, rows += PIXELS) {
        const uint8_t *own[PIXELS];
        memcpy(own, rows, sizeof own);
        for (int64_t c = 0; c < channels; c += 4, weight += wide * 64) {
            Weights low = load_weights(weight + 64 * v), high = load_weights(weight + 64 * v + 32);
#pragma GCC unroll 6
            for (int p = 0; p < PIXELS; p++) {
                int32_t four;
                memcpy(&four, own[p] + c, sizeof four);
                Four codes = four_of(four);
                sums[p][0] = dot(sums[p][0], codes, low);
                sums[p][1] = dot(sums[p][1], codes, high);
            }
        }
    }
#pragma GCC unroll 6
    for (int p = 0; p < PIXELS; p++)
        memcpy(tile->sums[p][v], sums[p], sizeof sums[p]);
}

#endif
