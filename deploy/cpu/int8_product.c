/* Convolutions and products of matrices on 8-bit codes, for CPUs with AVX512-VNNI, AVX-VNNI, AVX2 or NEON: how
 * each multiplies a tile is in a header of its own. What is computed, and how weights are packed, is told in int8_product.h;
 * CPUs with AMX have another way, int8_tiles.c.
 *
 * Nothing is copied: the rows that a tile of output pixels reads are found as addresses, and what lies outside the
 * image is a row of zero points.
 */

#include "int8_product.h"
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if HAS_AVX512 && defined(__AVX512VNNI__)
#include "int8_tile_avx512.h"
#define NAME "AVX512-VNNI"
#elif defined(__AVX2__) && defined(__FMA__)
#include "int8_tile_avx2.h"
#define NAME DOT_NAME
#elif defined(__aarch64__)
#include "int8_tile_neon.h"
#define NAME DOT_NAME
#endif

#ifdef NAME
#ifndef CACHED
#define CACHED (640 * 1024) /* bytes of the second cache, which has 1 MiB or more on such CPUs, for weights */
#endif

/* In int8_tiles.c. */
int errata_int8_tiles(const Product *product);

/* What `write` will touch is fetched while the tile is multiplied. */
static inline void fetch(const Product *product, int64_t first, int64_t count, int64_t output, int wide)
{
    size_t each = product->is_bfloat16 ? sizeof(uint16_t) : sizeof(float);
    for (int64_t p = 0; p < count; p++)
        for (int v = 0; v < wide; v++) {
            int64_t at = (first + p) * product->outputs + output + v * LANES;
            __builtin_prefetch((const char *)product->out + at * each, 1);
            if (product->added != NULL)
                __builtin_prefetch(product->added + at, 0);
        }
}

/* Returns 0, or 1 where memory is missing. `added` may be `out`. */
int errata_int8_product(const Product *product)
{
#if HAS_AVX512
    if (product->is_tiled)
        return errata_int8_tiles(product);
#endif
    uint8_t *outside = malloc((size_t)product->channels);
    if (outside == NULL)
        return 1;
    memset(outside, product->zero_point, (size_t)product->channels);
    int64_t taps = product->kernel_height * product->kernel_width, depth = taps * product->channels;
    int64_t pixels = product->batch * product->out_height * product->out_width;
    int64_t vectors = (product->outputs + LANES - 1) / LANES;
    int64_t panels = (vectors + VECTORS - 1) / VECTORS, tiles = (pixels + PIXELS - 1) / PIXELS;
    int64_t together = panels_at_once(panels, tiles, VECTORS * LANES * depth, CACHED);

#pragma omp parallel for collapse(2) schedule(static)
    for (int64_t start = 0; start < panels; start += together)
        for (int64_t t = 0; t < tiles; t++) {
            Tile tile;
            int64_t first = t * PIXELS, count = pixels - first < PIXELS ? pixels - first : PIXELS;
            find_rows(product, first, count, PIXELS, outside, tile.rows);
            for (int64_t panel = start; panel < panels && panel < start + together; panel++) {
                int wide = vectors - panel * VECTORS < VECTORS ? (int)(vectors - panel * VECTORS) : VECTORS;
                const int8_t *weight = product->weight + panel * VECTORS * LANES * depth;
                if (!product->is_gated)
                    fetch(product, first, count, panel * VECTORS * LANES, wide);
                switch (wide) {
                case 1: multiply(&tile, taps, product->channels, weight, 1); break;
                case 2: multiply(&tile, taps, product->channels, weight, 2); break;
                case 3: multiply(&tile, taps, product->channels, weight, 3); break;
                default: multiply(&tile, taps, product->channels, weight, 4); break;
                }
                write(product, &tile, first, count, panel * VECTORS * LANES, wide);
            }
        }
    free(outside);
    return 0;
}
#else
#define NAME ""
int errata_int8_product(const void *product)
{
    (void)product;
    return 1;
}
#endif

int errata_has_int8_product(void)
{
    return NAME[0] != 0;
}

/* How products multiply; empty where this build has none. */
const char *errata_int8_product_name(void)
{
    return NAME;
}
