/* A tile of int8_product.c, by AVX512-VNNI: six output pixels by four vectors of sixteen output channels. 24 of the 32
 * registers hold sums, and one dot product in each for every load of a weight by six pixels. */

#ifndef ERRATA_INT8_TILE_AVX512_H
#define ERRATA_INT8_TILE_AVX512_H

#include "pixel_rows.h"
#include <string.h>

#define PIXELS 6
#define VECTORS 4

typedef struct {
    const uint8_t *rows[MOST_TAPS * PIXELS]; /* what each pixel reads, tap by tap */
    __m512i sums[PIXELS][VECTORS];
} Tile;

/* Sums of a tile, of its first `wide` vectors of outputs; inlined once for each width. */
static inline __attribute__((always_inline)) void multiply(Tile *tile, int64_t taps, int64_t channels,
                                                           const int8_t *weight, const int wide)
{
    __m512i sums[PIXELS][VECTORS];
#pragma GCC unroll 6
    for (int p = 0; p < PIXELS; p++)
#pragma GCC unroll 4
        for (int v = 0; v < wide; v++)
            sums[p][v] = _mm512_setzero_si512();
    const uint8_t **rows = tile->rows;
    for (int64_t tap = 0; tap < taps; tap++, rows += PIXELS) {
        const uint8_t *own[PIXELS] = { rows[0], rows[1], rows[2], rows[3], rows[4], rows[5] };
        for (int64_t c = 0; c < channels; c += 4, weight += wide * 64) {
            __m512i weights[VECTORS];
#pragma GCC unroll 4
            for (int v = 0; v < wide; v++)
                weights[v] = _mm512_load_si512(weight + 64 * v);
#pragma GCC unroll 6
            for (int p = 0; p < PIXELS; p++) {
                int32_t four;
                memcpy(&four, own[p] + c, sizeof four);
                __m512i codes = _mm512_set1_epi32(four);
#pragma GCC unroll 4
                for (int v = 0; v < wide; v++)
                    sums[p][v] = _mm512_dpbusd_epi32(sums[p][v], codes, weights[v]);
            }
        }
    }
#pragma GCC unroll 6
    for (int p = 0; p < PIXELS; p++)
#pragma GCC unroll 4
        for (int v = 0; v < wide; v++)
            tile->sums[p][v] = sums[p][v];
}

/* y of a tile's `count` pixels, for the outputs from `output`. */
static void write(const Product *product, const Tile *tile, int64_t first, int64_t count, int64_t output, int wide)
{
    if (product->is_gated) {
        for (int v = 0; v < wide; v += 2, output += 2 * LANES) {
            Outputs of = outputs_from(product, output), gate = outputs_from(product, output + LANES);
            for (int64_t p = 0; p < count; p++)
                write_gated(product, of, tile->sums[p][v], gate, tile->sums[p][v + 1],
                            ((first + p) * product->outputs + output) / 2);
        }
        return;
    }
    for (int v = 0; v < wide; v++, output += LANES) {
        Outputs of = outputs_from(product, output);
        for (int64_t p = 0; p < count; p++)
            write_outputs(product, of, tile->sums[p][v], NULL, (first + p) * product->outputs + output);
    }
}

#endif
