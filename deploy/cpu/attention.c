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
 * Two ways to multiply, by `kind`, both in bfloat16 with float32 sums: by vectors (AVX512-BF16), or by tiles (AMX),
 * sixteen queries by sixteen keys by thirty-two channels in one instruction. Rounding to bfloat16 is to nearest even.
 * Scores, the softmax and all sums are float32. Other CPUs have no such code.
 *
 * Where the lengths of queries and keys show that no score of a block exceeds SMALL, m is 0: powers of two of such
 * scores are numbers of float32 and bfloat16, as exact as any. Else, and under a mask, m is found as keys come.
 *
 * Keys and values of a head are packed first, then each block of queries is a task of its own: neither threads nor
 * neighbours in a batch change a result.
 *
 *   packed K   for each 64 keys: pairs of channels x 64 keys x 2
 *   packed V   pairs of keys x columns x 2; columns: width in sixteens
 *
 * Sources: Milakov and Gimelshein 2018, "Online normalizer calculation for softmax", algorithm 3; Dao et al. 2022,
 * "FlashAttention", algorithm 1.
 */

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(__AVX512BF16__) && defined(__AVX512F__) && defined(__AVX512DQ__) && defined(__AVX512BW__) && \
    defined(__AVX512VL__)
#include "attention_products.h"

/* Channels of a token and a head, times `factor`, rounded; returns their squared length. */
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

static Sizes sizes_of(const Attention *of)
{
    Sizes sizes;
    int64_t unit = of->kind == TILES ? 32 : 2;
    sizes.channels = (of->width + unit - 1) / unit * unit;
    sizes.columns = (of->width + 15) / 16 * 16;
    sizes.keys = (of->keys + PANEL - 1) / PANEL * PANEL;
    return sizes;
}

/* Where a head of a sample begins, in elements. */
static inline int64_t start_of(const Attention *of, int64_t head, int64_t tokens)
{
    return (head / of->heads * tokens * of->heads + head % of->heads) * of->width;
}

/* Packs a panel of keys of a head; what is missing is zero. */
static void pack_keys(const Attention *of, const Sizes *sizes, int64_t head, int64_t first, const Head *to)
{
    uint32_t pairs[MOST_WIDTH / 2] = { 0 };
    uint16_t *panel = to->key + first * sizes->channels;
    int64_t row = of->heads * of->width, count = (of->width + 1) / 2;
    float longest = 0;
    memset(panel, 0, (size_t)(PANEL * sizes->channels) * sizeof *panel);
    for (int64_t j = 0; j < PANEL && first + j < of->keys; j++) {
        int64_t from = start_of(of, head, of->keys) + (first + j) * row;
        float length = take(of, of->key, from, 1, (uint16_t *)pairs);
        longest = length <= longest ? longest : length; /* NaN is longer than any */
        for (int64_t pair = 0; pair < count; pair++)
            memcpy(panel + (pair * PANEL + j) * 2, pairs + pair, sizeof *pairs);
    }
    to->lengths[first / PANEL] = longest;
}

/* Packs a panel of values of a head; what is missing is zero. */
static void pack_values(const Attention *of, const Sizes *sizes, int64_t head, int64_t first, const Head *to)
{
    uint16_t *panel = to->value + first * sizes->columns;
    int64_t row = of->heads * of->width, from = start_of(of, head, of->keys) + first * row;
    int64_t known = of->keys - first < PANEL ? of->keys - first : PANEL;
    memset(panel, 0, (size_t)(PANEL * sizes->columns) * sizeof *panel);
    for (int64_t j = 0; j < known; j += 2) {
        uint16_t even[MOST_WIDTH], odd[MOST_WIDTH] = { 0 }, *pairs = panel + j * sizes->columns;
        take(of, of->value, from + j * row, 1, even);
        if (j + 1 < known)
            take(of, of->value, from + (j + 1) * row, 1, odd);
        for (int64_t c = 0; c < of->width; c++) {
            pairs[2 * c] = even[c];
            pairs[2 * c + 1] = odd[c];
        }
    }
}

/* The queries of a block, scaled; those that are missing repeat the last one. */
static void take_queries(const Attention *of, const Sizes *sizes, int64_t head, int64_t first, int64_t rows,
                         const Head *packed, Work *work)
{
    int64_t row = of->heads * of->width, from = start_of(of, head, of->queries);
    float longest = 0, longest_key = 0;
    memset(work->query, 0, (size_t)(rows * sizes->channels) * sizeof *work->query);
    memset(work->sums, 0, (size_t)(rows * sizes->columns) * sizeof(float));
    memset(work->totals, 0, sizeof work->totals);
    for (int64_t i = 0; i < rows; i++) {
        int64_t query = first + i < of->queries ? first + i : of->queries - 1;
        float length = take(of, of->query, from + query * row, of->scale * LOG2_E,
                            work->query + i * sizes->channels);
        longest = length <= longest ? longest : length;
    }
    for (int64_t panel = 0; panel < sizes->keys / PANEL; panel++)
        longest_key = packed->lengths[panel] <= longest_key ? longest_key : packed->lengths[panel];
    work->is_bounded = of->mask == NULL && longest * longest_key <= SMALL * SMALL; /* |S| <= |q| |k|; not if NaN */
    for (int64_t i = 0; i < rows; i++)
        work->most[i] = work->is_bounded ? 0 : NOTHING;
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

/* The mask, in the units of S. */
static void add_mask(const float *mask, int64_t keys, float *scores)
{
    for (int64_t j = 0; j < keys; j++) {
        float s = scores[j] + LOG2_E * mask[j];
        scores[j] = s < NOTHING ? NOTHING : s;
    }
}

/* The largest of a row, and of what was the largest before. */
static float largest(const float *scores, int64_t keys, float most)
{
    __m512 found = _mm512_set1_ps(most);
    for (int64_t j = 0; j < keys; j += 16)
        found = _mm512_max_ps(found, _mm512_load_ps(scores + j));
    return _mm512_reduce_max_ps(found);
}

/* P of a row of S, of a multiple of 32; its sum is added to sixteen numbers. `most` is m, or 0 if `is_bounded`. */
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

/* Turns S of one query into P; where m grows, what was summed before is scaled. */
static void normalize(const Sizes *sizes, int64_t i, const float *mask, int64_t known,
                      int64_t keys, Work *work)
{
    float *scores = work->scores + i * KEYS, *totals = work->totals + i * 16;
    uint16_t *weights = work->weights + i * KEYS;
    for (int64_t j = known; j < keys; j++)
        scores[j] = NOTHING;
    if (work->is_bounded) {
        weigh(scores, keys, 0, 1, totals, weights);
        return;
    }
    if (mask != NULL)
        add_mask(mask, known, scores);
    float before = work->most[i], most = largest(scores, keys, before);
    if (most > before) {
        float shrink = before == NOTHING ? 0 : exp2f(before - most), *sums = work->sums + i * sizes->columns;
        work->most[i] = most;
        for (int64_t part = 0; part < 16; part++)
            totals[part] *= shrink;
        for (int64_t c = 0; c < sizes->columns; c++)
            sums[c] *= shrink;
    }
    weigh(scores, keys, most, 0, totals, weights);
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

static void write_row(const Attention *of, const float *sums, const float *totals, int64_t at)
{
    float total = 0;
    for (int64_t part = 0; part < 16; part++)
        total += totals[part];
    float share = 1 / total;
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

/* All of a block of queries. */
static void attend(const Attention *of, const Sizes *sizes, int64_t head, int64_t first, int64_t rows,
                   const Head *packed, Work *work)
{
    int64_t count = of->queries - first < rows ? of->queries - first : rows;
    take_queries(of, sizes, head, first, rows, packed, work);
    for (int64_t start = 0; start < of->keys; start += KEYS) {
        int64_t left = of->keys - start, known = left < KEYS ? left : KEYS;
        int64_t unit = of->kind == TILES ? 32 : PANEL, keys = (known + unit - 1) / unit * unit;
        const uint16_t *key = packed->key + start * sizes->channels;
        const uint16_t *value = packed->value + start * sizes->columns;
#if HAS_TILES
        if (of->kind == TILES && work->is_bounded) {
            for (int64_t i = 0; i < rows; i += TILED)
                weigh_bounded(sizes, key, known, keys, i, work);
            add(of, sizes, value, keys, rows, work);
            continue;
        }
#endif
        score(of, sizes, key, keys, rows, work);
        for (int64_t i = 0; i < rows; i++) {
            const float *mask = of->mask;
            int64_t query = first + i < of->queries ? first + i : of->queries - 1;
            if (mask != NULL)
                mask += head * of->mask_head + query * of->mask_query + start;
            normalize(sizes, i, mask, known, keys, work);
        }
        add(of, sizes, value, keys, rows, work);
    }
    int64_t row = of->heads * of->width, at = start_of(of, head, of->queries) + first * row;
    for (int64_t i = 0; i < count; i++, at += row)
        write_row(of, work->sums + i * sizes->columns, work->totals + i * 16, at);
}

/* Whether this build has a way to multiply. */
int errata_has_attention(int kind)
{
    return kind == VECTORS || (kind == TILES && HAS_TILES);
}

/* How many queries are a block: more read the keys less often, fewer leave less to do in vain. */
static int64_t rows_at_once(const Attention *of)
{
    int64_t unit = of->kind == TILES ? TILED : GROUP, most = of->kind == TILES ? QUERIES : GROUPED;
    int64_t all = (of->queries + unit - 1) / unit * unit;
    return all < most ? all : most;
}

/* Memory for a head, from that for all. */
static Head head_of(const Sizes *sizes, int64_t head, uint16_t *keys, uint16_t *values, float *lengths)
{
    Head of = { keys + head * sizes->keys * sizes->channels, values + head * sizes->keys * sizes->columns,
                lengths + head * sizes->keys / PANEL };
    return of;
}

/* Returns 0, or 1 where memory is missing. */
int errata_attention(const Attention *of)
{
    Sizes sizes = sizes_of(of);
    int64_t heads = of->batch * of->heads, panels = sizes.keys / PANEL, rows = rows_at_once(of);
    int64_t blocks = (of->queries + rows - 1) / rows;
    size_t tokens = (size_t)(heads * sizes.keys);
    uint16_t *keys = aligned_alloc(64, tokens * (size_t)sizes.channels * sizeof *keys);
    uint16_t *values = aligned_alloc(64, tokens * (size_t)sizes.columns * sizeof *values);
    float *lengths = malloc((size_t)(heads * panels) * sizeof(float));
    int failed = keys == NULL || values == NULL || lengths == NULL;
    if (!failed)
#pragma omp parallel reduction(| : failed)
    {
#pragma omp for collapse(2) schedule(static)
        for (int64_t head = 0; head < heads; head++)
            for (int64_t panel = 0; panel < panels; panel++) {
                Head to = head_of(&sizes, head, keys, values, lengths);
                pack_keys(of, &sizes, head, panel * PANEL, &to);
                pack_values(of, &sizes, head, panel * PANEL, &to);
            }
        Work *work = aligned_alloc(64, (sizeof(Work) + 63) / 64 * 64);
        failed = work == NULL;
#if HAS_TILES
        if (of->kind == TILES)
            configure_tiles(ROW_BYTES);
#endif
#pragma omp for collapse(2) schedule(dynamic)
        for (int64_t head = 0; head < heads; head++)
            for (int64_t block = 0; block < blocks; block++)
                if (work != NULL) {
                    Head packed = head_of(&sizes, head, keys, values, lengths);
                    attend(of, &sizes, head, block * rows, rows, &packed, work);
                }
#if HAS_TILES
        if (of->kind == TILES)
            _tile_release();
#endif
        free(work);
    }
    free(keys);
    free(values);
    free(lengths);
    return failed;
}
#else
int errata_has_attention(int kind)
{
    (void)kind;
    return 0;
}

int errata_attention(const void *of)
{
    (void)of;
    return 1;
}
#endif
