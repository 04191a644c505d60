/* One new position of each row through a whole block: what generating does over and over.
 *
 * Between two products lie operations of microseconds, which take longer to be called one by one than to be done.
 */
#include "weight.h"

enum { QUERY, KEY, VALUE, OUT, FC, PROJ, LINEARS };
enum { AT_ONCE = 1 << 14 }; /* numbers that one thread handles before others are asked to help */

struct nq_block { /* as `_Block` in step.py */
    const struct nq_weight *weights[LINEARS];
    const float *biases[LINEARS]; /* or 0 */
    const float *norms[4];        /* weight and bias of the norm before attention, and before the MLP */
    int64_t heads, window;        /* 0: everything is seen */
    float epsilons[2];
    int32_t activation, int8; /* bits of `int8`: for which weights x is rounded to int8 */
};

struct activating {
    void (*activate)(float *, int64_t, int);
    float *x;
    int activation;
};

static void activate_range(void *argument, int64_t begin, int64_t end) {
    const struct activating *a = argument;
    a->activate(a->x + begin, end - begin, a->activation);
}

/* [count, heads, size] to position `at` of [count, heads, capacity, size]. */
static void store(const float *from, float *to, int64_t heads, int64_t size, int64_t capacity, int64_t at) {
    for (int64_t h = 0; h < heads; h++)
        memcpy(to + (h * capacity + at) * size, from + h * size, (size_t)size * sizeof(float));
}

static void add(float *to, const float *from, int64_t n) {
    for (int64_t i = 0; i < n; i++) to[i] += from[i];
}

/* x[count, C] through the block: y[count, C]. Keys and values of the new position are added behind the `held` ones, to
 * keys and values [count, heads, capacity, C / heads]. keep[count, keep_stride] is 0 on padding; or 0: there is none. */
NQ_EXPORT void nq_step(
    const struct nq_block *b, const float *x, int64_t count, float *keys, float *values, int64_t capacity, int64_t held,
    const uint8_t *keep, int64_t keep_stride, float *y, int isa, int threads) {
    const struct nq_kernels *kernels = nq_kernels_of(isa);
    const int64_t C = b->weights[QUERY]->columns, inner = b->weights[FC]->rows, n = count * C, size = C / b->heads;
    float *normed = nq_scratch(NQ_STEP, (size_t)(4 * n + count * inner) * sizeof(float));
    float *query = normed + n, *key = query + n, *value = key + n, *wide = value + n;
#define PRODUCT(which, from, to)                                                                                      \
    nq_product(kernels, b->weights[which], from, count, b->biases[which], to, b->int8 >> which & 1, threads)
    for (int64_t m = 0; m < count; m++)
        kernels->norm(x + m * C, b->norms[0], b->norms[1], C, b->epsilons[0], normed + m * C);
    PRODUCT(QUERY, normed, query);
    PRODUCT(KEY, normed, key);
    PRODUCT(VALUE, normed, value);
    for (int64_t m = 0; m < count; m++) {
        store(key + m * C, keys + m * capacity * C, b->heads, size, capacity, held);
        store(value + m * C, values + m * capacity * C, b->heads, size, capacity, held);
    }
    struct nq_attention attention = {
        .query = query, .keys = keys, .values = values, .keep = keep, .y = normed, .heads = b->heads, .size = size,
        .capacity = capacity, .length = held + 1, .window = b->window, .keep_stride = keep_stride};
    nq_parallel(threads, count * b->heads, nq_ceil(AT_ONCE, (held + 1) * size), kernels->attend, &attention);
    PRODUCT(OUT, normed, y);
    add(y, x, n);
    for (int64_t m = 0; m < count; m++)
        kernels->norm(y + m * C, b->norms[2], b->norms[3], C, b->epsilons[1], normed + m * C);
    PRODUCT(FC, normed, wide);
    struct activating activating = {kernels->activate, wide, b->activation};
    nq_parallel(threads, count * inner, AT_ONCE, activate_range, &activating);
    PRODUCT(PROJ, wide, query);
    add(y, query, n);
#undef PRODUCT
}
