/* Products with packed weights, and decoding them: what is called from outside. */
#include "weight.h"

enum { WEIGHTS_A_PIECE = 1 << 15 };

const struct nq_kernels *nq_kernels_of(int isa) {
#ifdef NQ_X86
    if (isa == NQ_ISA_AVX2) return &nq_kernels_avx2;
    if (isa == NQ_ISA_AVX512) return &nq_kernels_avx512;
    if (isa == NQ_ISA_AVX512VNNI) return &nq_kernels_avx512vnni;
#endif
#ifdef NQ_ARM
    if (isa == NQ_ISA_NEON) return &nq_kernels_neon;
#endif
    return &nq_kernels_portable;
}

/* NQ_MOST_ROWS of x at a time; the weight is decoded once for each. */
static void multiply(const struct nq_way *way, struct nq_product p, int64_t count, int threads) {
    const int64_t columns = p.w->columns, piece = nq_ceil(WEIGHTS_A_PIECE, columns * way->panel) * way->panel;
    for (int64_t m = 0; m < count; m += NQ_MOST_ROWS) {
        struct nq_product part = p;
        part.x += m * columns;
        part.y += m * p.w->rows;
        part.count = nq_min(NQ_MOST_ROWS, count - m);
        part.laid = nq_scratch(NQ_SHARED, way->size(&part));
        nq_parallel(threads, nq_ceil(part.count, way->tile), 8, way->lay, &part);
        nq_parallel(threads, p.w->rows, piece, way->run, &part);
    }
}

void nq_product(
    const struct nq_kernels *kernels, const struct nq_weight *w, const float *x, int64_t count, const float *bias,
    float *y, int int8, int threads) {
    struct nq_product p = {w, x, bias, y, 0, 0};
    const struct nq_way *way = int8 ? &kernels->int8 : &kernels->many;
    if (count <= kernels->few_most && nq_is_regular(w))
        way = int8 ? &kernels->few8 : w->kind == NQ_PLAIN ? &kernels->plain : &kernels->few;
    multiply(way, p, count, threads);
}

NQ_EXPORT void nq_multiply(
    const struct nq_weight *w, const float *x, int64_t count, const float *bias, float *y, int isa, int threads) {
    nq_product(nq_kernels_of(isa), w, x, count, bias, y, 0, threads);
}

NQ_EXPORT void nq_multiply_int8(
    const struct nq_weight *w, const float *x, int64_t count, const float *bias, float *y, int isa, int threads) {
    nq_product(nq_kernels_of(isa), w, x, count, bias, y, 1, threads);
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
    nq_parallel(threads, count, nq_ceil(WEIGHTS_A_PIECE, w->columns), decode_range, &d);
}
