/* The two products of attention.c, S = Q K^T and O += P V, by vectors and by tiles. */

#ifndef ERRATA_ATTENTION_PRODUCTS_H
#define ERRATA_ATTENTION_PRODUCTS_H

#include "attention.h"
#include <string.h>
#if HAS_TILES
#include "tiles.h"
#endif

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
                for (int64_t i = 0; i < rows; i += TILED)
                    score_tiles(sizes, work->query + i * sizes->channels, panel + 2 * half,
                                work->scores + i * KEYS + j + half);
            continue;
        }
#else
        (void)of;
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
        for (int64_t i = 0; i < rows; i += TILED)
            add_tiles(sizes, work->weights + i * KEYS, value, keys, work->sums + i * sizes->columns);
        return;
    }
#else
    (void)of;
#endif
    for (int64_t i = 0; i < rows; i += GROUP)
        add_group(sizes, work->weights + i * KEYS, value, keys, work->sums + i * sizes->columns);
}

#endif
