/* A tile of int8_product.c, for 64-bit ARM CPUs: output pixels by sixteen output channels, four registers.
 *
 * One step multiplies four channels of a pixel by those of four outputs and adds them up, by what the CPU has:
 *
 *   sudot                 of the extension i8mm: int8 by uint8
 *   sdot                  of dotprod: int8 by int8, of codes that are 128 lower; z is as well, so y is the same
 *   smull, addp, sadalp   elsewhere, of such codes. Two products fit int16, because no weight is -128
 */

#ifndef ERRATA_INT8_TILE_NEON_H
#define ERRATA_INT8_TILE_NEON_H

#include "int8_product.h"
#include <arm_neon.h>
#include <string.h>

#define VECTORS 4
#define CACHED (192 * 1024) /* bytes of the second cache, which has 256 KiB or more on most such CPUs, for weights */
#define PARTS 4             /* registers that hold sixteen sums */

/* PLUS_PRODUCTS: sums plus the products of four weights each with one of the four groups of four codes; a macro,
 * since instructions name the group. Of the 32 registers, PIXELS x 4 hold sums. */
#if defined(__ARM_FEATURE_MATMUL_INT8)
#define OFFSET 0
#define PIXELS 6
#define DOT_NAME "NEON sudot"
typedef uint8x16_t Codes;
#define PLUS_PRODUCTS(sums, weight, codes, group) vsudotq_laneq_s32(sums, weight, codes, group)
#elif defined(__ARM_FEATURE_DOTPROD)
#define OFFSET 128
#define PIXELS 6
#define DOT_NAME "NEON sdot"
typedef int8x16_t Codes;
#define PLUS_PRODUCTS(sums, weight, codes, group) vdotq_laneq_s32(sums, weight, codes, group)
#else
#define OFFSET 128
#define PIXELS 4 /* products need registers of their own */
#define DOT_NAME "NEON smull"
typedef int8x16_t Codes;
static inline int32x4_t plus_products(int32x4_t sums, int8x16_t weight, int8x16_t four)
{
    int16x8_t low = vmull_s8(vget_low_s8(weight), vget_low_s8(four)), high = vmull_high_s8(weight, four);
    return vpadalq_s16(sums, vpaddq_s16(low, high));
}
#define PLUS_PRODUCTS(sums, weight, codes, group) \
    plus_products(sums, weight, vreinterpretq_s8_s32(vdupq_laneq_s32(vreinterpretq_s32_s8(codes), group)))
#endif
#include "int8_tile_sixteen.h"

static inline Codes lowered(uint8x16_t codes)
{
#if OFFSET == 0
    return codes;
#else
    return vreinterpretq_s8_u8(veorq_u8(codes, vdupq_n_u8(OFFSET)));
#endif
}

/* Codes of four channels, in the first group. */
static inline Codes four_channels(const uint8_t *codes)
{
    uint32_t four;
    memcpy(&four, codes, sizeof four);
    return lowered(vreinterpretq_u8_u32(vdupq_n_u32(four)));
}

/* Adds the products of one group of four channels. */
#define ADD_GROUP(group)                                                       \
    for (int part = 0; part < PARTS; part++) {                                 \
        int8x16_t four = vld1q_s8(weight + 16 * part);                         \
        for (int p = 0; p < PIXELS; p++)                                       \
            sums[p][part] = PLUS_PRODUCTS(sums[p][part], four, codes[p], group); \
    }                                                                          \
    weight += wide * 64

static inline void multiply_sixteen(Tile *tile, int64_t taps, int64_t channels, const int8_t *weight, int wide, int v)
{
    int32x4_t sums[PIXELS][PARTS];
    Codes codes[PIXELS];
    const uint8_t **rows = tile->rows;
    for (int p = 0; p < PIXELS; p++)
        for (int part = 0; part < PARTS; part++)
            sums[p][part] = vdupq_n_s32(0);
    weight += 64 * v;
    for (int64_t tap = 0; tap < taps; tap++, rows += PIXELS) {
        int64_t c = 0;
        for (; c + 16 <= channels; c += 16) {
            for (int p = 0; p < PIXELS; p++)
                codes[p] = lowered(vld1q_u8(rows[p] + c));
            ADD_GROUP(0);
            ADD_GROUP(1);
            ADD_GROUP(2);
            ADD_GROUP(3);
        }
        for (; c < channels; c += 4) {
            for (int p = 0; p < PIXELS; p++)
                codes[p] = four_channels(rows[p] + c);
            ADD_GROUP(0);
        }
    }
    for (int p = 0; p < PIXELS; p++)
        memcpy(tile->sums[p][v], sums[p], sizeof sums[p]);
}

#endif
