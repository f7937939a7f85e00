/* What all ways to compute an attention share; see attention.c for the symbols. */

#ifndef ERRATA_ATTENTION_H
#define ERRATA_ATTENTION_H

#include "codes.h"
#include <stdint.h>

#if defined(__AMX_BF16__) && defined(__AMX_TILE__)
#define HAS_TILES 1
#else
#define HAS_TILES 0
#endif

#define NOTHING (-1e30f) /* a score that weighs nothing; finite, since the difference of infinities is none */
#define SMALL 60.0f
#define MOST_WIDTH 256   /* channels of a head */
#define PANEL 64         /* keys that are packed together */
#define KEYS 256         /* of a block */
#define QUERIES 64       /* of a block, at most */
#define GROUPED 48       /* the same for vectors */
#define TILED 32         /* queries that tiles multiply at once: two tiles */
#define GROUP 6          /* queries that vectors multiply at once: three quarters of the registers hold sums */

enum { VECTORS, TILES, FLOATS };

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

#endif
