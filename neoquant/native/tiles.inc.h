/* Many rows of x on AMX: registers that hold tiles of sixteen rows of 64 bytes, and instructions that multiply two of
 * them. Part of products.inc.h.
 *
 * Tiles multiply bfloat16, of which three make a float32: its first digits, the nearest of what they leave, and the rest.
 * Of the products of two numbers' parts those count that a float32 can tell. Codes and zeros of up to eight bits are whole
 * numbers, and one bfloat16 each; a run's sum is multiplied by its scale.
 */

enum {
    TILE_ROWS = 16,
    TILE_BYTES = TILE_ROWS * 64,
    PAIR = 2 * TILE_ROWS,      /* rows of x that meet PANEL rows of the weight: two tiles by two */
    STEP = 32,                 /* columns in a tile of bfloat16 */
    PARTS = 3,
    TILES_DEPTH_BITS = 10,
    TILES_DEPTH = 1 << TILES_DEPTH_BITS, /* columns of a block: of three parts, less than half of the second cache */
    STEPS = TILES_DEPTH / STEP,
    LOWEST = -16,              /* code - zero, of up to four bits */
};

/* Not the intrinsics: those of some compilers do not say what memory they read. */
#define TILE_LOAD(TILE, FROM, STRIDE)                                                                                 \
    __asm__ volatile("tileloadd (%0,%1,1), %%tmm" #TILE : : "r"(FROM), "r"((int64_t)(STRIDE)) : "memory")
#define TILE_STORE(TO, STRIDE, TILE)                                                                                  \
    __asm__ volatile("tilestored %%tmm" #TILE ", (%0,%1,1)" : : "r"(TO), "r"((int64_t)(STRIDE)) : "memory")
#define TILE_ZERO(TILE) __asm__ volatile("tilezero %%tmm" #TILE : :)
#define TILE_MULTIPLY(SUM, X, W) __asm__ volatile("tdpbf16ps %%tmm" #W ", %%tmm" #X ", %%tmm" #SUM : :)
#define TILE_MULTIPLY_BYTES(SUM, X, W) __asm__ volatile("tdpbssd %%tmm" #W ", %%tmm" #X ", %%tmm" #SUM : :)
#define TILE_RELEASE() __asm__ volatile("tilerelease" : :)

/* As the instruction reads it. */
struct tile_shapes {
    uint8_t palette, start, reserved[14];
    uint16_t bytes[16];
    uint8_t rows[16];
};

/* Tiles 0 to 3 are sums: those of x's first sixteen rows in 0 and 1, of its next in 2 and 3. 4 and 5 are tiles of x, and
 * 6 and 7 of the weight, `words` of four bytes deep. */
static void shape_tiles(int64_t rows, int words) {
    const int64_t first = nq_min(rows, TILE_ROWS);
    const int64_t of_x[2] = {first, rows - first};
    struct tile_shapes shapes = {.palette = 1};
    for (int i = 0; i < 2; i++) {
        for (int j = 2 * i; j < 2 * i + 2; j++) shapes.rows[j] = (uint8_t)of_x[i], shapes.bytes[j] = of_x[i] ? 64 : 0;
        shapes.rows[4 + i] = (uint8_t)of_x[i], shapes.bytes[4 + i] = (uint16_t)(of_x[i] ? 4 * words : 0);
        shapes.rows[6 + i] = (uint8_t)words, shapes.bytes[6 + i] = 64;
    }
    __asm__ volatile("ldtilecfg %0" : : "m"(shapes));
}

/* Where the sums of PAIR rows of x and PANEL rows of the weight are gathered. */
struct gathered {
    float sums[PAIR][PANEL];
} __attribute__((aligned(64)));

static void open_sums(
    struct gathered *g, const struct nq_product *p, int64_t m0, int64_t m, int64_t row, int64_t width, int first) {
    for (int64_t i = 0; i < m; i++) {
        const float *from = first ? p->bias ? p->bias + row : 0 : p->y + (m0 + i) * p->w->rows + row;
        if (!from) memset(g->sums[i], 0, sizeof g->sums[i]);
        else memcpy(g->sums[i], from, (size_t)width * sizeof(float));
    }
}

static void close_sums(
    const struct gathered *g, const struct nq_product *p, int64_t m0, int64_t m, int64_t row, int64_t width) {
    for (int64_t i = 0; i < m; i++)
        memcpy(p->y + (m0 + i) * p->w->rows + row, g->sums[i], (size_t)width * sizeof(float));
}

NQ_INLINE void zero_sums(const int both) {
    TILE_ZERO(0);
    TILE_ZERO(1);
    if (!both) return;
    TILE_ZERO(2);
    TILE_ZERO(3);
}

/* The tiles of sums, as they are. */
NQ_INLINE void store_tiles(void *to, const int both) {
    const int64_t stride = PANEL * 4;
    TILE_STORE(to, stride, 0);
    TILE_STORE((uint8_t *)to + 64, stride, 1);
    if (!both) return;
    TILE_STORE((uint8_t *)to + TILE_ROWS * stride, stride, 2);
    TILE_STORE((uint8_t *)to + TILE_ROWS * stride + 64, stride, 3);
}

/* A bfloat16 of a number, as float32: what there is room for, which is NaN where x is or leaves NaN; of what that leaves,
 * the nearest, so that a third one holds the rest. */
NQ_INLINE vi part_of(vf x, int part) {
    return vi_and(_mm512_add_epi32(vi_cast(x), vi_set1(part ? 0x8000 : 0)), vi_set1((int32_t)0xffff0000));
}

/* LANES numbers and LANES others, in the parts that each is the sum of, as float32: parts[part][which]. Parts below the
 * normal numbers are zeros to tiles, so that numbers below 1e-30 lose digits. */
NQ_INLINE void split(vf first, vf second, vi parts[PARTS][2]) {
    vf left[2] = {first, second};
    _Pragma("GCC unroll 3") for (int part = 0; part < PARTS; part++)
        _Pragma("GCC unroll 2") for (int i = 0; i < 2; i++) {
            parts[part][i] = part_of(left[i], part);
            left[i] = vf_sub(left[i], vf_cast(parts[part][i]));
        }
}

/* Of each lane the high halves of two: the second one's above. */
NQ_INLINE vi in_pairs(vi first, vi second) {
    return _mm512_mask_blend_epi16(0xaaaaaaaa, vi_srl(first, 16), second);
}

static size_t tiles_size(const struct nq_product *p) {
    return (size_t)(nq_ceil(p->count, TILE_ROWS) * (p->w->columns / STEP) * PARTS * TILE_BYTES);
}

/* x in tiles: bfloat16[tiles, I / STEP, PARTS, TILE_ROWS, STEP]. */
static void tiles_lay(void *argument, int64_t begin, int64_t end) {
    const struct nq_product *p = argument;
    const int64_t columns = p->w->columns;
    for (int64_t m = begin * TILE_ROWS; m < nq_min(end * TILE_ROWS, p->count); m++) {
        const float *x = p->x + m * columns;
        uint8_t *to = (uint8_t *)p->laid + m / TILE_ROWS * (columns / STEP) * PARTS * TILE_BYTES + m % TILE_ROWS * 64;
        for (int64_t k = 0; k < columns; k += STEP, to += PARTS * TILE_BYTES) {
            vi parts[PARTS][2];
            split(vf_load(x + k), vf_load(x + k + LANES), parts);
            _Pragma("GCC unroll 3") for (int part = 0; part < PARTS; part++) {
                const __m256i low = _mm512_cvtepi32_epi16(vi_srl(parts[part][0], 16));
                const __m256i high = _mm512_cvtepi32_epi16(vi_srl(parts[part][1], 16));
                vi_store(to + part * TILE_BYTES, _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1));
            }
        }
    }
}

/* Whether codes are multiplied without their scales: those of a run, whole tiles long, are the same then. */
NQ_INLINE int scales_apart(const struct nq_weight *w) {
    return (w->kind == NQ_CODEBOOK || w->kind == NQ_INT8 || w->kind == NQ_AFFINE) && !w->half_zeros && nq_is_regular(w) &&
           1 << nq_step_bits(w, TILES_DEPTH_BITS) >= STEP;
}

/* How many parts the numbers have that meet x. */
NQ_INLINE int parts_of(const struct nq_weight *w) {
    if (w->kind == NQ_PLAIN) return w->plain == NQ_FLOAT32 ? 3 : w->plain == NQ_FLOAT16 ? 2 : 1;
    return scales_apart(w) && w->kind != NQ_CODEBOOK ? 1 : 3;
}

/* Tables of a lookup by five bits: the parts of a codebook's sixteen values, twice; or the numbers from LOWEST on. */
static void make_tables(const struct nq_weight *w, uint16_t tables[PARTS][32]) {
    for (int i = 0; i < 32; i++) {
        float left = w->kind == NQ_CODEBOOK ? w->table[i & 15] : (float)(i + LOWEST);
        for (int part = 0; part < PARTS; part++) {
            const uint32_t bits = (nq_bits(left) + (part ? 0x8000 : 0)) & 0xffff0000;
            tables[part][i] = (uint16_t)(bits >> 16);
            left -= nq_from_bits(bits);
        }
    }
}

/* Codes at the places `low` and `high` of each word, in the lowest bits of its halves; not all above them are zero. */
NQ_INLINE vi two_codes(vi words, int low, int high, const int bits) {
    const int up = 16 - bits * high;
    return _mm512_mask_blend_epi16(0xaaaaaaaa, vi_srl(words, bits * low), up > 0 ? vi_sll(words, up) : vi_srl(words, -up));
}

/* PANEL rows in tiles without their scales: bfloat16[PANEL / LANES, STEPS, parts, STEP / 2, LANES, 2]. */
NQ_INLINE void code_tiles(
    const struct nq_weight *w, int64_t row, int64_t end, int64_t column, int64_t depth, const int bits, const int parts,
    uint8_t *tiles, float *scales) {
    const int per = codes_a_word(bits), chunk = LANES * per, turn = w->kind == NQ_CODEBOOK;
    const int step_bits = nq_step_bits(w, TILES_DEPTH_BITS);
    const int64_t runs = nq_ceil(depth, (int64_t)1 << step_bits);
    const vtab numbers = vf_table(w->table);
    float zeros[STEPS * PANEL];
    uint16_t halves[PARTS][32];
    vi tables[PARTS];
    make_tables(w, halves);
    for (int part = 0; part < PARTS; part++) tables[part] = vi_load(halves[part]);
    panel_scales(w, row, end, column, runs, step_bits, scales, zeros);
    for (int half = 0; half < PANEL / LANES; half++)
        for (int64_t c = column / chunk; c * chunk < column + depth; c++) {
            vi words[LANES];
            load_transposed(w, row + half * LANES, end, c, bits, words);
            for (int j = 0; j < LANES; j++) {
                const int64_t at = c * chunk + j * per - column;
                if (at >= depth) break;
                const vf zero = w->zeros ? vf_load(zeros + (at >> step_bits) * PANEL + half * LANES) : vf_zero();
                const vi off = _mm512_cvtps_epi32(vf_sub(vf_set1((float)(-LOWEST - nq_middle(w))), zero));
                const vi offsets = vi_or(off, vi_sll(off, 16));
                uint8_t *to = tiles + (half * STEPS + at / STEP) * parts * TILE_BYTES + at % STEP / 2 * 64;
                _Pragma("GCC unroll 4") for (int k = 0; k < per; k += 2, to += 64) {
                    if (bits == 8) {
                        const vf low = vf_sub(value_at(numbers, words[j], k, bits), zero);
                        const vf high = vf_sub(value_at(numbers, words[j], k + 1, bits), zero);
                        vi_store(to, in_pairs(vi_cast(low), vi_cast(high)));
                        continue;
                    }
                    vi codes = two_codes(words[j], k ^ turn, (k + 1) ^ turn, bits);
                    if (!turn) codes = _mm512_add_epi16(vi_and(codes, vi_set1(0x10001 * ((1 << bits) - 1))), offsets);
                    _Pragma("GCC unroll 3") for (int part = 0; part < parts; part++)
                        vi_store(to + part * TILE_BYTES, _mm512_permutexvar_epi16(codes, tables[part]));
                }
            }
        }
}

/* The same with scales, of any weight: through float32, panel[depth, PANEL]. */
static void value_tiles(
    const struct nq_weight *w, int64_t row, int64_t end, int64_t column, int64_t depth, int parts, float *panel,
    uint8_t *tiles) {
    for (int64_t k = 0; k < depth; k += DEPTH)
        decode_any_panel(w, row, end, column + k, nq_min(DEPTH, depth - k), panel + k * PANEL);
    for (int half = 0; half < PANEL / LANES; half++)
        for (int64_t k = 0; k < depth; k += 2) {
            const float *from = panel + k * PANEL + half * LANES;
            uint8_t *to = tiles + (half * STEPS + k / STEP) * parts * TILE_BYTES + k % STEP / 2 * 64;
            vi found[PARTS][2];
            split(vf_load(from), vf_load(from + PANEL), found);
            for (int part = 0; part < parts; part++)
                vi_store(to + part * TILE_BYTES, in_pairs(found[part][0], found[part][1]));
        }
}

static void any_tiles(
    const struct nq_weight *w, int64_t row, int64_t end, int64_t column, int64_t depth, float *panel, uint8_t *tiles,
    float *scales) {
    if (!scales_apart(w)) {
        for (int i = 0; i < PANEL; i++) scales[i] = 1;
        value_tiles(w, row, end, column, depth, parts_of(w), panel, tiles);
    } else if (w->kind == NQ_CODEBOOK) code_tiles(w, row, end, column, depth, 4, 3, tiles, scales);
    else if (w->bits == 2) code_tiles(w, row, end, column, depth, 2, 1, tiles, scales);
    else if (w->bits == 3) code_tiles(w, row, end, column, depth, 3, 1, tiles, scales);
    else if (w->bits == 4) code_tiles(w, row, end, column, depth, 4, 1, tiles, scales);
    else code_tiles(w, row, end, column, depth, 8, 1, tiles, scales);
}

/* Sums of a run: tiles of x in steps, from one to the next sixteen rows it is so far, times those of the weight. The least
 * products come first. */
NQ_INLINE void multiply_tiles(
    const uint8_t *x, int64_t x_across, const uint8_t *w, int64_t steps, const int parts, const int both) {
    const int64_t w_across = STEPS * parts * TILE_BYTES;
    zero_sums(both);
    for (int64_t k = 0; k < steps; k++, x += PARTS * TILE_BYTES, w += parts * TILE_BYTES) {
#define LOAD_X(PART)                                                                                                  \
    do {                                                                                                              \
        TILE_LOAD(4, x + (PART)*TILE_BYTES, 64);                                                                      \
        if (both) TILE_LOAD(5, x + x_across + (PART)*TILE_BYTES, 64);                                                 \
    } while (0)
#define LOAD_W(PART)                                                                                                  \
    do {                                                                                                              \
        TILE_LOAD(6, w + (PART)*TILE_BYTES, 64);                                                                      \
        TILE_LOAD(7, w + w_across + (PART)*TILE_BYTES, 64);                                                           \
    } while (0)
#define MULTIPLY                                                                                                      \
    do {                                                                                                              \
        TILE_MULTIPLY(0, 4, 6);                                                                                       \
        TILE_MULTIPLY(1, 4, 7);                                                                                       \
        if (both) {                                                                                                   \
            TILE_MULTIPLY(2, 5, 6);                                                                                   \
            TILE_MULTIPLY(3, 5, 7);                                                                                   \
        }                                                                                                             \
    } while (0)
        LOAD_X(2);
        LOAD_W(0);
        MULTIPLY;
        LOAD_X(1);
        MULTIPLY;
        if (parts > 1) {
            LOAD_W(1);
            MULTIPLY;
        }
        LOAD_X(0);
        if (parts > 1) {
            MULTIPLY;
            if (parts > 2) {
                LOAD_W(2);
                MULTIPLY;
            }
            LOAD_W(0);
        }
        MULTIPLY;
#undef LOAD_X
#undef LOAD_W
#undef MULTIPLY
    }
}

/* What a block of the weight makes of PAIR rows of x, or fewer. */
NQ_INLINE void gather(
    struct gathered *g, int64_t m, const uint8_t *x, int64_t x_across, const uint8_t *w, const float *scales, int64_t steps,
    int64_t run, const int parts, const int both) {
    float found[PAIR][PANEL] __attribute__((aligned(64)));
    for (int64_t k = 0; k < steps; k += run, scales += PANEL) {
        multiply_tiles(x + k * PARTS * TILE_BYTES, x_across, w + k * parts * TILE_BYTES, nq_min(run, steps - k), parts, both);
        store_tiles(found, both);
        const vf first = vf_load(scales), second = vf_load(scales + LANES);
        for (int64_t i = 0; i < m; i++) {
            vf_store(g->sums[i], vf_fma(vf_load(found[i]), first, vf_load(g->sums[i])));
            vf_store(g->sums[i] + LANES, vf_fma(vf_load(found[i] + LANES), second, vf_load(g->sums[i] + LANES)));
        }
    }
}

static void tiles_run(void *argument, int64_t begin, int64_t end) {
    const struct nq_product *p = argument;
    const struct nq_weight *w = p->w;
    const int parts = parts_of(w);
    const int64_t columns = w->columns, x_across = columns / STEP * PARTS * TILE_BYTES, w_panel = 2 * STEPS * parts * TILE_BYTES;
    const int64_t run = scales_apart(w) ? (1 << nq_step_bits(w, TILES_DEPTH_BITS)) / STEP : STEPS;
    uint8_t *blocks = nq_scratch(NQ_OWN, (size_t)(BLOCK / PANEL * w_panel) + (BLOCK * STEPS + PANEL * TILES_DEPTH) * sizeof(float));
    if (!blocks) {
        *p->starved = 1;
        return;
    }
    float *scales = (float *)(blocks + BLOCK / PANEL * w_panel), *panel = scales + BLOCK * STEPS;
    struct gathered g;
    int64_t shaped = 0;
    for (int64_t row = begin; row < end; row += BLOCK) {
        const int64_t rows = nq_min(BLOCK, end - row);
        for (int64_t column = 0; column < columns; column += TILES_DEPTH) {
            const int64_t depth = nq_min(TILES_DEPTH, columns - column);
            for (int64_t n = 0; n < rows; n += PANEL)
                any_tiles(w, row + n, end, column, depth, panel, blocks + n / PANEL * w_panel, scales + n * STEPS);
            for (int64_t m0 = 0; m0 < p->count; m0 += PAIR) {
                const int64_t m = nq_min(PAIR, p->count - m0);
                const uint8_t *x = (const uint8_t *)p->laid + m0 / TILE_ROWS * x_across + column / STEP * PARTS * TILE_BYTES;
                if (m != shaped) shape_tiles(shaped = m, TILE_ROWS);
                for (int64_t n = 0; n < rows; n += PANEL) {
                    const int64_t width = nq_min(PANEL, rows - n);
                    const uint8_t *of_w = blocks + n / PANEL * w_panel;
                    const float *of_scales = scales + n * STEPS;
                    open_sums(&g, p, m0, m, row + n, width, column == 0);
#define GATHER(P, BOTH) gather(&g, m, x, x_across, of_w, of_scales, depth / STEP, run, P, BOTH)
                    if (m > TILE_ROWS) parts == 1 ? GATHER(1, 1) : parts == 2 ? GATHER(2, 1) : GATHER(3, 1);
                    else parts == 1 ? GATHER(1, 0) : parts == 2 ? GATHER(2, 0) : GATHER(3, 0);
#undef GATHER
                    close_sums(&g, p, m0, m, row + n, width);
                }
            }
        }
    }
    TILE_RELEASE();
}
