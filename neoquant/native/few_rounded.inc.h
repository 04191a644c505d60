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
    const struct nq_product *p, int64_t begin, int64_t end, int64_t m0, const int bits, const enum how how, const int count,
    const int together) {
    const struct nq_weight *w = p->w;
    const int per = codes_a_word(bits), chunk = LANES * per, seconds = per / 4;
    const int step_bits = nq_step_bits(w, RUN_BITS), spread = step_bits - (bits == 8 ? 2 : 3); /* lanes to runs */
    const int64_t chunks = count_chunks(w), row_bytes = nq_row_bytes(w), stride = few8_chunk(w);
    const int64_t runs = nq_ceil(w->columns, (int64_t)1 << step_bits);
    float scales[4][SEGMENT / 8 + LANES] = {{0}}, zeros[4][SEGMENT / 8 + LANES] = {{0}};
    int8_t table[16];
    const vbtab levels = level_table(w, X_FLIP, bits, table);
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
                _Pragma("GCC unroll 4") for (int r = 0; r < together; r++) {
                    const uint8_t *codes = w->codes + rows[r] * row_bytes;
                    __builtin_prefetch(ahead + (c * together + r) * (chunk * bits / 8));
                    const vi words = load_words(w, codes, row_bytes, c, bits);
                    const vf scale = how == WHOLE_ROWS ? vf_zero() : spread_over_lanes(scales[r] + run, spread, bits);
                    _Pragma("GCC unroll 4") for (int m = 0; m < count; m++) {
                        const int32_t *x = (const int32_t *)p->laid + ((m0 + m) * chunks + c) * stride;
                        const vi whole = dot_word(levels, vi_load(x + (seconds + 2) * LANES), words, x, bits, how == AS_NUMBERS);
                        const vf step = vf_load((const float *)x + seconds * LANES);
                        vf exact = vf_of(whole);
                        if (how == WHOLE_ROWS) {
                            sum[m * together + r] = vf_fma(exact, step, sum[m * together + r]);
                            continue;
                        }
                        if (w->zeros) {
                            const vf zero = spread_over_lanes(zeros[r] + run, spread, bits);
                            exact = vf_fnma(zero, vf_load((const float *)x + (seconds + 1) * LANES), exact);
                        }
                        sum[m * together + r] = vf_fma(vf_mul(exact, step), scale, sum[m * together + r]);
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

#define FEW8(BITS, M)                                                                                                 \
    static void few8_##BITS##_##M(const struct nq_product *p, int64_t begin, int64_t end, int64_t m0) {             \
        const enum how how = how_of(p->w);                                                                            \
        if (BITS < 8 && how == AS_NUMBERS)                                                                            \
            few8(p, begin, end, m0, BITS, AS_NUMBERS, M, FEW8_TOGETHER(M, BITS));                                     \
        else if (BITS == 8 && how == WHOLE_ROWS)                                                                      \
            few8(p, begin, end, m0, BITS, WHOLE_ROWS, M, FEW8_TOGETHER(M, BITS));                                     \
        else few8(p, begin, end, m0, BITS, BY_TABLE, M, FEW8_TOGETHER(M, BITS));                                      \
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
