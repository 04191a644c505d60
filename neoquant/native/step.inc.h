/* What lies between the products of a block, for one new position a row: norms, attention, activations.
 *
 * These loops are short. Where no simd_*.h operation is named they are plain C that compilers make vectors of.
 */

/* e**x for x <= 0: 2**n times a polynomial of what is left, off by one unit at most; 0 below the smallest normal. */
NQ_INLINE float exp_of(float x) {
    const float shifted = x * 0x1.715476p0f + ROUNDING, n = shifted - ROUNDING;
    const float r = x - n * 0x1.62e4p-1f - n * 0x1.7f7d1cp-20f; /* ln 2 in two parts: the product with the first is exact */
    float y = 1.0f / 720;
    y = y * r + 1.0f / 120;
    y = y * r + 1.0f / 24;
    y = y * r + 1.0f / 6;
    y = y * r + 0.5f;
    y = y * r + 1.0f;
    y = y * r + 1.0f;
    const float scaled = nq_from_bits(nq_bits(y) + (nq_bits(shifted) << 23));
    return x < -87.0f ? 0.0f : scaled;
}

/* Layer normalization: the mean first, then what is left. */
static void norm(const float *x, const float *weight, const float *bias, int64_t n, float epsilon, float *to) {
    vf sums = vf_zero(), squares = vf_zero();
    float mean = 0, variance = 0;
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) sums = vf_add(sums, vf_load(x + i));
    for (; i < n; i++) mean += x[i];
    mean = (mean + vf_sum(sums)) / (float)n;
    const vf middle = vf_set1(mean);
    for (i = 0; i + LANES <= n; i += LANES) {
        const vf off = vf_sub(vf_load(x + i), middle);
        squares = vf_fma(off, off, squares);
    }
    for (; i < n; i++) variance += (x[i] - mean) * (x[i] - mean);
    variance = (variance + vf_sum(squares)) / (float)n;
    const float scale = 1 / sqrtf(variance + epsilon);
    for (i = 0; i < n; i++) to[i] = (x[i] - mean) * scale * weight[i] + bias[i];
}

static void activate(float *x, int64_t n, int activation) {
    if (activation == NQ_RELU) {
        for (int64_t i = 0; i < n; i++) x[i] = x[i] < 0 ? 0 : x[i];
        return;
    }
    /* x (1 + tanh z) / 2 is x over 1 + e**(-2 z), which does not cancel out; with e**(-2 |z|) it does not overflow. */
    for (int64_t i = 0; i < n; i++) {
        const float z = 0.797884583f * (x[i] + 0.044715f * x[i] * x[i] * x[i]);
        const float e = exp_of(-2 * (z < 0 ? -z : z));
        x[i] = x[i] * (z < 0 ? e : 1.0f) / (1 + e);
    }
}

NQ_INLINE float dot(const float *a, const float *b, int64_t n) {
    vf sums = vf_zero();
    float sum = 0;
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) sums = vf_fma(vf_load(a + i), vf_load(b + i), sums);
    for (; i < n; i++) sum += a[i] * b[i];
    return sum + vf_sum(sums);
}

/* One head of one row: scores are not scaled. A position that would see nothing, for all is padding, sees itself. */
static void attend_head(const struct nq_attention *a, int64_t row, int64_t head, float *scores) {
    const int64_t at = row * a->heads + head, size = a->size;
    const float *query = a->query + at * size, *keys = a->keys + at * a->capacity * size;
    const float *values = a->values + at * a->capacity * size;
    const uint8_t *keep = a->keep ? a->keep + row * a->keep_stride : 0;
    float *y = a->y + at * size, highest = -INFINITY, total = 0;
    int64_t first = a->window && a->window < a->length ? a->length - a->window : 0, seen = 0;
    for (int64_t j = first; j < a->length; j++) seen += !keep || keep[j];
    if (!seen) first = a->length - 1, keep = 0;
    for (int64_t j = first; j < a->length; j++) {
        scores[j] = !keep || keep[j] ? dot(query, keys + j * size, size) : -INFINITY;
        highest = scores[j] > highest ? scores[j] : highest;
    }
    for (int64_t j = first; j < a->length; j++) scores[j] = exp_of(scores[j] - highest);
    for (int64_t j = first; j < a->length; j++) total += scores[j];
    memset(y, 0, (size_t)size * sizeof(float));
    for (int64_t j = first; j < a->length; j++) {
        const vf weight = vf_set1(scores[j]);
        const float *value = values + j * size;
        int64_t i = 0;
        if (keep && !keep[j]) continue; /* what lies there may be anything */
        for (; i + LANES <= size; i += LANES) vf_store(y + i, vf_fma(weight, vf_load(value + i), vf_load(y + i)));
        for (; i < size; i++) y[i] += scores[j] * value[i];
    }
    for (int64_t i = 0; i < size; i++) y[i] /= total;
}

static void attend(void *argument, int64_t begin, int64_t end) {
    const struct nq_attention *a = argument;
    float *scores = nq_scratch(NQ_OWN, (size_t)a->length * sizeof(float));
    for (int64_t at = begin; at < end; at++) attend_head(a, at / a->heads, at % a->heads, scores);
}
