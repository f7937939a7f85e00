/* What the tiles of int8_product.c share that are multiplied sixteen outputs at a time. Who includes this has said
 *
 *   PIXELS, VECTORS   of a tile
 *   OFFSET            what the sums take codes to be lower by
 *
 * and has the function that multiplies.
 */

#ifndef ERRATA_INT8_TILE_SIXTEEN_H
#define ERRATA_INT8_TILE_SIXTEEN_H

#include "int8_outputs.h"
#include "pixel_rows.h"

typedef struct {
    const uint8_t *rows[MOST_TAPS * PIXELS]; /* what each pixel reads, tap by tap */
    int32_t sums[PIXELS][VECTORS][LANES] __attribute__((aligned(32)));
} Tile;

/* Sums of a tile, of the `v`-th sixteen outputs of a panel of `wide` times sixteen. */
static inline void multiply_sixteen(Tile *tile, int64_t taps, int64_t channels, const int8_t *weight, int wide, int v);

/* Sums of a tile, of its first `wide` vectors of outputs. */
static void multiply(Tile *tile, int64_t taps, int64_t channels, const int8_t *weight, int wide)
{
    for (int v = 0; v < wide; v++)
        multiply_sixteen(tile, taps, channels, weight, wide, v);
}

/* y of a tile's `count` pixels, for the outputs from `output`. */
static void write(const Product *product, const Tile *tile, int64_t first, int64_t count, int64_t output, int wide)
{
    int step = product->is_gated ? 2 : 1;
    for (int v = 0; v < wide; v += step, output += step * LANES) {
        Sixteen of = sixteen_from(product, output, OFFSET);
        Sixteen gate = sixteen_from(product, output + (step - 1) * LANES, OFFSET);
        for (int64_t p = 0; p < count; p++) {
            int64_t at = (first + p) * product->outputs + output;
            if (product->is_gated)
                write_gated_sixteen(product, &of, tile->sums[p][v], &gate, tile->sums[p][v + 1], at / 2);
            else
                write_sixteen(product, &of, tile->sums[p][v], at);
        }
    }
}

#endif
