/* New positions of each sequence through whole blocks: what reading a prompt is, and generating over and over.
 *
 * Between two products lie operations that take longer to be called one by one than to be done, and tensors that are
 * larger than they need to be. Here NQ_MOST_ROWS rows of them are in memory at once.
 */
#include "weight.h"

enum { QUERY, KEY, VALUE, OUT, FC, PROJ, LINEARS };

struct nq_block { /* as `_Block` in step.py */
    const struct nq_weight *weights[LINEARS];
    const float *biases[LINEARS]; /* or 0 */
    const float *norms[4];        /* weight and bias of the norm before attention, and before the MLP */
    int64_t heads, window;        /* 0: everything is seen */
    float epsilons[2];
    int32_t activation, int8; /* bits of `int8`: for which weights x is rounded to int8 */
};

struct nq_cached { /* as `_Cached` in step.py: what a cache holds of a block */
    struct nq_states keys, values; /* [sequences, heads, capacity, C / heads], held as `stored` says */
    int64_t capacity, held, forgotten; /* `forgotten`: positions before the `held` ones */
    int64_t stored;
};

struct step {
    const struct nq_block *b;
    const struct nq_cached *cached;
    const struct nq_kernels *kernels;
    const float *x; /* [rows, C], row r being new position r % positions of sequence r / positions */
    float *y;
    float *normed, *query, *key, *value, *wide; /* [rows of a piece, C] and [.., inner], those from `begin` on */
    const uint8_t *keep;
    int threads;
    int64_t C, inner, size, positions, keep_stride, begin;
};

struct norms {
    const struct step *s;
    const float *from; /* [rows, C] */
    int which;         /* the first norm or the second */
};

static void norm_range(void *argument, int64_t begin, int64_t end) {
    const struct norms *norms = argument;
    const struct step *s = norms->s;
    const float *const *of = &s->b->norms[2 * norms->which];
    for (int64_t i = begin; i < end; i++)
        s->kernels->norm(
            norms->from + (s->begin + i) * s->C, of[0], of[1], s->C, s->b->epsilons[norms->which], s->normed + i * s->C);
}

static void norm_rows(const struct step *s, int64_t n, const float *from, int which) {
    struct norms norms = {s, from, which};
    nq_parallel(s->threads, n, 1, n * s->C / 2, norm_range, &norms);
}

static struct nq_linear linear(const struct step *s, int which, float *y) {
    return (struct nq_linear){
        .w = s->b->weights[which], .bias = s->b->biases[which], .y = y, .int8 = s->b->int8 >> which & 1};
}

static int product(const struct step *s, struct nq_linear one, const float *from, int64_t n) {
    return nq_products(s->kernels, &one, 1, from, n, s->threads);
}

/* A branch ends: y becomes `beside` plus the product. */
static int product_beside(const struct step *s, int which, const float *from, int64_t n, const float *beside) {
    struct nq_linear one = linear(s, which, s->query);
    one.beside = beside + s->begin * s->C, one.sum = s->y + s->begin * s->C;
    return product(s, one, from, n);
}

static void hold_rows(const struct step *s, int64_t n, const float *from, struct nq_states to) {
    const struct nq_cached *c = s->cached;
    struct nq_holding holding = {
        .from = from, .to = to, .first = s->begin, .positions = s->positions, .held = c->held, .heads = s->b->heads,
        .size = s->size, .capacity = c->capacity, .stored = (int)c->stored};
    nq_parallel(s->threads, n, 1, n * s->C, s->kernels->hold, &holding);
}

/* From the queries to `normed`. */
static int attend_rows(const struct step *s, int64_t n) {
    atomic_int starved = 0;
    const struct nq_block *b = s->b;
    const struct nq_cached *c = s->cached;
    const int64_t together = nq_min(n, s->positions), sequence = s->begin / s->positions; /* `together` of one sequence */
    struct nq_attention attention = {
        .query = s->query, .keys = c->keys, .values = c->values, .keep = s->keep ? s->keep + c->forgotten : 0,
        .y = s->normed, .begin = s->begin, .end = s->begin + n, .positions = s->positions, .held = c->held,
        .heads = b->heads, .size = s->size, .capacity = c->capacity, .window = b->window,
        .keep_stride = s->keep_stride, .stored = (int)c->stored,
        .panels = nq_ceil(together, s->kernels->panel), .starved = &starved};
    const int64_t items = (nq_ceil(s->begin + n, s->positions) - sequence) * b->heads * attention.panels;
    const int64_t held = (c->held + s->positions) * s->size; /* of keys, and of values; the cache is rarely near */
    const int64_t numbers = (nq_min(together, s->kernels->panel) + 3) * held;
    nq_parallel(s->threads, items, 1, items * numbers / 8, s->kernels->attend, &attention);
    return starved ? NQ_NO_MEMORY : 0;
}

/* A token is hundreds of products, each of which takes less than to wake a thread for it. */
static void rouse(struct step *s, int64_t rows, int64_t blocks) {
    int64_t all = 0, longest = 0;
    for (int which = 0; which < LINEARS; which++) {
        const struct nq_linear one = linear(s, which, 0);
        const int64_t time = nq_product_time(s->kernels, &one, nq_min(rows, NQ_MOST_ROWS));
        all += time;
        longest = time > longest ? time : longest;
    }
    nq_rouse(s->threads, all * blocks, longest);
}

/* Rows [begin, begin + n) of x. */
static int step_rows(const struct step *s, int64_t n) {
    const struct nq_linear seen[] = {linear(s, QUERY, s->query), linear(s, KEY, s->key), linear(s, VALUE, s->value)};
    struct nq_linear fc = linear(s, FC, s->wide);
    fc.activation = s->b->activation;
    norm_rows(s, n, s->x, 0);
    if (nq_products(s->kernels, seen, 3, s->normed, n, s->threads)) return NQ_NO_MEMORY;
    hold_rows(s, n, s->key, s->cached->keys);
    hold_rows(s, n, s->value, s->cached->values);
    if (attend_rows(s, n) || product_beside(s, OUT, s->normed, n, s->x)) return NQ_NO_MEMORY;
    norm_rows(s, n, s->y, 1);
    if (product(s, fc, s->normed, n) || product_beside(s, PROJ, s->wide, n, s->y)) return NQ_NO_MEMORY;
    return 0;
}

/* All rows of x through the block, NQ_MOST_ROWS at a time. */
static int step_block(struct step *s, int64_t rows) {
    const int64_t most = nq_min(NQ_MOST_ROWS, rows);
    s->C = s->b->weights[QUERY]->columns, s->inner = s->b->weights[FC]->rows, s->size = s->C / s->b->heads;
    s->normed = nq_scratch(NQ_STEP, (size_t)(most * (4 * s->C + s->inner)) * sizeof(float));
    if (!s->normed) return NQ_NO_MEMORY;
    s->query = s->normed + most * s->C, s->key = s->query + most * s->C, s->value = s->key + most * s->C;
    s->wide = s->value + most * s->C;
    for (s->begin = 0; s->begin < rows; s->begin += most)
        if (step_rows(s, nq_min(most, rows - s->begin))) return NQ_NO_MEMORY;
    return 0;
}

/* x[sequences, positions, C] through `n` blocks, one after the other: y of the same shape, not where x is. Keys and values
 * of the new positions are added to `cached`, which is each block's, behind the held ones. keep[sequences, keep_stride] is
 * 0 on padding, or 0: there is none; it begins with what has been forgotten. Gives 0, or NQ_NO_MEMORY. */
NQ_EXPORT int nq_steps(
    const struct nq_block *const *blocks, const struct nq_cached *cached, int64_t n, const float *x, int64_t sequences,
    int64_t positions, const uint8_t *keep, int64_t keep_stride, float *y, int isa, int threads) {
    const int64_t rows = sequences * positions, numbers = rows * blocks[0]->weights[QUERY]->columns;
    float *between = n > 1 ? nq_scratch(NQ_BETWEEN, (size_t)numbers * sizeof(float)) : y;
    if (!between) return NQ_NO_MEMORY;
    struct step s = {
        .kernels = nq_kernels_of(isa), .keep = keep, .threads = threads, .positions = positions,
        .keep_stride = keep_stride};
    s.b = blocks[0];
    rouse(&s, rows, n);
    for (int64_t i = 0; i < n; i++) {
        s.b = blocks[i], s.cached = &cached[i];
        s.x = i > 0 ? s.y : x;
        s.y = (n - i) % 2 ? y : between; /* the last one's is y */
        if (step_block(&s, rows)) return NQ_NO_MEMORY;
    }
    return 0;
}
