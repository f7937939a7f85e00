/* The same products as int8_product.c, for CPUs with AMX: one instruction multiplies sixteen pixels, up to sixteen
 * groups of four channels and sixteen outputs. See int8_product.h for what is computed.
 *
 * A block is two tiles of pixels by two vectors of outputs: four tiles of sums, and each tile that is loaded
 * serves two products.
 *
 * Products that are added up are computed block by block, so that their sum is written once. All of them find their
 * pixels as the last one does: where it needs a border, the images of the others are copied to its width.
 */

#define _DEFAULT_SOURCE /* for syscall */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(__AMX_INT8__) && defined(__AMX_TILE__) && defined(__AVX512VNNI__) && defined(__linux__)
#include "tile_pixels.h"
#include <sys/syscall.h>
#include <unistd.h>

#define VECTORS 2
#define FEWEST_BYTES 32 /* of a row: with fewer the other kernel is as fast */
#define CACHED (1280 * 1024) /* bytes of the second cache, which has 2 MiB on such CPUs, for weights */
#define REQUEST_PERMISSION 0x1023 /* ARCH_REQ_XCOMP_PERM */
#define TILE_DATA 18              /* the component of the state that it is asked for */
#define MOST_PRODUCTS 4           /* that are added up */

/* A product of a sum, and where it finds its pixels. */
typedef struct {
    Product product;
    Pixels pixels;
    uint8_t *copy; /* of its image, or of its last tile; or NULL */
    int64_t depth; /* codes that an output reads */
} Member;

typedef struct {
    Member members[MOST_PRODUCTS]; /* in the order in which they are added */
    int count;
} Sum;

/* Whether the system lets this process use tiles; asked for once. */
int errata_has_tiles(void)
{
    static _Atomic int known; /* 0: not yet; two threads that ask at once get the same answer */
    if (known == 0)
        known = syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0 ? 1 : -1;
    return known > 0;
}

/* Whether tiles serve a product with so many channels. */
int errata_tiles_serve(int64_t channels)
{
    return step_of(channels) >= FEWEST_BYTES;
}

/* y of a tile, from its sums for sixteen outputs; `before` is added, if it is not NULL. */
static void write_tile(const Product *product, const Pixels *pixels, int64_t tile, int64_t output,
                       const int32_t *sums, const float *before)
{
    Outputs of = outputs_from(product, output);
    int64_t own = tile % pixels->each * ROWS, group = tile / pixels->each;
    if (!pixels->is_span) {
        int64_t left = product->out_width - own, count = left < ROWS ? left : ROWS;
        int64_t at = (group * product->out_width + own) * product->outputs + output;
        for (int64_t row = 0; row < count; row++, at += product->outputs)
            write_outputs(product, of, _mm512_load_si512(sums + row * LANES),
                          before == NULL ? NULL : before + row * LANES, at);
        return;
    }
    int64_t y = own / pixels->width, x = own % pixels->width;
    for (int64_t row = 0; row < ROWS && y < product->out_height; row++) {
        if (x < product->out_width) {
            int64_t pixel = (group * product->out_height + y) * product->out_width + x;
            write_outputs(product, of, _mm512_load_si512(sums + row * LANES),
                          before == NULL ? NULL : before + row * LANES, pixel * product->outputs + output);
        }
        if (++x == pixels->width) {
            x = 0;
            y++;
        }
    }
}

/* Codes of a tile of a plain product, from its sums for sixteen outputs and for their gates. */
static void write_gated_tile(const Product *product, const Pixels *pixels, int64_t tile, int64_t output,
                             const int32_t *sums)
{
    Outputs of = outputs_from(product, output), gate = outputs_from(product, output + LANES);
    int64_t own = tile % pixels->each * ROWS, left = product->out_width - own, count = left < ROWS ? left : ROWS;
    int64_t at = (own * product->outputs + output) / 2;
    for (int64_t row = 0; row < count; row++, at += product->outputs / 2)
        write_gated(product, of, _mm512_load_si512(sums + row * LANES), gate,
                    _mm512_load_si512(sums + (ROWS + row) * LANES), at);
}

/* What `write_tile` will touch is fetched while the sums are computed. */
static inline void fetch_tile(const Product *product, const Pixels *pixels, int64_t tile, int64_t output)
{
    if (pixels->is_span || product->is_gated)
        return;
    size_t each = product->is_bfloat16 ? sizeof(uint16_t) : sizeof(float);
    int64_t own = tile % pixels->each * ROWS, left = product->out_width - own, count = left < ROWS ? left : ROWS;
    int64_t at = (tile / pixels->each * product->out_width + own) * product->outputs + output;
    for (int64_t row = 0; row < count; row++, at += product->outputs) {
        __builtin_prefetch((const char *)product->out + at * each, 1);
        if (product->added != NULL)
            __builtin_prefetch(product->added + at, 0);
    }
}

/* The sums of one or two tiles of pixels by a panel of one or two vectors; inlined once for each. */
static inline __attribute__((always_inline)) void multiply(const Product *product, const Pixels *pixels,
                                                           const uint8_t *first, const uint8_t *second,
                                                           const int8_t *weight, int32_t *sums,
                                                           const int tiles, const int vectors)
{
    const int64_t channels = product->channels, step = pixels->step, line = pixels->width * channels;
    const int64_t weight_row = vectors * LANES * 4, distance = pixels->distance;
    WRITTEN(first);
    _tile_zero(0);
    if (vectors > 1)
        _tile_zero(1);
    if (tiles > 1)
        _tile_zero(2);
    if (tiles > 1 && vectors > 1)
        _tile_zero(3);
    for (int64_t ky = 0; ky < product->kernel_height; ky++)
        for (int64_t kx = 0; kx < product->kernel_width; kx++) {
            int64_t place = ky * product->spread_y * line + kx * product->spread_x * channels;
            for (int64_t c = 0; c < channels; c += step, weight += step / 4 * weight_row) {
                _tile_loadd(6, weight, weight_row);
                _tile_loadd(4, first + place + c, distance);
                _tile_dpbusd(0, 4, 6);
                if (vectors > 1) {
                    _tile_loadd(7, weight + LANES * 4, weight_row);
                    _tile_dpbusd(1, 4, 7);
                }
                if (tiles > 1) {
                    _tile_loadd(5, second + place + c, distance);
                    _tile_dpbusd(2, 5, 6);
                }
                if (tiles > 1 && vectors > 1)
                    _tile_dpbusd(3, 5, 7);
            }
        }
    _tile_stored(0, sums, LANES * 4);
    if (vectors > 1)
        _tile_stored(1, sums + ROWS * LANES, LANES * 4);
    if (tiles > 1)
        _tile_stored(2, sums + 2 * ROWS * LANES, LANES * 4);
    if (tiles > 1 && vectors > 1)
        _tile_stored(3, sums + 3 * ROWS * LANES, LANES * 4);
}

/* The sums of a block of one or two tiles, by a panel of one or two vectors. */
static void multiply_block(const Member *member, int64_t tile, int64_t panel, int tiles, int vectors, int32_t *sums)
{
    const Product *product = &member->product;
    const Pixels *pixels = &member->pixels;
    const int8_t *weight = product->weight + panel * VECTORS * LANES * member->depth;
    const uint8_t *first = rows_of(product, pixels, tile);
    const uint8_t *second = tiles > 1 ? rows_of(product, pixels, tile + 1) : first;
    if (tiles == 2 && vectors == 2)
        multiply(product, pixels, first, second, weight, sums, 2, 2);
    else if (tiles == 2)
        multiply(product, pixels, first, second, weight, sums, 2, 1);
    else if (vectors == 2)
        multiply(product, pixels, first, second, weight, sums, 1, 2);
    else
        multiply(product, pixels, first, second, weight, sums, 1, 1);
}

/* The numbers that the sums of a block stand for, plus those that are there already unless it `is_first`. */
static void add_block(const Product *product, int64_t output, int tiles, int vectors, const int32_t *sums, int is_first,
                      float *numbers)
{
    for (int v = 0; v < vectors; v++) {
        Outputs of = outputs_from(product, output + v * LANES);
        for (int t = 0; t < tiles; t++)
            for (int row = 0; row < ROWS; row++) {
                int64_t at = ((2 * t + v) * ROWS + row) * LANES;
                __m512 y = output_of(of, _mm512_load_si512(sums + at));
                _mm512_store_ps(numbers + at, is_first ? y : _mm512_add_ps(y, _mm512_load_ps(numbers + at)));
            }
    }
}

static void multiply_panel(const Sum *sum, int64_t tile, int64_t panel)
{
    const Member *last = &sum->members[sum->count - 1];
    const Product *product = &last->product;
    const Pixels *pixels = &last->pixels;
    int64_t from = panel * VECTORS * LANES;
    int tiles = tile + 1 < pixels->tiles ? 2 : 1, vectors = from + LANES < product->outputs ? 2 : 1;
    int32_t sums[4 * ROWS * LANES] __attribute__((aligned(64)));
    float numbers[4 * ROWS * LANES] __attribute__((aligned(64)));
    for (int t = 0; t < tiles; t++)
        for (int v = 0; v < vectors; v++)
            fetch_tile(product, pixels, tile + t, from + v * LANES);
    for (int m = 0; m < sum->count; m++) {
        multiply_block(&sum->members[m], tile, panel, tiles, vectors, sums);
        if (m + 1 < sum->count)
            add_block(&sum->members[m].product, from, tiles, vectors, sums, m == 0, numbers);
    }
    for (int t = 0; t < tiles; t++)
        if (product->is_gated)
            write_gated_tile(product, pixels, tile + t, from, sums + 2 * t * ROWS * LANES);
    for (int t = 0; t < tiles && !product->is_gated; t++)
        for (int v = 0; v < vectors; v++) {
            int64_t at = (2 * t + v) * ROWS * LANES;
            write_tile(product, pixels, tile + t, from + v * LANES, sums + at, sum->count > 1 ? numbers + at : NULL);
        }
}

/* Whether the outputs of `first` can be added while those of `second` are made. */
int errata_tiles_add(const Product *first, const Product *second)
{
    int count = 2;
    for (const Product *before = first->before; before != NULL; before = before->before)
        count++;
    return count <= MOST_PRODUCTS && first->is_tiled && second->is_tiled && !first->is_gated && !second->is_gated &&
           !first->is_bfloat16 && first->added == NULL && first->batch == second->batch &&
           first->out_height == second->out_height && first->out_width == second->out_width &&
           first->outputs == second->outputs && step_of(first->channels) == step_of(second->channels) &&
           first->down == second->down && first->right == second->right;
}

/* Pixels of a product where they lie, and a copy of the last ones if they do not fill a tile; 0 without memory. */
static int find_plain(Member *member)
{
    Product *product = &member->product;
    product->out_width = product->width = product->batch * product->height * product->width;
    product->batch = product->height = product->out_height = 1;
    member->pixels = pixels_of(product);
    int64_t row = product->channels, left = product->out_width % ROWS;
    if (left == 0)
        return 1;
    member->pixels.last = member->copy = calloc(ROWS, (size_t)row);
    if (member->copy != NULL)
        memcpy(member->copy, product->codes + (product->out_width - left) * row, (size_t)(left * row));
    return member->copy != NULL;
}

/* Pixels laid out as those of the widest image of the sum, of a copy where it has a border; 0 without memory. */
static int find_bordered(Member *member, const Pixels *widest)
{
    Product *product = &member->product;
    member->pixels = pixels_of(product);
    member->pixels.width = widest->width;
    member->pixels.is_span = widest->is_span;
    member->pixels.each = widest->each;
    member->pixels.tiles = widest->tiles;
    if (is_plain(product) && !widest->is_span && product->width % ROWS == 0) { /* tiles stay within its lines */
        member->pixels.width = product->width;
        return 1;
    }
    member->copy = bordered(product, &member->pixels, ROWS * member->pixels.distance + ROW_BYTES);
    member->pixels.image = member->copy;
    return member->copy != NULL;
}

/* Returns 0 without memory. */
static int find_pixels(Sum *sum)
{
    int all_plain = 1;
    for (int m = 0; m < sum->count; m++)
        all_plain &= is_plain(&sum->members[m].product);
    Pixels widest = pixels_of(&sum->members[0].product);
    for (int m = 1; m < sum->count; m++) {
        Pixels own = pixels_of(&sum->members[m].product);
        if (own.width > widest.width)
            widest = own;
    }
    for (int m = 0; m < sum->count; m++) {
        Member *member = &sum->members[m];
        if (!(all_plain ? find_plain(member) : find_bordered(member, &widest)))
            return 0;
    }
    return 1;
}

/* Returns 0, or 1 where memory is missing. `added` may be `out`. */
int errata_int8_tiles(const Product *given)
{
    Sum sum = { .count = 0 };
    for (const Product *each = given; each != NULL; each = each->before)
        sum.count++;
    const Product *each = given;
    for (int m = sum.count - 1; m >= 0; m--, each = each->before) {
        Member member = { .product = *each, .copy = NULL };
        member.depth = each->kernel_height * each->kernel_width * each->channels;
        sum.members[m] = member;
    }
    int failed = !find_pixels(&sum);
    if (!failed) {
        const Member *last = &sum.members[sum.count - 1];
        int64_t depth = 0, blocks = (last->pixels.tiles + 1) / 2;
        for (int m = 0; m < sum.count; m++)
            depth += sum.members[m].depth;
        int64_t panels = (given->outputs + VECTORS * LANES - 1) / (VECTORS * LANES);
        int64_t together = panels_at_once(panels, blocks, VECTORS * LANES * depth, CACHED);
#pragma omp parallel
        {
            configure_tiles(last->pixels.step);
#pragma omp for collapse(2) schedule(static)
            for (int64_t start = 0; start < panels; start += together)
                for (int64_t block = 0; block < blocks; block++)
                    for (int64_t panel = start; panel < panels && panel < start + together; panel++)
                        multiply_panel(&sum, 2 * block, panel);
            _tile_release();
        }
    }
    for (int m = 0; m < sum.count; m++)
        free(sum.members[m].copy);
    return failed;
}
#else
int errata_has_tiles(void)
{
    return 0;
}

int errata_tiles_serve(int64_t channels)
{
    (void)channels;
    return 0;
}

int errata_tiles_add(const void *first, const void *second)
{
    (void)first;
    (void)second;
    return 0;
}

int errata_int8_tiles(const void *product)
{
    (void)product;
    return 1;
}
#endif
