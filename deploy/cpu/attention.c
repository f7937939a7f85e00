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
#include <immintrin.h>
#if defined(__AMX_BF16__) && defined(__AMX_TILE__)
#define HAS_TILES 1
#else
#define HAS_TILES 0
#endif

#define LOG2_E 1.44269504f
#define NOTHING (-1e30f) /* a score that weighs nothing; finite, since the difference of infinities is none */
#define SMALL 60.0f
#define MOST_WIDTH 256   /* channels of a head */
#define PANEL 64         /* keys that are packed together */
#define KEYS 256         /* of a block */
#define QUERIES 64       /* of a block, at most */
#define GROUPED 48       /* the same for vectors */
#define GROUP 6          /* queries that vectors multiply at once: 24 of 32 registers hold sums */
#define ROWS 16          /* of a tile */

enum { VECTORS, TILES };

typedef struct {
    const void *query, *key, *value;
    const float *mask;
    void *out;
    int64_t batch, heads, queries, keys, width;
    int64_t mask_head, mask_query; /* steps of the mask from one head of a sample, and one query, to the next */
    float scale, out_scale;
    int32_t out_zero_point, has_codes; /* whether `out` gets codes */
    int32_t is_bfloat16;               /* whether Q, K and V are */
    int32_t kind;
} Attention;

/* Sizes of the packed forms, in elements. */
typedef struct {
    int64_t channels; /* of Q and K: width, in thirty-twos for tiles, in twos for vectors */
    int64_t columns;  /* of V and O */
    int64_t keys;     /* whole panels */
} Sizes;

/* A head of K and V, packed. */
typedef struct {
    uint16_t *key, *value;
    float *lengths; /* of the longest key of each panel, squared */
} Head;

/* What a thread works on. */
typedef struct {
    float scores[QUERIES * KEYS] __attribute__((aligned(64)));
    float sums[QUERIES * MOST_WIDTH] __attribute__((aligned(64)));
    uint16_t weights[QUERIES * KEYS] __attribute__((aligned(64)));
    uint16_t query[QUERIES * MOST_WIDTH] __attribute__((aligned(64)));
    float totals[QUERIES * 16] __attribute__((aligned(64))); /* l, as sixteen summands */
    float most[QUERIES];
    int is_bounded; /* whether m stays 0 */
} Work;

/* Channels of a token and a head, times `factor`, rounded; returns their squared length. */
static float take(const Attention *of, const void *from, int64_t at, float factor, uint16_t *to)
{
    __m512 lengths = _mm512_setzero_ps(), by = _mm512_set1_ps(factor);
    for (int64_t c = 0; c < of->width; c += 16) {
        __mmask16 mask = of->width - c >= 16 ? 0xffff : (__mmask16)((1u << (of->width - c)) - 1);
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

#define DOWN (_MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC)

/* 2^u, with a relative error below 1e-4: a twentieth of what rounding to bfloat16 adds. */
static inline __m512 powers_of_two(__m512 u)
{
    __m512 f = _mm512_reduce_ps(u, DOWN), p = _mm512_set1_ps(7.80245012e-2f); /* f = u - floor(u) */
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(2.26067186e-1f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(6.9583353e-1f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(9.99925219e-1f));
    return _mm512_scalef_ps(p, u); /* by 2^floor(u) */
}

static inline __m512bh pair_of(const uint16_t *two)
{
    int32_t both;
    memcpy(&both, two, sizeof both);
    return (__m512bh)_mm512_set1_epi32(both);
}

/* Adds the products of GROUP rows of pairs, `distance` apart, with `pairs` rows of `wide` vectors, `step` apart. */
static inline __attribute__((always_inline)) void multiply_pairs(const uint16_t *rows, int64_t distance,
                                                                    const uint16_t *columns, int64_t step,
                                                                    int64_t pairs, float *sums, int64_t sums_distance,
                                                                    const int wide)
{
    __m512 own[GROUP][4];
#pragma GCC unroll 6
    for (int i = 0; i < GROUP; i++)
#pragma GCC unroll 4
        for (int v = 0; v < wide; v++)
            own[i][v] = _mm512_loadu_ps(sums + i * sums_distance + 16 * v);
    for (int64_t p = 0; p < pairs; p++, columns += step) {
        __m512bh read[4];
#pragma GCC unroll 4
        for (int v = 0; v < wide; v++)
            read[v] = (__m512bh)_mm512_loadu_si512(columns + 32 * v);
#pragma GCC unroll 6
        for (int i = 0; i < GROUP; i++) {
            __m512bh pair = pair_of(rows + i * distance + 2 * p);
#pragma GCC unroll 4
            for (int v = 0; v < wide; v++)
                own[i][v] = _mm512_dpbf16_ps(own[i][v], pair, read[v]);
        }
    }
#pragma GCC unroll 6
    for (int i = 0; i < GROUP; i++)
#pragma GCC unroll 4
        for (int v = 0; v < wide; v++)
            _mm512_storeu_ps(sums + i * sums_distance + 16 * v, own[i][v]);
}

/* S of a group of queries and a panel of keys. */
static void score_group(const Sizes *sizes, const uint16_t *query, const uint16_t *key, float *scores)
{
    for (int i = 0; i < GROUP; i++)
        memset(scores + i * KEYS, 0, PANEL * sizeof(float));
    multiply_pairs(query, sizes->channels, key, 2 * PANEL, sizes->channels / 2, scores, KEYS, 4);
}

/* Adds P V of a group of queries and `keys` keys to O. */
static void add_group(const Sizes *sizes, const uint16_t *weights, const uint16_t *value, int64_t keys, float *sums)
{
    int64_t c = 0, step = 2 * sizes->columns;
    for (; c + 64 <= sizes->columns; c += 64)
        multiply_pairs(weights, KEYS, value + 2 * c, step, keys / 2, sums + c, sizes->columns, 4);
    switch ((sizes->columns - c) / 16) {
    case 3: multiply_pairs(weights, KEYS, value + 2 * c, step, keys / 2, sums + c, sizes->columns, 3); break;
    case 2: multiply_pairs(weights, KEYS, value + 2 * c, step, keys / 2, sums + c, sizes->columns, 2); break;
    case 1: multiply_pairs(weights, KEYS, value + 2 * c, step, keys / 2, sums + c, sizes->columns, 1); break;
    }
}

#if HAS_TILES
/* Makes the compiler finish what was written before: to gcc 12, instructions that load tiles read no memory. */
#define WRITTEN(address) __asm__ volatile("" : : "r"(address) : "memory")

typedef struct {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
} __attribute__((packed)) Configuration;

static void configure(void)
{
    Configuration tiles = { .palette = 1 };
    for (int tile = 0; tile < 8; tile++) {
        tiles.rows[tile] = ROWS;
        tiles.row_bytes[tile] = 64;
    }
    WRITTEN(&tiles);
    _tile_loadconfig(&tiles);
}

static inline void begin_scores(const uint16_t *query)
{
    WRITTEN(query);
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
}

/* Adds what thirty-two channels, from the c-th, give to S of two tiles of queries and two of keys. */
static inline void add_scores(const Sizes *sizes, const uint16_t *query, const uint16_t *key, int64_t c)
{
    const int64_t row = sizes->channels * 2, panel = PANEL * 4;
    _tile_loadd(6, key + c * PANEL, panel);
    _tile_loadd(4, query + c, row);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(7, key + c * PANEL + 32, panel);
    _tile_dpbf16ps(1, 4, 7);
    _tile_loadd(5, query + ROWS * sizes->channels + c, row);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
}

/* Writes S; its rows are `distance` apart. */
static inline void end_scores(float *scores, int64_t distance)
{
    const int64_t out = distance * 4;
    _tile_stored(0, scores, out);
    _tile_stored(1, scores + 16, out);
    _tile_stored(2, scores + ROWS * distance, out);
    _tile_stored(3, scores + ROWS * distance + 16, out);
}

static void score_tiles(const Sizes *sizes, const uint16_t *query, const uint16_t *key, float *scores)
{
    begin_scores(query);
    for (int64_t c = 0; c < sizes->channels; c += 32)
        add_scores(sizes, query, key, c);
    end_scores(scores, KEYS);
}

/* Adds P V of two tiles of queries to one or two tiles of columns of O. */
static inline __attribute__((always_inline)) void add_columns(const Sizes *sizes, const uint16_t *weights,
                                                              const uint16_t *value, int64_t keys, float *sums,
                                                              const int wide)
{
    const int64_t row = KEYS * 2, step = sizes->columns * 4;
    float *below = sums + ROWS * sizes->columns;
    WRITTEN(weights);
    _tile_loadd(0, sums, step);
    _tile_loadd(2, below, step);
    if (wide > 1) {
        _tile_loadd(1, sums + 16, step);
        _tile_loadd(3, below + 16, step);
    }
    for (int64_t j = 0; j < keys; j += 32, value += 32 * sizes->columns) {
        _tile_loadd(6, value, step);
        _tile_loadd(4, weights + j, row);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(5, weights + ROWS * KEYS + j, row);
        _tile_dpbf16ps(2, 5, 6);
        if (wide > 1) {
            _tile_loadd(7, value + 32, step);
            _tile_dpbf16ps(1, 4, 7);
            _tile_dpbf16ps(3, 5, 7);
        }
    }
    _tile_stored(0, sums, step);
    _tile_stored(2, below, step);
    if (wide > 1) {
        _tile_stored(1, sums + 16, step);
        _tile_stored(3, below + 16, step);
    }
}

static void add_tiles(const Sizes *sizes, const uint16_t *weights, const uint16_t *value, int64_t keys, float *sums)
{
    int64_t c = 0;
    for (; c + 32 <= sizes->columns; c += 32)
        add_columns(sizes, weights, value + 2 * c, keys, sums + c, 2);
    if (c < sizes->columns)
        add_columns(sizes, weights, value + 2 * c, keys, sums + c, 1);
}
#endif

/* S of all queries of a block and `keys` keys from the first of a panel. */
static void score(const Attention *of, const Sizes *sizes, const uint16_t *key, int64_t keys, int64_t rows, Work *work)
{
    for (int64_t j = 0; j < keys; j += PANEL) {
        const uint16_t *panel = key + j * sizes->channels;
#if HAS_TILES
        if (of->kind == TILES) {
            for (int64_t half = 0; half < PANEL && j + half < keys; half += 32)
                for (int64_t i = 0; i < rows; i += 2 * ROWS)
                    score_tiles(sizes, work->query + i * sizes->channels, panel + 2 * half,
                                work->scores + i * KEYS + j + half);
            continue;
        }
#endif
        for (int64_t i = 0; i < rows; i += GROUP)
            score_group(sizes, work->query + i * sizes->channels, panel, work->scores + i * KEYS + j);
    }
}

/* Adds P V to O for all queries of a block. */
static void add(const Attention *of, const Sizes *sizes, const uint16_t *value, int64_t keys, int64_t rows, Work *work)
{
#if HAS_TILES
    if (of->kind == TILES) {
        for (int64_t i = 0; i < rows; i += 2 * ROWS)
            add_tiles(sizes, work->weights + i * KEYS, value, keys, work->sums + i * sizes->columns);
        return;
    }
#endif
    for (int64_t i = 0; i < rows; i += GROUP)
        add_group(sizes, work->weights + i * KEYS, value, keys, work->sums + i * sizes->columns);
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
        low = powers_of_two(is_bounded ? low : _mm512_sub_ps(low, shift));
        high = powers_of_two(is_bounded ? high : _mm512_sub_ps(high, shift));
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
    float *chunks[2] = { work->scores, work->scores + 2 * ROWS * 32 };
    int64_t share = 2 * ROWS * 32 / sizes->channels;
    begin_scores(query);
    for (int64_t c = 0; c < sizes->channels; c += 32)
        add_scores(sizes, query, key, c);
    end_scores(chunks[0], 32);
    for (int64_t j = 0; j < keys; j += 32) {
        float *scores = chunks[j / 32 % 2];
        int64_t next = j + 32;
        const uint16_t *following = key + next / PANEL * PANEL * sizes->channels + next % PANEL * 2;
        for (int64_t i = 0; i < 2 * ROWS; i++)
            for (int64_t missing = known - j; missing < 32; missing++)
                scores[i * 32 + missing] = NOTHING;
        begin_scores(query);
        for (int64_t c = 0, i = 0; i < 2 * ROWS; c += 32) {
            if (next < keys && c < sizes->channels)
                add_scores(sizes, query, following, c);
            int64_t until = c + 32 < sizes->channels ? i + share : 2 * ROWS;
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
    float inverse = 1 / of->out_scale, zero_point = (float)of->out_zero_point;
    for (int64_t c = 0; c < of->width; c++) {
        float q = rintf(sums[c] * share * inverse) + zero_point;
        q = q > 0.0f ? q : 0.0f; /* NaN too becomes 0 */
        ((uint8_t *)of->out)[at + c] = (uint8_t)(int32_t)(q < 255.0f ? q : 255.0f);
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
            for (int64_t i = 0; i < rows; i += 2 * ROWS)
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
    int64_t unit = of->kind == TILES ? 2 * ROWS : GROUP, most = of->kind == TILES ? QUERIES : GROUPED;
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
            configure();
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
#endif
