/* Rounding with error feedback: the columns of one block, one after the other.
 *
 * A column's rounding error is pushed into the block's later columns at once; the caller pushes the whole block's into
 * the columns behind it, as one matrix product. Where the weight's rows hang together in groups (the outputs of an
 * attention head), the error of a row is also pushed into the later rows of its group, column by column.
 *
 * Rows are dealt with in tiles, which do not touch each other: a tile of the block stays in cache.
 */
#include "cpu.h"

enum { TILE = 64, LARGEST_GROUP = 1024, LEVELS = 16 };

struct feedback {
    float *work;           /* [n, rows]: columns as rows; the block's part is used up */
    const float *plain;    /* [n, rows]: the weights before any feedback; with `across` only */
    const float *upper;    /* [n, n] of a matrix with rows `stride` apart: factor of the inverse second moments */
    int64_t stride, n, rows;
    const int64_t *places; /* [n]: the column of the weight in each row of `work` */
    const float *scale;    /* [groups, rows] */
    const float *inverse;  /* 1 / scale, or what stands for it */
    const float *zero;     /* [groups, rows]; 0: a codebook */
    int64_t width;         /* columns that share a scale */
    float top;             /* the highest code */
    const float *bounds;   /* [15] midpoints of a codebook, rising */
    const uint8_t *order;  /* [16] the codes of the intervals between them */
    const float *table;    /* [16] values by code */
    const float *across;   /* [rows / group, group, group] unit upper triangular, or 0 */
    const int32_t *turn;   /* [rows]: which row comes when in its group */
    int64_t group;
    uint8_t *codes;        /* [columns of the weight, rows] */
    float *errors;         /* [n, rows] */
    int isa;
};

struct rounded {
    float code, value;
};

NQ_INLINE struct rounded round_affine(float w, float scale, float inverse, float zero, float top) {
    const float to_integer = 12582912.0f; /* 1.5 * 2**23: what is added to it is rounded to an integer, ties to even */
    float code = (w * inverse + to_integer) - to_integer + zero;
    code = code < 0 ? 0 : code > top ? top : code;
    return (struct rounded){code, (code - zero) * scale};
}

NQ_INLINE int interval(const struct feedback *f, float scaled) {
    int found = 0;
    for (int i = 0; i < LEVELS - 1; i++) found += scaled > f->bounds[i];
    return found;
}

/* Rows [begin, end) of one column, none of which hangs on another. */
NQ_INLINE void round_apart(const struct feedback *f, int64_t column, int64_t begin, int64_t end) {
    int64_t place = f->places[column], scales = place / f->width * f->rows;
    const float *w = f->work + column * f->rows, *scale = f->scale + scales, *inverse = f->inverse + scales;
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

/* One group's rows of one column, each row's error pushed into the later ones. */
NQ_INLINE void round_group(const struct feedback *f, int64_t column, int64_t first) {
    int64_t place = f->places[column], scales = place / f->width * f->rows, group = f->group;
    const float *w = f->work + column * f->rows, *plain = f->plain + column * f->rows;
    const float *scale = f->scale + scales, *inverse = f->inverse + scales;
    float *errors = f->errors + column * f->rows, diagonal = f->upper[column * f->stride + column];
    uint8_t *codes = f->codes + place * f->rows;
    float pushed[LARGEST_GROUP];
    memset(pushed, 0, sizeof(float) * group);
    for (int64_t i = 0; i < group; i++) {
        int64_t r = first + f->turn[first + i];
        float target = w[r] + pushed[i], value;
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
        float error = plain[r] + pushed[i] - value;
        const float *across = f->across + (first + i) * group;
        for (int64_t k = i + 1; k < group; k++) pushed[k] -= error * across[k];
    }
}

NQ_INLINE void feed_back(const struct feedback *f, int64_t begin, int64_t end) {
    for (int64_t column = 0; column < f->n; column++) {
        if (f->across)
            for (int64_t first = begin; first < end; first += f->group) round_group(f, column, first);
        else
            round_apart(f, column, begin, end);
        const float *errors = f->errors + column * f->rows, *upper = f->upper + column * f->stride;
        for (int64_t later = column + 1; later < f->n; later++) {
            float *w = f->work + later * f->rows, part = upper[later];
            for (int64_t r = begin; r < end; r++) w[r] -= part * errors[r];
        }
    }
}

#ifdef NQ_X86
NQ_AVX512 static void feed_back_avx512(const struct feedback *f, int64_t begin, int64_t end) { feed_back(f, begin, end); }
NQ_AVX2 static void feed_back_avx2(const struct feedback *f, int64_t begin, int64_t end) { feed_back(f, begin, end); }
#endif
static void feed_back_portable(const struct feedback *f, int64_t begin, int64_t end) { feed_back(f, begin, end); }

static void run(void *job, int64_t begin, int64_t end) {
    const struct feedback *f = job;
    int64_t tile = f->across ? (TILE + f->group - 1) / f->group * f->group : TILE;
    for (; begin < end; begin += tile) {
        int64_t stop = nq_min(begin + tile, end);
#ifdef NQ_X86
        if (f->isa == NQ_ISA_AVX512 || f->isa == NQ_ISA_AVX512VNNI)
            feed_back_avx512(f, begin, stop);
        else if (f->isa == NQ_ISA_AVX2)
            feed_back_avx2(f, begin, stop);
        else
#endif
            feed_back_portable(f, begin, stop);
    }
}

/* With `across`, `rows` is a multiple of `group`, which is at most 1024. */
NQ_EXPORT void nq_feed_back(
    float *work, const float *plain, const float *upper, int64_t stride, int64_t n, int64_t rows, const int64_t *places,
    const float *scale, const float *inverse, const float *zero, int64_t width, int top, const float *bounds,
    const uint8_t *order, const float *table, const float *across, const int32_t *turn, int64_t group, uint8_t *codes,
    float *errors, int isa, int threads) {
    struct feedback job = {work, plain, upper, stride, n, rows, places, scale, inverse, zero, width, (float)top, bounds,
                           order, table, across, turn, group, codes, errors, isa};
    nq_parallel(threads, rows, across ? group : TILE, run, &job);
}
