/* The likeliest token: the largest logit of each row, and where it is. */
#include "cpu.h"

enum { SIDE_BY_SIDE = 32 };

struct rows {
    const float *logits;
    int64_t n;
    int64_t *token;
    uint8_t *finite;
};

/* Nothing in here depends on the order: compilers make vectors of it. */
static void of_row(const float *x, int64_t n, int64_t *token, uint8_t *finite) {
    float most[SIDE_BY_SIDE];
    int32_t odd[SIDE_BY_SIDE] = {0};
    for (int k = 0; k < SIDE_BY_SIDE; k++) most[k] = -INFINITY;
    int64_t i = 0;
    for (; i + SIDE_BY_SIDE <= n; i += SIDE_BY_SIDE)
        for (int k = 0; k < SIDE_BY_SIDE; k++) {
            most[k] = x[i + k] > most[k] ? x[i + k] : most[k];
            odd[k] |= x[i + k] != x[i + k];
        }
    for (; i < n; i++) {
        most[0] = x[i] > most[0] ? x[i] : most[0];
        odd[0] |= x[i] != x[i];
    }
    float largest = most[0];
    int nans = odd[0];
    for (int k = 1; k < SIDE_BY_SIDE; k++) {
        largest = most[k] > largest ? most[k] : largest;
        nans |= odd[k];
    }
    *finite = !nans && largest - largest == 0;
    for (i = 0; i < n - 1 && x[i] != largest;) i++;
    *token = i;
}

static void of_rows(void *argument, int64_t begin, int64_t end) {
    const struct rows *rows = argument;
    for (int64_t i = begin; i < end; i++) of_row(rows->logits + i * rows->n, rows->n, rows->token + i, rows->finite + i);
}

/* Of logits[count, n], the first place of each row's largest one, and whether that is finite and nothing is NaN. */
NQ_EXPORT void nq_likeliest(
    const float *logits, int64_t count, int64_t n, int64_t *token, uint8_t *finite, int threads) {
    struct rows rows = {logits, n, token, finite};
    nq_parallel(threads, count, 1, count * n / 8, of_rows, &rows);
}
