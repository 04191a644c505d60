/* Rounded activations, many rows: the same in bytes. Part of products.inc.h. */

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

/* Eight bytes as two words, in the order in which levels_of finds what they meet: of four bits, one half of each byte of
 * codes, then the other. */
NQ_INLINE void in_order(const struct nq_weight *w, const uint8_t *bytes, uint32_t words[2]) {
    const int halves = w->bits == 4, turn = w->kind == NQ_CODEBOOK;
    uint64_t eight;
    memcpy(&eight, bytes, 8);
    words[0] = halves ? every_second(turn ? eight >> 8 : eight) : (uint32_t)eight;
    words[1] = halves ? every_second(turn ? eight : eight >> 8) : (uint32_t)(eight >> 32);
}

static void int8_lay(void *argument, int64_t begin, int64_t end) {
    const struct nq_product *p = argument;
    const struct nq_weight *w = p->w;
    const int64_t words = int8_words(w), runs = int8_runs(w), run = (int64_t)1 << nq_step_bits(w, RUN_BITS);
    uint8_t bytes[LONGEST_RUN];
    for (int64_t m = begin * TILE8; m < nq_min(end * TILE8, p->count); m++) {
        uint32_t *to = (uint32_t *)p->laid + m / TILE8 * words * TILE8 + m % TILE8;
        float *steps = int8_steps(p) + (m / TILE8 * runs * TILE8 + m % TILE8) * 2;
        for (int64_t s = 0; s < runs; s++, steps += 2 * TILE8) {
            const int64_t n = nq_min(run, w->columns - s * run);
            steps[0] = round_run(p->x + m * w->columns + s * run, n, bytes, steps + 1);
            for (int64_t i = 0; i < n; i += 8, to += 2 * TILE8) {
                uint32_t eight[2];
                in_order(w, bytes + i, eight);
                to[0] = eight[0];
                to[TILE8] = eight[1];
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

/* What vb_lookup finds levels of a weight in, each XORed with `flip`; it may be in `table`. */
NQ_INLINE vbtab level_table(const struct nq_weight *w, int flip, const int bits, int8_t table[16]) {
    for (int i = 0; i < 16; i++) table[i] = (int8_t)(w->levels[i] ^ flip);
#ifdef TWO_BITS_TOGETHER /* every second code is found four times too large */
    if (bits == 2)
        for (int code = 1; code < 4; code++) table[4 * code] = table[code];
#endif
    (void)bits;
    return vb_table(table);
}

/* Four levels a lane of `words`: codes 0 to 3 or 4 to 7 of each word, or one half of each byte. */
NQ_INLINE vi levels_of(vbtab levels, vi words, int second, const int bits) {
    if (bits == 8) return words;
    if (bits == 4) return vb_lookup(levels, vi_and(vi_srl(words, second ? 4 : 0), vi_set1(0x0f0f0f0f)));
#ifdef TWO_BITS_TOGETHER
    if (bits == 2) return vb_lookup(levels, vi_and(vi_two_bits(words, second), vi_set1(0x0c030c03)));
#endif
    vi found = vi_set1(0);
    _Pragma("GCC unroll 4") for (int k = 0; k < 4; k++) { /* from its place in the word to its byte */
        const int up = 8 * k - bits * (4 * second + k);
        const vi moved = up < 0 ? vi_srl(words, -up) : vi_sll(words, up);
        found = vi_or(found, vi_and(moved, vi_set1(((1 << bits) - 1) << 8 * k)));
    }
    return vb_lookup(levels, found);
}

NQ_INLINE void levels_panel(
    const struct nq_weight *w, int64_t row, int64_t end, int64_t column, int64_t depth, const int bits,
    struct panel8 to) {
    const int per = codes_a_word(bits), chunk = LANES * per, step_bits = nq_step_bits(w, RUN_BITS);
    const int64_t runs = nq_ceil(depth, (int64_t)1 << step_bits);
    int8_t table[16];
    const vbtab levels = level_table(w, 0, bits, table);
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
