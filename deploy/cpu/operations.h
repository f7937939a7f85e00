/* What a program is made of: native operations with their arguments, and small ones that move bytes.
 *
 * A program is recorded once and run for every sampling step: patches first write what depends on the step, scales,
 * zero points and addresses of biases, into the arguments.
 */

#ifndef ERRATA_OPERATIONS_H
#define ERRATA_OPERATIONS_H

#include <stdint.h>

enum { PRODUCT, NORM, LAYER_NORM, ATTENTION, QUANTIZE, UPSAMPLE, COPY, ADJUST };

typedef struct {
    int64_t operation;
    const void *arguments;
} Instruction;

typedef struct {
    void *address;
    uint64_t value; /* its first `bytes` bytes are written */
    int64_t bytes;  /* 4 or 8 */
} Patch;

/* Codes of x: clamp(round(x / scale) + zero_point, 0, 255), by pixels; padded channels get the zero point. */
typedef struct {
    const float *x;
    uint8_t *codes; /* (batch, pixels, padded) */
    int64_t batch, pixels, channels, padded;
    int64_t sample_step, pixel_step, channel_step; /* of x, in numbers */
    float scale;
    int32_t zero_point;
} Quantize;

/* Each pixel of codes four times, as a square. */
typedef struct {
    const uint8_t *codes; /* (batch, height, width, channels) */
    uint8_t *out;         /* (batch, 2 height, 2 width, channels) */
    int64_t batch, height, width, channels;
} Upsample;

/* Rows of bytes at equal distances. */
typedef struct {
    const uint8_t *from;
    uint8_t *to;
    int64_t rows, bytes, from_step, to_step;
} Copy;

/* y = gain y + shift + added, by channel. */
typedef struct {
    float *y;          /* (rows, channels) */
    const float *gain; /* or NULL: one */
    const float *shift; /* of all rows, or, one after the other, of each `period` of them */
    const float *added; /* as y, or NULL */
    int64_t rows, channels;
    int64_t period; /* or 0: one shift for all */
} Adjust;

#endif
