/* What lies between the products of a block: norms, attention, activations.
 *
 * Where no simd_*.h operation is named they are plain C that compilers make vectors of.
 */

/* e**x for x <= 0: 2**n times a polynomial of what is left, off by one unit at most; 0 below the smallest normal, and
 * NaN for NaN. */
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
    return x < -87.0f ? 0.0f : x <= 0 ? scaled : x - x;
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

/* Keys and values where they are held ------------------------------------------------------------------------------- */

/* The nearest half, ties to even, past the largest one infinity. */
NQ_INLINE uint16_t half_of(float x) {
    const uint32_t bits = nq_bits(x), sign = bits >> 16 & 0x8000, size = bits & 0x7fffffff;
    const uint32_t small = nq_bits(nq_from_bits(size) + 0.5f) - nq_bits(0.5f); /* below 2**-14: whole steps of 2**-24 */
    const uint32_t usual = (size - (112u << 23) + 0xfff + (size >> 13 & 1)) >> 13;
    const uint32_t half = size < (113u << 23) ? small : size < 0x477ff000 ? usual : 0x7c00;
    return (uint16_t)(sign | (size > 0x7f800000 ? 0x7e00 : half));
}

NQ_INLINE void to_halves(const float *from, int64_t n, uint16_t *to) {
    for (int64_t i = 0; i < n; i++) to[i] = half_of(from[i]);
}

/* To bytes, in steps of a 127th of the largest. What is not finite makes the step NaN. */
NQ_INLINE float to_steps(const float *from, int64_t n, uint8_t *to) {
    float most = 0, odd = 0;
    for (int64_t i = 0; i < n; i++) {
        const float size = fabsf(from[i]);
        most = size > most ? size : most;
        odd += from[i] - from[i];
    }
    const float step = most / 127, turns = step > 1e-37f ? 1 / step : 0;
    for (int64_t i = 0; i < n; i++) {
        const float shifted = odd == 0 ? from[i] * turns + ROUNDING : ROUNDING;
        to[i] = (uint8_t)(nq_bits(shifted) + NQ_MIDDLE);
    }
    return step + odd;
}

static void hold(void *argument, int64_t begin, int64_t end) {
    const struct nq_holding *h = argument;
    const int64_t heads = h->heads, size = h->size;
    for (int64_t i = begin; i < end; i++) {
        const int64_t sequence = (h->first + i) / h->positions, at = h->held + (h->first + i) % h->positions;
        for (int64_t head = 0; head < heads; head++) {
            const float *from = h->from + (i * heads + head) * size;
            const int64_t place = (sequence * heads + head) * h->capacity + at;
            if (h->stored == NQ_HELD_FLOAT32) memcpy((float *)h->to.data + place * size, from, (size_t)size * 4);
            else if (h->stored == NQ_HELD_FLOAT16) to_halves(from, size, (uint16_t *)h->to.data + place * size);
            else h->to.scale[place] = to_steps(from, size, (uint8_t *)h->to.data + place * size);
        }
    }
}

/* LANES of the numbers held, and one; bytes are still to be multiplied with their step. */
NQ_INLINE vf states_at(const void *data, int64_t at, const int stored) {
    if (stored == NQ_HELD_FLOAT32) return vf_load((const float *)data + at);
    if (stored == NQ_HELD_FLOAT16) return vf_of_halves((const uint16_t *)data + at);
    return vf_sub(vf_of_bytes((const uint8_t *)data + at), vf_set1(NQ_MIDDLE));
}

NQ_INLINE float state_at(const void *data, int64_t at, const int stored) {
    if (stored == NQ_HELD_FLOAT32) return ((const float *)data)[at];
    if (stored == NQ_HELD_FLOAT16) return half_to_float(((const uint16_t *)data)[at]);
    return (float)((const uint8_t *)data)[at] - NQ_MIDDLE;
}

NQ_INLINE float step_at(struct nq_states states, int64_t place, const int stored) {
    return stored == NQ_HELD_INT8 ? states.scale[place] : 1;
}

/* `n` positions of a head, from `place` on, as float32 [n, size]: where they lie, or decoded to `to`. */
static const float *states_from(struct nq_states states, int64_t place, int64_t n, int64_t size, int stored, float *to) {
    if (stored == NQ_HELD_FLOAT32) return (const float *)states.data + place * size;
    for (int64_t j = 0; j < n; j++)
        for (int64_t i = 0; i < size; i++) {
            const int64_t at = (place + j) * size + i;
            to[j * size + i] = stored == NQ_HELD_FLOAT16 ? half_to_float(((const uint16_t *)states.data)[at])
                                                         : state_at(states.data, at, NQ_HELD_INT8) * states.scale[place + j];
        }
    return to;
}

/* Looking back ------------------------------------------------------------------------------------------------------ */

NQ_INLINE float dot(const float *a, const void *data, int64_t at, int64_t n, const int stored) {
    vf sums = vf_zero();
    float sum = 0;
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) sums = vf_fma(vf_load(a + i), states_at(data, at + i, stored), sums);
    for (; i < n; i++) sum += a[i] * state_at(data, at + i, stored);
    return sum + vf_sum(sums);
}

/* The place of a head's first position. */
NQ_INLINE int64_t head_of(const struct nq_attention *a, int64_t sequence, int64_t head) {
    return (sequence * a->heads + head) * a->capacity;
}

/* To y + i: weights[j] times the values of position place + j, summed over those that are kept; as many vectors of them
 * as the sums of stay in registers. */
NQ_INLINE void add_values(
    struct nq_states values, int64_t place, int64_t size, const float *weights, const uint8_t *keep, int64_t count,
    int64_t i, const int vectors, const int stored, float *y) {
    vf sums[8];
    _Pragma("GCC unroll 8") for (int v = 0; v < vectors; v++) sums[v] = vf_zero();
    for (int64_t j = 0; j < count; j++) {
        const vf weight = vf_set1(weights[j]);
        if (keep && !keep[j]) continue; /* what lies there may be anything */
        _Pragma("GCC unroll 8") for (int v = 0; v < vectors; v++)
            sums[v] = vf_fma(weight, states_at(values.data, (place + j) * size + i + v * LANES, stored), sums[v]);
    }
    _Pragma("GCC unroll 8") for (int v = 0; v < vectors; v++) vf_store(y + i + v * LANES, sums[v]);
}

/* One position: scores are not scaled. One that would see nothing, for all is padding, sees itself. */
NQ_INLINE void attend_held(
    const struct nq_attention *a, int64_t sequence, int64_t head, int64_t row, float *scores, const int stored) {
    const int64_t size = a->size, at = ((row - a->begin) * a->heads + head) * size;
    const int64_t stop = a->held + row - sequence * a->positions + 1, origin = head_of(a, sequence, head);
    const float *query = a->query + at;
    const uint8_t *keep = a->keep ? a->keep + sequence * a->keep_stride : 0;
    float *y = a->y + at, highest = -INFINITY, total = 0;
    int64_t first = a->window && a->window < stop ? stop - a->window : 0, seen = 0, i = 0;
    for (int64_t j = first; j < stop; j++) seen += !keep || keep[j];
    if (!seen) first = stop - 1, keep = 0;
    for (int64_t j = first; j < stop; j++) {
        const float step = step_at(a->keys, origin + j, stored);
        scores[j] = !keep || keep[j] ? step * dot(query, a->keys.data, (origin + j) * size, size, stored) : -INFINITY;
        highest = scores[j] > highest ? scores[j] : highest;
    }
    for (int64_t j = first; j < stop; j++) scores[j] = exp_of(scores[j] - highest);
    for (int64_t j = first; j < stop; j++) total += scores[j];
    for (int64_t j = first; j < stop; j++) scores[j] *= step_at(a->values, origin + j, stored);
    scores += first, keep = keep ? keep + first : 0;
    for (; i + 8 * LANES <= size; i += 8 * LANES)
        add_values(a->values, origin + first, size, scores, keep, stop - first, i, 8, stored, y);
    for (; i + 2 * LANES <= size; i += 2 * LANES)
        add_values(a->values, origin + first, size, scores, keep, stop - first, i, 2, stored, y);
    for (; i + LANES <= size; i += LANES)
        add_values(a->values, origin + first, size, scores, keep, stop - first, i, 1, stored, y);
    for (; i < size; i++) {
        y[i] = 0;
        for (int64_t j = 0; j < stop - first; j++)
            if (!keep || keep[j]) y[i] += scores[j] * state_at(a->values.data, (origin + first + j) * size + i, stored);
    }
    for (i = 0; i < size; i++) y[i] /= total;
}

static void attend_one(const struct nq_attention *a, int64_t sequence, int64_t head, int64_t row, float *scores) {
    if (a->stored == NQ_HELD_FLOAT32) attend_held(a, sequence, head, row, scores, NQ_HELD_FLOAT32);
    else if (a->stored == NQ_HELD_FLOAT16) attend_held(a, sequence, head, row, scores, NQ_HELD_FLOAT16);
    else attend_held(a, sequence, head, row, scores, NQ_HELD_INT8);
}

/* Many positions: PANEL of them lie beside each other, and all they meet is multiplied with the whole panel. So a key's
 * scores are a row, and what is done to them is done to vectors. */
enum {
    TOGETHER = TILE < 8 ? 4 : 8, /* rows that meet a panel at once */
    FEW_POSITIONS = 8,           /* up to which each is looked at by itself, and gets what it would get alone */
    KEYS_AT_ONCE = 128,          /* whose scores stay in cache while they meet the values */
};

/* to[n, PANEL] = (`more`: +=) x[n, depth] times panel[depth, PANEL], with x as multiply_tile has it. */
NQ_INLINE void times_panel(
    const float *x, int64_t across, int64_t down, int64_t n, const float *panel, int64_t depth, int more, float *to) {
    static const float zeros[PANEL];
    int64_t i = 0;
#define TIMES(M)                                                                                                      \
    for (; i + (M) <= n; i += (M)) {                                                                                  \
        float *y = to + i * PANEL;                                                                                    \
        const struct corner at = {more ? y : zeros, more ? PANEL : 0, y, PANEL};                                      \
        multiply_tile(x + i * down, across, down, panel, depth, at, M);                                               \
    }
    TIMES(TOGETHER)
    TIMES(1)
#undef TIMES
}

/* Scores of keys[first, stop) that a position may not see, or that are padding, become -infinity: scores[keys, PANEL]. A
 * position that would see nothing sees itself. */
static void hide(
    const struct nq_attention *a, const uint8_t *keep, int64_t at, int64_t n, int64_t first, int64_t stop,
    float *scores) {
    int32_t seen[PANEL] = {0};
    float *const of_first = scores;
    for (int64_t j = first; j < stop; j++, scores += PANEL) {
        const int64_t from = j - at, to = a->window ? from + a->window : PANEL; /* places of those that see it */
        const int kept = !keep || keep[j];
        for (int64_t q = 0; keep && q < PANEL; q++) seen[q] |= kept && q >= from && q < to;
        if (kept && from <= 0 && to >= n) continue;
        for (int64_t q = 0; q < PANEL; q++) scores[q] = kept && q >= from && q < to ? scores[q] : -INFINITY;
    }
    for (int64_t q = 0; keep && q < n; q++)
        if (!seen[q]) of_first[(at + q - first) * PANEL + q] = 0;
}

/* scores[keys, PANEL] to their powers of e, less the highest of each position; their sums to total[PANEL]. */
static void powers(float *scores, int64_t keys, const float *highest, float *total) {
    for (int q = 0; q < PANEL; q++) total[q] = 0;
    for (int64_t j = 0; j < keys; j++, scores += PANEL)
        for (int q = 0; q < PANEL; q++) {
            scores[q] = exp_of(scores[q] - highest[q]);
            total[q] += scores[q];
        }
}

/* `n` positions from `row` on, at most PANEL; the scratch holds a panel of queries, one of sums, keys or values
 * as float32, and a panel of scores. */
static void attend_panel(
    const struct nq_attention *a, int64_t sequence, int64_t head, int64_t row, int64_t n, float *scratch) {
    const int64_t size = a->size, width = a->heads * size, at = a->held + row - sequence * a->positions;
    const int64_t first = a->window && a->window <= at ? at - a->window + 1 : 0, keys = at + n - first;
    const int64_t origin = head_of(a, sequence, head) + first;
    const int64_t offset = (row - a->begin) * width + head * size;
    const uint8_t *keep = a->keep ? a->keep + sequence * a->keep_stride : 0;
    float *queries = scratch, *sums = queries + size * PANEL, *states = sums + size * PANEL;
    float *scores = states + size * KEYS_AT_ONCE;
    float highest[PANEL], total[PANEL];
    for (int64_t q = 0; q < PANEL; q++)
        for (int64_t i = 0; i < size; i++)
            queries[i * PANEL + q] = q < n ? a->query[offset + q * width + i] : 0;
    for (int64_t j = 0; j < keys; j += KEYS_AT_ONCE) {
        const int64_t count = nq_min(KEYS_AT_ONCE, keys - j);
        const float *key = states_from(a->keys, origin + j, count, size, a->stored, states);
        times_panel(key, 1, size, count, queries, size, 0, scores + j * PANEL);
    }
    hide(a, keep, at, n, first, first + keys, scores);
    for (int q = 0; q < PANEL; q++) highest[q] = -INFINITY;
    for (int64_t j = 0; j < keys; j++)
        for (int q = 0; q < PANEL; q++)
            highest[q] = scores[j * PANEL + q] > highest[q] ? scores[j * PANEL + q] : highest[q];
    powers(scores, keys, highest, total);
    for (int64_t j = 0; j < keys; j += KEYS_AT_ONCE) {
        const int64_t count = nq_min(KEYS_AT_ONCE, keys - j);
        const float *value = states_from(a->values, origin + j, count, size, a->stored, states);
        times_panel(value, size, 1, size, scores + j * PANEL, count, j > 0, sums);
    }
    for (int64_t q = 0; q < n; q++)
        for (int64_t i = 0; i < size; i++) a->y[offset + q * width + i] = sums[i * PANEL + q] / total[q];
}

static void attend(void *argument, int64_t begin, int64_t end) {
    const struct nq_attention *a = argument;
    const int64_t panels = (2 * a->size + a->held + a->positions) * PANEL;
    float *scratch = nq_scratch(NQ_OWN, (size_t)(panels + a->size * KEYS_AT_ONCE) * sizeof(float));
    if (!scratch) {
        *a->starved = 1;
        return;
    }
    for (int64_t item = begin; item < end; item++) {
        const int64_t panel = a->panels - 1 - item % a->panels; /* the last looks back furthest: first, lest others wait */
        const int64_t head = item / a->panels % a->heads;
        const int64_t sequence = a->begin / a->positions + item / a->panels / a->heads;
        const int64_t start = sequence * a->positions, stop = nq_min(start + a->positions, a->end);
        int64_t row = (start < a->begin ? a->begin : start) + panel * PANEL;
        const int64_t n = nq_min(PANEL, stop - row);
        if (n > FEW_POSITIONS) attend_panel(a, sequence, head, row, n, scratch);
        else for (const int64_t last = row + n; row < last; row++) attend_one(a, sequence, head, row, scratch);
    }
}
