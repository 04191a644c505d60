/* New positions of each sequence through a whole block: what reading a prompt is, and generating over and over.
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

struct step {
    const struct nq_block *b;
    const struct nq_kernels *kernels;
    const float *x; /* [rows, C], row r being new position r % positions of sequence r / positions */
    float *y;
    float *normed, *query, *key, *value, *wide; /* [rows of a piece, C] and [.., inner], those from `begin` on */
    struct nq_states keys, values;
    const uint8_t *keep;
    int stored, threads;
    int64_t C, inner, size, capacity, held, positions, keep_stride, begin;
};

static void norm_rows(void *argument, int64_t begin, int64_t end) {
    const struct step *s = argument;
    for (int64_t i = begin; i < end; i++)
        s->kernels->norm(
            s->x + (s->begin + i) * s->C, s->b->norms[0], s->b->norms[1], s->C, s->b->epsilons[0], s->normed + i * s->C);
}

static void add(float *to, const float *from, int64_t n) {
    for (int64_t i = 0; i < n; i++) to[i] += from[i];
}

/* x beside what attention gave, y, and the norm of their sum. */
static void add_and_norm_rows(void *argument, int64_t begin, int64_t end) {
    const struct step *s = argument;
    for (int64_t i = begin; i < end; i++) {
        const int64_t at = (s->begin + i) * s->C;
        add(s->y + at, s->x + at, s->C);
        s->kernels->norm(s->y + at, s->b->norms[2], s->b->norms[3], s->C, s->b->epsilons[1], s->normed + i * s->C);
    }
}

static void activate_rows(void *argument, int64_t begin, int64_t end) {
    const struct step *s = argument;
    s->kernels->activate(s->wide + begin * s->inner, (end - begin) * s->inner, s->b->activation);
}

/* What the MLP gave beside that. */
static void add_rows(void *argument, int64_t begin, int64_t end) {
    const struct step *s = argument;
    add(s->y + (s->begin + begin) * s->C, s->query + begin * s->C, (end - begin) * s->C);
}

static struct nq_linear linear(const struct step *s, int which, float *y) {
    return (struct nq_linear){s->b->weights[which], s->b->biases[which], y, s->b->int8 >> which & 1};
}

static int product(const struct step *s, int which, const float *from, int64_t n, float *y) {
    const struct nq_linear one = linear(s, which, y);
    return nq_products(s->kernels, &one, 1, from, n, s->threads);
}

static void hold_rows(const struct step *s, int64_t n, const float *from, struct nq_states to) {
    struct nq_holding holding = {
        .from = from, .to = to, .first = s->begin, .positions = s->positions, .held = s->held, .heads = s->b->heads,
        .size = s->size, .capacity = s->capacity, .stored = s->stored};
    nq_parallel(s->threads, n, 1, n * s->C, s->kernels->hold, &holding);
}

/* From the queries to `normed`. */
static int attend_rows(const struct step *s, int64_t n) {
    atomic_int starved = 0;
    const struct nq_block *b = s->b;
    const int64_t together = nq_min(n, s->positions), sequence = s->begin / s->positions; /* `together` of one sequence */
    struct nq_attention attention = {
        .query = s->query, .keys = s->keys, .values = s->values, .keep = s->keep, .y = s->normed, .begin = s->begin,
        .end = s->begin + n, .positions = s->positions, .held = s->held, .heads = b->heads, .size = s->size,
        .capacity = s->capacity, .window = b->window, .keep_stride = s->keep_stride, .stored = s->stored,
        .panels = nq_ceil(together, s->kernels->panel), .starved = &starved};
    const int64_t items = (nq_ceil(s->begin + n, s->positions) - sequence) * b->heads * attention.panels;
    const int64_t numbers = nq_min(together, s->kernels->panel) * (s->held + s->positions) * s->size;
    nq_parallel(s->threads, items, 1, items * numbers / 8, s->kernels->attend, &attention);
    return starved ? NQ_NO_MEMORY : 0;
}

/* Rows [begin, begin + n) of x. */
static int step_rows(const struct step *s, int64_t n) {
    const int threads = s->threads;
    const int64_t numbers = n * s->C;
    const struct nq_linear seen[] = {linear(s, QUERY, s->query), linear(s, KEY, s->key), linear(s, VALUE, s->value)};
    nq_parallel(threads, n, 1, numbers / 2, norm_rows, (void *)s);
    if (nq_products(s->kernels, seen, 3, s->normed, n, threads)) return NQ_NO_MEMORY;
    hold_rows(s, n, s->key, s->keys);
    hold_rows(s, n, s->value, s->values);
    if (attend_rows(s, n) || product(s, OUT, s->normed, n, s->y + s->begin * s->C)) return NQ_NO_MEMORY;
    nq_parallel(threads, n, 1, numbers, add_and_norm_rows, (void *)s);
    if (product(s, FC, s->normed, n, s->wide)) return NQ_NO_MEMORY;
    nq_parallel(threads, n, 1, n * s->inner / 2, activate_rows, (void *)s);
    if (product(s, PROJ, s->wide, n, s->query)) return NQ_NO_MEMORY;
    nq_parallel(threads, n, 1, numbers / 2, add_rows, (void *)s);
    return 0;
}

/* x[sequences, positions, C] through the block: y of the same shape. Keys and values of the new positions are added
 * behind the `held` ones, to keys and values [sequences, heads, capacity, C / heads], held as `stored` says. keep[sequences, keep_stride] is 0
 * on padding; or 0: there is none. Gives 0, or NQ_NO_MEMORY. */
NQ_EXPORT int nq_step(
    const struct nq_block *b, const float *x, int64_t sequences, int64_t positions, void *keys, void *values,
    float *key_scale, float *value_scale, int stored, int64_t capacity, int64_t held, const uint8_t *keep, int64_t keep_stride, float *y, int isa, int threads) {
    const int64_t C = b->weights[QUERY]->columns, inner = b->weights[FC]->rows, rows = sequences * positions;
    const int64_t most = nq_min(NQ_MOST_ROWS, rows);
    float *scratch = nq_scratch(NQ_STEP, (size_t)(most * (4 * C + inner)) * sizeof(float));
    if (!scratch) return NQ_NO_MEMORY;
    struct step s = {
        .b = b, .kernels = nq_kernels_of(isa), .x = x, .y = y, .normed = scratch, .query = scratch + most * C,
        .key = scratch + 2 * most * C, .value = scratch + 3 * most * C, .wide = scratch + 4 * most * C, .stored = stored,
        .keys = {keys, key_scale}, .values = {values, value_scale}, .C = C, .inner = inner, .size = C / b->heads, .capacity = capacity, .held = held,
        .positions = positions, .keep = keep, .keep_stride = keep_stride, .threads = threads};
    for (; s.begin < rows; s.begin += most)
        if (step_rows(&s, nq_min(most, rows - s.begin))) return NQ_NO_MEMORY;
    return 0;
}
