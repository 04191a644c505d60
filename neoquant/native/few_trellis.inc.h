/* Few rows of x and a trellis. Part of products.inc.h. */

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

#ifndef SIGNED_TABLES
/* The values of the codes in the four bits below the highest, which is their sign. */
NQ_INLINE vf vf_lookup_signed(vtab table, vi places) {
    const vf value = vf_lookup_high(table, vi_twice(places));
    return vf_cast(vi_xor(vi_cast(value), vi_and(places, vi_set1(INT32_MIN))));
}
#endif

/* The values of states that begin `shift` bits up in such windows: they are moved into the upper half of a lane, of whose
 * product the highest bits are the place in the table. */
NQ_INLINE vf value_of_state(vtab table, vi multiplier, vi window, int shift, const int bits) {
    const vi state = shift > 16 ? vi_srl(window, shift - 16) : shift < 16 ? vi_sll(window, 16 - shift) : window;
    const vi product = vi_mul16(state, multiplier);
    return bits == 2 ? vf_lookup_high(table, product) : vf_lookup_signed(table, product);
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
