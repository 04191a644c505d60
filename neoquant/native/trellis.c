/* Trellis-coded quantization (Marcellin and Fischer, 1990; QTIP, arXiv:2406.11235, section 3): codes of two or three bits,
 * read down the rows of a column. The last twelve bits of them are the state, which says which of sixteen or thirty-two values
 * a weight has.
 *
 * A column is cut into spans, whose first codes follow the last ones (tail-biting). The Viterbi algorithm finds the codes of
 * the least squared error, its costs being whole numbers: so every machine finds the same ones.
 *
 * Error feedback runs from column to column as in gptq.c. Spans are independent of each other.
 *
 * Rows of a span may be coupled: then the error of a row is also compensated in the later ones. What is to be compensated
 * depends on all of a path, so that it is not enough to know the best one to each state. A beam search takes its place: of all
 * paths to a row it keeps the best ones to different states, each with its own compensation (the M-algorithm: Anderson and
 * Mohan, 1984; per-survivor processing: Raheli et al., 1995).
 */
#include "cpu.h"

#include <stdatomic.h>

enum {
    STATE_BITS = 12,
    STATES = 1 << STATE_BITS,
    MOST_CODES = 8,            /* of three bits */
    MOST_KEPT = STATES / 4,    /* what the next state keeps of a state, of codes of two bits */
    MOST_MEMORY = 6,           /* codes in a state, of two bits */
    MOST_LEVELS = 32,
    SPAN = 256,
    AROUND = 32,               /* rows on either side of a span's beginning that are searched for the state there */
    UNREACHED = 0xffff,
    PATHS = 64,                /* that the beam search keeps */
};

struct trellis {
    float *weights;          /* [n, rows]: columns as rows; overwritten where errors are fed back */
    const float *upper;      /* [n, n] of a matrix with rows `stride` apart: factor of the inverse Hessian; 0: no feedback */
    int64_t stride, n, rows;
    const int64_t *places;   /* [n]: the weight's column in each row of `weights` */
    const float *scale;      /* [groups, rows] */
    const float *importance; /* [groups, rows]: what a squared error of one unit costs */
    int64_t width;           /* columns that share a scale */
    int bits;                /* of a code */
    const uint8_t *levels;   /* [STATES]: the value of each state, by its number */
    const float *table;      /* values, four times as many as codes */
    uint8_t *codes;          /* [columns of the weight, rows] */
    float *errors;           /* [n, rows], or 0 without feedback */
    const float *original;   /* [n, rows]: the weights before any compensation; with `unit` only */
    const float *unit;       /* [spans, SPAN, SPAN] unit upper triangular; 0: rows are not coupled */
    const float *price;      /* [rows]: what a squared error costs, what follows from it in later rows being compensated */
    int isa;
    atomic_int *starved;
    uint8_t turned[STATES];  /* `levels`, as step_avx2 reads them */
};

NQ_INLINE int codes_of(const struct trellis *t) { return 1 << t->bits; }
NQ_INLINE int kept_of(const struct trellis *t) { return STATES >> t->bits; } /* what the next state keeps of a state */
NQ_INLINE int memory_of(const struct trellis *t) { return STATE_BITS / t->bits; } /* codes in a state */
NQ_INLINE int levels_of(const struct trellis *t) { return 4 << t->bits; }

/* What one thread searches in. */
struct search {
    uint16_t cost[2][STATES];
    uint8_t back[SPAN][MOST_KEPT]; /* which of as many states as there are codes was the best that comes to what is kept */
};

/* The end of a path that comes to a row. */
struct end {
    float cost, value;
    int16_t state;
    uint8_t parent; /* which of the paths to the row above it continues */
};

/* What one thread searches in where rows are coupled. */
struct beam {
    struct search search; /* for the state that a span begins from */
    float compensation[2][PATHS][SPAN];
    struct end ends[MOST_CODES * PATHS];
    int16_t place[STATES]; /* of a state in `ends`, or -1 */
    uint8_t parent[SPAN][PATHS], code[SPAN][PATHS];
};

/* What each value costs above the cheapest, for a row whose weight is `wanted` times its scale. */
static void price(const struct trellis *t, float wanted, float importance, uint16_t *costs) {
    const int levels = levels_of(t);
    float square[MOST_LEVELS], least;
    for (int k = 0; k < levels; k++) {
        float apart = wanted - t->table[k];
        square[k] = apart * apart;
    }
    least = square[0];
    for (int k = 1; k < levels; k++) least = square[k] < least ? square[k] : least;
    for (int k = 0; k < levels; k++) {
        float cost = (square[k] - least) * importance;
        costs[k] = cost < (float)UNREACHED ? (uint16_t)(int32_t)cost : UNREACHED;
    }
}

/* One row: the least cost of each state, `before` being those at the row above less `least`, the least of them. Returns the
 * least of those that the states come from. */
NQ_INLINE uint16_t step_portable(
    const int bits, const uint8_t *levels, const uint16_t *costs, const uint16_t *before, uint16_t least, uint16_t *after,
    uint8_t *back) {
    const int kept = STATES >> bits, codes = 1 << bits;
    uint16_t found = UNREACHED;
    for (int u = 0; u < kept; u++) {
        uint16_t best = before[u];
        uint8_t choice = 0;
        for (int other = 1; other < codes; other++) {
            const uint16_t cost = before[other * kept + u];
            choice = cost < best ? (uint8_t)other : choice;
            best = cost < best ? cost : best;
        }
        best -= least, back[u] = choice;
        found = best < found ? best : found;
        for (int code = 0; code < codes; code++) {
            const uint32_t sum = (uint32_t)best + costs[levels[codes * u + code]];
            after[codes * u + code] = sum < UNREACHED ? (uint16_t)sum : UNREACHED;
        }
    }
    return found;
}

#ifdef NQ_X86
/* Sixteen costs, each as often as there are codes: those of the states that follow. */
NQ_AVX2 NQ_INLINE void spread(const int bits, __m256i kept, __m256i *to) {
    __m256i twice[2];
    if (bits == 2) kept = _mm256_permutevar8x32_epi32(kept, _mm256_setr_epi32(0, 2, 4, 6, 1, 3, 5, 7));
    else { /* every other one into each half */
        const __m256i apart = _mm256_setr_epi8(
            0, 1, 4, 5, 8, 9, 12, 13, 2, 3, 6, 7, 10, 11, 14, 15, 0, 1, 4, 5, 8, 9, 12, 13, 2, 3, 6, 7, 10, 11, 14, 15);
        kept = _mm256_permute4x64_epi64(_mm256_shuffle_epi8(kept, apart), 0xd8);
    }
    twice[0] = _mm256_unpacklo_epi16(kept, kept), twice[1] = _mm256_unpackhi_epi16(kept, kept);
    for (int i = 0; i < 2; i++) {
        const __m256i low = _mm256_unpacklo_epi32(twice[i], twice[i]), high = _mm256_unpackhi_epi32(twice[i], twice[i]);
        if (bits == 2) to[2 * i] = low, to[2 * i + 1] = high;
        else {
            to[4 * i] = _mm256_unpacklo_epi64(low, low), to[4 * i + 1] = _mm256_unpackhi_epi64(low, low);
            to[4 * i + 2] = _mm256_unpacklo_epi64(high, high), to[4 * i + 3] = _mm256_unpackhi_epi64(high, high);
        }
    }
}

/* The least of the costs of as many states as there are codes, and which of them it is, of equals the first. */
NQ_AVX2 NQ_INLINE __m256i least_of(const int bits, const uint16_t *from, __m256i *choice) {
    const int kept = STATES >> bits, codes = 1 << bits;
    __m256i cost[MOST_CODES], best;
    _Pragma("GCC unroll 8") for (int i = 0; i < codes; i++) cost[i] = _mm256_loadu_si256((const __m256i *)(from + i * kept));
    best = cost[0];
    _Pragma("GCC unroll 8") for (int i = 1; i < codes; i++) best = _mm256_min_epu16(best, cost[i]);
    *choice = _mm256_set1_epi16((short)(codes - 1));
    _Pragma("GCC unroll 8") for (int i = codes - 2; i >= 0; i--)
        *choice = _mm256_blendv_epi8(*choice, _mm256_set1_epi16((short)i), _mm256_cmpeq_epi16(best, cost[i]));
    return best;
}

/* One half of every cost, sixteen bytes of them in both halves of a vector; those of more values in another. */
struct bytes_of_costs {
    __m256i first, second;
};

NQ_AVX2 NQ_INLINE __m256i look_up(const int bits, struct bytes_of_costs bytes, __m256i which) {
    const __m256i first = _mm256_shuffle_epi8(bytes.first, which);
    if (bits == 2) return first;
    return _mm256_blendv_epi8(first, _mm256_shuffle_epi8(bytes.second, which), _mm256_slli_epi16(which, 3));
}

NQ_AVX2 NQ_INLINE void take_bytes(const uint16_t *costs, __m256i *lower, __m256i *upper) {
    const __m256i all = _mm256_loadu_si256((const __m256i *)costs);
    const __m256i bytes = _mm256_permute4x64_epi64(
        _mm256_packus_epi16(_mm256_and_si256(all, _mm256_set1_epi16(0xff)), _mm256_srli_epi16(all, 8)), 0xd8);
    *lower = _mm256_permute2x128_si256(bytes, bytes, 0x00), *upper = _mm256_permute2x128_si256(bytes, bytes, 0x11);
}

NQ_AVX2 NQ_INLINE uint16_t step_vectors(
    const int bits, const uint8_t *turned, const uint16_t *costs, const uint16_t *before, uint16_t least, uint16_t *after,
    uint8_t *back) {
    const int kept_states = STATES >> bits, codes = 1 << bits;
    struct bytes_of_costs lower, upper;
    take_bytes(costs, &lower.first, &upper.first);
    if (bits == 3) take_bytes(costs + 16, &lower.second, &upper.second);
    const __m256i taken = _mm256_set1_epi16((short)least);
    __m256i found = _mm256_set1_epi16(-1);
    for (int u = 0; u < kept_states; u += 32) {
        __m256i choice[2];
        for (int half = 0; half < 2; half++) {
            const __m256i kept = _mm256_sub_epi16(least_of(bits, before + u + 16 * half, &choice[half]), taken);
            __m256i follow[MOST_CODES];
            found = _mm256_min_epu16(found, kept);
            spread(bits, kept, follow);
            _Pragma("GCC unroll 4") for (int pair = 0; pair < codes / 2; pair++) {
                const int state = codes * (u + 16 * half) + 32 * pair;
                const __m256i which = _mm256_loadu_si256((const __m256i *)(turned + state));
                const __m256i small = look_up(bits, lower, which), large = look_up(bits, upper, which);
                _mm256_storeu_si256(
                    (__m256i *)(after + state), _mm256_adds_epu16(follow[2 * pair], _mm256_unpacklo_epi8(small, large)));
                _mm256_storeu_si256(
                    (__m256i *)(after + state + 16),
                    _mm256_adds_epu16(follow[2 * pair + 1], _mm256_unpackhi_epi8(small, large)));
            }
        }
        const __m256i packed = _mm256_packus_epi16(choice[0], choice[1]);
        _mm256_storeu_si256((__m256i *)(back + u), _mm256_permute4x64_epi64(packed, 0xd8));
    }
    const __m128i eight = _mm_min_epu16(_mm256_castsi256_si128(found), _mm256_extracti128_si256(found, 1));
    return (uint16_t)_mm_extract_epi16(_mm_minpos_epu16(eight), 0);
}

NQ_AVX2 static uint16_t step_avx2(
    int bits, const uint8_t *turned, const uint16_t *costs, const uint16_t *before, uint16_t least, uint16_t *after,
    uint8_t *back) {
    return bits == 2 ? step_vectors(2, turned, costs, before, least, after, back)
                     : step_vectors(3, turned, costs, before, least, after, back);
}
#endif

static uint16_t step(
    const struct trellis *t, const uint16_t *costs, const uint16_t *before, uint16_t least, uint16_t *after, uint8_t *back) {
#ifdef NQ_X86
    if (t->isa >= NQ_ISA_AVX2)
        return step_avx2(t->bits, t->turned, costs, before, least, after, back);
#endif
    return t->bits == 2 ? step_portable(2, t->levels, costs, before, least, after, back)
                        : step_portable(3, t->levels, costs, before, least, after, back);
}

/* Rows [0, count) of those that `row` names, from costs in cost[0] on. Returns which of the two holds the last ones. */
static int walk(
    const struct trellis *t, struct search *s, const float *wanted, const float *importance, int64_t first, int64_t n,
    int64_t count) {
    uint16_t least = 0;
    for (int64_t i = 0; i < count; i++) {
        const int64_t row = (first + i) % n;
        uint16_t costs[MOST_LEVELS];
        price(t, wanted[row], importance[row], costs);
        least = step(t, costs, s->cost[i & 1], least, s->cost[~i & 1], s->back[i]);
    }
    return (int)(count & 1);
}

static int64_t came_from(const struct trellis *t, const struct search *s, int64_t row, int64_t state) {
    const int64_t kept = state >> t->bits;
    return s->back[row][kept] * kept_of(t) + kept;
}

/* The state that a span begins from and ends in: that of the best path over its last rows and its first ones. */
static int64_t find_beginning(
    const struct trellis *t, struct search *s, const float *wanted, const float *importance, int64_t n) {
    const int64_t first = (n - AROUND % n) % n; /* short spans are walked around several times */
    memset(s->cost[0], 0, sizeof s->cost[0]);
    const uint16_t *last = s->cost[walk(t, s, wanted, importance, first, n, 2 * AROUND)];
    int64_t state = 0;
    for (int64_t other = 1; other < STATES; other++)
        if (last[other] < last[state]) state = other;
    for (int64_t row = 2 * AROUND - 1; row >= AROUND; row--) state = came_from(t, s, row, state);
    return state % kept_of(t);
}

/* The state at a row of a span of n codes. */
NQ_INLINE int state_at(const struct trellis *t, const uint8_t *codes, int64_t row, int64_t n) {
    int state = 0;
    for (int back = memory_of(t) - 1; back >= 0; back--) state = state << t->bits | codes[((row - back) % n + n) % n];
    return state;
}

/* Spans no longer than a state: every path is tried. */
static void try_all(
    const struct trellis *t, const float *wanted, const float *importance, int64_t n, uint8_t *codes) {
    uint16_t costs[MOST_MEMORY][MOST_LEVELS];
    uint32_t least = UINT32_MAX;
    uint8_t tried[MOST_MEMORY];
    for (int64_t row = 0; row < n; row++) price(t, wanted[row], importance[row], costs[row]);
    for (int path = 0; path < 1 << t->bits * n; path++) {
        uint32_t sum = 0;
        for (int64_t row = 0; row < n; row++) tried[row] = path >> t->bits * row & (codes_of(t) - 1);
        for (int64_t row = 0; row < n; row++) sum += costs[row][t->levels[state_at(t, tried, row, n)]];
        if (sum < least) {
            least = sum;
            memcpy(codes, tried, (size_t)n);
        }
    }
}

static void search_span(
    const struct trellis *t, struct search *s, const float *wanted, const float *importance, int64_t n, uint8_t *codes) {
    if (n <= memory_of(t)) {
        try_all(t, wanted, importance, n, codes);
        return;
    }
    const int64_t kept = find_beginning(t, s, wanted, importance, n), apart = kept_of(t);
    for (int64_t state = 0; state < STATES; state++) s->cost[0][state] = state % apart == kept ? 0 : UNREACHED;
    const uint16_t *last = s->cost[walk(t, s, wanted, importance, 0, n, n)];
    int64_t state = kept;
    for (int64_t other = kept + apart; other < STATES; other += apart)
        if (last[other] < last[state]) state = other;
    for (int64_t row = n - 1; row >= 0; row--) {
        codes[row] = (uint8_t)(state % codes_of(t));
        state = came_from(t, s, row, state);
    }
}

/* One column of a span with coupled rows. */
struct span {
    const float *w, *original, *scale, *unit, *price;
    int64_t n;
};

/* How many of n costs are at most `limit`. */
NQ_INLINE int count_up_to(const int32_t *costs, int n, int32_t limit) {
    int found = 0;
    for (int i = 0; i < n; i++) found += costs[i] <= limit;
    return found;
}

/* Keep PATHS of more ends, those of the least cost, of equals the first, in their order. No cost is negative, so that bits are
 * in the order of costs: which cost is the last one kept is found by halving, without a branch that depends on a cost. */
static void keep_least(struct end *ends, int n) {
    int32_t costs[MOST_CODES * PATHS], low = INT32_MAX, high = 0;
    for (int i = 0; i < n; i++) {
        costs[i] = (int32_t)nq_bits(ends[i].cost);
        low = costs[i] < low ? costs[i] : low;
        high = costs[i] > high ? costs[i] : high;
    }
    while (low < high) { /* the least limit that PATHS costs are within */
        const int32_t middle = low + (high - low) / 2;
        const int within = count_up_to(costs, n, middle);
        if (within >= PATHS) high = middle;
        else low = middle + 1;
        if (within == PATHS) break;
    }
    int equals = PATHS - count_up_to(costs, n, high - 1), kept = 0;
    for (int i = 0; i < n; i++) {
        const int taken = costs[i] < high || (costs[i] == high && equals-- > 0);
        ends[kept] = ends[i];
        kept += taken;
    }
}

/* The best ends at a row of a span, at most PATHS, that continue `count` paths in `before`. Returns how many. */
static int64_t continue_paths(
    const struct trellis *t, struct beam *b, const struct span *p, int64_t row, int64_t kept, const struct end *before,
    int64_t count) {
    const int64_t left = p->n - 1 - row; /* the last codes are those that the span's first ones follow */
    const int codes = codes_of(t), forced = left < memory_of(t) - 1 ? (int)(kept >> t->bits * left) & (codes - 1) : -1;
    int64_t found = 0;
    for (int64_t path = 0; path < count; path++) {
        const float target = p->w[row] + b->compensation[row & 1][path][row];
        for (int code = forced < 0 ? 0 : forced; code < (forced < 0 ? codes : forced + 1); code++) {
            const int state = (before[path].state << t->bits | code) % STATES, place = b->place[state];
            const float value = t->table[t->levels[state]] * p->scale[row], apart = target - value;
            const struct end end = {before[path].cost + apart * apart * p->price[row], value, (int16_t)state, (uint8_t)path};
            if (place >= 0 && b->ends[place].cost <= end.cost) continue;
            if (place < 0) b->place[state] = (int16_t)found;
            b->ends[place < 0 ? found++ : place] = end;
        }
    }
    for (int64_t i = 0; i < found; i++) b->place[b->ends[i].state] = -1;
    if (found <= PATHS) return found;
    keep_least(b->ends, (int)found);
    return PATHS;
}

/* What the error of a row asks of the later ones, `from` being what those before it do. */
NQ_INLINE void compensate(const struct span *p, int64_t row, float value, const float *from, float *to) {
    const float error = p->original[row] + from[row] - value, *unit = p->unit + row * SPAN;
    for (int64_t later = row + 1; later < p->n; later++) to[later] = from[later] - error * unit[later];
}

NQ_INLINE void compensate_all(struct beam *b, const struct span *p, int64_t row, int64_t count) {
    for (int64_t path = 0; path < count; path++) {
        const struct end *end = b->ends + path;
        compensate(p, row, end->value, b->compensation[row & 1][end->parent], b->compensation[~row & 1][path]);
    }
}

#ifdef NQ_X86
NQ_AVX512 static void compensate_avx512(struct beam *b, const struct span *p, int64_t row, int64_t count) {
    compensate_all(b, p, row, count);
}
NQ_AVX2 static void compensate_avx2(struct beam *b, const struct span *p, int64_t row, int64_t count) {
    compensate_all(b, p, row, count);
}
#endif

static void compensate_paths(const struct trellis *t, struct beam *b, const struct span *p, int64_t row, int64_t count) {
#ifdef NQ_X86
    if (t->isa >= NQ_ISA_AVX512) compensate_avx512(b, p, row, count);
    else if (t->isa >= NQ_ISA_AVX2) compensate_avx2(b, p, row, count);
    else
#endif
        compensate_all(b, p, row, count);
}

/* The codes of a column whose rows are coupled, from the state that the search without coupling begins from. */
static void search_coupled(
    const struct trellis *t, struct beam *b, const struct span *p, const float *wanted, const float *importance,
    uint8_t *codes) {
    struct end before[PATHS];
    const int64_t kept = find_beginning(t, &b->search, wanted, importance, p->n);
    int64_t count = 1, best = 0;
    before[0] = (struct end){0, 0, (int16_t)kept, 0};
    memset(b->compensation[0][0], 0, sizeof b->compensation[0][0]);
    memset(b->place, 0xff, sizeof b->place);
    for (int64_t row = 0; row < p->n; row++) {
        count = continue_paths(t, b, p, row, kept, before, count);
        compensate_paths(t, b, p, row, count);
        memcpy(before, b->ends, (size_t)count * sizeof *before);
        for (int64_t path = 0; path < count; path++) {
            b->parent[row][path] = before[path].parent;
            b->code[row][path] = (uint8_t)(before[path].state % codes_of(t));
        }
    }
    for (int64_t path = 1; path < count; path++)
        if (before[path].cost < before[best].cost) best = path;
    for (int64_t row = p->n - 1; row >= 0; row--) {
        codes[row] = b->code[row][best];
        best = b->parent[row][best];
    }
}

/* What each row of a column lacks, the rows before it being compensated where they are coupled. Returns what that costs. */
static float errors_of(const struct trellis *t, const struct span *p, const uint8_t *codes, float *errors) {
    float added[SPAN] = {0}, cost = 0;
    for (int64_t row = 0; row < p->n; row++) {
        const float value = t->table[t->levels[state_at(t, codes, row, p->n)]] * p->scale[row];
        errors[row] = p->w[row] + added[row] - value;
        if (!p->unit) continue;
        cost += errors[row] * errors[row] * p->price[row];
        compensate(p, row, value, added, added);
    }
    return cost;
}

/* Rows [begin, end) of one column, a span or the shorter last one; `b` where rows are coupled. */
static void round_span(
    const struct trellis *t, struct search *s, struct beam *b, int64_t column, int64_t begin, int64_t end) {
    const int64_t place = t->places[column], scales = place / t->width * t->rows + begin, n = end - begin;
    const float *w = t->weights + column * t->rows + begin, *scale = t->scale + scales, *importance = t->importance + scales;
    uint8_t *codes = t->codes + place * t->rows + begin, other_codes[SPAN];
    float wanted[SPAN], other_errors[SPAN];
    for (int64_t r = 0; r < n; r++) wanted[r] = scale[r] > 0 ? w[r] / scale[r] : 0;
    search_span(t, s, wanted, importance, n, codes);
    if (!t->upper) return;
    const struct span p = {
        w, b ? t->original + column * t->rows + begin : 0, scale, b ? t->unit + begin * SPAN : 0, b ? t->price + begin : 0, n};
    float *errors = t->errors + column * t->rows + begin;
    const float *upper = t->upper + column * t->stride, diagonal = upper[column];
    const float cost = errors_of(t, &p, codes, errors);
    if (b && n > memory_of(t)) { /* where rows hardly hang together, all paths without compensation are more than few with it */
        search_coupled(t, b, &p, wanted, importance, other_codes);
        if (errors_of(t, &p, other_codes, other_errors) < cost) {
            memcpy(codes, other_codes, (size_t)n);
            memcpy(errors, other_errors, (size_t)n * sizeof *errors);
        }
    }
    for (int64_t r = 0; r < n; r++) errors[r] /= diagonal;
    for (int64_t later = column + 1; later < t->n; later++) {
        float *to = t->weights + later * t->rows + begin, part = upper[later];
        for (int64_t r = 0; r < n; r++) to[r] -= part * errors[r];
    }
}

/* Items are spans; without feedback, spans of each column. */
static void run(void *job, int64_t begin, int64_t end) {
    const struct trellis *t = job;
    struct beam *b = nq_scratch(NQ_OWN, t->unit ? sizeof *b : sizeof b->search); /* of which the search is the beginning */
    if (!b) {
        *t->starved = 1;
        return;
    }
    for (int64_t item = begin; item < end; item++) {
        const int64_t first = (t->upper ? item : item / t->n) * SPAN, last = nq_min(first + SPAN, t->rows);
        for (int64_t column = t->upper ? 0 : item % t->n; column < t->n; column += t->upper ? 1 : t->n)
            round_span(t, &b->search, t->unit ? b : 0, column, first, last);
    }
}

/* With `unit`, errors are fed back: `upper` is given. */
NQ_EXPORT int nq_trellis_block(
    float *weights, const float *upper, int64_t stride, int64_t n, int64_t rows, const int64_t *places, const float *scale,
    const float *importance, int64_t width, int bits, const uint8_t *levels, const float *table, uint8_t *codes, float *errors,
    const float *original, const float *unit, const float *price, int isa, int threads) {
    atomic_int starved = 0;
    struct trellis t = {weights, upper, stride, n, rows, places, scale, importance, width, bits, levels, table, codes, errors,
                        original, unit, price, isa, &starved, {0}};
    for (int state = 0; state < STATES; state++) { /* bytes 8 to 15 of 32 and 16 to 23 change places */
        const int eight = state >> 3 & 3;
        t.turned[state] = levels[(state & ~24) | (eight == 1 ? 2 : eight == 2 ? 1 : eight) << 3];
    }
    const int64_t items = (rows + SPAN - 1) / SPAN * (upper ? 1 : n);
    nq_parallel(threads, items, 1, rows * n * (unit ? 3000 : 500), run, &t);
    return starved ? NQ_NO_MEMORY : 0;
}
