/* Products with packed weights, and decoding them.
 *
 * A product of few rows x[M, I] reads every byte of the weight once, so it is bound by memory as soon as looking a
 * value up costs less than reading it. The trick: a permute instruction with 32-bit lanes looks at the lowest bits of
 * each lane only, so a vector of packed codes, shifted by 0, 4, 8, ... 28 bits, is the index as it stands. x is laid
 * out once so that it meets the codes in that order. The sum of a block is multiplied by the block's scale once.
 */
#include "cpu.h"

#include <stdlib.h>

enum { SCALES = 512, TILE = 1024, MOST_ROWS = 4, NESTED_BLOCK_BITS = 8 };

struct weight {
    const uint8_t *codes;     /* two a byte, the first in the high half */
    const float *table;       /* [16] */
    const float *absmax;      /* [blocks], or 0 with double quantization: */
    const uint8_t *stored;    /* [blocks] */
    const float *nested;      /* [ceil(blocks / 256)] */
    const float *nested_table; /* [256] */
    float offset;
    int block_bits;           /* log2 of the block size */
    int64_t rows, columns;
};

struct product {
    struct weight w;
    const int8_t *int8; /* int8 rows instead: w.codes is 0, */
    const float *scb;   /* and this is their absmax */
    const float *x, *bias;
    float *laid, *y;
    int64_t count; /* rows of x */
    int isa;
};

NQ_INLINE float scale_of(const struct weight *w, int64_t at) {
    int64_t block = at >> w->block_bits;
    if (w->absmax) return w->absmax[block];
    return w->nested_table[w->stored[block]] * w->nested[block >> NESTED_BLOCK_BITS] + w->offset;
}

/* Decoding ---------------------------------------------------------------------------------------------------------- */

static void decode_portable(const struct weight *w, int64_t at, int64_t n, float scale, float *to) {
    for (int64_t i = 0; i < n; i++) {
        int64_t place = at + i;
        to[i] = w->table[w->codes[place >> 1] >> (place & 1 ? 0 : 4) & 15] * scale;
    }
}

#ifdef NQ_X86
/* `at` is even; decodes as many times 32 values as fit and returns how many. */
NQ_AVX512 static int64_t decode_avx512(const struct weight *w, int64_t at, int64_t n, float scale, float *to) {
    __m512 table = _mm512_loadu_ps(w->table), factor = _mm512_set1_ps(scale);
    int64_t i = 0;
    for (; i + 32 <= n; i += 32) {
        __m128i bytes = _mm_loadu_si128((const __m128i *)(w->codes + ((at + i) >> 1)));
        __m128i high = _mm_and_si128(_mm_srli_epi16(bytes, 4), _mm_set1_epi8(15));
        __m512i first = _mm512_cvtepu8_epi32(_mm_unpacklo_epi8(high, bytes));
        __m512i second = _mm512_cvtepu8_epi32(_mm_unpackhi_epi8(high, bytes));
        _mm512_storeu_ps(to + i, _mm512_mul_ps(_mm512_permutexvar_ps(first, table), factor));
        _mm512_storeu_ps(to + i + 16, _mm512_mul_ps(_mm512_permutexvar_ps(second, table), factor));
    }
    return i;
}

NQ_AVX2 static int64_t decode_avx2(const struct weight *w, int64_t at, int64_t n, float scale, float *to) {
    __m256 low = _mm256_loadu_ps(w->table), high = _mm256_loadu_ps(w->table + 8), factor = _mm256_set1_ps(scale);
    int64_t i = 0;
    for (; i + 16 <= n; i += 16) {
        __m128i bytes = _mm_loadl_epi64((const __m128i *)(w->codes + ((at + i) >> 1)));
        __m128i codes = _mm_unpacklo_epi8(_mm_srli_epi16(bytes, 4), bytes);
        for (int half = 0; half < 2; half++, codes = _mm_srli_si128(codes, 8)) {
            __m256i index = _mm256_cvtepu8_epi32(codes);
            __m256 upper = _mm256_castsi256_ps(_mm256_slli_epi32(index, 28));
            __m256 value = _mm256_blendv_ps(
                _mm256_permutevar8x32_ps(low, index), _mm256_permutevar8x32_ps(high, index), upper);
            _mm256_storeu_ps(to + i + 8 * half, _mm256_mul_ps(value, factor));
        }
    }
    return i;
}
#endif

/* Values [at, at + n) of the flattened weight. */
static void decode_values(const struct weight *w, int isa, int64_t at, int64_t n, float *to) {
    int64_t end = at + n;
    while (at < end) {
        int64_t stop = nq_min(((at >> w->block_bits) + 1) << w->block_bits, end);
        float scale = scale_of(w, at);
        if (at & 1) decode_portable(w, at++, 1, scale, to++);
        int64_t done = 0;
#ifdef NQ_X86
        if (isa == NQ_ISA_AVX512) done = decode_avx512(w, at, stop - at, scale, to);
        if (isa == NQ_ISA_AVX2) done = decode_avx2(w, at, stop - at, scale, to);
#endif
        decode_portable(w, at + done, stop - at - done, scale, to + done);
        to += stop - at;
        at = stop;
    }
}

/* Portable products: decode a piece of a row, then multiply ------------------------------------------------------- */

static float dot_portable(const float *a, const float *b, int64_t n) {
    float lanes[16] = {0}, sum = 0;
    int64_t i = 0;
    for (; i + 16 <= n; i += 16)
        for (int k = 0; k < 16; k++) lanes[k] += a[i + k] * b[i + k];
    for (; i < n; i++) sum += a[i] * b[i];
    for (int k = 0; k < 16; k++) sum += lanes[k];
    return sum;
}

static void row_portable(const struct product *p, int64_t row) {
    const struct weight *w = &p->w;
    float piece[TILE];
    for (int64_t m = 0; m < p->count; m++) p->y[m * w->rows + row] = 0;
    for (int64_t column = 0; column < w->columns; column += TILE) {
        int64_t n = nq_min(TILE, w->columns - column), at = row * w->columns + column;
        if (w->codes) {
            decode_values(w, p->isa, at, n, piece);
        } else {
            for (int64_t i = 0; i < n; i++) piece[i] = p->int8[at + i];
        }
        for (int64_t m = 0; m < p->count; m++)
            p->y[m * w->rows + row] += dot_portable(p->x + m * w->columns + column, piece, n);
    }
    for (int64_t m = 0; m < p->count; m++) {
        float *y = &p->y[m * w->rows + row];
        if (!w->codes) *y *= p->scb[row] * (float)(1.0 / 127.0);
        if (p->bias) *y += p->bias[row];
    }
}

#ifdef NQ_X86
/* Scales of `step` columns each, from `column` of `row` on, as many as fit; returns the column after them. */
NQ_INLINE int64_t row_scales(const struct weight *w, int64_t row, int64_t column, int step_bits, float *scales) {
    int64_t n = nq_min(SCALES, (w->columns - column + (1 << step_bits) - 1) >> step_bits);
    int64_t at = row * w->columns + column;
    for (int64_t i = 0; i < n; i++) scales[i] = scale_of(w, at + (i << step_bits));
    for (int64_t i = n; i < n + 4; i++) scales[i] = 0;
    return column + (n << step_bits);
}

/* The longest run of columns, of 32, 64, ... 128, that never holds parts of two blocks; 0 if even 32 does. */
static int step_bits(const struct weight *w, int most) {
    int bits = w->block_bits < most ? w->block_bits : most;
    while (bits >= 5 && w->columns & ((1 << bits) - 1)) bits--;
    return bits >= 5 ? bits : 0;
}

/* x[M, I] in the order in which shifting meets it: in chunks of 8 * lanes columns, position by position; zeros behind. */
static void lay_out(const struct product *p, int lanes) {
    int64_t chunk = 8 * lanes, chunks = (p->w.columns + chunk - 1) / chunk;
    for (int64_t m = 0; m < p->count; m++) {
        for (int64_t c = 0; c < chunks; c++) {
            float *to = p->laid + (m * chunks + c) * chunk;
            const float *from = p->x + m * p->w.columns + c * chunk;
            int64_t left = p->w.columns - c * chunk;
            for (int k = 0; k < 8; k++) {
                int column = k ^ 1; /* the low half of a byte is the second of its two codes */
                for (int lane = 0; lane < lanes; lane++)
                    to[k * lanes + lane] = lane * 8 + column < left ? from[lane * 8 + column] : 0;
            }
        }
    }
}

#define NQ_ROWS_AVX512(M)                                                                                             \
    NQ_AVX512 static void rows_avx512_##M(const struct product *p, int64_t row, int64_t m0, int bits) {              \
        const struct weight *w = &p->w;                                                                               \
        const int64_t chunks = (w->columns + 127) >> 7, words = w->columns >> 3;                                      \
        const uint8_t *codes = w->codes + (row * w->columns >> 1);                                                    \
        const __m512 table = _mm512_loadu_ps(w->table);                                                               \
        const __m512i spread = _mm512_srli_epi32(                                                                     \
            _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15), (unsigned)(bits - 3));           \
        const int each = 1 << (7 - bits);                                                                             \
        float scales[SCALES + 4];                                                                                     \
        __m512 sum[M];                                                                                                \
        for (int m = 0; m < M; m++) sum[m] = _mm512_setzero_ps();                                                     \
        for (int64_t c = 0, next = 0; next < w->columns;) {                                                           \
            next = row_scales(w, row, next, bits, scales);                                                            \
            const float *scale = scales;                                                                              \
            for (; c < chunks && c << 7 < next; c++, scale += each) {                                                 \
                int64_t left = words - (c << 4);                                                                      \
                __m512i packed = left >= 16                                                                           \
                                     ? _mm512_loadu_si512(codes + (c << 6))                                           \
                                     : _mm512_maskz_loadu_epi32((__mmask16)((1u << left) - 1), codes + (c << 6));     \
                const float *x = p->laid + ((m0 * chunks + c) << 7);                                                  \
                __m512 part[M], other[M];                                                                             \
                for (int m = 0; m < M; m++) part[m] = other[m] = _mm512_setzero_ps();                                 \
                _Pragma("GCC unroll 4") for (int k = 0; k < 8; k += 2) {                                              \
                    __m512 value = _mm512_permutexvar_ps(_mm512_srli_epi32(packed, 4u * (unsigned)k), table);         \
                    __m512 second = _mm512_permutexvar_ps(_mm512_srli_epi32(packed, 4u * (unsigned)k + 4), table);    \
                    for (int m = 0; m < M; m++) {                                                                     \
                        const float *at = x + ((m * chunks) << 7) + 16 * k;                                           \
                        part[m] = _mm512_fmadd_ps(value, _mm512_loadu_ps(at), part[m]);                               \
                        other[m] = _mm512_fmadd_ps(second, _mm512_loadu_ps(at + 16), other[m]);                       \
                    }                                                                                                 \
                }                                                                                                     \
                __m512 factor = each == 1 ? _mm512_set1_ps(*scale)                                                    \
                                          : _mm512_permutexvar_ps(spread, _mm512_castps128_ps512(_mm_loadu_ps(scale))); \
                for (int m = 0; m < M; m++) sum[m] = _mm512_fmadd_ps(_mm512_add_ps(part[m], other[m]), factor, sum[m]); \
            }                                                                                                         \
        }                                                                                                             \
        for (int m = 0; m < M; m++)                                                                                   \
            p->y[(m0 + m) * w->rows + row] = _mm512_reduce_add_ps(sum[m]) + (p->bias ? p->bias[row] : 0);             \
    }
NQ_ROWS_AVX512(1)
NQ_ROWS_AVX512(2)
NQ_ROWS_AVX512(3)
NQ_ROWS_AVX512(4)

NQ_AVX2 static float sum_avx2(__m256 lanes) {
    __m128 half = _mm_add_ps(_mm256_castps256_ps128(lanes), _mm256_extractf128_ps(lanes, 1));
    half = _mm_add_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
}

#define NQ_ROWS_AVX2(M)                                                                                               \
    NQ_AVX2 static void rows_avx2_##M(const struct product *p, int64_t row, int64_t m0, int bits) {                  \
        const struct weight *w = &p->w;                                                                               \
        const int64_t chunks = (w->columns + 63) >> 6;                                                                \
        const uint8_t *codes = w->codes + (row * w->columns >> 1);                                                    \
        const __m256 low = _mm256_loadu_ps(w->table), high = _mm256_loadu_ps(w->table + 8);                           \
        const int each = 1 << (6 - bits);                                                                             \
        float scales[SCALES + 4];                                                                                     \
        __m256 sum[M];                                                                                                \
        for (int m = 0; m < M; m++) sum[m] = _mm256_setzero_ps();                                                     \
        for (int64_t c = 0, next = 0; next < w->columns;) {                                                           \
            next = row_scales(w, row, next, bits, scales);                                                            \
            const float *scale = scales;                                                                              \
            for (; c < chunks && c << 6 < next; c++, scale += each) {                                                 \
                __m256i packed = w->columns - (c << 6) >= 64                                                          \
                                     ? _mm256_loadu_si256((const __m256i *)(codes + (c << 5)))                        \
                                     : _mm256_zextsi128_si256(_mm_loadu_si128((const __m128i *)(codes + (c << 5))));  \
                const float *x = p->laid + ((m0 * chunks + c) << 6);                                                  \
                __m256 part[M];                                                                                       \
                for (int m = 0; m < M; m++) part[m] = _mm256_setzero_ps();                                            \
                _Pragma("GCC unroll 8") for (int k = 0; k < 8; k++) {                                                 \
                    __m256i index = _mm256_srli_epi32(packed, 4 * k);                                                 \
                    __m256 upper = _mm256_castsi256_ps(_mm256_slli_epi32(packed, 28 - 4 * k));                        \
                    __m256 value = _mm256_blendv_ps(                                                                  \
                        _mm256_permutevar8x32_ps(low, index), _mm256_permutevar8x32_ps(high, index), upper);          \
                    for (int m = 0; m < M; m++)                                                                       \
                        part[m] = _mm256_fmadd_ps(value, _mm256_loadu_ps(x + ((m * chunks) << 6) + 8 * k), part[m]);  \
                }                                                                                                     \
                __m256 factor = _mm256_insertf128_ps(_mm256_set1_ps(scale[0]), _mm_set1_ps(scale[each - 1]), 1);      \
                for (int m = 0; m < M; m++) sum[m] = _mm256_fmadd_ps(part[m], factor, sum[m]);                        \
            }                                                                                                         \
        }                                                                                                             \
        for (int m = 0; m < M; m++)                                                                                   \
            p->y[(m0 + m) * w->rows + row] = sum_avx2(sum[m]) + (p->bias ? p->bias[row] : 0);                         \
    }
NQ_ROWS_AVX2(1)
NQ_ROWS_AVX2(2)
NQ_ROWS_AVX2(3)
NQ_ROWS_AVX2(4)

typedef void (*rows_function)(const struct product *, int64_t, int64_t, int);
static const rows_function ROWS_AVX512[] = {rows_avx512_1, rows_avx512_2, rows_avx512_3, rows_avx512_4};
static const rows_function ROWS_AVX2[] = {rows_avx2_1, rows_avx2_2, rows_avx2_3, rows_avx2_4};

/* int8: widen, convert, multiply; the row's scale at the end. */
NQ_AVX512 static void int8_avx512(const struct product *p, int64_t row) {
    const int64_t n = p->w.columns;
    const int8_t *codes = p->int8 + row * n;
    float step = p->scb[row] * (float)(1.0 / 127.0);
    for (int64_t m = 0; m < p->count; m++) {
        const float *x = p->x + m * n;
        __m512 sum[4];
        for (int k = 0; k < 4; k++) sum[k] = _mm512_setzero_ps();
        int64_t i = 0;
        for (; i + 64 <= n; i += 64)
            _Pragma("GCC unroll 4") for (int k = 0; k < 4; k++) {
                __m128i bytes = _mm_loadu_si128((const __m128i *)(codes + i + 16 * k));
                __m512 value = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes));
                sum[k] = _mm512_fmadd_ps(value, _mm512_loadu_ps(x + i + 16 * k), sum[k]);
            }
        for (; i < n; i += 16) {
            __mmask16 mask = n - i >= 16 ? 0xffff : (__mmask16)((1u << (n - i)) - 1);
            __m512 value = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_maskz_loadu_epi8(mask, codes + i)));
            sum[0] = _mm512_fmadd_ps(value, _mm512_maskz_loadu_ps(mask, x + i), sum[0]);
        }
        __m512 all = _mm512_add_ps(_mm512_add_ps(sum[0], sum[1]), _mm512_add_ps(sum[2], sum[3]));
        p->y[m * p->w.rows + row] = _mm512_reduce_add_ps(all) * step + (p->bias ? p->bias[row] : 0);
    }
}

NQ_AVX2 static void int8_avx2(const struct product *p, int64_t row) {
    const int64_t n = p->w.columns;
    const int8_t *codes = p->int8 + row * n;
    float step = p->scb[row] * (float)(1.0 / 127.0);
    for (int64_t m = 0; m < p->count; m++) {
        const float *x = p->x + m * n;
        __m256 sum[4];
        for (int k = 0; k < 4; k++) sum[k] = _mm256_setzero_ps();
        int64_t i = 0;
        for (; i + 32 <= n; i += 32)
            _Pragma("GCC unroll 4") for (int k = 0; k < 4; k++) {
                __m128i bytes = _mm_loadl_epi64((const __m128i *)(codes + i + 8 * k));
                __m256 value = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes));
                sum[k] = _mm256_fmadd_ps(value, _mm256_loadu_ps(x + i + 8 * k), sum[k]);
            }
        float total = sum_avx2(_mm256_add_ps(_mm256_add_ps(sum[0], sum[1]), _mm256_add_ps(sum[2], sum[3])));
        for (; i < n; i++) total += (float)codes[i] * x[i];
        p->y[m * p->w.rows + row] = total * step + (p->bias ? p->bias[row] : 0);
    }
}
#endif

/* Entry points ------------------------------------------------------------------------------------------------------ */

static void portable_range(void *argument, int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; row++) row_portable(argument, row);
}

#ifdef NQ_X86
static void codebook_range(void *argument, int64_t begin, int64_t end) {
    const struct product *p = argument;
    int wide = p->isa == NQ_ISA_AVX512, bits = step_bits(&p->w, wide ? 7 : 6);
    const rows_function *functions = wide ? ROWS_AVX512 : ROWS_AVX2;
    for (int64_t row = begin; row < end; row++)
        for (int64_t m = 0; m < p->count; m += MOST_ROWS)
            functions[nq_min(MOST_ROWS, p->count - m) - 1](p, row, m, bits);
}

static void int8_range(void *argument, int64_t begin, int64_t end) {
    const struct product *p = argument;
    for (int64_t row = begin; row < end; row++)
        p->isa == NQ_ISA_AVX512 ? int8_avx512(p, row) : int8_avx2(p, row);
}
#endif

static int64_t grain_of(int64_t columns) {
    int64_t grain = (1 << 15) / columns;
    return grain ? grain : 1;
}

/* x[count, columns] times a codebook weight's transpose, plus bias[rows] (or 0): y[count, rows], in float32. */
NQ_EXPORT void nq_multiply_codebook(
    const uint8_t *codes, const float *table, const float *absmax, const uint8_t *stored, const float *nested,
    const float *nested_table, const float *offset, int block_bits, int64_t rows, int64_t columns,
    const float *x, int64_t count, const float *bias, float *y, int isa, int threads) {
    struct weight w = {codes, table, absmax, stored, nested, nested_table, offset ? *offset : 0, block_bits, rows, columns};
    struct product p = {w, 0, 0, x, bias, 0, y, count, isa};
#ifdef NQ_X86
    if (isa != NQ_ISA_PORTABLE && step_bits(&w, 6)) {
        p.laid = aligned_alloc(64, (size_t)(count * ((columns + 127) & ~(int64_t)127)) * sizeof(float));
        if (p.laid) {
            lay_out(&p, isa == NQ_ISA_AVX512 ? 16 : 8);
            nq_parallel(threads, rows, grain_of(columns), codebook_range, &p);
            free(p.laid);
            return;
        }
    }
#endif
    nq_parallel(threads, rows, grain_of(columns), portable_range, &p);
}

/* The same for int8 rows, scaled by scb[rows] / 127. */
NQ_EXPORT void nq_multiply_int8(
    const int8_t *codes, const float *scb, int64_t rows, int64_t columns,
    const float *x, int64_t count, const float *bias, float *y, int isa, int threads) {
    struct weight w = {.rows = rows, .columns = columns};
    struct product p = {w, codes, scb, x, bias, 0, y, count, isa};
#ifdef NQ_X86
    if (isa != NQ_ISA_PORTABLE) {
        nq_parallel(threads, rows, grain_of(columns), int8_range, &p);
        return;
    }
#endif
    nq_parallel(threads, rows, grain_of(columns), portable_range, &p);
}

struct decoding {
    struct weight w;
    const int8_t *int8;
    const float *scb;
    float *to;
    int64_t first;
    int isa;
};

static void decode_range(void *argument, int64_t begin, int64_t end) {
    const struct decoding *d = argument;
    int64_t n = d->w.columns;
    if (d->w.codes) {
        decode_values(&d->w, d->isa, (d->first + begin) * n, (end - begin) * n, d->to + begin * n);
        return;
    }
    for (int64_t row = begin; row < end; row++) {
        float step = d->scb[d->first + row] * (float)(1.0 / 127.0);
        for (int64_t i = 0; i < n; i++) d->to[row * n + i] = (float)d->int8[(d->first + row) * n + i] * step;
    }
}

/* Rows [first, first + count) of a codebook weight, as float32 to[count, columns]. */
NQ_EXPORT void nq_decode_codebook(
    const uint8_t *codes, const float *table, const float *absmax, const uint8_t *stored, const float *nested,
    const float *nested_table, const float *offset, int block_bits, int64_t columns,
    int64_t first, int64_t count, float *to, int isa, int threads) {
    struct weight w = {codes, table, absmax, stored, nested, nested_table, offset ? *offset : 0, block_bits, 0, columns};
    struct decoding d = {w, 0, 0, to, first, isa};
    nq_parallel(threads, count, grain_of(columns), decode_range, &d);
}

/* The same for int8 rows. */
NQ_EXPORT void nq_decode_int8(
    const int8_t *codes, const float *scb, int64_t columns, int64_t first, int64_t count, float *to, int threads) {
    struct decoding d = {{.columns = columns}, codes, scb, to, first, 0};
    nq_parallel(threads, count, grain_of(columns), decode_range, &d);
}
