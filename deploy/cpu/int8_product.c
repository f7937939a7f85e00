/* Convolutions and products of matrices on 8-bit codes, for CPUs with AVX512-VNNI. What is computed,
 * and how weights are packed, is told in int8_product.h; CPUs with AMX have another way, int8_tiles.c, and ARM CPUs
 * int8_product_neon.c.
 *
 * Nothing is copied: the rows that a tile of output pixels reads are found as addresses, and what lies outside the
 * image is a row of zero points.
 *
 * A tile is six output pixels by four vectors of sixteen output channels: 24 of the 32 registers hold sums, and
 * one dot product in each for every load of a weight by six pixels.
 */

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512VNNI__)
#include "int8_product.h"
#include "pixel_rows.h"

#define PIXELS 6
#define VECTORS 4
#define CACHED (640 * 1024) /* bytes of the second cache, which has 1 MiB or more on such CPUs, for weights */

/* In int8_tiles.c. */
int errata_int8_tiles(const Product *product);

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

int errata_has_int8_product(void)
{
    return 1;
}

/* Returns 0, or 1 where memory is missing. `added` may be `out`. */
int errata_int8_product(const Product *product)
{
    if (product->is_tiled)
        return errata_int8_tiles(product);
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
#elif !defined(__aarch64__)
int errata_has_int8_product(void)
{
    return 0;
}

int errata_int8_product(const void *product)
{
    (void)product;
    return 1;
}
#endif

#if !defined(__aarch64__)
/* For reports; empty where the name of the backend says it. */
const char *errata_int8_product_name(void)
{
    return "";
}
#endif
