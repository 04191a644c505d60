/* Products with packed weights, and decoding them: what is called from outside. */
#include "weight.h"

#ifdef NQ_AVXVNNI
static struct nq_kernels kernels_avxvnni;

/* Not in products_avxvnni.c: the library is loaded on processors too that know nothing of what is compiled there. */
__attribute__((constructor)) static void make_kernels(void) {
    kernels_avxvnni = nq_kernels_avx2;
    kernels_avxvnni.int8 = nq_int8_avxvnni;
    kernels_avxvnni.few8 = nq_few8_avxvnni;
}
#endif

const struct nq_kernels *nq_kernels_of(int isa) {
#ifdef NQ_X86
    if (isa == NQ_ISA_AVX2) return &nq_kernels_avx2;
#ifdef NQ_AVXVNNI
    if (isa == NQ_ISA_AVXVNNI) return &kernels_avxvnni;
#endif
    if (isa == NQ_ISA_AVX512) return &nq_kernels_avx512;
    if (isa == NQ_ISA_AVX512VNNI) return &nq_kernels_avx512vnni;
#endif
#ifdef NQ_TILES
    if (isa == NQ_ISA_AMX) return &nq_kernels_amx;
#endif
#ifdef NQ_ARM
    if (isa == NQ_ISA_NEON) return &nq_kernels_neon;
#endif
    return &nq_kernels_portable;
}

/* The same rows of x meet several weights, that want them laid out alike. */
struct together {
    const struct nq_kernels *kernels;
    const struct nq_way *way;
    const struct nq_linear *linears;
    struct nq_product parts[NQ_TOGETHER];
    int n;
    int64_t first; /* row of x that the parts begin with */
};

/* What follows the product, for rows [begin, end) of a weight. */
static void finish(const struct together *t, int i, int64_t begin, int64_t end) {
    const struct nq_linear *linear = &t->linears[i];
    const int64_t rows = linear->w->rows, n = end - begin;
    if (linear->activation == NQ_IDENTITY && !linear->beside) return;
    for (int64_t m = t->first; m < t->first + t->parts[i].count; m++) {
        const int64_t at = m * rows + begin;
        if (linear->activation != NQ_IDENTITY) t->kernels->activate(linear->y + at, n, linear->activation);
        if (linear->beside)
            for (int64_t k = at; k < at + n; k++) linear->sum[k] = linear->beside[k] + linear->y[k];
    }
}

/* Rows [begin, end) of all weights, counted through. */
static void run_together(void *argument, int64_t begin, int64_t end) {
    struct together *t = argument;
    for (int i = 0; i < t->n; i++) {
        const int64_t rows = t->parts[i].w->rows, first = begin > 0 ? begin : 0, last = nq_min(end, rows);
        if (first < last) {
            t->way->run(&t->parts[i], first, last);
            finish(t, i, first, last);
        }
        begin -= rows, end -= rows;
    }
}

static int wants_alike(const struct nq_linear *a, const struct nq_linear *b) {
    return a->int8 == b->int8 && a->w->kind == b->w->kind && a->w->bits == b->w->bits && a->w->columns == b->w->columns &&
           a->w->group_bits == b->w->group_bits && a->w->level_step == b->w->level_step && a->w->plain == b->w->plain;
}

static const struct nq_way *way_of(const struct nq_kernels *kernels, const struct nq_linear *linear, int64_t count) {
    if (count > kernels->few_most || !nq_is_regular(linear->w)) {
        if (kernels->worth_tiles && kernels->worth_tiles(linear->w, linear->int8, count))
            return linear->int8 ? &kernels->tiles8 : &kernels->tiles;
        return linear->int8 ? &kernels->int8 : &kernels->many;
    }
    if (linear->w->kind == NQ_TRELLIS) return &kernels->trellis;
    return linear->int8 ? &kernels->few8 : linear->w->kind == NQ_PLAIN ? &kernels->plain : &kernels->few;
}

/* Multiplications in a nanosecond, about: few rows also wait for the weight, and in pieces of many rows x is read again. */
enum { FEW_SPEED = 48, MANY_SPEED = 96 };
enum { MOST_ROWS_A_PIECE = 128, PIECES_A_THREAD = 4 };

/* Rows of the weight in a piece: as many as kernels decode into cache together, for all of which x is read once, where each
 * thread has several such pieces. */
static int64_t grain_of(const struct nq_way *way, int64_t rows, int threads) {
    int64_t grain = way->panel;
    while (way->tile > 1 && grain < MOST_ROWS_A_PIECE && rows >= 2 * grain * threads * PIECES_A_THREAD) grain *= 2;
    return grain;
}

static int64_t nanoseconds_of(const struct nq_way *way, int64_t numbers, int64_t count) {
    return numbers * (count + 4) / (way->tile > 1 ? MANY_SPEED : FEW_SPEED);
}

int64_t nq_product_time(const struct nq_kernels *kernels, const struct nq_linear *linear, int64_t count) {
    return nanoseconds_of(way_of(kernels, linear, count), linear->w->rows * linear->w->columns, count);
}

/* NQ_MOST_ROWS of x at a time; the weights are decoded once for each. */
static int multiply(
    const struct nq_kernels *kernels, const struct nq_way *way, const struct nq_linear *linears, int n, const float *x,
    int64_t count, int threads) {
    const int64_t columns = linears->w->columns;
    atomic_int starved = 0;
    for (int64_t m = 0; m < count && !starved; m += NQ_MOST_ROWS) {
        const int64_t some = nq_min(NQ_MOST_ROWS, count - m);
        struct together t = {.kernels = kernels, .way = way, .linears = linears, .n = n, .first = m};
        int64_t rows = 0;
        for (int i = 0; i < n; rows += linears[i++].w->rows)
            t.parts[i] = (struct nq_product){linears[i].w, x + m * columns, linears[i].bias,
                                             linears[i].y + m * linears[i].w->rows, some, 0, &starved};
        const int64_t grain = grain_of(way, rows, threads);
        void *laid = nq_scratch(NQ_SHARED, way->size(&t.parts[0]));
        if (!laid) return NQ_NO_MEMORY;
        for (int i = 0; i < n; i++) t.parts[i].laid = laid;
        nq_parallel(threads, nq_ceil(some, way->tile), 1, some * columns, way->lay, &t.parts[0]);
        nq_parallel(threads, rows, grain, nanoseconds_of(way, rows * columns, some), run_together, &t);
    }
    return starved ? NQ_NO_MEMORY : 0;
}

int nq_products(
    const struct nq_kernels *kernels, const struct nq_linear *linears, int n, const float *x, int64_t count, int threads) {
    int failed = 0;
    for (int first = 0, last; first < n && !failed; first = last) {
        for (last = first + 1; last < n && wants_alike(&linears[first], &linears[last]);) last++;
        const struct nq_way *way = way_of(kernels, &linears[first], count);
        failed = multiply(kernels, way, linears + first, last - first, x, count, threads);
    }
    return failed;
}

NQ_EXPORT int nq_multiply(
    const struct nq_weight *w, const float *x, int64_t count, const float *bias, float *y, int isa, int threads) {
    return nq_products(nq_kernels_of(isa), &(struct nq_linear){.w = w, .bias = bias, .y = y}, 1, x, count, threads);
}

NQ_EXPORT int nq_multiply_int8(
    const struct nq_weight *w, const float *x, int64_t count, const float *bias, float *y, int isa, int threads) {
    return nq_products(nq_kernels_of(isa), &(struct nq_linear){.w = w, .bias = bias, .y = y, .int8 = 1}, 1, x, count, threads);
}

struct decoding {
    const struct nq_weight *w;
    const int64_t *rows;
    int64_t first;
    float *to;
};

static void decode_range(void *argument, int64_t begin, int64_t end) {
    const struct decoding *d = argument;
    for (int64_t i = begin; i < end; i++)
        nq_decode_run(d->w, d->rows ? d->rows[i] : d->first + i, 0, d->w->columns, d->to + i * d->w->columns);
}

/* Rows rows[0], rows[1], ... of the weight (where `rows` is 0: first, first + 1, ...) as float32 to[count, columns]. */
NQ_EXPORT void nq_decode(
    const struct nq_weight *w, const int64_t *rows, int64_t first, int64_t count, float *to, int threads) {
    struct decoding d = {w, rows, first, to};
    nq_parallel(threads, count, 1, count * w->columns, decode_range, &d);
}
