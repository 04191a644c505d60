/* GPTQ (Frantar et al., arXiv:2210.17323): the columns of one block, one after the other.
 *
 * A column's rounding error is compensated in the block's later columns at once; the caller compensates the whole
 * block's errors in the columns after it, as one matrix product. Rows of one attention head may be coupled: then the
 * error of a row is also compensated in the later rows of its head, column by column.
 *
 * Rows are processed in independent tiles, so that a tile of the block stays in cache.
 */
#include "cpu.h"

enum { TILE = 64, LARGEST_HEAD = 1024, LEVELS = 16 };

struct gptq {
    float *weights;        /* [n, rows]: columns as rows; overwritten */
    const float *original; /* [n, rows]: the weights before any compensation; with `unit` only */
    const float *upper;    /* [n, n] of a matrix with rows `stride` apart: factor of the inverse Hessian */
    int64_t stride, n, rows;
    const int64_t *places; /* [n]: the weight's column in each row of `weights` */
    const float *scale;    /* [groups, rows] */
    const float *inverse;  /* 1 / scale, or what stands for it */
    const float *zero;     /* [groups, rows]; 0: a codebook */
    int64_t width;         /* columns that share a scale */
    float top;             /* the highest code */
    const float *bounds;   /* [15] midpoints of a codebook, rising */
    const uint8_t *order;  /* [16] the codes of the intervals between them */
    const float *table;    /* [16] values by code */
    const float *unit;     /* [rows / head, head, head] unit upper triangular, or 0 */
    const int32_t *row_order; /* [rows]: a head's rows in the order in which they are rounded */
    int64_t head;
    uint8_t *codes;        /* [columns of the weight, rows] */
    float *errors;         /* [n, rows] */
    int isa;
};

struct rounded {
    float code, value;
};

NQ_INLINE struct rounded round_affine(float w, float scale, float inverse, float zero, float top) {
    const float to_integer = 12582912.0f; /* 1.5 * 2**23: what is added to it is rounded to an integer, ties to even */
    const float whole = (zero + to_integer) - to_integer, part = zero - whole; /* the part of an integer is 0 */
    float code = (w * inverse + part + to_integer) - to_integer + whole;
    code = !(code > 0) ? 0 : code > top ? top : code; /* 0 for NaN, which is no integer */
    return (struct rounded){code, (code - zero) * scale};
}

NQ_INLINE int interval(const struct gptq *f, float scaled) {
    int found = 0;
    for (int i = 0; i < LEVELS - 1; i++) found += scaled > f->bounds[i];
    return found;
}

/* Rows [begin, end) of one column, independent of each other. */
NQ_INLINE void round_rows(const struct gptq *f, int64_t column, int64_t begin, int64_t end) {
    int64_t place = f->places[column], scales = place / f->width * f->rows;
    const float *w = f->weights + column * f->rows, *scale = f->scale + scales, *inverse = f->inverse + scales;
    float *errors = f->errors + column * f->rows, diagonal = f->upper[column * f->stride + column];
    uint8_t *codes = f->codes + place * f->rows;
    if (f->zero) {
        const float *zero = f->zero + scales;
        for (int64_t r = begin; r < end; r++) {
            struct rounded found = round_affine(w[r], scale[r], inverse[r], zero[r], f->top);
            codes[r] = (uint8_t)found.code;
            errors[r] = (w[r] - found.value) / diagonal;
        }
    } else
        for (int64_t r = begin; r < end; r++) {
            int code = f->order[interval(f, w[r] * inverse[r])];
            codes[r] = (uint8_t)code;
            errors[r] = (w[r] - f->table[code] * scale[r]) / diagonal;
        }
}

/* One head's rows of one column, each row's error compensated in the later ones. */
NQ_INLINE void round_head(const struct gptq *f, int64_t column, int64_t first) {
    int64_t place = f->places[column], scales = place / f->width * f->rows, head = f->head;
    const float *w = f->weights + column * f->rows, *original = f->original + column * f->rows;
    const float *scale = f->scale + scales, *inverse = f->inverse + scales;
    float *errors = f->errors + column * f->rows, diagonal = f->upper[column * f->stride + column];
    uint8_t *codes = f->codes + place * f->rows;
    float compensation[LARGEST_HEAD];
    memset(compensation, 0, sizeof(float) * head);
    for (int64_t i = 0; i < head; i++) {
        int64_t r = first + f->row_order[first + i];
        float target = w[r] + compensation[i], value;
        if (f->zero) {
            struct rounded found = round_affine(target, scale[r], inverse[r], f->zero[scales + r], f->top);
            codes[r] = (uint8_t)found.code;
            value = found.value;
        } else {
            int code = f->order[interval(f, target * inverse[r])];
            codes[r] = (uint8_t)code;
            value = f->table[code] * scale[r];
        }
        errors[r] = (target - value) / diagonal;
        float error = original[r] + compensation[i] - value;
        const float *unit = f->unit + (first + i) * head;
        for (int64_t k = i + 1; k < head; k++) compensation[k] -= error * unit[k];
    }
}

NQ_INLINE void round_columns(const struct gptq *f, int64_t begin, int64_t end) {
    for (int64_t column = 0; column < f->n; column++) {
        if (f->unit)
            for (int64_t first = begin; first < end; first += f->head) round_head(f, column, first);
        else
            round_rows(f, column, begin, end);
        const float *errors = f->errors + column * f->rows, *upper = f->upper + column * f->stride;
        for (int64_t later = column + 1; later < f->n; later++) {
            float *w = f->weights + later * f->rows, part = upper[later];
            for (int64_t r = begin; r < end; r++) w[r] -= part * errors[r];
        }
    }
}

#ifdef NQ_X86
NQ_AVX512 static void round_avx512(const struct gptq *f, int64_t begin, int64_t end) { round_columns(f, begin, end); }
NQ_AVX2 static void round_avx2(const struct gptq *f, int64_t begin, int64_t end) { round_columns(f, begin, end); }
#endif
static void round_portable(const struct gptq *f, int64_t begin, int64_t end) { round_columns(f, begin, end); }

static void run(void *job, int64_t begin, int64_t end) {
    const struct gptq *f = job;
    int64_t tile = f->unit ? (TILE + f->head - 1) / f->head * f->head : TILE;
    for (; begin < end; begin += tile) {
        int64_t stop = nq_min(begin + tile, end);
#ifdef NQ_X86
        if (f->isa >= NQ_ISA_AVX512)
            round_avx512(f, begin, stop);
        else if (f->isa >= NQ_ISA_AVX2)
            round_avx2(f, begin, stop);
        else
#endif
            round_portable(f, begin, stop);
    }
}

/* With `unit`, `rows` is a multiple of `head`, which is at most 1024. */
NQ_EXPORT void nq_gptq_block(
    float *weights, const float *original, const float *upper, int64_t stride, int64_t n, int64_t rows,
    const int64_t *places, const float *scale, const float *inverse, const float *zero, int64_t width, int top,
    const float *bounds, const uint8_t *order, const float *table, const float *unit, const int32_t *row_order,
    int64_t head, uint8_t *codes, float *errors, int isa, int threads) {
    struct gptq job = {weights, original, upper, stride, n, rows, places, scale, inverse, zero, width, (float)top,
                       bounds, order, table, unit, row_order, head, codes, errors, isa};
    const int64_t nanoseconds = rows * n * (n + 32 + (unit ? 2 * head : 0)) / 16;
    nq_parallel(threads, rows, unit ? head : TILE, nanoseconds, run, &job);
}
