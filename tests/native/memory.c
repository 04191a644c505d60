/* The library where memory is wanting: each allocation in turn fails, and the entry point says so; then all is well again. */
#include "library.h"

#include <pthread.h>

static int left = -1; /* allocations of the library until one fails; -1: none does */
static int isa;

void *__real_aligned_alloc(size_t alignment, size_t bytes);
void *__real_calloc(size_t n, size_t bytes);

static int fails(void) { return left >= 0 && left-- == 0; }
void *__wrap_aligned_alloc(size_t alignment, size_t bytes) { return fails() ? 0 : __real_aligned_alloc(alignment, bytes); }
void *__wrap_calloc(size_t n, size_t bytes) { return fails() ? 0 : __real_calloc(n, bytes); }

enum { ROWS = 40, COLUMNS = 96, MANY = 20, POSITIONS = 12 };
static struct nq_weight w;
static struct made m;
static float *x, *y, *keys, *values;
static uint16_t *scales;
static uint8_t *codes;
static const int64_t places[1];

static int few(void) { return nq_multiply(&w, x, 1, 0, y, isa, 1); }
static int many(void) { return nq_multiply(&w, x, MANY, 0, y, isa, 1); }
static int few8(void) { return nq_multiply_int8(&w, x, 1, 0, y, isa, 1); }
static int many8(void) { return nq_multiply_int8(&w, x, MANY, 0, y, isa, 1); }
static int affine(void) { return nq_affine(x, NQ_FLOAT32, MANY, COLUMNS, 32, 4, 1, scales, 0, 0, codes, isa, 1); }
static int path(void) {
    return nq_trellis_block(keys, 0, 0, 1, 64, places, x, y, 1, 3, codes, x, codes, 0, 0, 0, 0, isa, 1);
}
static int steps(int n) {
    const struct cached cached = {.keys = {keys, 0}, .values = {values, 0}, .capacity = CAPACITY, .stored = NQ_HELD_FLOAT32};
    const struct cached both[] = {cached, cached};
    const void *blocks[] = {&m.block, &m.block};
    return nq_steps(blocks, both, n, x, SEQUENCES, POSITIONS, 0, 0, y, isa, 1);
}
static int block(void) { return steps(1); }
static int two_blocks(void) { return steps(2); }

struct attempt {
    int (*call)(void);
    int result;
};

static void *run(void *argument) {
    struct attempt *attempt = argument;
    attempt->result = attempt->call();
    return 0;
}

/* In a thread of its own, which has no memory from before. */
static int with(int allocations, int (*call)(void)) {
    struct attempt attempt = {.call = call};
    pthread_t thread;
    left = allocations;
    require(!pthread_create(&thread, 0, run, &attempt), "no thread for the test");
    pthread_join(thread, 0);
    left = -1;
    return attempt.result;
}

/* `least`: allocations that a call is known to make. */
static void each_fails(int (*call)(void), int least, const char *what) {
    int failed = 0;
    for (int result; (result = with(failed, call)) != 0; failed++) require(result == NQ_NO_MEMORY, what);
    require(failed >= least && failed < 20, what);
}

int main(void) {
    w = weight(NQ_CODEBOOK, 4, ROWS, COLUMNS);
    make_block(&m);
    x = numbers(MANY * COLUMNS, 1), y = room(MANY * COLUMNS * 4);
    keys = room(SEQUENCES * CAPACITY * C * 4), values = room(SEQUENCES * CAPACITY * C * 4);
    scales = room(MANY * COLUMNS * 2), codes = room(4096);
    for (isa = NQ_ISA_PORTABLE; isa <= NQ_ISA_NEON; isa++) {
        if (!nq_runs(isa)) continue;
        each_fails(path, 1, "a trellis without memory");
        each_fails(few, 2, "few rows without memory");
        each_fails(many, 3, "many rows without memory");
        each_fails(few8, 2, "few rows in int8 without memory");
        each_fails(many8, 3, "many rows in int8 without memory");
        each_fails(affine, 2, "affine groups without memory");
        each_fails(block, 4, "a block without memory");
        each_fails(two_blocks, 5, "two blocks without memory");
    }
    forget(&w), forget_block(&m);
    free(x), free(y), free(keys), free(values), free(scales), free(codes);
    puts("every allocation may fail, and is said to have failed");
    return 0;
}
