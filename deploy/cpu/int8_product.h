/* What the products on 8-bit codes share: their arguments, and how a sum becomes an output.
 *
 *   symbol     here              meaning
 *   q          codes             (batch, height, width, channels), uint8; a product of matrices has one line of pixels
 *   w          weight            int8, packed as told below; sums has each output's sum over w
 *   s_x, z     scale, zero_point of the codes
 *   s_w        scales            of each output channel
 *   y          out               s_x s_w (sum q w - z sum w) + bias + added; (batch, out_height, out_width, outputs),
 *                                float32, or rounded to bfloat16
 *   v, g                         y of two vectors of outputs that lie side by side, if `is_gated`: then `out` gets
 *                                the codes clamp(round(v g Phi(g) / s) + t, 0, 255) of half as many outputs, where
 *                                Phi is the normal distribution (GEGLU: Shazeer 2020, "GLU variants")
 *   s, t       out_scale, out_zero_point
 *   y'         before            a product whose y is added, and is not written; see int8_tiles.c for which
 *
 * The sums are exact. Weights are packed in panels of V vectors of sixteen outputs, the last one narrower: for
 * kernel row, kernel column and each four channels, V x 16 outputs x 4 channels. V is 4, or 2 for tiles.
 */

#ifndef ERRATA_INT8_PRODUCT_H
#define ERRATA_INT8_PRODUCT_H

#include "codes.h"
#include <omp.h>
#include <stdint.h>

typedef struct Product {
    const uint8_t *codes;
    const int8_t *weight; /* aligned to 64 bytes, as its panels are */
    const float *scales;
    const int32_t *sums;
    const float *bias;  /* or NULL */
    const float *added; /* or NULL; of the shape of out */
    void *out;
    int64_t batch, height, width, channels; /* channels: a multiple of four */
    int64_t out_height, out_width, outputs;
    int64_t kernel_height, kernel_width; /* at most MOST_TAPS together */
    int64_t top, left, down, right;      /* padding and stride */
    int64_t spread_y, spread_x;          /* dilation */
    float scale;
    int32_t zero_point;
    int32_t is_bfloat16; /* of out */
    int32_t is_gated;
    float out_scale;
    int32_t out_zero_point;
    int32_t is_tiled; /* whether the weight is packed for tiles, and AMX is to multiply */
    const struct Product *before; /* or NULL */
} Product;

#if HAS_AVX512
/* What turns the sums of sixteen outputs into y. */
typedef struct {
    __mmask16 mask; /* of the outputs that there are */
    __m512i shift;  /* z sum w */
    __m512 gain;    /* s_x s_w */
    __m512 bias;
} Outputs;

static inline Outputs outputs_from(const Product *product, int64_t output)
{
    Outputs of;
    of.mask = first_lanes(product->outputs - output);
    of.shift = _mm512_mullo_epi32(_mm512_maskz_loadu_epi32(of.mask, product->sums + output),
                                  _mm512_set1_epi32(product->zero_point));
    of.gain = _mm512_mul_ps(_mm512_maskz_loadu_ps(of.mask, product->scales + output),
                            _mm512_set1_ps(product->scale));
    of.bias = product->bias == NULL ? _mm512_setzero_ps() : _mm512_maskz_loadu_ps(of.mask, product->bias + output);
    return of;
}

/* The upper halves, rounded to nearest even; for finite numbers. */
static inline __m256i bfloat16_of(__m512 y)
{
    __m512i bits = _mm512_castps_si512(y);
    __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    bits = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(bits, 16));
}

static inline __m512 output_of(Outputs of, __m512i sums)
{
    return _mm512_fmadd_ps(_mm512_cvtepi32_ps(_mm512_sub_epi32(sums, of.shift)), of.gain, of.bias);
}

/* 1 - Phi(|x|), to 1e-6: Abramowitz and Stegun 1964, 7.1.26. */
static inline __m512 tail_of(__m512 x)
{
    __m512 z = _mm512_mul_ps(_mm512_abs_ps(x), _mm512_set1_ps(0.70710678f));
    __m512 t = _mm512_div_ps(_mm512_set1_ps(1), _mm512_fmadd_ps(z, _mm512_set1_ps(0.3275911f), _mm512_set1_ps(1)));
    __m512 sum = _mm512_set1_ps(1.061405429f);
    sum = _mm512_fmadd_ps(sum, t, _mm512_set1_ps(-1.453152027f));
    sum = _mm512_fmadd_ps(sum, t, _mm512_set1_ps(1.421413741f));
    sum = _mm512_fmadd_ps(sum, t, _mm512_set1_ps(-0.284496736f));
    sum = _mm512_fmadd_ps(sum, t, _mm512_set1_ps(0.254829592f));
    __m512 u = _mm512_mul_ps(_mm512_mul_ps(z, z), _mm512_set1_ps(-LOG2_E));
    return _mm512_mul_ps(_mm512_set1_ps(0.5f), _mm512_mul_ps(_mm512_mul_ps(sum, t), powers_of_two(u)));
}

/* The codes of one pixel, for sixteen gated outputs whose first is at `at` in out. */
static inline void write_gated(const Product *product, Outputs of, __m512i sums, Outputs of_gate, __m512i gate_sums,
                               int64_t at)
{
    __m512 gate = output_of(of_gate, gate_sums), tail = tail_of(gate);
    __mmask16 is_positive = _mm512_cmp_ps_mask(gate, _mm512_setzero_ps(), _CMP_GT_OQ);
    __m512 share = _mm512_mask_sub_ps(tail, is_positive, _mm512_set1_ps(1), tail);
    __m512 y = _mm512_mul_ps(output_of(of, sums), _mm512_mul_ps(gate, share));
    store_codes((uint8_t *)product->out + at, y, _mm512_set1_ps(1 / product->out_scale),
                _mm512_set1_epi32(product->out_zero_point));
}

/* y of one pixel, for the sixteen outputs whose first is at `at` in out; `before` has sixteen numbers, or is NULL. */
static inline void write_outputs(const Product *product, Outputs of, __m512i sums, const float *before, int64_t at)
{
    __m512 y = output_of(of, sums);
    if (before != NULL)
        y = _mm512_add_ps(y, _mm512_load_ps(before));
    if (product->added != NULL)
        y = _mm512_add_ps(y, _mm512_maskz_loadu_ps(of.mask, product->added + at));
    if (product->is_bfloat16)
        _mm256_mask_storeu_epi16((uint16_t *)product->out + at, of.mask, bfloat16_of(y));
    else
        _mm512_mask_storeu_ps((float *)product->out + at, of.mask, y);
}
#endif

/* How many panels a block of pixels is multiplied by before the next one: their weights stay in the second cache, in
 * `cached` bytes of it. One, where there are few blocks, so that every thread has work. */
static inline int64_t panels_at_once(int64_t panels, int64_t blocks, int64_t panel_bytes, int64_t cached)
{
    int64_t fitting = cached / panel_bytes;
    if (fitting < 1 || blocks < 4 * (int64_t)omp_get_max_threads())
        return 1;
    return fitting < panels ? fitting : panels;
}

#endif
