/* Where the tiles of a product find their pixels; for int8_tiles.c.
 *
 * A tile of the CPU has rows of at most 64 bytes at equal distances in memory. Sixteen output pixels in a row read
 * pixels at equal distances for each tap of the kernel, if the image has a border of zero points; so it is copied
 * into one where the kernel reaches beyond it. Two kinds of tiles:
 *
 *   lines   sixteen pixels of an output line, the last tile of a line with fewer. Any stride.
 *   spans   sixteen places of the bordered image, line after line: the places of the border are computed in vain,
 *           but tiles go on across lines. Stride 1; better for narrow images.
 */

#ifndef ERRATA_TILE_PIXELS_H
#define ERRATA_TILE_PIXELS_H

#include "int8_product.h"
#include "tiles.h"
#include <stdlib.h>
#include <string.h>

/* Where tiles of pixels are found. */
typedef struct {
    const uint8_t *image;    /* codes, or the bordered copy */
    int64_t width, height;   /* of it, in pixels */
    int64_t distance;        /* of the pixels of a tile's rows, bytes */
    int64_t step;            /* bytes of a row */
    int64_t each, tiles;     /* tiles of a line, or of a sample; and of all */
    int is_span;
    const uint8_t *last;     /* a copy of the last tile, where its rows would reach beyond the image; or NULL */
} Pixels;

/* The largest multiple of four bytes, at most a row of a tile, that divides the channels. */
static inline int64_t step_of(int64_t channels)
{
    int64_t step = channels < ROW_BYTES ? channels : ROW_BYTES;
    while (channels % step != 0 || step % 4 != 0)
        step--;
    return step;
}

/* The image with its border, and room for tiles that reach beyond its end; NULL where memory is missing. */
static inline uint8_t *bordered(const Product *product, const Pixels *pixels, int64_t slack)
{
    int64_t line = pixels->width * product->channels, inner = product->width * product->channels;
    int64_t lines = product->batch * pixels->height;
    uint8_t *copy = malloc((size_t)(lines * line + slack));
    if (copy == NULL)
        return NULL;
#pragma omp parallel for schedule(static)
    for (int64_t at = 0; at < lines; at++) {
        uint8_t *to = copy + at * line;
        int64_t sample = at / pixels->height, y = at % pixels->height - product->top;
        if (y < 0 || y >= product->height) {
            memset(to, product->zero_point, (size_t)line);
            continue;
        }
        int64_t before = product->left * product->channels, taken = line - before < inner ? line - before : inner;
        memset(to, product->zero_point, (size_t)before);
        memcpy(to + before, product->codes + (sample * product->height + y) * inner, (size_t)taken);
        memset(to + before + taken, product->zero_point, (size_t)(line - before - taken));
    }
    memset(copy + lines * line, 0, (size_t)slack);
    return copy;
}

/* Decides between lines and spans, and says how large the image is that tiles read. */
static inline Pixels pixels_of(const Product *product)
{
    Pixels pixels = { product->codes, product->width, product->height, 0, step_of(product->channels), 0, 0, 0, NULL };
    int64_t reach_x = (product->kernel_width - 1) * product->spread_x + 1;
    int64_t reach_y = (product->kernel_height - 1) * product->spread_y + 1;
    pixels.distance = product->right * product->channels;
    pixels.width = (product->out_width - 1) * product->right + reach_x;
    pixels.height = (product->out_height - 1) * product->down + reach_y;
    int64_t span = (product->out_height - 1) * pixels.width + product->out_width;
    int64_t by_line = (product->out_width + ROWS - 1) / ROWS, by_span = (span + ROWS - 1) / ROWS;
    pixels.is_span = product->right == 1 && product->down == 1 && by_span < by_line * product->out_height;
    pixels.each = pixels.is_span ? by_span : by_line;
    pixels.tiles = pixels.each * product->batch * (pixels.is_span ? 1 : product->out_height);
    return pixels;
}

/* A product that reads each pixel once, where it lies: all pixels are one line. */
static inline int is_plain(const Product *product)
{
    return product->kernel_height == 1 && product->kernel_width == 1 && product->down == 1 && product->right == 1 &&
           product->top == 0 && product->left == 0 && product->out_height == product->height &&
           product->out_width == product->width;
}

/* The first pixel of a tile. */
static inline const uint8_t *rows_of(const Product *product, const Pixels *pixels, int64_t tile)
{
    if (pixels->last != NULL && tile == pixels->tiles - 1)
        return pixels->last;
    int64_t place;
    if (pixels->is_span)
        place = tile / pixels->each * pixels->height * pixels->width + tile % pixels->each * ROWS;
    else {
        int64_t line = tile / pixels->each, sample = line / product->out_height, y = line % product->out_height;
        place = (sample * pixels->height + y * product->down) * pixels->width +
                tile % pixels->each * ROWS * product->right;
    }
    return pixels->image + place * product->channels;
}

#endif
