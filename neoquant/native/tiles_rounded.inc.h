/* Rounded activations, many rows, on AMX: tiles of bytes. Part of products.inc.h. */

NQ_INLINE int64_t tiles8_bytes(const struct nq_weight *w) { return nq_ceil(w->columns, 64) * TILE_BYTES; }
NQ_INLINE float *tiles8_steps(const struct nq_product *p) {
    return (float *)((uint8_t *)p->laid + nq_ceil(p->count, TILE_ROWS) * tiles8_bytes(p->w));
}

static size_t tiles8_size(const struct nq_product *p) {
    return (size_t)(nq_ceil(p->count, TILE_ROWS) * (tiles8_bytes(p->w) + TILE_ROWS * 2 * int8_runs(p->w) * 4));
}

/* x in tiles: int8[tiles, ceil(I / 64), TILE_ROWS, 64], the bytes of eight in the order of levels_panel; and for each run
 * of each row its scale, and the scale times the sum of its bytes: [tiles, runs, TILE_ROWS, 2]. */
static void tiles8_lay(void *argument, int64_t begin, int64_t end) {
    const struct nq_product *p = argument;
    const struct nq_weight *w = p->w;
    const int64_t runs = int8_runs(w), run = (int64_t)1 << nq_step_bits(w, RUN_BITS);
    uint8_t bytes[LONGEST_RUN];
    for (int64_t m = begin * TILE_ROWS; m < nq_min(end * TILE_ROWS, p->count); m++) {
        uint8_t *to = (uint8_t *)p->laid + m / TILE_ROWS * tiles8_bytes(w) + m % TILE_ROWS * 64;
        float *steps = tiles8_steps(p) + (m / TILE_ROWS * runs * TILE_ROWS + m % TILE_ROWS) * 2;
        for (int64_t k = 0; k < w->columns; k += run, steps += 2 * TILE_ROWS) {
            steps[0] = round_run(p->x + m * w->columns + k, run, bytes, steps + 1);
            for (int64_t i = 0; i < run; i += 8) {
                uint32_t eight[2];
                in_order(w, bytes + i, eight);
                for (int j = 0; j < 2; j++) eight[j] ^= X_FLIP * 0x01010101u; /* both sides have signs here */
                memcpy(to + (k + i) / 64 * TILE_BYTES + (k + i) % 64, eight, 8);
            }
        }
    }
}

/* What a block of the weight in bytes makes of PAIR rows of x, or fewer; `words` of four columns. */
NQ_INLINE void gather_bytes(
    struct gathered *g, int64_t m, const uint8_t *x, int64_t x_across, const float *steps, int64_t steps_across,
    struct panel8 panel, int64_t words, int64_t run, int zeros, const int both) {
    const int64_t stride = PANEL * 4, deep = nq_min(run, TILE_ROWS);
    int32_t found[PAIR][PANEL] __attribute__((aligned(64)));
    for (int64_t k = 0, s = 0; k < words; s++, steps += 2 * TILE_ROWS) {
        zero_sums(both);
        for (const int64_t stop = k + run; k < stop; k += deep) {
            const uint8_t *at = x + k / 16 * TILE_BYTES + k % 16 * 4;
            TILE_LOAD(4, at, 64);
            TILE_LOAD(6, panel.codes + k * PANEL, stride);
            TILE_LOAD(7, panel.codes + k * PANEL + LANES, stride);
            TILE_MULTIPLY_BYTES(0, 4, 6);
            TILE_MULTIPLY_BYTES(1, 4, 7);
            if (!both) continue;
            TILE_LOAD(5, at + x_across, 64);
            TILE_MULTIPLY_BYTES(2, 5, 6);
            TILE_MULTIPLY_BYTES(3, 5, 7);
        }
        store_tiles(found, both);
        const vf first = vf_load(panel.scales + s * PANEL), second = vf_load(panel.scales + s * PANEL + LANES);
        const vf low = vf_load(panel.zeros + s * PANEL), high = vf_load(panel.zeros + s * PANEL + LANES);
        for (int64_t i = 0; i < m; i++) {
            const float *of_row = steps + (i < TILE_ROWS ? 2 * i : 2 * (i - TILE_ROWS) + steps_across);
            const vf step = vf_set1(of_row[0]), total = vf_set1(of_row[1]);
            vf sum = vf_load(g->sums[i]), next = vf_load(g->sums[i] + LANES);
            sum = vf_fma(vf_mul(vf_of(vi_load(found[i])), step), first, sum);
            next = vf_fma(vf_mul(vf_of(vi_load(found[i] + LANES)), step), second, next);
            vf_store(g->sums[i], zeros ? vf_fnma(total, low, sum) : sum);
            vf_store(g->sums[i] + LANES, zeros ? vf_fnma(total, high, next) : next);
        }
    }
}

static void tiles8_run(void *argument, int64_t begin, int64_t end) {
    const struct nq_product *p = argument;
    const struct nq_weight *w = p->w;
    const int step_bits = nq_step_bits(w, RUN_BITS), zeros = zeros_apart(w);
    const int64_t columns = w->columns, most = DEPTH8 >> step_bits, runs = int8_runs(w), run = 1 << step_bits >> 2;
    void *scratch = nq_scratch(NQ_OWN, (size_t)(BLOCK * (DEPTH8 / 4 + 3 * most)) * 4);
    if (!scratch) {
        *p->starved = 1;
        return;
    }
    struct gathered g;
    int64_t shaped = 0;
    for (int64_t row = begin; row < end; row += BLOCK) {
        const int64_t rows = nq_min(BLOCK, end - row);
        for (int64_t column = 0; column < columns; column += DEPTH8) {
            const int64_t depth = nq_min(DEPTH8, columns - column), words = depth / 4;
            for (int64_t n = 0; n < rows; n += PANEL)
                levels_any_panel(w, row + n, end, column, depth, panel8_at(scratch, n / PANEL, most));
            for (int64_t m0 = 0; m0 < p->count; m0 += PAIR) {
                const int64_t m = nq_min(PAIR, p->count - m0);
                const uint8_t *x = (const uint8_t *)p->laid + m0 / TILE_ROWS * tiles8_bytes(w) + column / 64 * TILE_BYTES;
                const float *steps = tiles8_steps(p) + (m0 * runs + (column >> step_bits) * TILE_ROWS) * 2;
                if (m != shaped) shape_tiles(shaped = m, (int)nq_min(run, TILE_ROWS));
                for (int64_t n = 0; n < rows; n += PANEL) {
                    const int64_t width = nq_min(PANEL, rows - n);
                    const struct panel8 panel = panel8_at(scratch, n / PANEL, most);
                    open_sums(&g, p, m0, m, row + n, width, column == 0);
#define GATHER(BOTH)                                                                                                  \
    gather_bytes(&g, m, x, tiles8_bytes(w), steps, runs * TILE_ROWS * 2, panel, words, run, zeros, BOTH)
                    if (m > TILE_ROWS) GATHER(1);
                    else GATHER(0);
#undef GATHER
                    close_sums(&g, p, m0, m, row + n, width);
                }
            }
        }
    }
    TILE_RELEASE();
}

/* Whether columns, and those of activations that are rounded together, fill tiles, and rows of x are enough for what it
 * takes to fill them: measured on a Xeon (Emerald Rapids). */
static int worth_tiles(const struct nq_weight *w, int int8, int64_t count) {
    if (int8) {
        const int64_t run = (int64_t)1 << nq_step_bits(w, RUN_BITS);
        return count >= 16 && nq_is_regular(w) && run >= STEP && w->columns % run == 0;
    }
    const int64_t least = !scales_apart(w) ? 48 : w->kind == NQ_CODEBOOK ? 16 : 1;
    return count >= least && w->columns % STEP == 0;
}
