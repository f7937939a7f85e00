/* How the sums of int8_product_neon.c become outputs: the same operations in the same order as in int8_product.h, so
 * that numbers are those of other CPUs. */

#ifndef ERRATA_INT8_OUTPUTS_NEON_H
#define ERRATA_INT8_OUTPUTS_NEON_H

#include "int8_product.h"
#include "numbers_neon.h"
#include <string.h>

/* What turns the sums of sixteen outputs into y. */
typedef struct {
    int64_t count;            /* of the outputs that there are, at most sixteen */
    int32x4_t shift[PARTS];   /* z sum w */
    float32x4_t gain[PARTS];  /* s_x s_w */
    float32x4_t bias[PARTS];
} Outputs;

/* Sixteen numbers of 32 bits, of which `count` are there; the others are 0. */
static inline const void *sixteen_of(const void *from, int64_t count, void *room)
{
    if (count >= LANES)
        return from;
    memset(room, 0, LANES * 4);
    return memcpy(room, from, (size_t)count * 4);
}

/* `offset` is what the sums take codes to be lower by. */
static inline Outputs outputs_from(const Product *product, int64_t output, int32_t offset)
{
    Outputs of = { .count = product->outputs - output < LANES ? product->outputs - output : LANES };
    int32_t room[LANES];
    float number_room[2][LANES];
    const int32_t *sums = sixteen_of(product->sums + output, of.count, room);
    const float *scales = sixteen_of(product->scales + output, of.count, number_room[0]), *bias = NULL;
    if (product->bias != NULL)
        bias = sixteen_of(product->bias + output, of.count, number_room[1]);
    for (int part = 0; part < PARTS; part++) {
        of.shift[part] = vmulq_n_s32(vld1q_s32(sums + 4 * part), product->zero_point - offset);
        of.gain[part] = vmulq_n_f32(vld1q_f32(scales + 4 * part), product->scale);
        of.bias[part] = bias == NULL ? vdupq_n_f32(0) : vld1q_f32(bias + 4 * part);
    }
    return of;
}

static inline float32x4_t output_of(const Outputs *of, const int32x4_t sums[PARTS], int part)
{
    return vfmaq_f32(of->bias[part], vcvtq_f32_s32(vsubq_s32(sums[part], of->shift[part])), of->gain[part]);
}

/* y of one pixel, for the outputs whose first is at `at` in out. */
static inline void write_outputs(const Product *product, const Outputs *of, const int32x4_t sums[PARTS], int64_t at)
{
    int is_whole = of->count == LANES;
    float added_room[LANES], room[LANES], *numbers = is_whole ? (float *)product->out + at : room;
    uint16_t half_room[LANES], *halves = is_whole ? (uint16_t *)product->out + at : half_room;
    const float *added = product->added == NULL ? NULL : sixteen_of(product->added + at, of->count, added_room);
    for (int part = 0; part < PARTS; part++) {
        float32x4_t y = output_of(of, sums, part);
        if (added != NULL)
            y = vaddq_f32(y, vld1q_f32(added + 4 * part));
        if (product->is_bfloat16)
            vst1_u16(halves + 4 * part, bfloat16_of(y));
        else
            vst1q_f32(numbers + 4 * part, y);
    }
    if (!is_whole && product->is_bfloat16)
        memcpy((uint16_t *)product->out + at, halves, (size_t)of->count * sizeof *halves);
    else if (!is_whole)
        memcpy((float *)product->out + at, numbers, (size_t)of->count * sizeof *numbers);
}

/* 1 - Phi(|x|), to 1e-6: as in int8_product.h. */
static inline float32x4_t tail_of(float32x4_t x)
{
    const float32x4_t one = vdupq_n_f32(1);
    float32x4_t z = vmulq_n_f32(vabsq_f32(x), 0.70710678f);
    float32x4_t t = vdivq_f32(one, vfmaq_n_f32(one, z, 0.3275911f)), sum = vdupq_n_f32(1.061405429f);
    sum = vfmaq_f32(vdupq_n_f32(-1.453152027f), sum, t);
    sum = vfmaq_f32(vdupq_n_f32(1.421413741f), sum, t);
    sum = vfmaq_f32(vdupq_n_f32(-0.284496736f), sum, t);
    sum = vfmaq_f32(vdupq_n_f32(0.254829592f), sum, t);
    float32x4_t u = vmulq_n_f32(vmulq_f32(z, z), -LOG2_E);
    return vmulq_n_f32(vmulq_f32(vmulq_f32(sum, t), powers_of_two(u)), 0.5f);
}

/* The codes of one pixel, for sixteen gated outputs whose first is at `at` in out. */
static inline void write_gated(const Product *product, const Outputs *of, const int32x4_t sums[PARTS],
                               const Outputs *of_gate, const int32x4_t gate_sums[PARTS], int64_t at)
{
    float32x4_t y[PARTS];
    for (int part = 0; part < PARTS; part++) {
        float32x4_t gate = output_of(of_gate, gate_sums, part), tail = tail_of(gate);
        float32x4_t share = vbslq_f32(vcgtzq_f32(gate), vsubq_f32(vdupq_n_f32(1), tail), tail);
        y[part] = vmulq_f32(output_of(of, sums, part), vmulq_f32(gate, share));
    }
    store_codes((uint8_t *)product->out + at, y, 1 / product->out_scale, product->out_zero_point);
}

#endif
