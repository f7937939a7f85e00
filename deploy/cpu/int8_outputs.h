/* How sums become outputs, as in int8_product.h, in plain C that compilers turn into vectors of any width. */

#ifndef ERRATA_INT8_OUTPUTS_H
#define ERRATA_INT8_OUTPUTS_H

#include "int8_product.h"
#include <string.h>

/* What turns the sums of sixteen outputs into y. */
typedef struct {
    int64_t count; /* of the outputs that there are, at most sixteen */
    int32_t shift[LANES]; /* z sum w */
    float gain[LANES];    /* s_x s_w */
    float bias[LANES];
} Sixteen;

/* `offset` is what the sums take codes to be lower by. */
static inline Sixteen sixteen_from(const Product *product, int64_t output, int32_t offset)
{
    Sixteen of = { .count = product->outputs - output < LANES ? product->outputs - output : LANES };
    for (int64_t o = 0; o < of.count; o++) {
        of.shift[o] = product->sums[output + o] * (product->zero_point - offset);
        of.gain[o] = product->scales[output + o] * product->scale;
        of.bias[o] = product->bias == NULL ? 0 : product->bias[output + o];
    }
    return of;
}

/* The upper half, rounded to nearest even; for finite numbers. */
static inline uint16_t upper_half(float y)
{
    uint32_t bits;
    memcpy(&bits, &y, sizeof bits);
    return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

static inline float gated(float value, float gate)
{
    float z = fabsf(gate) * 0.70710678f, t = 1 / (z * 0.3275911f + 1), sum = 1.061405429f;
    sum = sum * t - 1.453152027f;
    sum = sum * t + 1.421413741f;
    sum = sum * t - 0.284496736f;
    sum = sum * t + 0.254829592f;
    float tail = 0.5f * (sum * t * power_of_two(z * z * -LOG2_E)); /* 1 - Phi(|x|), as in int8_product.h */
    return value * (gate * (gate > 0 ? 1 - tail : tail));
}

/* The codes of one pixel, for sixteen gated outputs whose first is at `at` in out. */
static inline void write_gated_sixteen(const Product *product, const Sixteen *of, const int32_t *sums,
                                       const Sixteen *of_gate, const int32_t *gate_sums, int64_t at)
{
    float inverse = 1 / product->out_scale, zero_point = (float)product->out_zero_point;
    for (int o = 0; o < LANES; o++) {
        float value = (float)(sums[o] - of->shift[o]) * of->gain[o] + of->bias[o];
        float gate = (float)(gate_sums[o] - of_gate->shift[o]) * of_gate->gain[o] + of_gate->bias[o];
        ((uint8_t *)product->out)[at + o] = code(gated(value, gate), inverse, zero_point);
    }
}

/* y of one pixel, for the sixteen outputs whose first is at `at` in out. */
static inline void write_sixteen(const Product *product, const Sixteen *of, const int32_t *sums, int64_t at)
{
    float y[LANES];
    for (int o = 0; o < LANES; o++)
        y[o] = (float)(sums[o] - of->shift[o]) * of->gain[o] + of->bias[o];
    if (product->added != NULL)
        for (int64_t o = 0; o < of->count; o++)
            y[o] += product->added[at + o];
    if (product->is_bfloat16)
        for (int64_t o = 0; o < of->count; o++)
            ((uint16_t *)product->out)[at + o] = upper_half(y[o]);
    else
        for (int64_t o = 0; o < of->count; o++)
            ((float *)product->out)[at + o] = y[o];
}

#endif
