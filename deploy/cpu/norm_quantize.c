/* Group normalization, SiLU and quantization of a channels-last tensor, in two passes over it.
 *
 *   symbol     here              meaning
 *   x          sources           one tensor, or two whose channels follow each other: (batch, pixels, channels of the
 *                                source), float32
 *   mu, var    mean, variance    over the pixels and channels of a group, of one sample
 *   y          y                 gamma (x - mu) / sqrt(var + eps) + beta, then y / (1 + exp(-y)) if `silu`
 *   q          codes             clamp(round(y / s) + z, 0, 255), round to nearest even
 *
 * Parts are ranges of channels, each with a scale s, a zero point z and a dense output of its own; they may
 * overlap, where several layers read the same values. The codes of x itself, which a shortcut reads, are written
 * in the same pass where they are asked for.
 *
 * Sums are taken over blocks of fixed size, about the first pixel of a sample, in float32 within a block and
 * in float64 across blocks: neither the number of threads nor a large mean changes a result noticeably.
 */

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "codes.h"
#include "norm_quantize.h"

#define BLOCK 64    /* pixels */
#define TOGETHER 64 /* channels that are summed at once */

/* sum and sum of squares about `origin` of `wide` channels, over `count` pixels; inlined for a fixed number, they stay
 * in registers. */
static inline __attribute__((always_inline)) void sums_of(const float *restrict x, const float *restrict origin,
                                                          int64_t count, int64_t channels, const int64_t wide,
                                                          float *restrict sum, float *restrict square)
{
    float own_sum[TOGETHER] = { 0 }, own_square[TOGETHER] = { 0 };
    for (int64_t pixel = 0; pixel < count; pixel++, x += channels)
        for (int64_t c = 0; c < wide; c++) {
            float d = x[c] - origin[c];
            own_sum[c] += d;
            own_square[c] += d * d;
        }
    memcpy(sum, own_sum, (size_t)wide * sizeof(float));
    memcpy(square, own_square, (size_t)wide * sizeof(float));
}

/* The same of all channels. */
static void block_sums(const float *restrict x, const float *restrict origin, int64_t count, int64_t channels,
                       float *restrict sum, float *restrict square)
{
    int64_t c = 0;
    for (; c + TOGETHER <= channels; c += TOGETHER)
        sums_of(x + c, origin + c, count, channels, TOGETHER, sum + c, square + c);
    if (c < channels)
        sums_of(x + c, origin + c, count, channels, channels - c, sum + c, square + c);
}

/* y = gain x + shift, by channel, from the sums of all blocks of a sample. */
static void affine_of(const float *sums, int64_t blocks, const float *origin, int64_t pixels, int64_t channels,
                      int64_t groups, const float *gamma, const float *beta, float eps, float *gain, float *shift)
{
    int64_t width = channels / groups;
    for (int64_t group = 0; group < groups; group++) {
        double mean = 0, scatter = 0;
        for (int64_t c = group * width; c < (group + 1) * width; c++) {
            double sum = 0;
            for (int64_t block = 0; block < blocks; block++)
                sum += sums[2 * block * channels + c];
            mean += (origin[c] + sum / pixels) / width;
        }
        for (int64_t c = group * width; c < (group + 1) * width; c++) {
            double sum = 0, square = 0;
            for (int64_t block = 0; block < blocks; block++) {
                sum += sums[2 * block * channels + c];
                square += sums[(2 * block + 1) * channels + c];
            }
            double off = origin[c] + sum / pixels - mean;
            scatter += square - sum * sum / pixels + pixels * off * off;
        }
        double inverse = 1 / sqrt(scatter / ((double)width * pixels) + eps);
        for (int64_t c = group * width; c < (group + 1) * width; c++) {
            gain[c] = (float)(gamma[c] * inverse);
            shift[c] = (float)(beta[c] - gamma[c] * inverse * mean);
        }
    }
}

#if HAS_AVX512

/* y / (1 + exp(-y)), with a relative error below 4e-6. 2^f, for f from 0 to 1, is a polynomial with an error of 3e-6;
 * the reciprocal is the 14-bit one after a step of Newton's. */
static inline __m512 silu_of(__m512 y)
{
    __m512 u = _mm512_min_ps(_mm512_set1_ps(126.0f), _mm512_mul_ps(y, _mm512_set1_ps(-LOG2_E))); /* NaN stays */
    __m512 f = _mm512_reduce_ps(u, DOWN), p = _mm512_set1_ps(1.353417e-2f);
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(5.201146e-2f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(2.4144276e-1f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(6.9300383e-1f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.0000026f));
    __m512 below = _mm512_add_ps(_mm512_scalef_ps(p, u), _mm512_set1_ps(1.0f)); /* scaled by 2^floor(u) */
    __m512 inverse = _mm512_rcp14_ps(below);
    inverse = _mm512_mul_ps(inverse, _mm512_fnmadd_ps(below, inverse, _mm512_set1_ps(2.0f)));
    return _mm512_mul_ps(y, inverse);
}

/* The codes of as many channels as fill vectors; returns how many. */
static int64_t quantize_vectors(const float *restrict x, const float *restrict gain, const float *restrict shift,
                                int64_t width, int silu, float inverse_scale, float zero_point,
                                uint8_t *restrict codes)
{
    __m512 inverse = _mm512_set1_ps(inverse_scale);
    __m512i zero = _mm512_set1_epi32((int32_t)zero_point);
    int64_t c = 0;
    if (silu)
        for (; c + LANES <= width; c += LANES) {
            __m512 y = _mm512_fmadd_ps(_mm512_loadu_ps(gain + c), _mm512_loadu_ps(x + c), _mm512_loadu_ps(shift + c));
            store_codes(codes + c, silu_of(y), inverse, zero);
        }
    else
        for (; c + LANES <= width; c += LANES) {
            __m512 y = _mm512_fmadd_ps(_mm512_loadu_ps(gain + c), _mm512_loadu_ps(x + c), _mm512_loadu_ps(shift + c));
            store_codes(codes + c, y, inverse, zero);
        }
    return c;
}
#else
static int64_t quantize_vectors(const float *restrict x, const float *restrict gain, const float *restrict shift,
                                int64_t width, int silu, float inverse_scale, float zero_point,
                                uint8_t *restrict codes)
{
    (void)x, (void)gain, (void)shift, (void)width, (void)silu, (void)inverse_scale, (void)zero_point, (void)codes;
    return 0; /* the compiler makes vectors of what is left */
}
#endif

static void quantize_row(const float *restrict x, const float *restrict gain, const float *restrict shift,
                         int64_t width, int silu, float inverse_scale, float zero_point, uint8_t *restrict codes)
{
    int64_t first = quantize_vectors(x, gain, shift, width, silu, inverse_scale, zero_point, codes);
    if (silu)
        for (int64_t c = first; c < width; c++) {
            float y = gain[c] * x[c] + shift[c];
            codes[c] = code(y / (1.0f + power_of_two(-LOG2_E * y)), inverse_scale, zero_point);
        }
    else
        for (int64_t c = first; c < width; c++)
            codes[c] = code(gain[c] * x[c] + shift[c], inverse_scale, zero_point);
}

static void quantize_raw_row(const float *restrict x, int64_t width, float inverse_scale, float zero_point,
                             uint8_t *restrict codes)
{
    for (int64_t c = 0; c < width; c++)
        codes[c] = code(x[c], inverse_scale, zero_point);
}

/* The channels of a pixel that one source has, as the codes of every part that they belong to. */
static void quantize_source(const NormQuantize *of, const float *row, int64_t first, int64_t channels,
                            const float *gain, const float *shift, int64_t pixel)
{
    for (int64_t part = 0; part < of->parts; part++) {
        int64_t start = of->starts[part], width = of->widths[part];
        int64_t from = start > first ? start : first;
        int64_t end = start + width < first + channels ? start + width : first + channels;
        if (from >= end)
            continue;
        int64_t at = pixel * width + from - start;
        const Quantizers *normed = of->normed, *raw = of->raw;
        quantize_row(row + from - first, gain + from, shift + from, end - from, of->silu, 1 / normed->scales[part],
                     (float)normed->zero_points[part], normed->codes[part] + at);
        if (raw != NULL)
            quantize_raw_row(row + from - first, end - from, 1 / raw->scales[part], (float)raw->zero_points[part],
                             raw->codes[part] + at);
    }
}

/* Returns 0, or 1 where memory is missing. */
int errata_norm_quantize(const NormQuantize *of)
{
    int64_t batch = of->batch, pixels = of->pixels, channels = of->channels[0] + of->channels[1];
    int64_t blocks = (pixels + BLOCK - 1) / BLOCK, sources = of->channels[1] > 0 ? 2 : 1;
    float *sums = malloc((size_t)(batch * (2 * blocks + 3) * channels) * sizeof(float));
    if (sums == NULL)
        return 1;
    float *affine = sums + batch * 2 * blocks * channels, *origins = affine + batch * 2 * channels;
    for (int64_t b = 0; b < batch; b++)
        for (int64_t s = 0, first = 0; s < sources; first += of->channels[s++])
            memcpy(origins + b * channels + first, of->sources[s] + b * pixels * of->channels[s],
                   (size_t)of->channels[s] * sizeof(float));

#pragma omp parallel for collapse(2) schedule(static)
    for (int64_t b = 0; b < batch; b++)
        for (int64_t block = 0; block < blocks; block++) {
            int64_t pixel = block * BLOCK, count = pixels - pixel < BLOCK ? pixels - pixel : BLOCK;
            float *own = sums + (b * blocks + block) * 2 * channels;
            for (int64_t s = 0, first = 0; s < sources; first += of->channels[s++])
                block_sums(of->sources[s] + (b * pixels + pixel) * of->channels[s], origins + b * channels + first,
                           count, of->channels[s], own + first, own + channels + first);
        }

#pragma omp parallel for schedule(static)
    for (int64_t b = 0; b < batch; b++)
        affine_of(sums + b * blocks * 2 * channels, blocks, origins + b * channels, pixels, channels, of->groups,
                  of->gamma, of->beta, of->eps, affine + b * 2 * channels, affine + (b * 2 + 1) * channels);

#pragma omp parallel for collapse(2) schedule(static)
    for (int64_t b = 0; b < batch; b++)
        for (int64_t block = 0; block < blocks; block++) {
            int64_t first = b * pixels + block * BLOCK, end = (b + 1) * pixels;
            int64_t last = first + BLOCK < end ? first + BLOCK : end;
            const float *gain = affine + b * 2 * channels, *shift = gain + channels;
            for (int64_t pixel = first; pixel < last; pixel++)
                for (int64_t s = 0, channel = 0; s < sources; channel += of->channels[s++])
                    quantize_source(of, of->sources[s] + pixel * of->channels[s], channel, of->channels[s], gain,
                                    shift, pixel);
        }
    free(sums);
    return 0;
}

/* Mean and 1 / sqrt(variance + eps) of a row. */
static void moments_of(const float *restrict x, int64_t width, float eps, float *mean, float *inverse)
{
    float sum = 0, scatter = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t c = 0; c < width; c++)
        sum += x[c];
    float middle = sum / (float)width;
#pragma omp simd reduction(+ : scatter)
    for (int64_t c = 0; c < width; c++)
        scatter += (x[c] - middle) * (x[c] - middle);
    *mean = middle;
    *inverse = 1 / sqrtf(scatter / (float)width + eps);
}

/* Layer normalization: of every row by itself. The codes of each quantizer, one after the other: (rows, width).
 * Returns 0, or 1 where memory is missing. */
int errata_layer_norm_quantize(const LayerNormQuantize *of)
{
    const float *x = of->x, *gamma = of->gamma, *beta = of->beta;
    const Quantizers *normed = of->normed;
    int64_t rows = of->rows, width = of->width;
    float eps = of->eps;
    int failed = 0;
#pragma omp parallel reduction(| : failed)
    {
        float *gain = malloc((size_t)(2 * width) * sizeof(float)), *shift = gain + width;
        failed = gain == NULL;
#pragma omp for schedule(static)
        for (int64_t row = 0; row < rows; row++) {
            if (failed)
                continue;
            const float *own = x + row * width;
            float mean, inverse;
            moments_of(own, width, eps, &mean, &inverse);
            for (int64_t c = 0; c < width; c++) {
                gain[c] = gamma[c] * inverse;
                shift[c] = beta[c] - mean * gain[c];
            }
            for (int64_t q = 0; q < of->count; q++)
                quantize_row(own, gain, shift, width, 0, 1 / normed->scales[q], (float)normed->zero_points[q],
                             normed->codes[q] + row * width);
        }
        free(gain);
    }
    return failed;
}
