/* Few rows of x and a plain weight. Part of products.inc.h. */

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
