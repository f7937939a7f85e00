/* The two products of an attention, S = Q K^T and O += P V, by vectors, for either type of number. Who includes this
 * has said what attention_work.h asks for, and has
 *
 *   Sums, Reads     a vector of sums, of SUM_LANES numbers, and what it is multiplied by: PAIR elements for each
 *   WIDE            vectors of sums in a row, at most 4
 *   load_reads, pair_of, multiply_add
 */

#ifndef ERRATA_ATTENTION_VECTORS_H
#define ERRATA_ATTENTION_VECTORS_H

#include "attention_work.h"
#include <string.h>

static inline Sums load_sums(const float *from)
{
    Sums sums;
    memcpy(&sums, from, sizeof sums);
    return sums;
}

/* Adds the products of GROUP rows of pairs, `distance` apart, with `pairs` rows of `wide` vectors, `step` apart; to
 * nothing, if it `begins`. */
static inline __attribute__((always_inline)) void multiply_pairs(const Element *rows, int64_t distance,
                                                                    const Element *columns, int64_t step,
                                                                    int64_t pairs, float *sums, int64_t sums_distance,
                                                                    const int wide, const int begins)
{
    Sums own[GROUP][4];
#pragma GCC unroll 6
    for (int i = 0; i < GROUP; i++)
#pragma GCC unroll 4
        for (int v = 0; v < wide; v++)
            own[i][v] = begins ? (Sums){ 0 } : load_sums(sums + i * sums_distance + SUM_LANES * v);
    for (int64_t p = 0; p < pairs; p++, columns += step) {
        Reads read[4];
#pragma GCC unroll 4
        for (int v = 0; v < wide; v++)
            read[v] = load_reads(columns + PAIR * SUM_LANES * v);
#pragma GCC unroll 6
        for (int i = 0; i < GROUP; i++) {
            Reads pair = pair_of(rows + i * distance + PAIR * p);
#pragma GCC unroll 4
            for (int v = 0; v < wide; v++)
                own[i][v] = multiply_add(own[i][v], pair, read[v]);
        }
    }
#pragma GCC unroll 6
    for (int i = 0; i < GROUP; i++)
#pragma GCC unroll 4
        for (int v = 0; v < wide; v++)
            memcpy(sums + i * sums_distance + SUM_LANES * v, &own[i][v], sizeof own[i][v]);
}

/* S of a group of queries and a panel of keys. */
static void score_group(const Sizes *sizes, const Element *query, const Element *key, float *scores)
{
    for (int64_t j = 0; j < PANEL; j += WIDE * SUM_LANES)
        multiply_pairs(query, sizes->channels, key + PAIR * j, PAIR * PANEL, sizes->channels / PAIR, scores + j, KEYS,
                       WIDE, 1);
}

/* Adds P V of a group of queries and `keys` keys to O. */
static void add_group(const Sizes *sizes, const Element *weights, const Element *value, int64_t keys, float *sums)
{
    int64_t c = 0, step = PAIR * sizes->columns, pairs = keys / PAIR, row = sizes->columns;
    for (; c + WIDE * SUM_LANES <= sizes->columns; c += WIDE * SUM_LANES)
        multiply_pairs(weights, KEYS, value + PAIR * c, step, pairs, sums + c, row, WIDE, 0);
    switch ((sizes->columns - c) / SUM_LANES) {
    case 3: multiply_pairs(weights, KEYS, value + PAIR * c, step, pairs, sums + c, row, 3, 0); break;
    case 2: multiply_pairs(weights, KEYS, value + PAIR * c, step, pairs, sums + c, row, 2, 0); break;
    case 1: multiply_pairs(weights, KEYS, value + PAIR * c, step, pairs, sums + c, row, 1, 0); break;
    }
}

/* S of all queries of a block and `keys` keys from the first of a panel. */
static inline void score_by_vectors(const Sizes *sizes, const Element *key, int64_t keys, int64_t rows, Work *work)
{
    for (int64_t j = 0; j < keys; j += PANEL)
        for (int64_t i = 0; i < rows; i += GROUP)
            score_group(sizes, work->query + i * sizes->channels, key + j * sizes->channels,
                        work->scores + i * KEYS + j);
}

/* Adds P V to O for all queries of a block. */
static inline void add_by_vectors(const Sizes *sizes, const Element *value, int64_t keys, int64_t rows, Work *work)
{
    for (int64_t i = 0; i < rows; i += GROUP)
        add_group(sizes, work->weights + i * KEYS, value, keys, work->sums + i * sizes->columns);
}

#endif
