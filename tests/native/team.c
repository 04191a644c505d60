/* The library on several threads, for sanitizers: the same bits on any number of them, three callers at once, after a fork.
 *
 * It is built so that the least work is shared out (see run.sh). */
#include "library.h"

#include <pthread.h>
#include <sys/wait.h>
#include <unistd.h>

enum { ROWS = 72, COLUMNS = 104, WHOLE_COLUMNS = 96, COUNTS = 3, MASTERS = 3, ROUNDS = 40 };
enum { FEW = 5, LONG = 390, RING = 256 }; /* columns and rows on a trellis, whose spans are rings */
static const int64_t counts[COUNTS] = {1, 5, 50};
static const int kinds[][3] = {/* kind, bits, half_zeros */
    {NQ_CODEBOOK, 4}, {NQ_INT8, 8},      {NQ_AFFINE, 2}, {NQ_AFFINE, 3},  {NQ_AFFINE, 4},
    {NQ_AFFINE, 8},   {NQ_AFFINE, 4, 1}, {NQ_PLAIN, 32}, {NQ_TRELLIS, 2}, {NQ_TRELLIS, 3},
};
enum { KINDS = sizeof kinds / sizeof *kinds };

static void same(const void *found, const void *expected, int64_t bytes, const char *what) {
    require(!memcmp(found, expected, (size_t)bytes), what);
}

static void products(int isa, const int *kind, int64_t columns, int threads) {
    struct nq_weight w = weight_of(kind[0], kind[1], kind[2], ROWS, columns);
    float *x = numbers(50 * columns, 11), *bias = numbers(ROWS, 12);
    for (int i = 0; i < COUNTS; i++)
        for (int int8 = 0; int8 < (kind[0] == NQ_PLAIN || kind[0] == NQ_TRELLIS ? 1 : 2); int8++) {
            const int64_t n = counts[i] * ROWS;
            float *alone = room((size_t)n * 4), *together = room((size_t)n * 4);
            int (*multiply)(const struct nq_weight *, const float *, int64_t, const float *, float *, int, int) =
                int8 ? nq_multiply_int8 : nq_multiply;
            require(!multiply(&w, x, counts[i], bias, alone, isa, 1), "a product has no memory");
            require(!multiply(&w, x, counts[i], bias, together, isa, threads), "a product has no memory");
            same(together, alone, n * 4, "a product depends on the number of threads");
            free(alone), free(together);
        }
    float *alone = room((size_t)(ROWS * columns) * 4), *together = room((size_t)(ROWS * columns) * 4);
    nq_decode(&w, 0, 0, ROWS, alone, 1);
    nq_decode(&w, 0, 0, ROWS, together, threads);
    same(together, alone, ROWS * columns * 4, "decoding depends on the number of threads");
    free(alone), free(together), free(x), free(bias), forget(&w);
}

/* A block -------------------------------------------------------------------------------------------------------------- */

/* The same block twice, each with keys and values of its own. */
static void step(const struct block *b, int stored, int isa, int threads, float *y) {
    const int64_t states = SEQUENCES * CAPACITY * C;
    float *x = numbers(SEQUENCES * CAPACITY * C, 21), *held[2][4];
    const void *both[] = {b, b};
    struct cached cached[2];
    for (int i = 0; i < 2; i++) {
        for (int j = 0; j < 4; j++) held[i][j] = room((size_t)states * 4);
        cached[i] = (struct cached){{held[i][0], held[i][1]}, {held[i][2], held[i][3]}, CAPACITY, 0, 0, stored};
    }
    for (int i = 0; i < 3; i++) { /* many positions, some, one */
        const int64_t positions = i == 0 ? 18 : i == 1 ? 4 : 1;
        require(!nq_steps(both, cached, 2, x, SEQUENCES, positions, 0, 0, y, isa, threads), "blocks have no memory");
        y += SEQUENCES * positions * C;
        for (int j = 0; j < 2; j++) cached[j].held += positions;
    }
    for (int i = 0; i < 8; i++) free(held[i / 4][i % 4]);
    free(x);
}

static void blocks(int isa, int threads) {
    const int64_t n = SEQUENCES * (18 + 4 + 1) * C;
    float *alone = room((size_t)n * 4), *together = room((size_t)n * 4);
    struct made m;
    make_block(&m);
    for (int stored = NQ_HELD_FLOAT32; stored <= NQ_HELD_INT8; stored++) {
        step(&m.block, stored, isa, 1, alone);
        step(&m.block, stored, isa, threads, together);
        same(together, alone, n * 4, "a block depends on the number of threads");
    }
    forget_block(&m), free(alone), free(together);
}

/* Rounding, of weights that hold what is no number too ----------------------------------------------------------------- */

static void spoil(float *w, int64_t n) {
    const float odd[] = {NAN, INFINITY, -INFINITY, 3e38f, 1e-42f};
    for (int64_t i = 0; i < 5; i++) w[(i + 1) * n / 7] = odd[i];
}

struct rounded {
    uint8_t codes[10][ROWS * COLUMNS];
    float absmax[2][ROWS * COLUMNS], errors[5][ROWS * COLUMNS];
};

static void round_all(int isa, int threads, struct rounded *to) {
    float *w = numbers(ROWS * COLUMNS, 31), *bounds = numbers(16, 32), *upper = numbers(ROWS * ROWS, 33);
    float *scale = numbers(COLUMNS, 34), *zero = room(COLUMNS * 4);
    float *columns = numbers(FEW * LONG, 36), *scale_rows = room(LONG * 4), *importance = room(LONG * 4);
    float *table = numbers(32, 37), *original = numbers(FEW * LONG, 39), *unit = numbers(2 * RING * RING, 40);
    uint8_t *order = bytes_of(16, 35), *levels = bytes_of(4096, 38);
    uint16_t *scales = room(ROWS * 4 * 2);
    int64_t places[ROWS];
    for (int i = 0; i < ROWS; i++) places[i] = i;
    spoil(w, ROWS * COLUMNS), spoil(scale, COLUMNS);
    for (int i = 0; i < 16; i++) bounds[i] = (float)i / 8 - 1, order[i] &= 15;
    nq_round_blocks(w, NQ_FLOAT32, ROWS * COLUMNS, 64, bounds, order, to->codes[0], to->absmax[0], isa, threads);
    nq_round_rows(w, NQ_FLOAT32, ROWS, COLUMNS, (int8_t *)to->codes[1], to->absmax[1], isa, threads);
    nq_affine(w, NQ_FLOAT32, ROWS, COLUMNS, 32, 4, 1, scales, 0, 0, to->codes[2], isa, threads);
    nq_gptq_block(w, 0, upper, ROWS, ROWS, COLUMNS, places, scale, scale, zero, ROWS, 15, 0, 0, 0, 0, 0, 0, to->codes[3],
                  to->errors[0], isa, threads);
    for (int i = 0; i < LONG; i++) scale_rows[i] = (i % 7 + 1) * 0.125f, importance[i] = 512;
    for (int64_t i = 0; i < 2 * RING * RING; i++) unit[i] *= 1.0f / RING;
    for (int bits = 3; bits >= 2; bits--) {
        for (int i = 0; i < 4096; i++) levels[i] &= (4 << bits) - 1;
        for (int how = 0; how < 3; how++) /* rows of a ring and a half: on their own, fed back, and coupled as well */
            require(
                !nq_trellis_block(columns, how ? upper : 0, FEW, FEW, LONG, places, scale_rows, importance, FEW, bits, levels,
                                  table, to->codes[4 + 3 * (bits - 2) + how], how ? to->errors[2 * (bits - 2) + how] : 0,
                                  original, how > 1 ? unit : 0, importance, isa, threads),
                "a trellis has no memory");
    }
    free(columns), free(scale_rows), free(importance), free(levels), free(table);
    free(original), free(unit);
    free(w), free(bounds), free(upper), free(scale), free(zero), free(order), free(scales);
}

static void rounding(int isa, int threads) {
    struct rounded *alone = room(sizeof *alone), *together = room(sizeof *together);
    round_all(isa, 1, alone);
    round_all(isa, threads, together);
    same(together, alone, sizeof *alone, "rounding depends on the number of threads");
    for (int64_t i = 0; i < ROWS * COLUMNS; i++) require(alone->codes[3][i] <= 15, "GPTQ gave a code that there is not");
    for (int64_t i = 0; i < FEW * LONG; i++) require(
        alone->codes[5][i] <= 3 && alone->codes[6][i] <= 3 && alone->codes[8][i] <= 7 && alone->codes[9][i] <= 7,
        "a trellis gave a code that there is not");
    free(alone), free(together);
}

/* Several callers ------------------------------------------------------------------------------------------------------ */

static void all(int isa, int threads) {
    for (int kind = 0; kind < KINDS; kind++) {
        products(isa, kinds[kind], COLUMNS, threads);
        products(isa, kinds[kind], WHOLE_COLUMNS, threads);
    }
    blocks(isa, threads);
    rounding(isa, threads);
}

static int best(void) {
    int isa = NQ_ISA_NEON;
    while (!nq_runs(isa)) isa--;
    return isa;
}

/* Each with pauses of its own, so that helpers are met awake, asleep and at work for another. */
static void *be_master(void *argument) {
    const int number = *(const int *)argument;
    for (int round = 0; round < ROUNDS; round++) {
        products(best(), kinds[(round + number) % KINDS], round & 1 ? COLUMNS : WHOLE_COLUMNS, 2 + (round + number) % 3);
        if (round % 4 == number) usleep(100);
    }
    blocks(best(), 3);
    return 0;
}

static void masters(void) {
    pthread_t threads[MASTERS];
    int names[MASTERS];
    for (int i = 0; i < MASTERS; i++) {
        names[i] = i;
        require(!pthread_create(&threads[i], 0, be_master, &names[i]), "no thread for the test");
    }
    for (int i = 0; i < MASTERS; i++) pthread_join(threads[i], 0);
}

/* A child that begins with the team in use has one of its own; so has its child. */
static void fork_after_use(int depth) {
    const pid_t child = fork();
    require(child >= 0, "no process for the test");
    if (!child) {
        alarm(60);
        products(best(), kinds[0], WHOLE_COLUMNS, 4);
        if (depth > 1) fork_after_use(depth - 1);
        _exit(0);
    }
    int status;
    require(waitpid(child, &status, 0) == child && status == 0, "a child that was forked after use did not come to its end");
    products(best(), kinds[0], WHOLE_COLUMNS, 4);
}

/* ThreadSanitizer refuses threads in a child that was forked beside some, unless it is told. */
const char *__tsan_default_options(void) { return "die_after_fork=0:halt_on_error=1"; }

int main(void) {
    for (int isa = NQ_ISA_PORTABLE; isa <= NQ_ISA_NEON; isa++)
        if (nq_runs(isa))
            for (int threads = 2; threads <= 5; threads += 3) all(isa, threads);
    masters();
    fork_after_use(2);
    puts("the same on any number of threads, with three callers, and after a fork");
    return 0;
}
