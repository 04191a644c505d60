/* Products with packed weights, written once in the few operations that each simd_*.h names.
 *
 * Few rows of x (generating) are bound by reading the weight: its words are used as they lie. A word of 32 bits holds
 * eight codes (four of 8 bits, and two or three bytes are widened to one): shifted by so many bits, its lowest bits
 * are the next code, and a vector of words is an index into the table of values. x is laid out once so that it meets
 * the codes in that order, and the sum of a run is multiplied by the run's scale once.
 *
 * Many rows are bound by arithmetic: a block of the weight is decoded, transposed, into cache, and meets tiles of x in
 * registers. Rounded activations meet it in whole numbers, with a scale for every run of inputs.
 */
#include "weight.h"

enum {
    PANEL = 2 * LANES,   /* rows of the weight that are decoded side by side */
    BLOCK = 128,         /* rows of the weight in cache together */
    DEPTH_BITS = 9,
    DEPTH = 1 << DEPTH_BITS, /* columns of them, decoded to float */
    DEPTH8 = 2048,       /* and to bytes */
    SEGMENT_BITS = 10,
    SEGMENT = 1 << SEGMENT_BITS, /* columns whose scales are looked up together */
    AHEAD = 8192,        /* bytes of the weight that are asked for before they are used */
    RUN_BITS = 7,        /* log2 of the longest run of activations that share a scale */
    LONGEST_RUN = 1 << RUN_BITS,
};
static const float ROUNDING = 0x1.8p23f;        /* added, leaves the nearest whole number in the lowest bits */
static const float SMALLEST_ACTIVATION = 1e-30f; /* what a run must reach not to be all zero */

NQ_INLINE int codes_a_word(int bits) { return bits == 8 ? 4 : 8; }

/* LANES words of a row from its chunk `c` on; zeros where the row has ended. */
NQ_INLINE vi load_words(const struct nq_weight *w, const uint8_t *row, int64_t row_bytes, int64_t c, const int bits) {
    const int64_t bytes = LANES * codes_a_word(bits) * bits / 8;
    const uint8_t *from = row + c * bytes;
    uint8_t rest[LANES * 4];
    if ((c + 1) * bytes > row_bytes) {
#ifdef SOME_LANES /* a call, however rare, would have sums leave their registers */
        vi_store(rest, vi_load_some_bytes(from, (int)(row_bytes - c * bytes)));
#else
        memset(rest, 0, sizeof rest);
        memcpy(rest, from, (size_t)(row_bytes - c * bytes));
#endif
        from = rest;
    }
    if (bits == 2) return vi_load2(from);
    if (bits == 3) return vi_load3(from);
    vi words = vi_load(from);
    return bits == 8 && w->kind == NQ_AFFINE ? vi_xor(words, vi_set1((int32_t)0x80808080)) : words;
}

/* Each lane's number of those from `from` on, 2**shift lanes having one. Of codes that are used fast, one for all lanes is
 * read as one: several, just written in pieces, would have to reach the cache first. */
NQ_INLINE vf spread_over_lanes(const float *from, int shift, const int bits) {
    return bits < 8 && 1 << shift >= LANES ? vf_set1(*from) : vf_spread(from, shift);
}

/* Values of the codes at place `k` of every word. */
NQ_INLINE vf value_at(vtab table, vi words, int k, const int bits) {
    return bits == 8 ? vf_of_byte(words, k) : vf_lookup(table, vi_srl(words, bits * k), bits);
}

/* Where rows of x are few, how codes become values: by permutes of a table, as above; as the numbers that they are, counted
 * from 0 and not from the middle, which zeros make up for; by shuffles of the table's bytes; or, of bytes with signs, as what
 * they are, where a whole row has one scale, by which its sum is multiplied in the end. */
enum how { BY_TABLE, AS_NUMBERS, BY_BYTES, WHOLE_ROWS };

NQ_INLINE int codes_are_numbers(const struct nq_weight *w) {
    return CODES_AS_NUMBERS && w->kind == NQ_AFFINE && w->bits < 8;
}

NQ_INLINE enum how how_of(const struct nq_weight *w) {
    if (codes_are_numbers(w)) return AS_NUMBERS;
    if (w->kind == NQ_INT8) return WHOLE_ROWS;
    return TABLES_OF_BYTES && w->bits == 4 && nq_shuffles_are_fast ? BY_BYTES : BY_TABLE;
}

/* A number is taken where it lies among four codes, a byte in the highest bits, where its sign is: 2**number_shift times too
 * large. x is made so much smaller. */
NQ_INLINE int number_shift(int place, const int bits) { return bits == 8 ? 24 : bits * (place & 3); }

#if !TABLES_OF_BYTES
typedef int vbytes;
NQ_INLINE vbytes vf_bytes(const float *table) { return (void)table, 0; }
NQ_INLINE void vf_lookup_halves(vbytes table, vi words, int high, vf *values) { (void)table, (void)words, (void)high, (void)values; }
#endif

/* Bytes become four values at a time: of one half of each byte, then of the other. */
NQ_INLINE int values_at_once(const enum how how) { return how == BY_BYTES ? 4 : 1; }

/* The place in the word of value `i` of a step. */
NQ_INLINE int place_of(int step, int i, const enum how how) { return how == BY_BYTES ? 2 * i + step : step; }

NQ_INLINE void values_of(
    vtab table, vbytes bytes, vi words, int step, const int bits, const enum how how, vf *values) {
    if (how == BY_BYTES) {
        vf_lookup_halves(bytes, words, step, values);
    } else if (how == AS_NUMBERS) {
        const vi mask = vi_set1(((1 << bits) - 1) << number_shift(step, bits));
        values[0] = vf_of(vi_and(step < 4 ? words : vi_srl(words, 4 * bits), mask));
    } else if (bits == 8) {
        const vi high = step == 3 ? words : vi_sll(words, 24 - 8 * step);
        values[0] = vf_of(step == 0 ? high : vi_and(high, vi_set1((int32_t)0xff000000)));
    } else {
        values[0] = value_at(table, words, step, bits);
    }
}

/* absmax[n] of the blocks from `block` on, double quantization undone: one rounding at a time, as the grid does. */
NQ_INLINE void load_absmax(const struct nq_weight *w, int64_t block, int64_t n, float *to) {
    const float offset = *w->offset;
    while (n > 0) {
        const float coarse = w->nested[block >> NESTED_BLOCK_BITS];
        const int64_t count = nq_min(n, (((block >> NESTED_BLOCK_BITS) + 1) << NESTED_BLOCK_BITS) - block);
        for (int64_t i = 0; i < count; i++) to[i] = w->nested_table[w->stored[block + i]] * coarse + offset;
        block += count, to += count, n -= count;
    }
}

/* Scales and zeros (counted from the middle) of `n` runs of a row, `step_bits` long each, from run `first` on. */
NQ_INLINE void load_scales(
    const struct nq_weight *w, int64_t row, int64_t first, int64_t n, int step_bits, float *scale, float *zero) {
    const int apart = w->group_bits - step_bits; /* 0: every run is a group */
    const int64_t origin = w->kind == NQ_CODEBOOK ? row * w->columns : 0;
    if (w->kind == NQ_INT8) {
        for (int64_t i = 0; i < n; i++) scale[i] = nq_row_scale(w, row);
    } else if (w->kind == NQ_CODEBOOK) {
        const int64_t run = (origin >> step_bits) + first;
        if (apart == 0 && !w->absmax) load_absmax(w, run, n, scale);
        else if (apart == 0) memcpy(scale, w->absmax + run, (size_t)n * sizeof(float));
        else for (int64_t i = 0; i < n; i++) scale[i] = nq_absmax(w, (run + i) >> apart);
    } else {
        const uint16_t *scales = w->scales + row * w->groups;
        const uint8_t *zeros = w->zeros && !w->half_zeros ? (const uint8_t *)w->zeros + row * w->groups : 0;
        const uint16_t *halves = w->half_zeros ? (const uint16_t *)w->zeros + row * w->groups : 0;
        const int middle = nq_middle(w);
        int64_t i = 0;
        for (; apart == 0 && i + LANES <= n; i += LANES) {
            vf_store(scale + i, vf_of_halves(scales + first + i));
            if (zeros) vf_store(zero + i, vf_sub(vf_of_bytes(zeros + first + i), vf_set1((float)middle)));
            if (halves) vf_store(zero + i, vf_sub(vf_of_halves(halves + first + i), vf_set1((float)middle)));
        }
#ifdef SOME_LANES
        if (apart == 0 && i < n) { /* one after the other, they would have to reach the cache before a vector reads them */
            const int some = (int)(n - i);
            vf_store(scale + i, vf_of_some_halves(scales + first + i, some));
            if (zeros) vf_store(zero + i, vf_sub(vf_of_some_bytes(zeros + first + i, some), vf_set1((float)middle)));
            if (halves) vf_store(zero + i, vf_sub(vf_of_some_halves(halves + first + i, some), vf_set1((float)middle)));
            i = n;
        }
#endif
        for (; i < n; i++) {
            scale[i] = half_to_float(scales[(first + i) >> apart]);
            if (zeros) zero[i] = (float)((int)zeros[(first + i) >> apart] - middle);
            if (halves) zero[i] = half_to_float(halves[(first + i) >> apart]) - (float)middle;
        }
    }
}

#include "few.inc.h"
#include "few_plain.inc.h"
#include "few_trellis.inc.h"
#include "many.inc.h"
#include "rounded.inc.h"
#include "few_rounded.inc.h"
#include "step.inc.h"

#define KERNELS                                                                                                       \
    .few_most = FEW_MOST,                                                                                             \
    .few = {few_size, few_lay, few_run, 1, 4},                                                                        \
    .many = {many_size, many_lay, many_run, TILE, PANEL},                                                             \
    .int8 = {int8_size, int8_lay, int8_run, TILE8, PANEL},                                                            \
    .few8 = {few8_size, few8_lay, few8_run, 1, 4},                                                                    \
    .plain = {nothing_size, nothing_lay, plain_run, 1, 1},                                                            \
    .trellis = {nothing_size, nothing_lay, trellis_run, 1, NQ_BLOCK_ROWS},                                            \
    .hold = hold,                                                                                                     \
    .attend = attend,                                                                                                 \
    .panel = PANEL,                                                                                                   \
    .norm = norm,                                                                                                     \
    .activate = activate

#ifdef ROUNDED_ONLY
const struct nq_way NAME(nq_int8) = {int8_size, int8_lay, int8_run, TILE8, PANEL};
const struct nq_way NAME(nq_few8) = {few8_size, few8_lay, few8_run, 1, 4};
#else
const struct nq_kernels NAME(nq_kernels) = {KERNELS};
#endif

#if defined(NQ_TILES) && defined(NQ_VNNI) && LANES == 16
#include "tiles.inc.h"
#include "tiles_rounded.inc.h"
const struct nq_kernels nq_kernels_amx = {
    KERNELS,
    .tiles = {tiles_size, tiles_lay, tiles_run, TILE_ROWS, PANEL},
    .tiles8 = {tiles8_size, tiles8_lay, tiles8_run, TILE_ROWS, PANEL},
    .worth_tiles = worth_tiles,
};
#endif
