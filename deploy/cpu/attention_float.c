/* Attention in float32, by vectors, for CPUs that do not multiply bfloat16: with AVX-512, or AVX2 and FMA. What is
 * computed is told in attention.c. Powers of two are exact to 2e-7. */

#include "attention.h"
#include <string.h>

#if HAS_AVX512
#define HAS_FLOATS 1
#define SUM_LANES 16
#define WIDE 4
#elif defined(__AVX2__) && defined(__FMA__)
#define HAS_FLOATS 1
#define SUM_LANES 8
#define WIDE 2 /* there are sixteen registers */
#else
#define HAS_FLOATS 0
#endif

#if HAS_FLOATS
typedef float Element;
typedef float Sums __attribute__((vector_size(SUM_LANES * 4)));
typedef Sums Reads;
#define PAIR 1

static inline Reads load_reads(const Element *from)
{
    Reads read;
    memcpy(&read, from, sizeof read);
    return read;
}

static inline Reads pair_of(const Element *one)
{
    return *one - (Reads){ 0 };
}

static inline Sums multiply_add(Sums sums, Reads pair, Reads read)
{
    return sums + pair * read; /* one instruction, as the options allow */
}

#include "attention_vectors.h"

static float take(const Attention *of, const void *from, int64_t at, float factor, float *restrict to)
{
    const uint16_t *halves = (const uint16_t *)from + at;
    float length = 0;
    if (of->is_bfloat16)
        for (int64_t c = 0; c < of->width; c++) {
            uint32_t bits = (uint32_t)halves[c] << 16;
            memcpy(to + c, &bits, sizeof bits);
        }
    else
        memcpy(to, (const float *)from + at, (size_t)of->width * sizeof *to);
#pragma omp simd reduction(+ : length)
    for (int64_t c = 0; c < of->width; c++) {
        to[c] *= factor;
        length += to[c] * to[c];
    }
    return length;
}

static int64_t key_unit(const Attention *of)
{
    (void)of;
    return PANEL;
}

static Sizes sizes_of(const Attention *of)
{
    Sizes sizes = { .channels = of->width };
    sizes.columns = (of->width + SUM_LANES - 1) / SUM_LANES * SUM_LANES;
    sizes.keys = (of->keys + PANEL - 1) / PANEL * PANEL;
    return sizes;
}

static int64_t rows_at_once(const Attention *of)
{
    int64_t all = (of->queries + GROUP - 1) / GROUP * GROUP;
    return all < GROUPED ? all : GROUPED;
}

static float largest(const float *scores, int64_t keys, float most)
{
    float found[LANES];
    for (int part = 0; part < LANES; part++)
        found[part] = most;
    for (int64_t j = 0; j < keys; j += LANES)
        for (int part = 0; part < LANES; part++)
            found[part] = scores[j + part] > found[part] ? scores[j + part] : found[part];
    for (int part = 0; part < LANES; part++)
        most = found[part] > most ? found[part] : most;
    return most;
}

/* `most` is m; it is 0 where scores are bounded. */
static void weigh(const float *restrict scores, int64_t keys, float most, int is_bounded, float *restrict totals,
                  float *restrict weights)
{
    (void)is_bounded;
    for (int64_t j = 0; j < keys; j++)
        weights[j] = power_of_two(scores[j] - most);
    for (int64_t j = 0; j < keys; j += LANES)
        for (int part = 0; part < LANES; part++)
            totals[part] += weights[j + part];
}

static void score(const Attention *of, const Sizes *sizes, const float *key, int64_t keys, int64_t rows, Work *work)
{
    (void)of;
    score_by_vectors(sizes, key, keys, rows, work);
}

static void add(const Attention *of, const Sizes *sizes, const float *value, int64_t keys, int64_t rows, Work *work)
{
    (void)of;
    add_by_vectors(sizes, value, keys, rows, work);
}

static void write_row(const Attention *of, const float *sums, float share, int64_t at)
{
    float inverse = 1 / of->out_scale, zero_point = (float)of->out_zero_point;
    if (!of->has_codes)
        for (int64_t c = 0; c < of->width; c++)
            ((float *)of->out)[at + c] = sums[c] * share;
    else
        for (int64_t c = 0; c < of->width; c++)
            ((uint8_t *)of->out)[at + c] = code(sums[c] * share, inverse, zero_point);
}

static int weigh_at_once(const Attention *of, const Sizes *sizes, const float *key, int64_t known, int64_t keys,
                         int64_t rows, Work *work)
{
    (void)of, (void)sizes, (void)key, (void)known, (void)keys, (void)rows, (void)work;
    return 0;
}

static void begin_thread(const Attention *of)
{
    (void)of;
}

static void end_thread(const Attention *of)
{
    (void)of;
}

#include "attention_flow.h"
#endif

int errata_has_float_attention(void)
{
    return HAS_FLOATS;
}

/* Returns 0, or 1 where memory is missing. */
int errata_float_attention(const Attention *of)
{
#if HAS_FLOATS
    return attend_all(of);
#else
    (void)of;
    return 1;
#endif
}
