/* Attention, block by block: the matrix of scores is never whole.
 *
 *   symbol     here              meaning
 *   Q, K, V    query, key, value (batch, tokens, heads x width), as projections write them; float32 or bfloat16
 *   c          scale             of the scores
 *   b          mask              added to the scores, or NULL
 *   S          scores            log2(e) (c Q K^T + b), of a block of queries and a block of keys
 *   m, l       most, total       of each query: largest score so far, or 0, and sum of 2^(S - m)
 *   P          weights           2^(S - m)
 *   O          sums              P V, scaled down where m grows
 *   y          out               O / l, float32, or its codes clamp(round(y / s) + z, 0, 255)
 *
 * Three ways to multiply, by `kind`. Two are in bfloat16 with float32 sums, and here: by vectors (AVX512-BF16), or by
 * tiles (AMX), sixteen queries by sixteen keys by thirty-two channels in one instruction. Rounding to bfloat16 is to
 * nearest even. The third, in attention_float.c, is in float32, by vectors (AVX-512, or AVX2 with FMA). Scores, the
 * softmax and all sums are float32. Other CPUs have no such code.
 *
 * Where the lengths of queries and keys show that no score of a block exceeds SMALL, m is 0: powers of two of such
 * scores are numbers of float32 and bfloat16, as exact as any. Else, and under a mask, m is found as keys come.
 *
 * Keys and values of a head are packed first, then each block of queries is a task of its own: neither threads nor
 * neighbours in a batch change a result.
 *
 *   packed K   for each 64 keys: pairs of channels x 64 keys x 2; in float32 channels x 64 keys
 *   packed V   pairs of keys x columns x 2; in float32 keys x columns; columns: width in whole vectors
 *
 * What both types share is in attention_flow.h, packing, blocks and the softmax, and in attention_vectors.h.
 *
 * Sources: Milakov and Gimelshein 2018, "Online normalizer calculation for softmax", algorithm 3; Dao et al. 2022,
 * "FlashAttention", algorithm 1.
 */

#include "attention.h"
#include <stdint.h>

#if defined(__AVX512BF16__) && HAS_AVX512
#define HAS_BFLOAT16 1
#else
#define HAS_BFLOAT16 0
#endif

/* In attention_float.c. */
int errata_has_float_attention(void);
int errata_float_attention(const Attention *of);

#if HAS_BFLOAT16
#include "attention_products.h"

static float take(const Attention *of, const void *from, int64_t at, float factor, uint16_t *to)
{
    __m512 lengths = _mm512_setzero_ps(), by = _mm512_set1_ps(factor);
    for (int64_t c = 0; c < of->width; c += 16) {
        __mmask16 mask = first_lanes(of->width - c);
        __m512 x;
        if (of->is_bfloat16) {
            __m256i halves = _mm256_maskz_loadu_epi16(mask, (const uint16_t *)from + at + c);
            x = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
        } else
            x = _mm512_maskz_loadu_ps(mask, (const float *)from + at + c);
        x = _mm512_mul_ps(x, by);
        lengths = _mm512_fmadd_ps(x, x, lengths);
        _mm256_mask_storeu_epi16(to + c, mask, (__m256i)_mm512_cvtneps_pbh(x));
    }
    return _mm512_reduce_add_ps(lengths);
}

/* Keys are scored in multiples of it. */
static int64_t key_unit(const Attention *of)
{
    return of->kind == TILES ? 32 : PANEL;
}

static Sizes sizes_of(const Attention *of)
{
    Sizes sizes;
    int64_t unit = of->kind == TILES ? 32 : PAIR;
    sizes.channels = (of->width + unit - 1) / unit * unit;
    sizes.columns = (of->width + 15) / 16 * 16;
    sizes.keys = (of->keys + PANEL - 1) / PANEL * PANEL;
    return sizes;
}

/* 2^u, with a relative error below 1e-4: a twentieth of what rounding to bfloat16 adds. */
static inline __m512 rough_powers_of_two(__m512 u)
{
    __m512 f = _mm512_reduce_ps(u, DOWN), p = _mm512_set1_ps(7.80245012e-2f); /* f = u - floor(u) */
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(2.26067186e-1f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(6.9583353e-1f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(9.99925219e-1f));
    return _mm512_scalef_ps(p, u); /* by 2^floor(u) */
}

static float largest(const float *scores, int64_t keys, float most)
{
    __m512 found = _mm512_set1_ps(most);
    for (int64_t j = 0; j < keys; j += 16)
        found = _mm512_max_ps(found, _mm512_load_ps(scores + j));
    return _mm512_reduce_max_ps(found);
}

/* `most` is m, or 0 if `is_bounded`. */
static inline __attribute__((always_inline)) void weigh(const float *scores, int64_t keys, float most,
                                                        const int is_bounded, float *totals, uint16_t *weights)
{
    __m512 total = _mm512_load_ps(totals), other = _mm512_setzero_ps(), shift = _mm512_set1_ps(most);
    for (int64_t j = 0; j < keys; j += 32) {
        __m512 low = _mm512_load_ps(scores + j), high = _mm512_load_ps(scores + j + 16);
        low = rough_powers_of_two(is_bounded ? low : _mm512_sub_ps(low, shift));
        high = rough_powers_of_two(is_bounded ? high : _mm512_sub_ps(high, shift));
        total = _mm512_add_ps(total, low);
        other = _mm512_add_ps(other, high);
        _mm512_store_si512(weights + j, (__m512i)_mm512_cvtne2ps_pbh(high, low));
    }
    _mm512_store_ps(totals, _mm512_add_ps(total, other));
}

#if HAS_TILES
/* P of two tiles of queries whose scores are bounded, 32 keys at a time. While tiles multiply for the next ones,
 * vectors take the powers of these: after each instruction of tiles, those of as many rows as are its share. */
static void weigh_bounded(const Sizes *sizes, const uint16_t *key, int64_t known, int64_t keys, int64_t first,
                          Work *work)
{
    const uint16_t *query = work->query + first * sizes->channels;
    float *chunks[2] = { work->scores, work->scores + TILED * 32 };
    int64_t share = TILED * 32 / sizes->channels;
    begin_scores(query);
    for (int64_t c = 0; c < sizes->channels; c += 32)
        add_scores(sizes, query, key, c);
    end_scores(chunks[0], 32);
    for (int64_t j = 0; j < keys; j += 32) {
        float *scores = chunks[j / 32 % 2];
        int64_t next = j + 32;
        const uint16_t *following = key + next / PANEL * PANEL * sizes->channels + next % PANEL * 2;
        for (int64_t i = 0; i < TILED; i++)
            for (int64_t missing = known - j; missing < 32; missing++)
                scores[i * 32 + missing] = NOTHING;
        begin_scores(query);
        for (int64_t c = 0, i = 0; i < TILED; c += 32) {
            if (next < keys && c < sizes->channels)
                add_scores(sizes, query, following, c);
            int64_t until = c + 32 < sizes->channels ? i + share : TILED;
            for (; i < until; i++)
                weigh(scores + i * 32, 32, 0, 1, work->totals + (first + i) * 16,
                      work->weights + (first + i) * KEYS + j);
        }
        if (next < keys)
            end_scores(chunks[next / 32 % 2], 32);
    }
}
#endif

static void write_row(const Attention *of, const float *sums, float share, int64_t at)
{
    if (!of->has_codes) {
        for (int64_t c = 0; c < of->width; c++)
            ((float *)of->out)[at + c] = sums[c] * share;
        return;
    }
    __m512 inverse = _mm512_set1_ps(1 / of->out_scale), by = _mm512_set1_ps(share);
    __m512i zero_point = _mm512_set1_epi32(of->out_zero_point);
    uint8_t *codes = (uint8_t *)of->out + at;
    for (int64_t c = 0; c < of->width; c += LANES) { /* sums are there for whole vectors */
        __m512 y = _mm512_mul_ps(_mm512_load_ps(sums + c), by);
        store_some_codes(codes + c, first_lanes(of->width - c), y, inverse, zero_point);
    }
}

/* How many queries are a block: more read the keys less often, fewer leave less to do in vain. */
static int64_t rows_at_once(const Attention *of)
{
    int64_t unit = of->kind == TILES ? TILED : GROUP, most = of->kind == TILES ? QUERIES : GROUPED;
    int64_t all = (of->queries + unit - 1) / unit * unit;
    return all < most ? all : most;
}

/* Of tiles, where the scores are bounded. */
static int weigh_at_once(const Attention *of, const Sizes *sizes, const Element *key, int64_t known, int64_t keys,
                         int64_t rows, Work *work)
{
#if HAS_TILES
    if (of->kind == TILES && work->is_bounded) {
        for (int64_t i = 0; i < rows; i += TILED)
            weigh_bounded(sizes, key, known, keys, i, work);
        return 1;
    }
#endif
    (void)of, (void)sizes, (void)key, (void)known, (void)keys, (void)rows, (void)work;
    return 0;
}

static void begin_thread(const Attention *of)
{
#if HAS_TILES
    if (of->kind == TILES)
        configure_tiles(ROW_BYTES);
#endif
    (void)of;
}

static void end_thread(const Attention *of)
{
#if HAS_TILES
    if (of->kind == TILES)
        _tile_release();
#endif
    (void)of;
}

#include "attention_flow.h"
#endif

/* Whether this build has a way to multiply. */
int errata_has_attention(int kind)
{
    if (kind == FLOATS)
        return errata_has_float_attention();
    return HAS_BFLOAT16 && (kind == VECTORS || (kind == TILES && HAS_TILES));
}

/* Returns 0, or 1 where memory is missing. */
int errata_attention(const Attention *of)
{
#if HAS_BFLOAT16
    if (of->kind != FLOATS)
        return attend_all(of);
#endif
    return errata_float_attention(of);
}
