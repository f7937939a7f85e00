/* Group normalization, SiLU and quantization of a channels-last tensor, in two passes over it.
 *
 *   symbol     here              meaning
 *   x          x                 (batch, pixels, channels), float32
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

#define BLOCK 64 /* pixels */

typedef struct {
    const float *scales;        /* s of each part */
    const int32_t *zero_points; /* z of each part */
    uint8_t *const *codes;      /* (batch, pixels, width of the part) */
} Quantizers;

/* sum and sum of squares about `origin`, by channel, over `count` pixels. */
static void block_sums(const float *restrict x, const float *restrict origin, int64_t count, int64_t channels,
                       float *restrict sum, float *restrict square)
{
    memset(sum, 0, channels * sizeof(float));
    memset(square, 0, channels * sizeof(float));
    for (int64_t pixel = 0; pixel < count; pixel++, x += channels)
        for (int64_t c = 0; c < channels; c++) {
            float d = x[c] - origin[c];
            sum[c] += d;
            square[c] += d * d;
        }
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

#ifdef __AVX512F__

/* y / (1 + exp(-y)), as below; the reciprocal is the 14-bit one after a step of Newton's. */
static inline __m512 silu_of(__m512 y)
{
    __m512 u = _mm512_mul_ps(y, _mm512_set1_ps(-LOG2_E));
    u = _mm512_max_ps(_mm512_set1_ps(-126.0f), _mm512_min_ps(_mm512_set1_ps(126.0f), u)); /* NaN stays */
    __m512 below = _mm512_add_ps(powers_of_two(u), _mm512_set1_ps(1.0f));
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

/* Returns 0, or 1 where memory is missing. `raw` may be NULL. */
int errata_norm_quantize(const float *x, int64_t batch, int64_t pixels, int64_t channels, int64_t groups,
                         const float *gamma, const float *beta, float eps, int silu, int64_t parts,
                         const int64_t *starts, const int64_t *widths, const Quantizers *normed,
                         const Quantizers *raw)
{
    int64_t blocks = (pixels + BLOCK - 1) / BLOCK;
    float *sums = malloc((size_t)(batch * (2 * blocks + 2) * channels) * sizeof(float));
    if (sums == NULL)
        return 1;
    float *affine = sums + batch * 2 * blocks * channels;

#pragma omp parallel for collapse(2) schedule(static)
    for (int64_t b = 0; b < batch; b++)
        for (int64_t block = 0; block < blocks; block++) {
            int64_t first = block * BLOCK, count = pixels - first < BLOCK ? pixels - first : BLOCK;
            const float *sample = x + b * pixels * channels;
            float *own = sums + (b * blocks + block) * 2 * channels;
            block_sums(sample + first * channels, sample, count, channels, own, own + channels);
        }

#pragma omp parallel for schedule(static)
    for (int64_t b = 0; b < batch; b++)
        affine_of(sums + b * blocks * 2 * channels, blocks, x + b * pixels * channels, pixels, channels, groups,
                  gamma, beta, eps, affine + b * 2 * channels, affine + (b * 2 + 1) * channels);

#pragma omp parallel for collapse(2) schedule(static)
    for (int64_t b = 0; b < batch; b++)
        for (int64_t block = 0; block < blocks; block++) {
            int64_t first = b * pixels + block * BLOCK, end = (b + 1) * pixels;
            int64_t last = first + BLOCK < end ? first + BLOCK : end;
            const float *gain = affine + b * 2 * channels, *shift = gain + channels;
            for (int64_t pixel = first; pixel < last; pixel++) {
                const float *row = x + pixel * channels;
                for (int64_t part = 0; part < parts; part++) {
                    int64_t start = starts[part], width = widths[part];
                    quantize_row(row + start, gain + start, shift + start, width, silu, 1 / normed->scales[part],
                                 (float)normed->zero_points[part], normed->codes[part] + pixel * width);
                    if (raw != NULL)
                        quantize_raw_row(row + start, width, 1 / raw->scales[part],
                                         (float)raw->zero_points[part], raw->codes[part] + pixel * width);
                }
            }
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
int errata_layer_norm_quantize(const float *x, int64_t rows, int64_t width, const float *gamma, const float *beta,
                               float eps, int64_t count, const Quantizers *normed)
{
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
            for (int64_t q = 0; q < count; q++)
                quantize_row(own, gain, shift, width, 0, 1 / normed->scales[q], (float)normed->zero_points[q],
                             normed->codes[q] + row * width);
        }
        free(gain);
    }
    return failed;
}
