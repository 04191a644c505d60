/* Runs the products of the native library on cases from standard input: for machines that are only emulated.
 *
 * A case is fourteen int64 (isa, threads, int8, count, rows, columns, groups, kind, bits, group_bits, level_step's bits,
 * plain, half_zeros, multiplier) and the arrays of struct nq_weight in its order, then x and the bias. The answer is y and
 * the decoded weight. */
#include "driver.h"

void nq_multiply(const struct nq_weight *, const float *, int64_t, const float *, float *, int, int);
void nq_multiply_int8(const struct nq_weight *, const float *, int64_t, const float *, float *, int, int);
void nq_decode(const struct nq_weight *, const int64_t *, int64_t, int64_t, float *, int);

int main(void) {
    int64_t said[14];
    while (fread(said, 8, 14, stdin) == 14) {
        struct nq_weight w = {.rows = said[4], .columns = said[5], .groups = said[6], .kind = (int32_t)said[7],
                              .bits = (int32_t)said[8], .group_bits = (int32_t)said[9]};
        w.level_step = nq_from_bits((uint32_t)said[10]);
        w.plain = (int32_t)said[11];
        w.half_zeros = (int32_t)said[12];
        w.multiplier = (int32_t)said[13];
        const void **arrays[] = {
            (const void **)&w.codes, (const void **)&w.table, (const void **)&w.levels, (const void **)&w.absmax,
            (const void **)&w.stored, (const void **)&w.nested, (const void **)&w.nested_table,
            (const void **)&w.offset, (const void **)&w.scb, (const void **)&w.scales, (const void **)&w.zeros};
        for (size_t i = 0; i < sizeof arrays / sizeof *arrays; i++) *arrays[i] = read_array();
        const float *x = read_array(), *bias = read_array();
        float *y = malloc((size_t)(said[3] * w.rows) * 4), *values = malloc((size_t)(w.rows * w.columns) * 4);
        if (!nq_runs((int)said[0])) return 3;
        (said[2] ? nq_multiply_int8 : nq_multiply)(&w, x, said[3], bias, y, (int)said[0], (int)said[1]);
        nq_decode(&w, 0, 0, w.rows, values, (int)said[1]);
        fwrite(y, 4, (size_t)(said[3] * w.rows), stdout);
        fwrite(values, 4, (size_t)(w.rows * w.columns), stdout);
    }
    return 0;
}
