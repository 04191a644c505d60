/* Many rows of x: blocks of the weight, decoded into cache, meet tiles of x. Part of products.inc.h. */

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
