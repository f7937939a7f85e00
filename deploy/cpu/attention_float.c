/* Attention in float32, by vectors, for CPUs that do not multiply bfloat16: with AVX-512, AVX2 and FMA, or NEON. What
 * is computed is told in attention.c. Powers of two are exact to 2e-7. */

#include "attention.h"
#include <string.h>
#if defined(__aarch64__)
#include <arm_neon.h>
#else
#include <immintrin.h>
#endif

#if HAS_AVX512
#define HAS_FLOATS 1
#define SUM_LANES 16
#define WIDE 4
#elif defined(__AVX2__) && defined(__FMA__)
#define HAS_FLOATS 1
#define SUM_LANES 8
#define WIDE 2 /* there are sixteen registers */
#elif defined(__aarch64__)
#define HAS_FLOATS 1
#define SUM_LANES 4
#define WIDE 4
#else
#define HAS_FLOATS 0
#endif

#if HAS_FLOATS
typedef float Element;
typedef float Sums __attribute__((vector_size(SUM_LANES * 4)));
typedef int32_t Bits __attribute__((vector_size(SUM_LANES * 4)));
typedef Sums Reads;
#define PAIR 1

/* The larger one; NaN stays. */
static inline Sums at_least(float least, Sums u)
{
#if HAS_AVX512
    return _mm512_max_ps(_mm512_set1_ps(least), u);
#elif defined(__aarch64__)
    return (Sums)vmaxq_f32(vdupq_n_f32(least), (float32x4_t)u);
#else
    return _mm256_max_ps(_mm256_set1_ps(least), u);
#endif
}

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

/* 2^u, as 2^n 2^f with |f| <= 1/2, where u is at most 126: relative error below 1e-7. The polynomial is the one of
 * degree 5 with the least such error. */
static inline Sums powers(Sums u)
{
    u = at_least(-126.0f, u);
    Sums shifted = u + 12582912.0f, f = u - (shifted - 12582912.0f); /* 1.5 * 2^23: n in the low bits */
    Sums p = f * 1.327647187e-3f + 9.675541334e-3f;
    p = p * f + 5.550713274e-2f;
    p = p * f + 2.402211972e-1f;
    p = p * f + 6.931469671e-1f;
    p = p * f + 1.000000072f;
    return (Sums)((Bits)p + ((Bits)shifted << 23));
}

/* `most` is m, or 0 if `is_bounded`. */
static inline __attribute__((always_inline)) void weigh(const float *scores, int64_t keys, float most,
                                                        const int is_bounded, float *totals, float *weights)
{
    Sums own[LANES / SUM_LANES];
    for (int v = 0; v < LANES / SUM_LANES; v++)
        own[v] = load_sums(totals + SUM_LANES * v);
    for (int64_t j = 0; j < keys; j += LANES)
#pragma GCC unroll 4
        for (int v = 0; v < LANES / SUM_LANES; v++) {
            Sums u = load_sums(scores + j + SUM_LANES * v);
            u = powers(is_bounded ? u : u - most);
            own[v] += u;
            memcpy(weights + j + SUM_LANES * v, &u, sizeof u);
        }
    for (int v = 0; v < LANES / SUM_LANES; v++)
        memcpy(totals + SUM_LANES * v, &own[v], sizeof own[v]);
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
