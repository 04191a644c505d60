/* A packed weight [rows, columns], whatever its grid.
 *
 * value = (table[code] - zero) * scale
 *
 * A run of columns shares scale and zero: 2**group_bits columns of a row, or of the flattened weight for codebooks.
 * Codes are packed low bits first, every row on a byte; those of codebooks high half first, rows without a gap. Plain
 * weights are the values themselves, of the nq_dtype that `plain` says.
 *
 * On a trellis, the last twelve bits of codes down a column are the state. The highest bits of (state * multiplier mod 4096),
 * two more than a code has, are the place of the value in the table, which stands for table[code]; of three bits, the first
 * of them is the sign, and the table holds the sixteen values without it. Codes of a block of sixteen rows of a column are one
 * number, the first row's highest. Its lowest 32 bits stand in a row of words, those of other columns beside them; behind that
 * row, of three bits, one of half words with the rest. 256 rows, or what is left, are a ring. Behind all blocks come the words
 * of the last ring's last sixteen codes.
 */
#ifndef NEOQUANT_WEIGHT_H
#define NEOQUANT_WEIGHT_H

#include "cpu.h"

#include <stdatomic.h>

enum nq_kind { NQ_CODEBOOK = 0, NQ_INT8 = 1, NQ_AFFINE = 2, NQ_PLAIN = 3, NQ_TRELLIS = 4 };
enum { NQ_BLOCK_ROWS = 16, NQ_RING_BLOCKS = 16, NQ_STATE_BITS = 12 }; /* of a trellis */
enum { NQ_WHOLE_ROW = 62, NESTED_BLOCK_BITS = 8 };

struct nq_weight { /* as `_Struct` in products.py */
    const uint8_t *codes;
    const float *table;        /* [16] values of codes below 8 bits; for affine grids code - middle */
    const int8_t *levels;      /* [16] the same in whole steps of level_step, for products with int8 activations */
    const float *absmax;       /* codebook [blocks], or 0 with double quantization: */
    const uint8_t *stored;     /* [blocks] */
    const float *nested;       /* [ceil(blocks / 256)] */
    const float *nested_table; /* [256] */
    const float *offset;       /* [1] */
    const float *scb;          /* int8 [rows]: scale = scb / 127 */
    const uint16_t *scales;    /* affine and trellis [rows, groups], half precision */
    const void *zeros;         /* affine [rows, groups], or 0 where the zero is the middle */
    int64_t rows, columns, groups;
    int32_t kind, bits, group_bits;
    float level_step;
    int32_t plain;
    int32_t half_zeros;        /* zeros are half-precision numbers, else bytes */
    int32_t multiplier;        /* trellis: of a state */
};

/* What a product is asked for. */
struct nq_product {
    const struct nq_weight *w;
    const float *x, *bias; /* [count, columns]; [rows] or 0 */
    float *y;              /* [count, rows] */
    int64_t count;
    void *laid;            /* x in the order in which the kernel wants it */
    atomic_int *starved;   /* set where memory is wanting */
};

/* One way to multiply: x is laid out first, then rows of the weight are multiplied, both on all threads. */
struct nq_way {
    size_t (*size)(const struct nq_product *); /* bytes of x laid out */
    nq_range lay, run;                         /* tiles of x; rows of the weight */
    int tile, panel;                           /* rows of x in a tile, rows of the weight handled together */
};

/* How keys and values are held. Bytes count steps from NQ_MIDDLE, `scale` being the step of a head at a position. */
enum nq_stored { NQ_HELD_FLOAT32 = 0, NQ_HELD_FLOAT16 = 1, NQ_HELD_INT8 = 2 };
enum { NQ_MIDDLE = 128 };

struct nq_states {
    void *data;   /* [sequences, heads, capacity, size] */
    float *scale; /* [sequences, heads, capacity], or 0 */
};

/* Rows [begin, end) of `from` [rows, heads, size] to where they are held, where row r is new position r % positions of
 * sequence r / positions; `from` begins with row `first`. */
struct nq_holding {
    const float *from;
    struct nq_states to;
    int64_t first, positions, held, heads, size, capacity;
    int stored;
};

/* New positions look back, each at those of its sequence up to itself: all heads of the rows [begin, end), where row r is
 * new position r % positions of sequence r / positions. An item of work is a panel of a head of a sequence. */
struct nq_attention {
    const float *query;         /* [end - begin, heads, size] */
    struct nq_states keys, values; /* `held` of before, then the new ones */
    const uint8_t *keep;        /* [sequences, keep_stride], 0 on padding; or 0: there is none */
    float *y;                   /* [end - begin, heads, size] */
    int64_t begin, end, positions, held, heads, size, capacity, window, keep_stride; /* `window` 0: everything is seen */
    int64_t panels;             /* of `panel` rows, that the most rows of a sequence make */
    int stored;
    atomic_int *starved;        /* set where memory is wanting */
};

enum nq_activation { NQ_IDENTITY = 0, NQ_GELU_TANH = 1, NQ_RELU = 2 };

/* What there is for one instruction set. */
struct nq_kernels {
    int few_most; /* rows of x up to which `few` is the faster */
    struct nq_way few, many, int8, few8, plain, trellis; /* `few8`: int8 and few rows of x; the last two: few rows too */
    struct nq_way tiles, tiles8; /* in the places of `many` and `int8` where the next says so; 0: nowhere */
    int (*worth_tiles)(const struct nq_weight *, int int8, int64_t count);
    nq_range hold, attend;
    int panel; /* new positions of a sequence that `attend` looks at together */
    void (*norm)(const float *x, const float *weight, const float *bias, int64_t n, float epsilon, float *to);
    void (*activate)(float *x, int64_t n, int activation);
};

/* Rows of x that are multiplied at once, so that what is laid out of them stays small. */
enum { NQ_MOST_ROWS = 480 };

const struct nq_kernels *nq_kernels_of(int isa);

/* Whether this processor shuffles bytes within 128 bits more often in a cycle than it permutes numbers across 256: those of
 * AMD, and Intel's since Ice Lake. Set when the library is loaded; changed by tests. */
extern NQ_EXPORT int nq_shuffles_are_fast;

/* A weight with its bias[rows] (or 0), and y[count, rows], in float32. With `int8`, x is rounded to int8 in runs of inputs;
 * codebooks of rows that are no multiple of 8 are not known then. What follows is done to a piece of y by the thread that
 * has just computed it, for another would have to fetch it: an activation, and `sum` = `beside` + y, each [count, rows]. */
struct nq_linear {
    const struct nq_weight *w;
    const float *bias;
    float *y;
    int int8;
    enum nq_activation activation;
    const float *beside; /* or 0 */
    float *sum;          /* may be where `beside` is */
};
enum { NQ_TOGETHER = 3 };

/* x[count, columns] times the transpose of each of `n` weights, at most NQ_TOGETHER, plus its bias. 0, or NQ_NO_MEMORY. */
int nq_products(
    const struct nq_kernels *kernels, const struct nq_linear *linears, int n, const float *x, int64_t count, int threads);

/* About how many nanoseconds that takes a thread, for one of them. */
int64_t nq_product_time(const struct nq_kernels *kernels, const struct nq_linear *linear, int64_t count);

extern const struct nq_kernels nq_kernels_portable, nq_kernels_avx2, nq_kernels_avx512, nq_kernels_avx512vnni,
    nq_kernels_amx, nq_kernels_neon;
extern const struct nq_way nq_int8_avxvnni, nq_few8_avxvnni; /* in the places of those for AVX2 */

NQ_INLINE int64_t nq_ceil(int64_t n, int64_t step) { return (n + step - 1) / step; }

/* The value that 8-bit codes and zeros are counted from: the middle for affine grids. */
NQ_INLINE int nq_middle(const struct nq_weight *w) { return w->kind == NQ_AFFINE ? 1 << (w->bits - 1) : 0; }

/* Bytes of a row, where rows start on bytes. */
NQ_INLINE int64_t nq_row_bytes(const struct nq_weight *w) { return nq_ceil(w->columns * w->bits, 8); }

/* Whether rows start on bytes and no eight columns have two scales. */
NQ_INLINE int nq_is_regular(const struct nq_weight *w) { return w->kind != NQ_CODEBOOK || w->columns % 8 == 0; }

/* log2 of the longest run of columns, at most `most`, that starts at a multiple of its length in every row and has one
 * scale. */
NQ_INLINE int nq_step_bits(const struct nq_weight *w, int most) {
    int bits = w->group_bits < most ? w->group_bits : most;
    if (w->kind == NQ_CODEBOOK)
        while (w->columns & (((int64_t)1 << bits) - 1)) bits--;
    return bits;
}

/* The codes of a trellis in half words, of the block of rows that `row` is in; and of the block before it in its ring. */
NQ_INLINE const uint16_t *nq_block(const struct nq_weight *w, int64_t row) {
    return (const uint16_t *)w->codes + row / NQ_BLOCK_ROWS * w->bits * w->columns;
}

NQ_INLINE const uint16_t *nq_block_before(const struct nq_weight *w, int64_t row) {
    const int64_t block = row / NQ_BLOCK_ROWS, ring = block / NQ_RING_BLOCKS, blocks = nq_ceil(w->rows, NQ_BLOCK_ROWS);
    const int is_whole = (ring + 1) * NQ_RING_BLOCKS * NQ_BLOCK_ROWS <= w->rows;
    const int64_t before = block % NQ_RING_BLOCKS ? block - 1 : is_whole ? block + NQ_RING_BLOCKS - 1 : blocks;
    return (const uint16_t *)w->codes + before * w->bits * w->columns;
}

/* The state of a row is in 32 bits of its block's number, above which the number of the block before continues: in those from
 * the half word on that nq_state_half gives, so many bits up from their lowest. */
NQ_INLINE int nq_state_bit(int bits, int64_t row) { return bits * (NQ_BLOCK_ROWS - 1 - (int)(row % NQ_BLOCK_ROWS)); }
NQ_INLINE int nq_state_half(int bits, int64_t row) {
    const int end = nq_state_bit(bits, row) + NQ_STATE_BITS;
    return end > 32 ? (int)nq_ceil(end - 32, 16) : 0;
}
NQ_INLINE int nq_state_shift(int bits, int64_t row) { return nq_state_bit(bits, row) - 16 * nq_state_half(bits, row); }

/* A half word of a block, of one column. */
NQ_INLINE uint32_t nq_half_word(const uint16_t *block, int64_t columns, int64_t column, int half) {
    uint32_t word;
    if (half == 2) return block[2 * columns + column];
    memcpy(&word, block + 2 * column, sizeof word);
    return half ? word >> 16 : word & 0xffff;
}

NQ_INLINE float nq_trellis_value(const struct nq_weight *w, int64_t row, int64_t column) {
    const uint16_t *block = nq_block(w, row);
    const int half = nq_state_half(w->bits, row), next = half + 1;
    const uint32_t low = nq_half_word(block, w->columns, column, half);
    const uint32_t high = next < w->bits ? nq_half_word(block, w->columns, column, next)
                                         : nq_half_word(nq_block_before(w, row), w->columns, column, 0);
    const uint32_t product = ((high << 16 | low) >> nq_state_shift(w->bits, row)) * (uint32_t)w->multiplier;
    const float value = w->table[product >> (NQ_STATE_BITS - 2 - w->bits) & 15];
    return w->bits == 3 && product >> (NQ_STATE_BITS - 1) & 1 ? -value : value;
}

/* The value of column `column` in row `row`, less its zero and scale. */
NQ_INLINE float nq_raw(const struct nq_weight *w, int64_t row, int64_t column) {
    if (w->kind == NQ_TRELLIS) return nq_trellis_value(w, row, column);
    if (w->kind == NQ_CODEBOOK) {
        int64_t at = row * w->columns + column;
        return w->table[w->codes[at >> 1] >> (at & 1 ? 0 : 4) & 15];
    }
    const uint8_t *codes = w->codes + row * nq_row_bytes(w);
    if (w->bits == 8) return (float)(int8_t)(codes[column] ^ nq_middle(w));
    int64_t bit = column * w->bits;
    int shift = (int)(bit & 7), code = codes[bit >> 3] >> shift;
    if (shift + w->bits > 8) code |= codes[(bit >> 3) + 1] << (8 - shift);
    return w->table[code & ((1 << w->bits) - 1)];
}

NQ_INLINE float nq_half(uint16_t half) {
    uint32_t sign = (uint32_t)(half & 0x8000) << 16, rest = half & 0x7fff;
    if (rest >= 0x7c00) return nq_from_bits(sign | 0x7f800000 | (rest & 0x3ff) << 13);
    if (rest >= 0x0400) return nq_from_bits(sign | ((rest << 13) + (112u << 23)));
    return nq_from_bits(nq_bits((float)rest * 0x1p-24f) | sign); /* subnormal: exact in float */
}

/* One value of a plain weight. */
NQ_INLINE float nq_plain(const struct nq_weight *w, int64_t row, int64_t column) {
    const uint8_t *at = w->codes + (row * w->columns + column) * (w->bits / 8);
    uint16_t half;
    uint32_t whole;
    if (w->plain == NQ_FLOAT32) {
        memcpy(&whole, at, 4);
        return nq_from_bits(whole);
    }
    memcpy(&half, at, 2);
    return w->plain == NQ_FLOAT16 ? nq_half(half) : nq_from_bits((uint32_t)half << 16);
}

NQ_INLINE float nq_absmax(const struct nq_weight *w, int64_t block) {
    if (w->absmax) return w->absmax[block];
    return w->nested_table[w->stored[block]] * w->nested[block >> NESTED_BLOCK_BITS] + *w->offset;
}

/* The scale of a row of int8. */
NQ_INLINE float nq_row_scale(const struct nq_weight *w, int64_t row) { return w->scb[row] * (float)(1.0 / 127.0); }

/* Scale and zero of one column; the zero is counted from the middle, unless it is a half-precision number. */
NQ_INLINE float nq_scale(const struct nq_weight *w, int64_t row, int64_t column, float *zero) {
    *zero = 0;
    if (w->kind == NQ_CODEBOOK) return nq_absmax(w, (row * w->columns + column) >> w->group_bits);
    if (w->kind == NQ_INT8) return nq_row_scale(w, row);
    int64_t at = row * w->groups + (column >> w->group_bits);
    if (w->half_zeros) *zero = nq_half(((const uint16_t *)w->zeros)[at]);
    else if (w->zeros) *zero = (float)(((const uint8_t *)w->zeros)[at] - nq_middle(w));
    return nq_half(w->scales[at]);
}

/* Columns [column, column + n) of a row, one by one. */
NQ_INLINE void nq_decode_run(const struct nq_weight *w, int64_t row, int64_t column, int64_t n, float *to) {
    int64_t origin = w->kind == NQ_CODEBOOK ? row * w->columns : 0; /* where groups are counted from */
    if (w->kind == NQ_PLAIN) {
        for (int64_t i = 0; i < n; i++) to[i] = nq_plain(w, row, column + i);
        return;
    }
    for (int64_t i = 0; i < n;) {
        int64_t at = origin + column + i;
        int64_t stop = nq_min(n, i + (((at >> w->group_bits) + 1) << w->group_bits) - at);
        float zero, scale = nq_scale(w, row, column + i, &zero);
        if (w->half_zeros) { /* code - zero is rounded once: a middle taken off the zero first could round it */
            const float middle = (float)nq_middle(w);
            for (; i < stop; i++) to[i] = (nq_raw(w, row, column + i) + middle - zero) * scale;
        }
        for (; i < stop; i++) to[i] = (nq_raw(w, row, column + i) - zero) * scale;
    }
}

#endif
