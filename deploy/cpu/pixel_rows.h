/* Where the pixels of a product lie that are read one by one. */

#ifndef ERRATA_PIXEL_ROWS_H
#define ERRATA_PIXEL_ROWS_H

#include "int8_product.h"
#include <stdint.h>

#define MOST_TAPS 64

/* The rows, tap by tap, that `count` output pixels from the `first` read, of `each` in a tile; those that are missing
 * in a tile repeat the last one. */
static inline void find_rows(const Product *product, int64_t first, int64_t count, int64_t each,
                             const uint8_t *outside, const uint8_t **rows)
{
    int64_t ox = first % product->out_width, oy = first / product->out_width % product->out_height;
    int64_t sample = first / (product->out_width * product->out_height);
    int64_t line = product->width * product->channels;
    for (int64_t p = 0; p < each; p++) {
        const uint8_t *image = product->codes + sample * product->height * line, **own = rows + p;
        int64_t x_first = ox * product->right - product->left, y = oy * product->down - product->top;
        for (int64_t ky = 0; ky < product->kernel_height; ky++, y += product->spread_y) {
            int has_line = y >= 0 && y < product->height;
            int64_t x = x_first;
            for (int64_t kx = 0; kx < product->kernel_width; kx++, x += product->spread_x, own += each)
                *own = has_line && x >= 0 && x < product->width ? image + y * line + x * product->channels : outside;
        }
        if (p + 1 < count && ++ox == product->out_width) {
            ox = 0;
            if (++oy == product->out_height) {
                oy = 0;
                sample++;
            }
        }
    }
}

#endif
