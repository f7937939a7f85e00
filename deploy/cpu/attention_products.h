/* The two products of attention.c, S = Q K^T and O += P V, in bfloat16, by vectors and by tiles. */

#ifndef ERRATA_ATTENTION_PRODUCTS_H
#define ERRATA_ATTENTION_PRODUCTS_H

#include "attention.h"
#include <string.h>
#if HAS_TILES
#include "tiles.h"
#endif

typedef uint16_t Element;
typedef __m512 Sums;
typedef __m512bh Reads;
#define PAIR 2
#define SUM_LANES LANES
#define WIDE 4

static inline Reads load_reads(const Element *from)
{
    return (__m512bh)_mm512_loadu_si512(from);
}

static inline Reads pair_of(const Element *two)
{
    int32_t both;
    memcpy(&both, two, sizeof both);
    return (__m512bh)_mm512_set1_epi32(both);
}

static inline Sums multiply_add(Sums sums, Reads pair, Reads read)
{
    return _mm512_dpbf16_ps(sums, pair, read);
}

#include "attention_vectors.h"

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
#if HAS_TILES
    for (int64_t j = 0; of->kind == TILES && j < keys; j += 32)
        for (int64_t i = 0; i < rows; i += TILED)
            score_tiles(sizes, work->query + i * sizes->channels,
                        key + j / PANEL * PANEL * sizes->channels + j % PANEL * 2, work->scores + i * KEYS + j);
#endif
    if (of->kind != TILES)
        score_by_vectors(sizes, key, keys, rows, work);
}

/* Adds P V to O for all queries of a block. */
static void add(const Attention *of, const Sizes *sizes, const uint16_t *value, int64_t keys, int64_t rows, Work *work)
{
#if HAS_TILES
    for (int64_t i = 0; of->kind == TILES && i < rows; i += TILED)
        add_tiles(sizes, work->weights + i * KEYS, value, keys, work->sums + i * sizes->columns);
#endif
    if (of->kind != TILES)
        add_by_vectors(sizes, value, keys, rows, work);
}

#endif
