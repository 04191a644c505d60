/* Runs what lies between the products of a block on cases from standard input: for machines that are only emulated.
 *
 * A case is ten int64 (isa, begin, end, positions, held, heads, size, capacity, window, keep_stride) and the arrays query,
 * keys, values and keep. The answer is what attention gives, the queries activated by gelu, and each query normed with
 * the weight 2 and the bias 1. */
#include "driver.h"

int main(void) {
    int64_t said[10];
    while (fread(said, 8, 10, stdin) == 10) {
        if (!nq_runs((int)said[0])) return 3;
        const struct nq_kernels *kernels = nq_kernels_of((int)said[0]);
        struct nq_attention a = {.begin = said[1], .end = said[2], .positions = said[3], .held = said[4], .heads = said[5],
                                 .size = said[6], .capacity = said[7], .window = said[8], .keep_stride = said[9]};
        const int64_t rows = a.end - a.begin, n = rows * a.heads * a.size;
        float *query = read_array();
        a.query = query, a.keys.data = read_array(), a.values.data = read_array(), a.keep = read_array();
        a.y = malloc((size_t)n * 4);
        a.panels = nq_ceil(nq_min(rows, a.positions), kernels->panel);
        const int64_t sequences = nq_ceil(a.end, a.positions) - a.begin / a.positions;
        kernels->attend(&a, 0, sequences * a.heads * a.panels);
        fwrite(a.y, 4, (size_t)n, stdout);
        float *weight = malloc((size_t)a.size * 4), *bias = malloc((size_t)a.size * 4);
        for (int64_t i = 0; i < a.size; i++) weight[i] = 2, bias[i] = 1;
        for (int64_t i = 0; i < n; i += a.size) kernels->norm(query + i, weight, bias, a.size, 1e-5f, a.y + i);
        kernels->activate(query, n, NQ_GELU_TANH);
        fwrite(query, 4, (size_t)n, stdout);
        fwrite(a.y, 4, (size_t)n, stdout);
    }
    return 0;
}
