/* What is called from outside, and inputs for it. */
#include "weight.h"

#include <stdio.h>
#include <stdlib.h>

int nq_runs(int);
int nq_multiply(const struct nq_weight *, const float *, int64_t, const float *, float *, int, int);
int nq_multiply_int8(const struct nq_weight *, const float *, int64_t, const float *, float *, int, int);
void nq_decode(const struct nq_weight *, const int64_t *, int64_t, int64_t, float *, int);
int nq_steps(
    const void *const *, const void *, int64_t, const float *, int64_t, int64_t, const uint8_t *, int64_t, float *, int, int);
void nq_round_blocks(const void *, int, int64_t, int64_t, const float *, const uint8_t *, uint8_t *, float *, int, int);
void nq_round_rows(const void *, int, int64_t, int64_t, int8_t *, float *, int, int);
int nq_affine(
    const void *, int, int64_t, int64_t, int64_t, int, int, uint16_t *, void *, int, uint8_t *, int, int);
void nq_gptq_block(
    float *, const float *, const float *, int64_t, int64_t, int64_t, const int64_t *, const float *, const float *,
    const float *, int64_t, int, const float *, const uint8_t *, const float *, const float *, const int32_t *, int64_t,
    uint8_t *, float *, int, int);
int nq_trellis_block(
    float *, const float *, int64_t, int64_t, int64_t, const int64_t *, const float *, const float *, int64_t, int,
    const uint8_t *, const float *, uint8_t *, float *, const float *, const float *, const float *, int, int);

static void require(int held, const char *what) {
    if (held) return;
    fprintf(stderr, "%s\n", what);
    exit(1);
}

static void *room(size_t bytes) {
    void *memory = calloc(bytes, 1);
    require(memory != 0, "no memory for the test");
    return memory;
}

/* Numbers that are the same in every run. */
static uint32_t draw(uint32_t *seed) {
    *seed ^= *seed << 13, *seed ^= *seed >> 17, *seed ^= *seed << 5;
    return *seed;
}

static void *bytes_of(int64_t n, uint32_t seed) {
    uint8_t *bytes = room((size_t)n);
    for (int64_t i = 0; i < n; i++) bytes[i] = (uint8_t)(draw(&seed) >> 8);
    return bytes;
}

/* In [-1, 1). */
static float *numbers(int64_t n, uint32_t seed) {
    float *to = room((size_t)n * sizeof(float));
    for (int64_t i = 0; i < n; i++) to[i] = (float)(int32_t)draw(&seed) * 0x1p-31f;
    return to;
}

/* Halves in [1/16, 1/8). */
static uint16_t *halves(int64_t n, uint32_t seed) {
    uint16_t *to = room((size_t)n * sizeof(uint16_t));
    for (int64_t i = 0; i < n; i++) to[i] = (uint16_t)(0x2c00 | (draw(&seed) & 0x3ff));
    return to;
}

/* `half_zeros`: for affine weights. */
static struct nq_weight weight_of(int kind, int bits, int half_zeros, int64_t rows, int64_t columns) {
    const int64_t groups = nq_ceil(columns, 32);
    struct nq_weight w = {
        .kind = kind, .bits = bits, .rows = rows, .columns = columns, .groups = groups, .level_step = 1,
        .half_zeros = half_zeros, .multiplier = 1133,
        .group_bits = kind == NQ_INT8 || kind == NQ_PLAIN ? NQ_WHOLE_ROW : 5};
    w.table = numbers(16, 7);
    w.levels = bytes_of(16, 8);
    if (kind == NQ_PLAIN) w.codes = (const uint8_t *)numbers(rows * columns, 1);
    else if (kind == NQ_TRELLIS) w.codes = bytes_of((nq_ceil(rows, NQ_BLOCK_ROWS) * bits + 2) * columns * 2, 2);
    else w.codes = bytes_of(rows * nq_row_bytes(&w), 2);
    if (kind == NQ_CODEBOOK) w.absmax = numbers(rows * groups, 3);
    if (kind == NQ_INT8) w.scb = numbers(rows, 4);
    if (kind == NQ_AFFINE || kind == NQ_TRELLIS) w.scales = halves(rows * groups, 5);
    if (kind == NQ_AFFINE) w.zeros = half_zeros ? (void *)halves(rows * groups, 6) : bytes_of(rows * groups, 6);
    return w;
}

static struct nq_weight weight(int kind, int bits, int64_t rows, int64_t columns) {
    return weight_of(kind, bits, 0, rows, columns);
}

static void forget(struct nq_weight *w) {
    const void *all[] = {w->table, w->levels, w->codes, w->absmax, w->scb, w->scales, w->zeros};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++) free((void *)all[i]);
}

enum { C = 32, INNER = 64, HEADS = 2, CAPACITY = 32, SEQUENCES = 2 };

struct block { /* as in step.c */
    const struct nq_weight *weights[6];
    const float *biases[6], *norms[4];
    int64_t heads, window;
    float epsilons[2];
    int32_t activation, int8;
};

struct cached { /* as in step.c */
    struct nq_states keys, values;
    int64_t capacity, held, forgotten, stored;
};

/* A block that holds its weights, some of which round activations; q and v want x laid out alike, and k does not. */
struct made {
    struct block block;
    struct nq_weight weights[6];
    float *numbers;
};

static void make_block(struct made *m) {
    *m = (struct made){.block = {
        .heads = HEADS, .window = 7, .epsilons = {1e-5f, 1e-5f}, .activation = NQ_GELU_TANH, .int8 = 0x2a}};
    m->numbers = numbers(INNER, 22);
    for (int i = 0; i < 6; i++) {
        m->weights[i] = i == 1 ? weight(NQ_AFFINE, 4, C, C)
                               : weight(NQ_CODEBOOK, 4, i == 4 ? INNER : C, i == 5 ? INNER : C);
        m->block.weights[i] = &m->weights[i], m->block.biases[i] = m->numbers;
    }
    for (int i = 0; i < 4; i++) m->block.norms[i] = m->numbers;
}

static void forget_block(struct made *m) {
    for (int i = 0; i < 6; i++) forget(&m->weights[i]);
    free(m->numbers);
}
