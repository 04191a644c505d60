/* Few rows of x: words of the weight are used as they lie. Part of products.inc.h. */

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
    for (int k = 0; k < per; k++) parts[k] = codes_are_numbers(w) || w->bits == 8 ? 1 / (float)(1 << number_shift(k, w->bits)) : 1;
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
            if (how != WHOLE_ROWS)
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
                if (how == WHOLE_ROWS) {
                    _Pragma("GCC unroll 16") for (int i = 0; i < count * together; i++) sum[i] = vf_add(sum[i], part[i]);
                    continue;
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
            const float bias = p->bias ? p->bias[rows[r]] : 0, scale = how == WHOLE_ROWS ? nq_row_scale(w, rows[r]) : 1;
            _Pragma("GCC unroll 4") for (int m = 0; m < count; m++)
                p->y[(m0 + m) * w->rows + rows[r]] = vf_sum(sum[m * together + r]) * scale + bias;
        }
    }
}

#define FEW(BITS, M)                                                                                                  \
    static void few_##BITS##_##M(const struct nq_product *p, int64_t begin, int64_t end, int64_t m0) {              \
        const enum how how = how_of(p->w);                                                                            \
        if (CODES_AS_NUMBERS && BITS < 8 && how == AS_NUMBERS)                                                        \
            few(p, begin, end, m0, BITS, AS_NUMBERS, M, FEW_TOGETHER(M));                                             \
        else if (BITS == 8 && how == WHOLE_ROWS)                                                                      \
            few(p, begin, end, m0, BITS, WHOLE_ROWS, M, FEW_TOGETHER(M));                                             \
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
