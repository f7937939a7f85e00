/* Runs native operations, one or a whole program of them; see operations.h. */

#include "operations.h"
#include "attention.h"
#include "codes.h"
#include "norm_quantize.h"
#include <string.h>

#define BLOCK 4096 /* numbers that one thread quantizes at a time */

/* In int8_product.c and attention.c. */
int errata_int8_product(const void *product);
int errata_attention(const Attention *of);

static void quantize_row(const float *restrict x, int64_t count, float inverse, int32_t zero_point,
                         uint8_t *restrict codes)
{
    int64_t c = 0;
#if HAS_AVX512
    for (; c + LANES <= count; c += LANES)
        store_codes(codes + c, _mm512_loadu_ps(x + c), _mm512_set1_ps(inverse), _mm512_set1_epi32(zero_point));
#endif
    for (; c < count; c++)
        codes[c] = code(x[c], inverse, (float)zero_point);
}

static int quantize(const Quantize *of)
{
    float inverse = 1 / of->scale;
    int is_dense = of->channel_step == 1 && of->padded == of->channels && of->pixel_step == of->channels &&
                   of->sample_step == of->pixels * of->channels;
    if (is_dense) {
        int64_t count = of->batch * of->pixels * of->channels;
#pragma omp parallel for schedule(static)
        for (int64_t at = 0; at < count; at += BLOCK)
            quantize_row(of->x + at, count - at < BLOCK ? count - at : BLOCK, inverse, of->zero_point, of->codes + at);
        return 0;
    }
#pragma omp parallel for collapse(2) schedule(static)
    for (int64_t b = 0; b < of->batch; b++)
        for (int64_t pixel = 0; pixel < of->pixels; pixel++) {
            const float *x = of->x + b * of->sample_step + pixel * of->pixel_step;
            uint8_t *codes = of->codes + (b * of->pixels + pixel) * of->padded;
            for (int64_t c = 0; c < of->channels; c++)
                codes[c] = code(x[c * of->channel_step], inverse, (float)of->zero_point);
            memset(codes + of->channels, of->zero_point, (size_t)(of->padded - of->channels));
        }
    return 0;
}

static int upsample(const Upsample *of)
{
    int64_t line = of->width * of->channels;
#pragma omp parallel for schedule(static)
    for (int64_t y = 0; y < of->batch * of->height; y++) {
        const uint8_t *from = of->codes + y * line;
        uint8_t *to = of->out + 4 * y * line;
        for (int64_t x = 0; x < of->width; x++) {
            memcpy(to + 2 * x * of->channels, from + x * of->channels, (size_t)of->channels);
            memcpy(to + (2 * x + 1) * of->channels, from + x * of->channels, (size_t)of->channels);
        }
        memcpy(to + 2 * line, to, (size_t)(2 * line));
    }
    return 0;
}

static int copy(const Copy *of)
{
#pragma omp parallel for schedule(static)
    for (int64_t row = 0; row < of->rows; row++)
        memcpy(of->to + row * of->to_step, of->from + row * of->from_step, (size_t)of->bytes);
    return 0;
}

static int adjust(const Adjust *of)
{
    const float *gain = of->gain;
#pragma omp parallel for schedule(static)
    for (int64_t row = 0; row < of->rows; row++) {
        float *restrict y = of->y + row * of->channels;
        const float *shift = of->period == 0 ? of->shift : of->shift + row / of->period * of->channels;
        for (int64_t c = 0; c < of->channels; c++)
            y[c] = (gain == NULL ? y[c] : y[c] * gain[c]) + shift[c];
        for (int64_t c = 0; of->added != NULL && c < of->channels; c++)
            y[c] += of->added[row * of->channels + c];
    }
    return 0;
}

/* Returns 0, or 1 where memory is missing. */
int errata_call(int64_t operation, const void *arguments)
{
    switch (operation) {
    case PRODUCT: return errata_int8_product(arguments);
    case NORM: return errata_norm_quantize(arguments);
    case LAYER_NORM: return errata_layer_norm_quantize(arguments);
    case ATTENTION: return errata_attention(arguments);
    case QUANTIZE: return quantize(arguments);
    case UPSAMPLE: return upsample(arguments);
    case COPY: return copy(arguments);
    case ADJUST: return adjust(arguments);
    default: return 1;
    }
}

/* Returns 0, or 1 where memory is missing: then no output of the program is of use. */
int errata_run(const Instruction *program, int64_t count, const Patch *patches, int64_t patch_count)
{
    for (int64_t p = 0; p < patch_count; p++)
        memcpy(patches[p].address, &patches[p].value, (size_t)patches[p].bytes);
    for (int64_t i = 0; i < count; i++)
        if (errata_call(program[i].operation, program[i].arguments))
            return 1;
    return 0;
}
