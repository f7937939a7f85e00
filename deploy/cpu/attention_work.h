/* What the code of attention for one type of number works on. Who includes this names the type, Element, and says
 * how many channels, or keys, lie side by side for one instruction: PAIR. */

#ifndef ERRATA_ATTENTION_WORK_H
#define ERRATA_ATTENTION_WORK_H

#include "attention.h"

/* Sizes of the packed forms, in elements. */
typedef struct {
    int64_t channels; /* of Q and K: width, in thirty-twos for tiles, in pairs for vectors */
    int64_t columns;  /* of V and O */
    int64_t keys;     /* whole panels */
} Sizes;

/* A head of K and V, packed. */
typedef struct {
    Element *key, *value;
    float *lengths; /* of the longest key of each panel, squared */
} Head;

/* What a thread works on. */
typedef struct {
    float scores[QUERIES * KEYS] __attribute__((aligned(64)));
    float sums[QUERIES * MOST_WIDTH] __attribute__((aligned(64)));
    Element weights[QUERIES * KEYS] __attribute__((aligned(64)));
    Element query[QUERIES * MOST_WIDTH] __attribute__((aligned(64)));
    float totals[QUERIES * 16] __attribute__((aligned(64))); /* l, as sixteen summands */
    float most[QUERIES];
    int is_bounded; /* whether m stays 0 */
} Work;

#endif
