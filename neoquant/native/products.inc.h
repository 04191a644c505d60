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
        memset(rest, 0, sizeof rest);
        memcpy(rest, from, (size_t)(row_bytes - c * bytes));
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
 * from 0 and not from the middle, which zeros make up for; or by shuffles of the table's bytes. */
enum how { BY_TABLE, AS_NUMBERS, BY_BYTES };

NQ_INLINE int codes_are_numbers(const struct nq_weight *w) {
    return CODES_AS_NUMBERS && w->kind == NQ_AFFINE && w->bits < 8;
}

NQ_INLINE enum how how_of(const struct nq_weight *w) {
    if (codes_are_numbers(w)) return AS_NUMBERS;
    return TABLES_OF_BYTES && w->bits == 4 && nq_shuffles_are_fast ? BY_BYTES : BY_TABLE;
}

/* A number is taken where it lies among four codes, 2**number_shift times too large: x is made so much smaller. */
NQ_INLINE int number_shift(int place, const int bits) { return bits * (place & 3); }

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
        for (int64_t i = 0; i < n; i++) scale[i] = w->scb[row] * (float)(1.0 / 127.0);
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
        for (; i < n; i++) {
            scale[i] = half_to_float(scales[(first + i) >> apart]);
            if (zeros) zero[i] = (float)((int)zeros[(first + i) >> apart] - middle);
            if (halves) zero[i] = half_to_float(halves[(first + i) >> apart]) - (float)middle;
        }
    }
}

/* Few rows of x ----------------------------------------------------------------------------------------------------- */

NQ_INLINE int64_t chunk_columns(const struct nq_weight *w) { return LANES * codes_a_word(w->bits); }
NQ_INLINE int64_t count_chunks(const struct nq_weight *w) { return nq_ceil(w->columns, chunk_columns(w)); }

static size_t few_size(const struct nq_product *p) {
    return (size_t)(p->count * count_chunks(p->w) * (chunk_columns(p->w) + LANES)) * sizeof(float);
}

/* Behind all rows of x: the sum of the columns that meet each lane, for zeros. */
NQ_INLINE float *few_sums(const struct nq_product *p) {
    return (float *)p->laid + p->count * count_chunks(p->w) * chunk_columns(p->w);
}

/* x by chunks, and in a chunk by places: the columns that meet the first code of every word, then the second, ... */
static void few_lay(void *argument, int64_t begin, int64_t end) {
    const struct nq_product *p = argument;
    const struct nq_weight *w = p->w;
    const int per = codes_a_word(w->bits), turn = w->kind == NQ_CODEBOOK; /* codebooks: the high half is the first */
    const int64_t chunk = chunk_columns(w), chunks = count_chunks(w);
    float parts[8];
    for (int k = 0; k < per; k++) parts[k] = codes_are_numbers(w) ? 1 / (float)(1 << number_shift(k, w->bits)) : 1;
    for (int64_t m = begin; m < end; m++) {
        for (int64_t c = 0; c < chunks; c++) {
            float *to = (float *)p->laid + (m * chunks + c) * chunk, *sums = few_sums(p) + (m * chunks + c) * LANES;
            const float *from = p->x + m * w->columns + c * chunk;
            float rest[LANES * 8] = {0};
            if ((c + 1) * chunk > w->columns) {
                memcpy(rest, from, (size_t)(w->columns - c * chunk) * sizeof(float));
                from = rest;
            }
            for (int lane = 0; lane < LANES; lane++) sums[lane] = 0;
            for (int k = 0; k < per; k++)
                for (int lane = 0; lane < LANES; lane++) {
                    const float value = from[lane * per + (k ^ turn)];
                    to[k * LANES + lane] = value * parts[k];
                    sums[lane] += value;
                }
        }
    }
}

/* What is asked for while `together` rows from `row` on are used. It is read from one end to the other: what rows beside
 * each other ask for is no order that memory likes. */
NQ_INLINE const uint8_t *codes_ahead(const struct nq_weight *w, int64_t row, int together, int64_t row_bytes) {
    const int64_t group = together * row_bytes;
    return w->codes + row * row_bytes + (group > AHEAD ? group + AHEAD / 2 : AHEAD);
}

/* Rows [begin, end) of the weight times `count` rows of x from m0 on, `together` rows of the weight at once. */
NQ_INLINE void few(
    const struct nq_product *p, int64_t begin, int64_t end, int64_t m0, const int bits, const enum how how, const int count,
    const int together) {
    const struct nq_weight *w = p->w;
    const int per = codes_a_word(bits), chunk = LANES * per, at_once = values_at_once(how);
    const int step_bits = nq_step_bits(w, SEGMENT_BITS), spread = step_bits - (bits == 8 ? 2 : 3); /* lanes to runs */
    const int64_t chunks = count_chunks(w), row_bytes = nq_row_bytes(w), stride = chunks * chunk;
    const int64_t runs = nq_ceil(w->columns, (int64_t)1 << step_bits);
    const float *laid = (const float *)p->laid + m0 * stride, *sums = few_sums(p) + m0 * chunks * LANES;
    const vtab table = vf_table(w->table);
    const vbytes bytes = vf_bytes(w->table);
    const vf middle = vf_set1((float)nq_middle(w));
    float scales[4][SEGMENT / 8 + LANES] = {{0}}, zeros[4][SEGMENT / 8 + LANES] = {{0}};
    for (int64_t row = begin; row < end; row += together) {
        int64_t rows[4];
        vf sum[4 * 4];
        _Pragma("GCC unroll 4") for (int r = 0; r < together; r++) rows[r] = nq_min(row + r, end - 1);
        const uint8_t *ahead = codes_ahead(w, row, together, row_bytes);
        _Pragma("GCC unroll 16") for (int i = 0; i < count * together; i++) sum[i] = vf_zero();
        for (int64_t c = 0; c < chunks;) {
            const int64_t stop = nq_min(chunks, c + SEGMENT / chunk);
            const int64_t first = (c * chunk) >> step_bits;
            const int64_t last = nq_min(runs, nq_ceil(stop * chunk, (int64_t)1 << step_bits));
            _Pragma("GCC unroll 4") for (int r = 0; r < together; r++)
                load_scales(w, rows[r], first, last - first, step_bits, scales[r], zeros[r]);
            for (; c < stop; c++) {
                const int64_t run = ((c * chunk) >> step_bits) - first;
                const float *x = laid + c * chunk;
                vi words[4];
                vf part[4 * 4];
                _Pragma("GCC unroll 4") for (int r = 0; r < together; r++) {
                    __builtin_prefetch(ahead + (c * together + r) * (chunk * bits / 8));
                    words[r] = load_words(w, w->codes + rows[r] * row_bytes, row_bytes, c, bits);
                }
                _Pragma("GCC unroll 16") for (int i = 0; i < count * together; i++) part[i] = vf_zero();
                _Pragma("GCC unroll 8") for (int step = 0; step < per / at_once; step++)
                    _Pragma("GCC unroll 4") for (int r = 0; r < together; r++) {
                        vf values[4];
                        values_of(table, bytes, words[r], step, bits, how, values);
                        _Pragma("GCC unroll 4") for (int i = 0; i < at_once; i++)
                            _Pragma("GCC unroll 4") for (int m = 0; m < count; m++) {
                                const vf other = vf_load(x + m * stride + place_of(step, i, how) * LANES);
                                part[m * together + r] = vf_fma(values[i], other, part[m * together + r]);
                            }
                    }
                _Pragma("GCC unroll 4") for (int r = 0; r < together; r++) {
                    const vf scale = spread_over_lanes(scales[r] + run, spread, bits);
                    vf zero = w->zeros ? spread_over_lanes(zeros[r] + run, spread, bits) : vf_zero();
                    if (how == AS_NUMBERS) zero = vf_add(zero, middle);
                    _Pragma("GCC unroll 4") for (int m = 0; m < count; m++) {
                        vf whole = part[m * together + r];
                        if (w->zeros || how == AS_NUMBERS) whole = vf_fnma(zero, vf_load(sums + (m * chunks + c) * LANES), whole);
                        sum[m * together + r] = vf_fma(whole, scale, sum[m * together + r]);
                    }
                }
            }
        }
        _Pragma("GCC unroll 4") for (int r = 0; r < together; r++) {
            const float bias = p->bias ? p->bias[rows[r]] : 0;
            _Pragma("GCC unroll 4") for (int m = 0; m < count; m++)
                p->y[(m0 + m) * w->rows + rows[r]] = vf_sum(sum[m * together + r]) + bias;
        }
    }
}

#define FEW(BITS, M)                                                                                                  \
    static void few_##BITS##_##M(const struct nq_product *p, int64_t begin, int64_t end, int64_t m0) {              \
        const enum how how = how_of(p->w);                                                                            \
        if (CODES_AS_NUMBERS && BITS < 8 && how == AS_NUMBERS)                                                        \
            few(p, begin, end, m0, BITS, AS_NUMBERS, M, FEW_TOGETHER(M));                                             \
        else if (TABLES_OF_BYTES && BITS == 4 && how == BY_BYTES)                                                     \
            few(p, begin, end, m0, BITS, BY_BYTES, M, FEW_TOGETHER(M));                                               \
        else few(p, begin, end, m0, BITS, BY_TABLE, M, FEW_TOGETHER(M));                                              \
    }
#define FEW_OF(BITS) FEW(BITS, 1) FEW(BITS, 2) FEW(BITS, 3) FEW(BITS, 4)
FEW_OF(2)
FEW_OF(3)
FEW_OF(4)
FEW_OF(8)
#define FEW_NAMES(BITS) {few_##BITS##_1, few_##BITS##_2, few_##BITS##_3, few_##BITS##_4}

typedef void (*few_function)(const struct nq_product *, int64_t, int64_t, int64_t);

/* By the bits of a code, and by rows of x: at most four at once. */
static void run_few(const few_function functions[4][4], const struct nq_product *p, int64_t begin, int64_t end) {
    const int which = p->w->bits == 8 ? 3 : p->w->bits - 2;
    for (int64_t m = 0; m < p->count; m += 4) functions[which][nq_min(4, p->count - m) - 1](p, begin, end, m);
}

static void few_run(void *argument, int64_t begin, int64_t end) {
    static const few_function functions[4][4] = {FEW_NAMES(2), FEW_NAMES(3), FEW_NAMES(4), FEW_NAMES(8)};
    run_few(functions, argument, begin, end);
}

/* Few rows of x and a plain weight ---------------------------------------------------------------------------------- */

/* LANES values from `column` on, as float32. */
NQ_INLINE vf plain_at(const uint8_t *row, int64_t column, const int dtype) {
    if (dtype == NQ_FLOAT32) return vf_load((const float *)row + column);
    if (dtype == NQ_FLOAT16) return vf_of_halves((const uint16_t *)row + column);
    return vf_cast(vi_sll(vi_load2(row + 2 * column), 16));
}

/* x is read as it lies: a row of the weight after the other, two vectors at a time. */
NQ_INLINE void plain_few(
    const struct nq_product *p, int64_t begin, int64_t end, int64_t m0, const int dtype, const int count) {
    const struct nq_weight *w = p->w;
    const int64_t columns = w->columns, size = dtype == NQ_FLOAT32 ? 4 : 2, step = 2 * LANES;
    const float *x = p->x + m0 * columns;
    for (int64_t row = begin; row < end; row++) {
        const uint8_t *from = w->codes + row * columns * size;
        vf sum[2 * 4];
        float rest[4];
        int64_t i = 0;
        _Pragma("GCC unroll 8") for (int k = 0; k < 2 * count; k++) sum[k] = vf_zero();
        for (; i + step <= columns; i += step) {
            const vf first = plain_at(from, i, dtype), second = plain_at(from, i + LANES, dtype);
            for (int64_t ahead = 0; ahead < step * size; ahead += 64) __builtin_prefetch(from + i * size + AHEAD + ahead);
            _Pragma("GCC unroll 4") for (int m = 0; m < count; m++) {
                sum[2 * m] = vf_fma(first, vf_load(x + m * columns + i), sum[2 * m]);
                sum[2 * m + 1] = vf_fma(second, vf_load(x + m * columns + i + LANES), sum[2 * m + 1]);
            }
        }
        for (int m = 0; m < count; m++) rest[m] = p->bias ? p->bias[row] : 0;
        for (; i < columns; i++) {
            const float value = nq_plain(w, row, i);
            for (int m = 0; m < count; m++) rest[m] += value * x[m * columns + i];
        }
        _Pragma("GCC unroll 4") for (int m = 0; m < count; m++)
            p->y[(m0 + m) * w->rows + row] = vf_sum(vf_add(sum[2 * m], sum[2 * m + 1])) + rest[m];
    }
}

#define PLAIN(DTYPE)                                                                                                  \
    static void plain_##DTYPE(const struct nq_product *p, int64_t begin, int64_t end, int64_t m, int count) {       \
        if (count == 1) plain_few(p, begin, end, m, DTYPE, 1);                                                        \
        else if (count == 2) plain_few(p, begin, end, m, DTYPE, 2);                                                   \
        else if (count == 3) plain_few(p, begin, end, m, DTYPE, 3);                                                   \
        else plain_few(p, begin, end, m, DTYPE, 4);                                                                   \
    }
PLAIN(NQ_FLOAT32)
PLAIN(NQ_FLOAT16)
PLAIN(NQ_BFLOAT16)

static size_t nothing_size(const struct nq_product *p) {
    (void)p;
    return 0;
}

static void nothing_lay(void *argument, int64_t begin, int64_t end) { (void)argument, (void)begin, (void)end; }

static void plain_run(void *argument, int64_t begin, int64_t end) {
    static void (*const functions[])(const struct nq_product *, int64_t, int64_t, int64_t, int) = {
        plain_NQ_FLOAT32, plain_NQ_FLOAT16, plain_NQ_BFLOAT16};
    const struct nq_product *p = argument;
    for (int64_t m = 0; m < p->count; m += 4) functions[p->w->plain](p, begin, end, m, (int)nq_min(4, p->count - m));
}

/* Few rows of x and a trellis --------------------------------------------------------------------------------------- */

/* LANES words from `column` on, zeros behind the last. */
NQ_INLINE vi words_at(const uint16_t *block, int64_t column, int64_t columns) {
    if (column + LANES <= columns) return vi_load(block + 2 * column);
    uint32_t rest[LANES] = {0};
    memcpy(rest, block + 2 * column, (size_t)(columns - column) * sizeof *rest);
    return vi_load(rest);
}

/* And as many half words behind a block's words, each in a lane. */
NQ_INLINE vi halves_at(const uint16_t *block, int64_t column, int64_t columns) {
    const uint16_t *from = block + 2 * columns + column;
    if (column + LANES <= columns) return vi_load2((const uint8_t *)from);
    uint16_t rest[LANES] = {0};
    memcpy(rest, from, (size_t)(columns - column) * sizeof *rest);
    return vi_load2((const uint8_t *)rest);
}

/* 32 bits of each block's number, from half word `half` on. */
NQ_INLINE vi window_at(
    const uint16_t *block, const uint16_t *before, int64_t column, int64_t columns, int half, const int bits) {
    if (half == 0) return words_at(block, column, columns);
    const vi low = half == 1 ? vi_srl(words_at(block, column, columns), 16) : halves_at(block, column, columns);
    const vi high = half + 1 < bits ? halves_at(block, column, columns) : words_at(before, column, columns);
    return vi_or(vi_sll(high, 16), low);
}

/* The values of states that begin `shift` bits up in such windows: they are moved into the upper half of a lane, of whose
 * product the highest bits are the place in the table. */
NQ_INLINE vf value_of_state(vtab table, vi multiplier, vi window, int shift, const int bits) {
    const vi state = shift > 16 ? vi_srl(window, shift - 16) : shift < 16 ? vi_sll(window, 16 - shift) : window;
    const vi product = vi_mul16(state, multiplier);
    if (bits == 2) return vf_lookup_high(table, product);
    const vf value = vf_lookup_high(table, vi_twice(product));
    return vf_cast(vi_xor(vi_cast(value), vi_and(product, vi_set1(INT32_MIN))));
}

NQ_INLINE vi state_multiplier(const struct nq_weight *w) {
    return vi_set1((int32_t)((uint32_t)w->multiplier << (32 - NQ_STATE_BITS)));
}

/* sum[LANES] of each of `together` rows of a block from its row `first` on and of each row of x, over a run of columns that
 * share a scale. */
NQ_INLINE void trellis_run_of(
    const struct nq_weight *w, const uint16_t *codes, const uint16_t *before, const float *x, int64_t column, int64_t stop,
    const int first, const int together, const int count, const int bits, vtab table, vi multiplier, vf *part) {
    const int low = nq_state_half(bits, first + together - 1), high = nq_state_half(bits, first);
    _Pragma("GCC unroll 16") for (int i = 0; i < together * count; i++) part[i] = vf_zero();
    for (; column < stop; column += LANES) {
        vi windows[3];
        vf values[4];
        _Pragma("GCC unroll 3") for (int half = low; half <= high; half++)
            windows[half] = window_at(codes, before, column, w->columns, half, bits);
        _Pragma("GCC unroll 4") for (int m = 0; m < count; m++) {
            const float *from = x + m * w->columns + column;
            float rest[LANES] = {0};
            if (column + LANES > w->columns) {
                memcpy(rest, from, (size_t)(w->columns - column) * sizeof(float));
                from = rest;
            }
            values[m] = vf_load(from);
        }
        _Pragma("GCC unroll 8") for (int r = 0; r < together; r++) {
            const vi window = windows[nq_state_half(bits, first + r)];
            const vf value = value_of_state(table, multiplier, window, nq_state_shift(bits, first + r), bits);
            _Pragma("GCC unroll 4") for (int m = 0; m < count; m++)
                part[m * together + r] = vf_fma(value, values[m], part[m * together + r]);
        }
    }
}

enum { SHORTEST_RUN = 16 };

/* The rows [begin, end) of one block, whose words are read once for `together` rows. */
NQ_INLINE void trellis_block(
    const struct nq_product *p, int64_t block, int64_t begin, int64_t end, int64_t m0, const int count,
    const int together, const int bits) {
    const struct nq_weight *w = p->w;
    const int64_t origin = block * NQ_BLOCK_ROWS, columns = w->columns;
    const int step_bits = nq_step_bits(w, SEGMENT_BITS);
    const uint16_t *codes = nq_block(w, origin), *before = nq_block_before(w, origin);
    const vtab table = vf_table(w->table);
    const vi multiplier = state_multiplier(w);
    const float *x = p->x + m0 * columns;
    float scales[NQ_BLOCK_ROWS][SEGMENT / SHORTEST_RUN + LANES], zeros[SEGMENT / SHORTEST_RUN + LANES];
    vf sum[4 * NQ_BLOCK_ROWS], part[8];
    for (int i = 0; i < count * NQ_BLOCK_ROWS; i++) sum[i] = vf_zero();
    for (int64_t segment = 0; segment < columns; segment += SEGMENT) {
        const int64_t last = nq_min(columns, segment + SEGMENT);
        const int64_t runs = nq_ceil(last, (int64_t)1 << step_bits) - (segment >> step_bits);
        for (int r = 0; r < NQ_BLOCK_ROWS; r++)
            load_scales(w, nq_min(origin + r, w->rows - 1), segment >> step_bits, runs, step_bits, scales[r], zeros);
        for (int64_t run = 0; run < runs; run++) {
            const int64_t column = segment + (run << step_bits), stop = nq_min(last, column + ((int64_t)1 << step_bits));
            _Pragma("GCC unroll 16") for (int first = 0; first < NQ_BLOCK_ROWS; first += together) {
                trellis_run_of(w, codes, before, x, column, stop, first, together, count, bits, table, multiplier, part);
                _Pragma("GCC unroll 8") for (int r = 0; r < together; r++) {
                    const vf scale = vf_set1(scales[first + r][run]);
                    _Pragma("GCC unroll 4") for (int m = 0; m < count; m++) {
                        vf *to = &sum[m * NQ_BLOCK_ROWS + first + r];
                        *to = vf_fma(part[m * together + r], scale, *to);
                    }
                }
            }
        }
    }
    for (int64_t row = begin; row < end; row++)
        for (int m = 0; m < count; m++)
            p->y[(m0 + m) * w->rows + row] = vf_sum(sum[m * NQ_BLOCK_ROWS + row - origin]) + (p->bias ? p->bias[row] : 0);
}

#define TRELLIS(BITS, M, TOGETHER)                                                                                    \
    static void trellis_##BITS##_##M(const struct nq_product *p, int64_t block, int64_t begin, int64_t end, int64_t m) { \
        trellis_block(p, block, begin, end, m, M, TOGETHER, BITS);                                                    \
    }
#define TRELLIS_OF(BITS)                                                                                              \
    TRELLIS(BITS, 1, TRELLIS_TOGETHER) TRELLIS(BITS, 2, TRELLIS_TOGETHER / 2) TRELLIS(BITS, 3, TRELLIS_TOGETHER / 4)  \
    TRELLIS(BITS, 4, TRELLIS_TOGETHER / 4)
TRELLIS_OF(2)
TRELLIS_OF(3)
#define TRELLIS_NAMES(BITS) {trellis_##BITS##_1, trellis_##BITS##_2, trellis_##BITS##_3, trellis_##BITS##_4}

/* By blocks of rows: the threads' pieces, of several weights counted through, may begin within one. */
static void trellis_run(void *argument, int64_t begin, int64_t end) {
    static void (*const functions[2][4])(const struct nq_product *, int64_t, int64_t, int64_t, int64_t) = {
        TRELLIS_NAMES(2), TRELLIS_NAMES(3)};
    const struct nq_product *p = argument;
    for (int64_t row = begin; row < end;) {
        const int64_t block = row / NQ_BLOCK_ROWS, stop = nq_min(end, (block + 1) * NQ_BLOCK_ROWS);
        for (int64_t m = 0; m < p->count; m += 4)
            functions[p->w->bits - 2][nq_min(4, p->count - m) - 1](p, block, row, stop, m);
        row = stop;
    }
}

/* Many rows of x ---------------------------------------------------------------------------------------------------- */

/* Rows of a panel: those beyond `end` are its last row again, and are not kept. */
NQ_INLINE int64_t panel_row(int64_t row, int i, int64_t end) { return nq_min(row + i, end - 1); }

/* Scales and zeros of a panel's rows from column `column` on, [runs, PANEL]; at most DEPTH8 / 8 runs. */
static void panel_scales(
    const struct nq_weight *w, int64_t row, int64_t end, int64_t column, int64_t runs, int step_bits, float *scales,
    float *zeros) {
    float scale[DEPTH8 / 8], zero[DEPTH8 / 8] = {0};
    for (int i = 0; i < PANEL; i++) {
        load_scales(w, panel_row(row, i, end), column >> step_bits, runs, step_bits, scale, zero);
        for (int64_t s = 0; s < runs; s++) scales[s * PANEL + i] = scale[s];
        for (int64_t s = 0; w->zeros && s < runs; s++) zeros[s * PANEL + i] = zero[s];
    }
}

/* One chunk of LANES rows, transposed: words[j] holds word j of each row. */
NQ_INLINE void load_transposed(const struct nq_weight *w, int64_t row, int64_t end, int64_t c, const int bits, vi *words) {
    const int64_t row_bytes = nq_row_bytes(w), bytes = LANES * codes_a_word(bits) * bits / 8;
    const uint8_t *ahead = w->codes + (row + LANES) * row_bytes + c * LANES * bytes; /* the rows behind, in their order */
    for (int i = 0; i < LANES; i++) {
        __builtin_prefetch(ahead + i * bytes);
        words[i] = load_words(w, w->codes + panel_row(row, i, end) * row_bytes, row_bytes, c, bits);
    }
    vi_transpose(words);
}

/* Rows [row, row + PANEL) and columns [column, column + depth), decoded to panel[depth, PANEL]. */
NQ_INLINE void decode_panel(
    const struct nq_weight *w, int64_t row, int64_t end, int64_t column, int64_t depth, const int bits, float *panel) {
    const int per = codes_a_word(bits), chunk = LANES * per, turn = w->kind == NQ_CODEBOOK;
    const int step_bits = nq_step_bits(w, DEPTH_BITS);
    const int64_t runs = nq_ceil(depth, (int64_t)1 << step_bits);
    const vtab table = vf_table(w->table);
    float scales[DEPTH / 8 * PANEL], zeros[DEPTH / 8 * PANEL];
    panel_scales(w, row, end, column, runs, step_bits, scales, zeros);
    for (int half = 0; half < PANEL; half += LANES)
        for (int64_t c = column / chunk; c * chunk < column + depth; c++) {
            vi words[LANES];
            load_transposed(w, row + half, end, c, bits, words);
            for (int j = 0; j < LANES; j++) {
                const int64_t at = c * chunk + j * per - column;
                if (at >= depth) break;
                const int64_t run = (at >> step_bits) * PANEL + half;
                const vf scale = vf_load(scales + run), zero = w->zeros ? vf_load(zeros + run) : vf_zero();
                _Pragma("GCC unroll 8") for (int k = 0; k < per; k++) {
                    vf value = vf_sub(value_at(table, words[j], k, bits), zero);
                    vf_store(panel + (at + (k ^ turn)) * PANEL + half, vf_mul(value, scale));
                }
            }
        }
}

/* The same for weights whose rows do not start on bytes, or whose scales change anywhere. */
static void decode_panel_slowly(
    const struct nq_weight *w, int64_t row, int64_t end, int64_t column, int64_t depth, float *panel) {
    float values[DEPTH];
    for (int i = 0; i < PANEL; i++) {
        nq_decode_run(w, panel_row(row, i, end), column, depth, values);
        for (int64_t k = 0; k < depth; k++) panel[k * PANEL + i] = values[k];
    }
}

/* And of a plain weight: LANES columns of LANES rows at a time, transposed. */
NQ_INLINE void decode_plain_panel(
    const struct nq_weight *w, int64_t row, int64_t end, int64_t column, int64_t depth, const int dtype, float *panel) {
    const int64_t row_bytes = w->columns * (w->bits / 8);
    for (int half = 0; half < PANEL; half += LANES) {
        int64_t k = 0;
        for (; k + LANES <= depth; k += LANES) {
            vi values[LANES];
            for (int i = 0; i < LANES; i++) {
                const uint8_t *from = w->codes + panel_row(row + half, i, end) * row_bytes;
                values[i] = vi_cast(plain_at(from, column + k, dtype));
            }
            vi_transpose(values);
            for (int j = 0; j < LANES; j++) vf_store(panel + (k + j) * PANEL + half, vf_cast(values[j]));
        }
        for (; k < depth; k++)
            for (int i = 0; i < LANES; i++)
                panel[k * PANEL + half + i] = nq_plain(w, panel_row(row + half, i, end), column + k);
    }
}

/* And of a trellis: LANES columns of LANES rows at a time, transposed. */
NQ_INLINE void decode_trellis_panel(
    const struct nq_weight *w, int64_t row, int64_t end, int64_t column, int64_t depth, const int bits, float *panel) {
    const int step_bits = nq_step_bits(w, DEPTH_BITS);
    const int64_t runs = nq_ceil(depth, (int64_t)1 << step_bits);
    const vtab table = vf_table(w->table);
    const vi multiplier = state_multiplier(w);
    float scales[DEPTH / SHORTEST_RUN * PANEL], zeros[DEPTH / SHORTEST_RUN * PANEL];
    panel_scales(w, row, end, column, runs, step_bits, scales, zeros);
    for (int half = 0; half < PANEL; half += LANES)
        for (int64_t k = 0; k < depth; k += LANES) {
            vi values[LANES];
            for (int i = 0; i < LANES; i++) {
                const int64_t at = panel_row(row + half, i, end);
                const vi window = window_at(
                    nq_block(w, at), nq_block_before(w, at), column + k, w->columns, nq_state_half(bits, at), bits);
                values[i] = vi_cast(value_of_state(table, multiplier, window, nq_state_shift(bits, at), bits));
            }
            vi_transpose(values);
            const vf scale = vf_load(scales + (k >> step_bits) * PANEL + half);
            for (int j = 0; j < LANES && k + j < depth; j++)
                vf_store(panel + (k + j) * PANEL + half, vf_mul(vf_cast(values[j]), scale));
        }
}

static void decode_any_panel(
    const struct nq_weight *w, int64_t row, int64_t end, int64_t column, int64_t depth, float *panel) {
    if (w->kind == NQ_TRELLIS) {
        if (w->bits == 2) decode_trellis_panel(w, row, end, column, depth, 2, panel);
        else decode_trellis_panel(w, row, end, column, depth, 3, panel);
        return;
    }
    if (w->kind == NQ_PLAIN) {
        if (w->plain == NQ_FLOAT32) decode_plain_panel(w, row, end, column, depth, NQ_FLOAT32, panel);
        else if (w->plain == NQ_FLOAT16) decode_plain_panel(w, row, end, column, depth, NQ_FLOAT16, panel);
        else decode_plain_panel(w, row, end, column, depth, NQ_BFLOAT16, panel);
        return;
    }
    if (!nq_is_regular(w)) decode_panel_slowly(w, row, end, column, depth, panel);
    else if (w->bits == 2) decode_panel(w, row, end, column, depth, 2, panel);
    else if (w->bits == 3) decode_panel(w, row, end, column, depth, 3, panel);
    else if (w->bits == 4) decode_panel(w, row, end, column, depth, 4, panel);
    else decode_panel(w, row, end, column, depth, 8, panel);
}

static size_t many_size(const struct nq_product *p) {
    return (size_t)(nq_ceil(p->count, TILE) * TILE * p->w->columns) * sizeof(float);
}

/* x in tiles: [tiles, I, TILE]. */
static void many_lay(void *argument, int64_t begin, int64_t end) {
    const struct nq_product *p = argument;
    const int64_t columns = p->w->columns;
    for (int64_t tile = begin; tile < end; tile++) {
        const int64_t rows = nq_min(TILE, p->count - tile * TILE);
        float *to = (float *)p->laid + tile * TILE * columns;
        for (int64_t k = 0; k < columns; k++)
            for (int64_t m = 0; m < rows; m++) to[k * TILE + m] = p->x[(tile * TILE + m) * columns + k];
    }
}

/* Where a tile of y begins and ends: `start` is the bias (or zeros), or y itself behind the first columns. */
struct corner {
    const float *start;
    int64_t start_stride;
    float *y;
    int64_t stride;
};

/* y[m, PANEL] += the tile times the panel; from a number of x to the row's next, and to the next row's, it is so far. */
NQ_INLINE void multiply_tile(
    const float *x, int64_t across, int64_t down, const float *panel, int64_t depth, struct corner at, const int m) {
    vf sum[TILE * 2];
    _Pragma("GCC unroll 12") for (int i = 0; i < m; i++) {
        sum[2 * i] = vf_load(at.start + i * at.start_stride);
        sum[2 * i + 1] = vf_load(at.start + i * at.start_stride + LANES);
    }
    for (int64_t k = 0; k < depth; k++) {
        const vf first = vf_load(panel + k * PANEL), second = vf_load(panel + k * PANEL + LANES);
        _Pragma("GCC unroll 12") for (int i = 0; i < m; i++) {
            const vf value = vf_set1(x[k * across + i * down]);
            sum[2 * i] = vf_fma(value, first, sum[2 * i]);
            sum[2 * i + 1] = vf_fma(value, second, sum[2 * i + 1]);
        }
    }
    _Pragma("GCC unroll 12") for (int i = 0; i < m; i++) {
        vf_store(at.y + i * at.stride, sum[2 * i]);
        vf_store(at.y + i * at.stride + LANES, sum[2 * i + 1]);
    }
}

/* The number of rows in registers, at most a tile's, is known when this is compiled. */
#define OF_ROWS(CALL, m)                                                                                              \
    switch (m) {                                                                                                      \
        case 1: CALL(1); break;                                                                                       \
        case 2: CALL(2); break;                                                                                       \
        case 3: CALL(3); break;                                                                                       \
        case 4: CALL(4); break;                                                                                       \
        case 5: CALL(5); break;                                                                                       \
        case 6: CALL(6); break;                                                                                       \
        case 7: CALL(7); break;                                                                                       \
        case 8: CALL(8); break;                                                                                       \
        case 9: CALL(9); break;                                                                                       \
        case 10: CALL(10); break;                                                                                     \
        case 11: CALL(11); break;                                                                                     \
        default: CALL(12);                                                                                            \
    }

static void multiply_rows(const float *x, const float *panel, int64_t depth, struct corner at, int64_t m) {
#define CALL(M) if ((M) <= TILE) multiply_tile(x, TILE, 1, panel, depth, at, M)
    OF_ROWS(CALL, m)
#undef CALL
}

/* y as a tile sees it: `edge`, from which finish_corner copies, where the weight's rows end within the panel. */
static struct corner open_corner(
    const struct nq_product *p, int64_t m0, int64_t m, int64_t row, int64_t width, int first, float *edge) {
    static const float zeros[PANEL];
    float *y = p->y + m0 * p->w->rows + row;
    if (width == PANEL) {
        if (!first) return (struct corner){y, p->w->rows, y, p->w->rows};
        return (struct corner){p->bias ? p->bias + row : zeros, 0, y, p->w->rows};
    }
    memset(edge, 0, TILE * PANEL * sizeof(float));
    for (int64_t i = 0; i < m; i++)
        for (int64_t n = 0; n < width; n++)
            edge[i * PANEL + n] = !first ? y[i * p->w->rows + n] : p->bias ? p->bias[row + n] : 0;
    return (struct corner){edge, PANEL, edge, PANEL};
}

static void finish_corner(const struct nq_product *p, struct corner at, int64_t m0, int64_t m, int64_t row, int64_t width) {
    if (width == PANEL) return;
    for (int64_t i = 0; i < m; i++)
        memcpy(p->y + (m0 + i) * p->w->rows + row, at.y + i * PANEL, (size_t)width * sizeof(float));
}

static void many_run(void *argument, int64_t begin, int64_t end) {
    const struct nq_product *p = argument;
    const int64_t columns = p->w->columns;
    float *panels = nq_scratch(NQ_OWN, (DEPTH + 8) * BLOCK * sizeof(float)), edge[TILE * PANEL];
    if (!panels) {
        *p->starved = 1;
        return;
    }
    for (int64_t row = begin; row < end; row += BLOCK) {
        const int64_t rows = nq_min(BLOCK, end - row);
        for (int64_t column = 0; column < columns; column += DEPTH) {
            const int64_t depth = nq_min(DEPTH, columns - column);
            for (int64_t n = 0; n < rows; n += PANEL)
                decode_any_panel(p->w, row + n, end, column, depth, panels + n * (DEPTH + 8));
            for (int64_t m0 = 0; m0 < p->count; m0 += TILE) {
                const int64_t m = nq_min(TILE, p->count - m0);
                const float *x = (const float *)p->laid + m0 * columns + column * TILE;
                for (int64_t n = 0; n < rows; n += PANEL) {
                    const int64_t width = nq_min(PANEL, rows - n);
                    struct corner at = open_corner(p, m0, m, row + n, width, column == 0, edge);
                    multiply_rows(x, panels + n * (DEPTH + 8), depth, at, m);
                    finish_corner(p, at, m0, m, row + n, width);
                }
            }
        }
    }
}

/* Rounded activations ------------------------------------------------------------------------------------------------ */

/* x in tiles of TILE8 rows, four bytes of a row beside the next row's: int8[tiles, ceil(I / 8) * 2, TILE8, 4], and for
 * each run of each row its scale and the scale times the sum of its bytes: [tiles, runs, TILE8, 2]. */
NQ_INLINE int64_t int8_words(const struct nq_weight *w) { return nq_ceil(w->columns, 8) * 2; }
NQ_INLINE int64_t int8_runs(const struct nq_weight *w) {
    return nq_ceil(w->columns, (int64_t)1 << nq_step_bits(w, RUN_BITS));
}
NQ_INLINE int64_t int8_tiles(const struct nq_product *p) { return nq_ceil(p->count, TILE8); }
NQ_INLINE float *int8_steps(const struct nq_product *p) {
    return (float *)p->laid + int8_tiles(p) * int8_words(p->w) * TILE8;
}

static size_t int8_size(const struct nq_product *p) {
    return (size_t)(int8_tiles(p) * TILE8 * (int8_words(p->w) + 2 * int8_runs(p->w))) * 4;
}

/* Every second byte of eight, from the first or the second on. */
NQ_INLINE uint32_t every_second(uint64_t bytes) {
    bytes &= 0x00ff00ff00ff00ffu;
    bytes = (bytes | bytes >> 8) & 0x0000ffff0000ffffu;
    return (uint32_t)(bytes | bytes >> 16);
}

/* And every second two of them. */
NQ_INLINE uint32_t every_second_pair(uint64_t bytes) { return (uint32_t)(bytes & 0xffff) | (uint32_t)(bytes >> 16 & 0xffff0000u); }

/* A run x[n] to bytes in [-127, 127] and their scale; n is at most LONGEST_RUN, and zeros follow up to a multiple of 8. */
static float round_run(const float *x, int64_t n, uint8_t *bytes, float *total) {
    uint32_t top = 0;
    for (int64_t i = 0; i < n; i++) {
        uint32_t magnitude = nq_bits(x[i]) & 0x7fffffffu;
        top = magnitude > top ? magnitude : top;
    }
    const float largest = nq_from_bits(top), inverse = largest < SMALLEST_ACTIVATION ? 0 : 127.0f / largest;
    int32_t sum = 0;
    for (int64_t i = 0; i < n; i++) {
        int8_t byte = (int8_t)nq_bits(x[i] * inverse + ROUNDING);
        bytes[i] = (uint8_t)byte ^ X_FLIP;
        sum += byte;
    }
    for (int64_t i = n; i & 7; i++) bytes[i] = X_FLIP;
    const float step = largest < SMALLEST_ACTIVATION ? 0 : largest / 127.0f;
    *total = step * (float)sum;
    return step;
}

static void int8_lay(void *argument, int64_t begin, int64_t end) {
    const struct nq_product *p = argument;
    const struct nq_weight *w = p->w;
    const int64_t words = int8_words(w), runs = int8_runs(w), run = (int64_t)1 << nq_step_bits(w, RUN_BITS);
    const int halves = w->bits == 4, turn = w->kind == NQ_CODEBOOK; /* one half of each byte, then the other */
    uint8_t bytes[LONGEST_RUN];
    for (int64_t m = begin * TILE8; m < nq_min(end * TILE8, p->count); m++) {
        uint32_t *to = (uint32_t *)p->laid + m / TILE8 * words * TILE8 + m % TILE8;
        float *steps = int8_steps(p) + (m / TILE8 * runs * TILE8 + m % TILE8) * 2;
        for (int64_t s = 0; s < runs; s++, steps += 2 * TILE8) {
            const int64_t n = nq_min(run, w->columns - s * run);
            steps[0] = round_run(p->x + m * w->columns + s * run, n, bytes, steps + 1);
            for (int64_t i = 0; i < n; i += 8, to += 2 * TILE8) {
                uint64_t eight;
                memcpy(&eight, bytes + i, 8);
                to[0] = halves ? every_second(turn ? eight >> 8 : eight) : (uint32_t)eight;
                to[TILE8] = halves ? every_second(turn ? eight : eight >> 8) : (uint32_t)(eight >> 32);
            }
        }
    }
}

/* Whether zeros meet the sums of x: those of 8 bits and fractions. Others are taken off the levels, which stay bytes. */
NQ_INLINE int zeros_apart(const struct nq_weight *w) { return w->zeros && (w->bits == 8 || w->half_zeros); }

/* A block of PANEL rows in bytes: codes[depth / 4, PANEL], and by run what sums start from, scales, and zeros. */
struct panel8 {
    int32_t *codes, *starts;
    float *scales, *zeros;
};

static struct panel8 panel8_at(void *scratch, int64_t panel, int64_t runs) {
    int32_t *at = (int32_t *)scratch + panel * PANEL * (DEPTH8 / 4 + 3 * runs);
    int32_t *starts = at + PANEL * (DEPTH8 / 4);
    return (struct panel8){at, starts, (float *)starts + PANEL * runs, (float *)starts + 2 * PANEL * runs};
}

/* Four levels a lane of `words`: codes 0 to 3 or 4 to 7 of each word, or one half of each byte. */
NQ_INLINE vi levels_of(vbtab levels, vi words, int second, const int bits) {
    if (bits == 8) return words;
    if (bits == 4) return vb_lookup(levels, vi_and(vi_srl(words, second ? 4 : 0), vi_set1(0x0f0f0f0f)));
    vi found = vi_set1(0);
    _Pragma("GCC unroll 4") for (int k = 0; k < 4; k++) {
        vi code = vi_and(vi_srl(words, bits * (4 * second + k)), vi_set1((1 << bits) - 1));
        found = vi_or(found, vi_sll(code, 8 * k));
    }
    return vb_lookup(levels, found);
}

NQ_INLINE void levels_panel(
    const struct nq_weight *w, int64_t row, int64_t end, int64_t column, int64_t depth, const int bits,
    struct panel8 to) {
    const int per = codes_a_word(bits), chunk = LANES * per, step_bits = nq_step_bits(w, RUN_BITS);
    const int64_t runs = nq_ceil(depth, (int64_t)1 << step_bits);
    const vbtab levels = vb_table(w->levels);
    panel_scales(w, row, end, column, runs, step_bits, to.scales, to.zeros);
    const int apart = zeros_apart(w), within = w->zeros && !apart;
    if (apart)
        for (int64_t i = 0; i < runs * PANEL; i++) to.zeros[i] *= to.scales[i];
    for (int64_t i = 0; i < runs * PANEL; i++) {
        to.scales[i] *= w->level_step;
        to.starts[i] = within ? (int32_t)((uint8_t)(int)to.zeros[i] * 0x01010101u) : 0;
    }
    for (int half = 0; half < PANEL; half += LANES)
        for (int64_t c = column / chunk; c * chunk < column + depth; c++) {
            vi words[LANES];
            load_transposed(w, row + half, end, c, bits, words);
            for (int j = 0; j < LANES; j++) {
                const int64_t at = c * chunk + j * per - column;
                if (at >= depth) break;
                const vi zero = vi_load(to.starts + (at >> step_bits) * PANEL + half);
                for (int second = 0; second < per / 4; second++) {
                    vi found = levels_of(levels, words[j], second, bits);
                    if (within) found = vb_sub(found, zero);
                    vi_store(to.codes + (at / 4 + second) * PANEL + half, found);
                }
            }
        }
    if (bits == 8) /* columns 4 to 7 of the last eight may not have been reached */
        for (int64_t at = nq_ceil(depth, 4); at & 1; at++) memset(to.codes + at * PANEL, 0, PANEL * 4);
    for (int64_t s = 0; s < runs; s++) { /* activations that are X_FLIP too high: what that adds is taken off */
        const int64_t first = (s << step_bits) / 4;
        const int64_t last = nq_min(((s + 1) << step_bits) / 4, nq_ceil(depth, 8) * 2);
        for (int half = 0; half < PANEL; half += LANES) {
            vi sum = vi_set1(0);
            for (int64_t k = first; X_FLIP && k < last; k++)
                sum = vi_dot4(sum, vi_set1(0x01010101), vi_load(to.codes + k * PANEL + half));
            vi_store(to.starts + s * PANEL + half, sum);
        }
    }
    for (int64_t i = 0; i < runs * PANEL; i++) to.starts[i] *= -X_FLIP;
}

static void levels_any_panel(
    const struct nq_weight *w, int64_t row, int64_t end, int64_t column, int64_t depth, struct panel8 to) {
    if (w->bits == 2) levels_panel(w, row, end, column, depth, 2, to);
    else if (w->bits == 3) levels_panel(w, row, end, column, depth, 3, to);
    else if (w->bits == 4) levels_panel(w, row, end, column, depth, 4, to);
    else levels_panel(w, row, end, column, depth, 8, to);
}

/* y[m, PANEL] += the tile of bytes times the panel; `words` of four columns. */
NQ_INLINE void multiply_bytes(
    const int32_t *x, const float *steps, struct panel8 panel, int64_t words, int run_words, int zeros,
    struct corner at, const int m) {
    vf sum[TILE8 * 2];
    _Pragma("GCC unroll 6") for (int i = 0; i < m; i++) {
        sum[2 * i] = vf_load(at.start + i * at.start_stride);
        sum[2 * i + 1] = vf_load(at.start + i * at.start_stride + LANES);
    }
    for (int64_t k = 0, s = 0; k < words; s++, steps += 2 * TILE8) {
        const int64_t stop = nq_min(words, k + run_words);
        vi whole[TILE8 * 2];
        _Pragma("GCC unroll 6") for (int i = 0; i < m; i++) {
            whole[2 * i] = vi_load(panel.starts + s * PANEL);
            whole[2 * i + 1] = vi_load(panel.starts + s * PANEL + LANES);
        }
        for (; k < stop; k++) {
            const vi first = vi_load(panel.codes + k * PANEL), second = vi_load(panel.codes + k * PANEL + LANES);
            _Pragma("GCC unroll 6") for (int i = 0; i < m; i++) {
                const vi four = vi_set1(x[k * TILE8 + i]);
                whole[2 * i] = vi_dot4(whole[2 * i], four, first);
                whole[2 * i + 1] = vi_dot4(whole[2 * i + 1], four, second);
            }
        }
        const vf first = vf_load(panel.scales + s * PANEL), second = vf_load(panel.scales + s * PANEL + LANES);
        _Pragma("GCC unroll 6") for (int i = 0; i < m; i++) {
            const vf step = vf_set1(steps[2 * i]);
            sum[2 * i] = vf_fma(vf_mul(vf_of(whole[2 * i]), step), first, sum[2 * i]);
            sum[2 * i + 1] = vf_fma(vf_mul(vf_of(whole[2 * i + 1]), step), second, sum[2 * i + 1]);
        }
        if (!zeros) continue;
        const vf low = vf_load(panel.zeros + s * PANEL), high = vf_load(panel.zeros + s * PANEL + LANES);
        _Pragma("GCC unroll 6") for (int i = 0; i < m; i++) {
            const vf total = vf_set1(steps[2 * i + 1]);
            sum[2 * i] = vf_fnma(total, low, sum[2 * i]);
            sum[2 * i + 1] = vf_fnma(total, high, sum[2 * i + 1]);
        }
    }
    _Pragma("GCC unroll 6") for (int i = 0; i < m; i++) {
        vf_store(at.y + i * at.stride, sum[2 * i]);
        vf_store(at.y + i * at.stride + LANES, sum[2 * i + 1]);
    }
}

/* Rounded activations, few rows: the words as they lie. x by chunks: for each lane of a chunk the four or eight bytes that
 * meet its codes, then their step, their sum, and what the lane's sum starts from: levels are X_FLIP higher than they should
 * be, and codes that are numbers by the middle. */
NQ_INLINE int64_t few8_chunk(const struct nq_weight *w) { return (codes_a_word(w->bits) / 4 + 3) * LANES; }

static size_t few8_size(const struct nq_product *p) {
    return (size_t)(p->count * count_chunks(p->w) * few8_chunk(p->w)) * 4;
}

static void few8_lay(void *argument, int64_t begin, int64_t end) {
    const struct nq_product *p = argument;
    const struct nq_weight *w = p->w;
    const int64_t run = (int64_t)1 << nq_step_bits(w, RUN_BITS), stride = few8_chunk(w), chunks = count_chunks(w);
    const int per = codes_a_word(w->bits), halves = w->bits == 4, turn = w->kind == NQ_CODEBOOK;
    const int pairs = codes_are_numbers(w) && !halves, above = codes_are_numbers(w) ? nq_middle(w) : X_FLIP;
    for (int64_t m = begin; m < end; m++) {
        int32_t *laid = (int32_t *)p->laid + m * chunks * stride;
        memset(laid, 0, (size_t)(chunks * stride) * 4);
        for (int64_t start = 0; start < w->columns; start += run) {
            const int64_t n = nq_min(run, w->columns - start);
            uint8_t bytes[LONGEST_RUN];
            float total;
            const float step = round_run(p->x + m * w->columns + start, n, bytes, &total) * w->level_step;
            for (int64_t i = 0; i < n; i += per) {
                const int64_t lane = (start + i) / per;
                int32_t *to = laid + lane / LANES * stride + lane % LANES, *behind = to + per / 4 * LANES, sum = 0;
                uint64_t eight = 0;
                for (int k = 0; k < per; k++) { /* without X_FLIP: here it is the weight that has no sign */
                    bytes[i + k] ^= X_FLIP;
                    sum += (int8_t)bytes[i + k];
                }
                memcpy(&eight, bytes + i, (size_t)per);
                const uint64_t first = turn ? eight >> 8 : eight, second = turn ? eight : eight >> 8;
                to[0] = (int32_t)(halves ? every_second(first) : pairs ? every_second_pair(eight) : (uint32_t)eight);
                if (per == 8)
                    to[LANES] = (int32_t)(halves  ? every_second(second)
                                          : pairs ? every_second_pair(eight >> 16)
                                                  : (uint32_t)(eight >> 32));
                const float as_float = (float)sum;
                memcpy(behind, &step, 4);
                memcpy(behind + LANES, &as_float, 4);
                behind[2 * LANES] = -above * sum;
            }
        }
    }
}

/* The sum of four products a lane. With VNNI the weight is X_FLIP too high, for what the sums start from. */
NQ_INLINE vi dot_levels(vi sum, vi x, vi levels) {
    return X_FLIP ? vi_dot4(sum, levels, x) : vi_dot4(sum, x, levels);
}

/* The sum of all products of a word's codes, with x as few8_lay laid it out. */
NQ_INLINE vi dot_word(vbtab levels, vi sum, vi words, const int32_t *x, const int bits, const int numbers) {
    (void)numbers;
#if CODES_AS_NUMBERS
    if (numbers) return vi_dot_codes(sum, words, vi_load(x), vi_load(x + LANES), bits);
#endif
    _Pragma("GCC unroll 2") for (int second = 0; second < codes_a_word(bits) / 4; second++) {
        vi found = levels_of(levels, words, second, bits);
        if (bits == 8 && X_FLIP) found = vi_xor(found, vi_set1((int32_t)(X_FLIP * 0x01010101u)));
        sum = dot_levels(sum, vi_load(x + second * LANES), found);
    }
    return sum;
}

NQ_INLINE void few8(
    const struct nq_product *p, int64_t begin, int64_t end, int64_t m0, const int bits, const int numbers, const int count,
    const int together) {
    const struct nq_weight *w = p->w;
    const int per = codes_a_word(bits), chunk = LANES * per, seconds = per / 4;
    const int step_bits = nq_step_bits(w, RUN_BITS), spread = step_bits - (bits == 8 ? 2 : 3); /* lanes to runs */
    const int64_t chunks = count_chunks(w), row_bytes = nq_row_bytes(w), stride = few8_chunk(w);
    const int64_t runs = nq_ceil(w->columns, (int64_t)1 << step_bits);
    float scales[4][SEGMENT / 8 + LANES] = {{0}}, zeros[4][SEGMENT / 8 + LANES] = {{0}};
    int8_t flipped[16];
    for (int i = 0; i < 16; i++) flipped[i] = (int8_t)(w->levels[i] ^ X_FLIP);
    const vbtab levels = vb_table(flipped);
    for (int64_t row = begin; row < end; row += together) {
        int64_t rows[4];
        vf sum[4 * 4];
        _Pragma("GCC unroll 4") for (int r = 0; r < together; r++) rows[r] = nq_min(row + r, end - 1);
        const uint8_t *ahead = codes_ahead(w, row, together, row_bytes);
        _Pragma("GCC unroll 16") for (int i = 0; i < count * together; i++) sum[i] = vf_zero();
        for (int64_t c = 0; c < chunks;) {
            const int64_t stop = nq_min(chunks, c + SEGMENT / chunk);
            const int64_t first = (c * chunk) >> step_bits;
            const int64_t last = nq_min(runs, nq_ceil(stop * chunk, (int64_t)1 << step_bits));
            _Pragma("GCC unroll 4") for (int r = 0; r < together; r++)
                load_scales(w, rows[r], first, last - first, step_bits, scales[r], zeros[r]);
            for (; c < stop; c++) {
                const int64_t run = ((c * chunk) >> step_bits) - first;
                _Pragma("GCC unroll 4") for (int r = 0; r < together; r++) {
                    const uint8_t *codes = w->codes + rows[r] * row_bytes;
                    __builtin_prefetch(ahead + (c * together + r) * (chunk * bits / 8));
                    const vi words = load_words(w, codes, row_bytes, c, bits);
                    const vf scale = vf_spread(scales[r] + run, spread);
                    _Pragma("GCC unroll 4") for (int m = 0; m < count; m++) {
                        const int32_t *x = (const int32_t *)p->laid + ((m0 + m) * chunks + c) * stride;
                        vf exact = vf_of(dot_word(levels, vi_load(x + (seconds + 2) * LANES), words, x, bits, numbers));
                        if (w->zeros)
                            exact = vf_fnma(
                                vf_spread(zeros[r] + run, spread), vf_load((const float *)x + (seconds + 1) * LANES), exact);
                        sum[m * together + r] = vf_fma(
                            vf_mul(exact, vf_load((const float *)x + seconds * LANES)), scale, sum[m * together + r]);
                    }
                }
            }
        }
        _Pragma("GCC unroll 4") for (int r = 0; r < together; r++) {
            const float bias = p->bias ? p->bias[rows[r]] : 0;
            _Pragma("GCC unroll 4") for (int m = 0; m < count; m++)
                p->y[(m0 + m) * w->rows + rows[r]] = vf_sum(sum[m * together + r]) + bias;
        }
    }
}

#define FEW8(BITS, M)                                                                                                 \
    static void few8_##BITS##_##M(const struct nq_product *p, int64_t begin, int64_t end, int64_t m0) {             \
        if (BITS < 8 && codes_are_numbers(p->w)) few8(p, begin, end, m0, BITS, 1, M, FEW8_TOGETHER(M, BITS));         \
        else few8(p, begin, end, m0, BITS, 0, M, FEW8_TOGETHER(M, BITS));                                             \
    }
#define FEW8_OF(BITS) FEW8(BITS, 1) FEW8(BITS, 2) FEW8(BITS, 3) FEW8(BITS, 4)
FEW8_OF(2)
FEW8_OF(3)
FEW8_OF(4)
FEW8_OF(8)
#define FEW8_NAMES(BITS) {few8_##BITS##_1, few8_##BITS##_2, few8_##BITS##_3, few8_##BITS##_4}

static void few8_run(void *argument, int64_t begin, int64_t end) {
    static const few_function functions[4][4] = {FEW8_NAMES(2), FEW8_NAMES(3), FEW8_NAMES(4), FEW8_NAMES(8)};
    run_few(functions, argument, begin, end);
}

static void int8_run(void *argument, int64_t begin, int64_t end) {
    const struct nq_product *p = argument;
    const struct nq_weight *w = p->w;
    const int step_bits = nq_step_bits(w, RUN_BITS), run_words = 1 << step_bits >> 2, zeros = zeros_apart(w);
    const int64_t columns = w->columns, most = DEPTH8 >> step_bits, runs = int8_runs(w);
    void *scratch = nq_scratch(NQ_OWN, (size_t)(BLOCK * (DEPTH8 / 4 + 3 * most)) * 4);
    float edge[TILE * PANEL];
    if (!scratch) {
        *p->starved = 1;
        return;
    }
    for (int64_t row = begin; row < end; row += BLOCK) {
        const int64_t rows = nq_min(BLOCK, end - row);
        for (int64_t column = 0; column < columns; column += DEPTH8) {
            const int64_t depth = nq_min(DEPTH8, columns - column), words = nq_ceil(depth, 8) * 2;
            for (int64_t n = 0; n < rows; n += PANEL)
                levels_any_panel(w, row + n, end, column, depth, panel8_at(scratch, n / PANEL, most));
            for (int64_t m0 = 0; m0 < p->count; m0 += TILE8) {
                const int64_t m = nq_min(TILE8, p->count - m0);
                const int32_t *x = (const int32_t *)p->laid + m0 * int8_words(w) + column / 4 * TILE8;
                const float *steps = int8_steps(p) + (m0 * runs + (column >> step_bits) * TILE8) * 2;
                for (int64_t n = 0; n < rows; n += PANEL) {
                    const int64_t width = nq_min(PANEL, rows - n);
                    const struct panel8 panel = panel8_at(scratch, n / PANEL, most);
                    struct corner at = open_corner(p, m0, m, row + n, width, column == 0, edge);
#define CALL(M) if ((M) <= TILE8) multiply_bytes(x, steps, panel, words, run_words, zeros, at, M)
                    OF_ROWS(CALL, m)
#undef CALL
                    finish_corner(p, at, m0, m, row + n, width);
                }
            }
        }
    }
}

#include "step.inc.h"

const struct nq_kernels NAME(nq_kernels) = {
    .few_most = FEW_MOST,
    .few = {few_size, few_lay, few_run, 1, 4},
    .many = {many_size, many_lay, many_run, TILE, PANEL},
    .int8 = {int8_size, int8_lay, int8_run, TILE8, PANEL},
    .few8 = {few8_size, few8_lay, few8_run, 1, 4},
    .plain = {nothing_size, nothing_lay, plain_run, 1, 1},
    .trellis = {nothing_size, nothing_lay, trellis_run, 1, NQ_BLOCK_ROWS},
    .hold = hold,
    .attend = attend,
    .panel = PANEL,
    .norm = norm,
    .activate = activate,
};
