/* The course of an attention, for either type of number: packing, blocks, the softmax, threads; see attention.c. Who
 * includes this has said what attention_work.h asks for, and has the functions that are named here:
 *
 *   take           channels of a token and a head, times a factor, as elements; returns their squared length
 *   weigh          P of a row of S, of a multiple of 32; its sum is added to sixteen numbers
 *   largest        the largest of a row, and of what was the largest before
 *   score, add     the products
 *   write_row      y of a query
 *   weigh_at_once  whether S and P of a block were computed together
 *   sizes_of, key_unit, rows_at_once, begin_thread, end_thread
 */

#ifndef ERRATA_ATTENTION_FLOW_H
#define ERRATA_ATTENTION_FLOW_H

#include "attention_work.h"
#include <math.h>
#include <stdlib.h>
#include <string.h>

/* Where a head of a sample begins, in elements. */
static inline int64_t start_of(const Attention *of, int64_t head, int64_t tokens)
{
    return (head / of->heads * tokens * of->heads + head % of->heads) * of->width;
}

/* Packs a panel of keys of a head; what is missing is zero. */
static void pack_keys(const Attention *of, const Sizes *sizes, int64_t head, int64_t first, const Head *to)
{
    Element channels[MOST_WIDTH] = { 0 }, *panel = to->key + first * sizes->channels;
    int64_t row = of->heads * of->width, count = (of->width + PAIR - 1) / PAIR;
    float longest = 0;
    memset(panel, 0, (size_t)(PANEL * sizes->channels) * sizeof *panel);
    for (int64_t j = 0; j < PANEL && first + j < of->keys; j++) {
        int64_t from = start_of(of, head, of->keys) + (first + j) * row;
        float length = take(of, of->key, from, 1, channels);
        longest = length <= longest ? longest : length; /* NaN is longer than any */
        for (int64_t pair = 0; pair < count; pair++)
            memcpy(panel + (pair * PANEL + j) * PAIR, channels + pair * PAIR, PAIR * sizeof *panel);
    }
    to->lengths[first / PANEL] = longest;
}

/* Packs a panel of values of a head; what is missing is zero. */
static void pack_values(const Attention *of, const Sizes *sizes, int64_t head, int64_t first, const Head *to)
{
    Element channels[MOST_WIDTH], *panel = to->value + first * sizes->columns;
    int64_t row = of->heads * of->width, from = start_of(of, head, of->keys) + first * row;
    memset(panel, 0, (size_t)(PANEL * sizes->columns) * sizeof *panel);
    for (int64_t j = 0; j < PANEL && first + j < of->keys; j++) {
        Element *pairs = panel + j / PAIR * PAIR * sizes->columns + j % PAIR;
        take(of, of->value, from + j * row, 1, channels);
        for (int64_t c = 0; c < of->width; c++)
            pairs[PAIR * c] = channels[c];
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

/* The mask, in the units of S. */
static void add_mask(const float *mask, int64_t keys, float *scores)
{
    for (int64_t j = 0; j < keys; j++) {
        float s = scores[j] + LOG2_E * mask[j];
        scores[j] = s < NOTHING ? NOTHING : s;
    }
}

/* Turns S of one query into P; where m grows, what was summed before is scaled. */
static void normalize(const Sizes *sizes, int64_t i, const float *mask, int64_t known,
                      int64_t keys, Work *work)
{
    float *scores = work->scores + i * KEYS, *totals = work->totals + i * 16;
    Element *weights = work->weights + i * KEYS;
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

/* l of a query. */
static inline float total_of(const float *totals)
{
    float total = 0;
    for (int64_t part = 0; part < 16; part++)
        total += totals[part];
    return total;
}

/* All of a block of queries. */
static void attend(const Attention *of, const Sizes *sizes, int64_t head, int64_t first, int64_t rows,
                   const Head *packed, Work *work)
{
    int64_t count = of->queries - first < rows ? of->queries - first : rows, unit = key_unit(of);
    take_queries(of, sizes, head, first, rows, packed, work);
    for (int64_t start = 0; start < of->keys; start += KEYS) {
        int64_t left = of->keys - start, known = left < KEYS ? left : KEYS;
        int64_t keys = (known + unit - 1) / unit * unit;
        const Element *key = packed->key + start * sizes->channels;
        if (!weigh_at_once(of, sizes, key, known, keys, rows, work)) {
            score(of, sizes, key, keys, rows, work);
            for (int64_t i = 0; i < rows; i++) {
                const float *mask = of->mask;
                int64_t query = first + i < of->queries ? first + i : of->queries - 1;
                if (mask != NULL)
                    mask += head * of->mask_head + query * of->mask_query + start;
                normalize(sizes, i, mask, known, keys, work);
            }
        }
        add(of, sizes, packed->value + start * sizes->columns, keys, rows, work);
    }
    int64_t row = of->heads * of->width, at = start_of(of, head, of->queries) + first * row;
    for (int64_t i = 0; i < count; i++, at += row)
        write_row(of, work->sums + i * sizes->columns, 1 / total_of(work->totals + i * 16), at);
}

/* Memory for a head, from that for all. */
static Head head_of(const Sizes *sizes, int64_t head, Element *keys, Element *values, float *lengths)
{
    Head of = { keys + head * sizes->keys * sizes->channels, values + head * sizes->keys * sizes->columns,
                lengths + head * sizes->keys / PANEL };
    return of;
}

/* Returns 0, or 1 where memory is missing. */
static int attend_all(const Attention *of)
{
    Sizes sizes = sizes_of(of);
    int64_t heads = of->batch * of->heads, panels = sizes.keys / PANEL, rows = rows_at_once(of);
    int64_t blocks = (of->queries + rows - 1) / rows;
    size_t tokens = (size_t)(heads * sizes.keys);
    Element *keys = aligned_alloc(64, tokens * (size_t)sizes.channels * sizeof *keys);
    Element *values = aligned_alloc(64, tokens * (size_t)sizes.columns * sizeof *values);
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
        begin_thread(of);
#pragma omp for collapse(2) schedule(dynamic)
        for (int64_t head = 0; head < heads; head++)
            for (int64_t block = 0; block < blocks; block++)
                if (work != NULL) {
                    Head packed = head_of(&sizes, head, keys, values, lengths);
                    attend(of, &sizes, head, block * rows, rows, &packed, work);
                }
        end_thread(of);
        free(work);
    }
    free(keys);
    free(values);
    free(lengths);
    return failed;
}

#endif
