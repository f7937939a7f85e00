/* The same products as int8_product.c, for 64-bit ARM CPUs; int8_product.h tells what is computed, and how weights are
 * packed. Nothing is copied: see int8_product.c.
 *
 * One step multiplies four channels of a pixel by those of four outputs and adds them up, by what the CPU has:
 *
 *   sudot                 of the extension i8mm: int8 by uint8
 *   sdot                  of dotprod: int8 by int8, of codes that are 128 lower; z is as well, so y is the same
 *   smull, addp, sadalp   elsewhere, of such codes. Two products fit int16, because no weight is -128
 *
 * A tile is six output pixels by sixteen outputs: 24 of the 32 registers hold sums, and each load of weights serves six
 * pixels. It is four pixels for the last of the three ways, which needs more registers on the way.
 */

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(__aarch64__)
#include "int8_outputs_neon.h"
#include "pixel_rows.h"

#define VECTORS 4 /* of a panel */
#define CACHED (192 * 1024) /* bytes of the second cache, which has 256 KiB or more on most CPUs, for weights */

/* Sums plus the products of four weights each with one of the four groups of four codes. */
#if defined(__ARM_FEATURE_MATMUL_INT8)
#define OFFSET 0
#define PIXELS 6
#define NAME "NEON sudot"
typedef uint8x16_t Codes;
#define PLUS_PRODUCTS(sums, weight, codes, group) vsudotq_laneq_s32(sums, weight, codes, group)
#elif defined(__ARM_FEATURE_DOTPROD)
#define OFFSET 128
#define PIXELS 6
#define NAME "NEON sdot"
typedef int8x16_t Codes;
#define PLUS_PRODUCTS(sums, weight, codes, group) vdotq_laneq_s32(sums, weight, codes, group)
#else
#define OFFSET 128
#define PIXELS 4
#define NAME "NEON smull"
typedef int8x16_t Codes;
static inline int32x4_t plus_products(int32x4_t sums, int8x16_t weight, int8x16_t four)
{
    int16x8_t low = vmull_s8(vget_low_s8(weight), vget_low_s8(four)), high = vmull_high_s8(weight, four);
    return vpadalq_s16(sums, vpaddq_s16(low, high));
}
#define PLUS_PRODUCTS(sums, weight, codes, group) \
    plus_products(sums, weight, vreinterpretq_s8_s32(vdupq_laneq_s32(vreinterpretq_s32_s8(codes), group)))
#endif

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

/* Adds the products of one group of four channels; a macro, since instructions name the group. */
#define ADD_GROUP(group)                                                                \
    for (int part = 0; part < PARTS; part++) {                                          \
        int8x16_t four = vld1q_s8(weight + 16 * part);                                  \
        for (int p = 0; p < PIXELS; p++)                                                \
            own[p][part] = PLUS_PRODUCTS(own[p][part], four, codes[p], group);          \
    }                                                                                   \
    weight += step

/* Sums of a tile; weights of four channels are `step` apart. */
static void multiply(const uint8_t **rows, int64_t taps, int64_t channels, const int8_t *weight, int64_t step,
                     int32x4_t sums[PIXELS][PARTS])
{
    int32x4_t own[PIXELS][PARTS];
    Codes codes[PIXELS];
    for (int p = 0; p < PIXELS; p++)
        for (int part = 0; part < PARTS; part++)
            own[p][part] = vdupq_n_s32(0);
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
    memcpy(sums, own, sizeof own);
}

/* y of `count` pixels from the `first`, for the panel's outputs from `output`. */
static void compute_panel(const Product *product, const uint8_t **rows, int64_t first, int64_t count, int64_t output)
{
    int64_t taps = product->kernel_height * product->kernel_width, depth = taps * product->channels;
    int64_t vectors = (product->outputs - output + LANES - 1) / LANES, wide = vectors < VECTORS ? vectors : VECTORS;
    const int8_t *weight = product->weight + output * depth;
    int32x4_t sums[PIXELS][PARTS], gate_sums[PIXELS][PARTS];
    for (int64_t v = 0; v < wide; v++, output += LANES) {
        multiply(rows, taps, product->channels, weight + 64 * v, 64 * wide, sums);
        Outputs of = outputs_from(product, output, OFFSET);
        if (!product->is_gated) {
            for (int64_t p = 0; p < count; p++)
                write_outputs(product, &of, sums[p], (first + p) * product->outputs + output);
            continue;
        }
        v++;
        multiply(rows, taps, product->channels, weight + 64 * v, 64 * wide, gate_sums);
        Outputs gate = outputs_from(product, output + LANES, OFFSET);
        for (int64_t p = 0; p < count; p++)
            write_gated(product, &of, sums[p], &gate, gate_sums[p], ((first + p) * product->outputs + output) / 2);
        output += LANES;
    }
}

int errata_has_int8_product(void)
{
    return 1;
}

/* For reports. */
const char *errata_int8_product_name(void)
{
    return NAME;
}

/* Returns 0, or 1 where memory is missing. `added` may be `out`. */
int errata_int8_product(const Product *product)
{
    uint8_t *outside = malloc((size_t)product->channels);
    if (outside == NULL)
        return 1;
    memset(outside, product->zero_point, (size_t)product->channels);
    int64_t depth = product->kernel_height * product->kernel_width * product->channels;
    int64_t pixels = product->batch * product->out_height * product->out_width;
    int64_t panels = (product->outputs + VECTORS * LANES - 1) / (VECTORS * LANES);
    int64_t tiles = (pixels + PIXELS - 1) / PIXELS;
    int64_t together = panels_at_once(panels, tiles, VECTORS * LANES * depth, CACHED);

#pragma omp parallel for collapse(2) schedule(static)
    for (int64_t start = 0; start < panels; start += together)
        for (int64_t t = 0; t < tiles; t++) {
            const uint8_t *rows[MOST_TAPS * PIXELS];
            int64_t first = t * PIXELS, count = pixels - first < PIXELS ? pixels - first : PIXELS;
            find_rows(product, first, count, PIXELS, outside, rows);
            for (int64_t panel = start; panel < panels && panel < start + together; panel++)
                compute_panel(product, rows, first, count, panel * VECTORS * LANES);
        }
    free(outside);
    return 0;
}
#endif
