/* Convolutions and products of matrices on 8-bit codes, for CPUs with AVX512-VNNI; absent on others.
 *
 *   symbol     here              meaning
 *   q          codes             (batch, height, width, channels), uint8; a product of matrices has one line of pixels
 *   w          weight            int8, packed as told below; sums has each output's sum over w
 *   s_x, z     scale, zero_point of the codes
 *   s_w        scales            of each output channel
 *   y          out               s_x s_w (sum q w - z sum w) + bias + added; (batch, out_height, out_width, outputs),
 *                                float32, or rounded to bfloat16
 *
 * The sums are exact. Nothing is copied: the rows that a tile of output pixels reads are found as addresses, and
 * what lies outside the image is a row of zero points.
 *
 * A tile is six output pixels by four vectors of sixteen output channels: 24 of the 32 registers hold sums, and
 * one dot product in each for every load of a weight by six pixels. Weights are packed in panels of four vectors,
 * the last one narrower: for kernel row, kernel column and each four channels, 4 x 16 outputs x 4 channels.
 */

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512VNNI__)
#include <immintrin.h>
#include <omp.h>

#define PIXELS 6
#define LANES 16
#define VECTORS 4
#define MOST_TAPS 64
#define CACHED (640 * 1024) /* bytes of a core's second cache, which has 1 MiB or more on such CPUs, for weights */

typedef struct {
    const uint8_t *codes;
    const int8_t *weight; /* aligned to 64 bytes, as its panels are */
    const float *scales;
    const int32_t *sums;
    const float *bias;  /* or NULL */
    const float *added; /* or NULL; of the shape of out */
    void *out;
    int64_t batch, height, width, channels; /* channels: a multiple of four */
    int64_t out_height, out_width, outputs;
    int64_t kernel_height, kernel_width; /* at most MOST_TAPS together */
    int64_t top, left, down, right;      /* padding and stride */
    int64_t spread_y, spread_x;          /* dilation */
    float scale;
    int32_t zero_point;
    int32_t is_bfloat16; /* of out */
} Product;

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

/* The rows of `count` output pixels from the `first`; those that are missing in a tile repeat the last one. */
static void find_rows(const Product *product, int64_t first, int64_t count, const uint8_t *outside, Tile *tile)
{
    int64_t ox = first % product->out_width, oy = first / product->out_width % product->out_height;
    int64_t sample = first / (product->out_width * product->out_height);
    int64_t line = product->width * product->channels;
    for (int64_t p = 0; p < PIXELS; p++) {
        const uint8_t *image = product->codes + sample * product->height * line, **own = tile->rows + p;
        int64_t x_first = ox * product->right - product->left, y = oy * product->down - product->top;
        for (int64_t ky = 0; ky < product->kernel_height; ky++, y += product->spread_y) {
            int has_line = y >= 0 && y < product->height;
            int64_t x = x_first;
            for (int64_t kx = 0; kx < product->kernel_width; kx++, x += product->spread_x, own += PIXELS)
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

/* The upper halves, rounded to nearest even; for finite numbers. */
static inline __m256i bfloat16_of(__m512 y)
{
    __m512i bits = _mm512_castps_si512(y);
    __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    bits = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(bits, 16));
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
    for (int v = 0; v < wide; v++, output += LANES) {
        int64_t left = product->outputs - output;
        __mmask16 mask = left >= LANES ? 0xffff : (__mmask16)((1u << left) - 1);
        __m512i shift = _mm512_mullo_epi32(_mm512_maskz_loadu_epi32(mask, product->sums + output),
                                           _mm512_set1_epi32(product->zero_point));
        __m512 gain = _mm512_mul_ps(_mm512_maskz_loadu_ps(mask, product->scales + output),
                                    _mm512_set1_ps(product->scale));
        __m512 bias = _mm512_setzero_ps();
        if (product->bias != NULL)
            bias = _mm512_maskz_loadu_ps(mask, product->bias + output);
        for (int64_t p = 0; p < count; p++) {
            int64_t at = (first + p) * product->outputs + output;
            __m512 sum = _mm512_cvtepi32_ps(_mm512_sub_epi32(tile->sums[p][v], shift));
            __m512 y = _mm512_fmadd_ps(sum, gain, bias);
            if (product->added != NULL)
                y = _mm512_add_ps(y, _mm512_maskz_loadu_ps(mask, product->added + at));
            if (product->is_bfloat16)
                _mm256_mask_storeu_epi16((uint16_t *)product->out + at, mask, bfloat16_of(y));
            else
                _mm512_mask_storeu_ps((float *)product->out + at, mask, y);
        }
    }
}

/* How many panels a tile is multiplied by before the next one: their weights stay in the second cache. One,
 * where there are few tiles, so that every thread has work. */
static int64_t panels_at_once(int64_t panels, int64_t tiles, int64_t depth)
{
    int64_t fitting = CACHED / (VECTORS * LANES * depth);
    if (fitting < 1 || tiles < 4 * (int64_t)omp_get_max_threads())
        return 1;
    return fitting < panels ? fitting : panels;
}

/* Returns 0, or 1 where memory is missing. `added` may be `out`. */
int errata_int8_product(const Product *product)
{
    uint8_t *outside = malloc((size_t)product->channels);
    if (outside == NULL)
        return 1;
    memset(outside, product->zero_point, (size_t)product->channels);
    int64_t taps = product->kernel_height * product->kernel_width, depth = taps * product->channels;
    int64_t pixels = product->batch * product->out_height * product->out_width;
    int64_t vectors = (product->outputs + LANES - 1) / LANES;
    int64_t panels = (vectors + VECTORS - 1) / VECTORS, tiles = (pixels + PIXELS - 1) / PIXELS;
    int64_t together = panels_at_once(panels, tiles, depth);

#pragma omp parallel for collapse(2) schedule(static)
    for (int64_t start = 0; start < panels; start += together)
        for (int64_t t = 0; t < tiles; t++) {
            Tile tile;
            int64_t first = t * PIXELS, count = pixels - first < PIXELS ? pixels - first : PIXELS;
            find_rows(product, first, count, outside, &tile);
            for (int64_t panel = start; panel < panels && panel < start + together; panel++) {
                int wide = vectors - panel * VECTORS < VECTORS ? (int)(vectors - panel * VECTORS) : VECTORS;
                const int8_t *weight = product->weight + panel * VECTORS * LANES * depth;
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
#endif
