/* What codes.h has for AVX-512, for the four lanes of a NEON vector. */

#ifndef ERRATA_NUMBERS_NEON_H
#define ERRATA_NUMBERS_NEON_H

#include "codes.h"
#include <arm_neon.h>
#include <stdint.h>

#define PARTS 4 /* NEON vectors that take the sixteen lanes of codes.h */

/* 2^u, u at most 126; from -126 down it stays 2^-126. NaN stays. */
static inline float32x4_t powers_of_two(float32x4_t u)
{
    u = vmaxq_f32(u, vdupq_n_f32(-126.0f));
    float32x4_t n = vrndnq_f32(u), f = vsubq_f32(u, n), p = vdupq_n_f32(EXP2_6);
    p = vfmaq_f32(vdupq_n_f32(EXP2_5), p, f);
    p = vfmaq_f32(vdupq_n_f32(EXP2_4), p, f);
    p = vfmaq_f32(vdupq_n_f32(EXP2_3), p, f);
    p = vfmaq_f32(vdupq_n_f32(EXP2_2), p, f);
    p = vfmaq_f32(vdupq_n_f32(EXP2_1), p, f);
    p = vfmaq_f32(vdupq_n_f32(1.0f), p, f);
    return vreinterpretq_f32_s32(vaddq_s32(vreinterpretq_s32_f32(p), vshlq_n_s32(vcvtq_s32_f32(n), 23)));
}

/* The upper halves, rounded to nearest even; for finite numbers. */
static inline uint16x4_t bfloat16_of(float32x4_t y)
{
    uint32x4_t bits = vreinterpretq_u32_f32(y), odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
    return vshrn_n_u32(vaddq_u32(bits, vaddq_u32(odd, vdupq_n_u32(0x7fff))), 16);
}

/* Sixteen codes; NaN becomes 0. */
static inline void store_codes(uint8_t *codes, const float32x4_t y[PARTS], float inverse_scale, int32_t zero_point)
{
    uint16x4_t narrow[PARTS];
    for (int part = 0; part < PARTS; part++) {
        float32x4_t q = vrndnq_f32(vmulq_n_f32(y[part], inverse_scale));
        q = vaddq_f32(q, vdupq_n_f32((float)zero_point));
        q = vminnmq_f32(vmaxnmq_f32(q, vdupq_n_f32(0.0f)), vdupq_n_f32(255.0f));
        narrow[part] = vmovn_u32(vcvtq_u32_f32(q));
    }
    uint8x8_t low = vmovn_u16(vcombine_u16(narrow[0], narrow[1]));
    uint8x8_t high = vmovn_u16(vcombine_u16(narrow[2], narrow[3]));
    vst1q_u8(codes, vcombine_u8(low, high));
}

#endif
