/* Arguments of the normalizations; see norm_quantize.c for the symbols. */

#ifndef ERRATA_NORM_QUANTIZE_H
#define ERRATA_NORM_QUANTIZE_H

#include <stdint.h>

typedef struct {
    const float *scales;        /* s of each part */
    const int32_t *zero_points; /* z of each part */
    uint8_t *const *codes;      /* (batch, pixels, width of the part) */
} Quantizers;

typedef struct {
    const float *sources[2];
    int64_t channels[2]; /* of each source; the second 0 where there is one */
    int64_t batch, pixels, groups;
    const float *gamma, *beta;
    float eps;
    int32_t silu;
    int64_t parts;
    const int64_t *starts, *widths; /* of each part, in channels */
    const Quantizers *normed;
    const Quantizers *raw; /* or NULL */
} NormQuantize;

typedef struct {
    const float *x; /* (rows, width) */
    int64_t rows, width;
    const float *gamma, *beta;
    float eps;
    int64_t count; /* of quantizers */
    const Quantizers *normed;
} LayerNormQuantize;

int errata_norm_quantize(const NormQuantize *of);
int errata_layer_norm_quantize(const LayerNormQuantize *of);

#endif
