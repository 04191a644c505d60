/* Rounding weights to codes, with the bytes of bitsandbytes and of the grids. */
#include "cpu.h"

#include <math.h>
#include <stdatomic.h>

enum { LONGEST_BLOCK = 4096, PIECE = 4096, NESTED_BLOCK = 256, NESTED_STEPS = 65536 };
static const float SMALLEST_SCALE = 1e-38f;

/* Conversions ------------------------------------------------------------------------------------------------- */

static float from_half(uint16_t half) {
    uint32_t sign = (uint32_t)(half & 0x8000) << 16, rest = half & 0x7fff;
    if (rest >= 0x7c00) return nq_from_bits(sign | 0x7f800000 | (rest & 0x3ff) << 13);
    if (rest >= 0x0400) return nq_from_bits(sign | ((rest << 13) + (112u << 23)));
    return nq_from_bits(nq_bits((float)rest * 0x1p-24f) | sign); /* subnormal: exact in float */
}

/* The nearest half-precision value, ties to even, as a float. */
static float through_half(float value) {
    uint32_t bits = nq_bits(value), sign = bits & 0x80000000u, rest = bits & 0x7fffffffu;
    if (rest >= 0x7f800000u) return value;
    if (rest >= 0x477ff000u) return nq_from_bits(sign | 0x7f800000u); /* 65520 and more are infinity */
    if (rest < 0x38800000u) {                                          /* subnormal: whole steps of 2**-24 */
        float steps = nq_from_bits(rest) + 0.5f;                       /* one unit of 0.5 is 2**-24: the sum rounds */
        return nq_from_bits(nq_bits(steps - 0.5f) | sign);
    }
    rest += 0xfff + ((rest >> 13) & 1);
    return nq_from_bits(sign | (rest & ~0x1fffu));
}

static void widen_portable(const void *from, int dtype, int64_t start, int64_t n, float *to) {
    if (dtype == NQ_FLOAT32) {
        memcpy(to, (const float *)from + start, (size_t)n * 4);
    } else if (dtype == NQ_FLOAT16) {
        for (int64_t i = 0; i < n; i++) to[i] = from_half(((const uint16_t *)from)[start + i]);
    } else {
        for (int64_t i = 0; i < n; i++) to[i] = nq_from_bits((uint32_t)((const uint16_t *)from)[start + i] << 16);
    }
}

/* The largest magnitude. Bit patterns are compared as integers: infinity beats every number, NaN beats infinity. */
static float largest_portable(const float *values, int64_t n) {
    uint32_t found = 0;
    for (int64_t i = 0; i < n; i++) {
        uint32_t bits = nq_bits(values[i]) & 0x7fffffffu;
        if (bits > found) found = bits;
    }
    return nq_from_bits(found);
}

/* The code of each value in [-1, 1]: how many of the fifteen bounds it exceeds, renamed by `order`. Counted without
 * branches, which compilers turn into whatever vectors the machine has; a weight's rank is past guessing anyway. */
static void nearest_portable(const float *values, int64_t n, const float *bounds, const uint8_t *order, uint8_t *codes) {
    for (int64_t start = 0; start < n; start += 32) {
        int32_t rank[32] = {0};
        int count = (int)nq_min(32, n - start);
        for (int bound = 0; bound < 15; bound++)
            for (int i = 0; i < count; i++) rank[i] += values[start + i] > bounds[bound];
        for (int i = 0; i < count; i++) codes[start + i] = order[rank[i]];
    }
}

static void int8_portable(const float *values, int64_t n, float scale, int8_t *codes) {
    for (int64_t i = 0; i < n; i++) codes[i] = (int8_t)nearbyintf(values[i] * scale);
}

#ifdef NQ_X86
NQ_AVX2 static void widen_avx2(const void *from, int dtype, int64_t start, int64_t n, float *to) {
    const uint16_t *words = (const uint16_t *)from + start;
    int64_t i = 0;
    if (dtype == NQ_FLOAT16) {
        for (; i + 8 <= n; i += 8)
            _mm256_storeu_ps(to + i, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(words + i))));
    } else if (dtype == NQ_BFLOAT16) {
        for (; i + 8 <= n; i += 8) {
            __m256i bits = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)(words + i)));
            _mm256_storeu_si256((__m256i *)(to + i), _mm256_slli_epi32(bits, 16));
        }
    }
    if (i < n) widen_portable(from, dtype, start + i, n - i, to + i);
}

NQ_AVX2 static void through_half_avx2(float *values, int64_t n) {
    int64_t i = 0;
    for (; i + 8 <= n; i += 8) {
        __m128i half = _mm256_cvtps_ph(_mm256_loadu_ps(values + i), _MM_FROUND_TO_NEAREST_INT);
        _mm256_storeu_ps(values + i, _mm256_cvtph_ps(half));
    }
    for (; i < n; i++) values[i] = through_half(values[i]);
}

NQ_AVX2 static float largest_avx2(const float *values, int64_t n) {
    __m256i found = _mm256_setzero_si256(), magnitude = _mm256_set1_epi32(0x7fffffff);
    int64_t i = 0;
    for (; i + 8 <= n; i += 8)
        found = _mm256_max_epi32(found, _mm256_and_si256(_mm256_loadu_si256((const __m256i *)(values + i)), magnitude));
    float lanes[9] = {0};
    _mm256_storeu_si256((__m256i *)lanes, found);
    lanes[8] = largest_portable(values + i, n - i);
    return largest_portable(lanes, 9);
}

/* `n` is a multiple of 32. */
NQ_AVX2 static void nearest_avx2(
    const float *values, int64_t n, float scale, const float *bounds, const uint8_t *order, uint8_t *codes) {
    __m256 factor = _mm256_set1_ps(scale), low = _mm256_loadu_ps(bounds), high = _mm256_loadu_ps(bounds + 8);
    __m128i names = _mm_loadu_si128((const __m128i *)order);
    __m256i turn = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    for (int64_t i = 0; i < n; i += 32) {
        __m256i rank[4];
        for (int k = 0; k < 4; k++) {
            __m256 value = _mm256_mul_ps(_mm256_loadu_ps(values + i + 8 * k), factor);
            /* above the middle bound or not: that half of the bounds, then three more halvings within it */
            __m256 upper = _mm256_cmp_ps(value, _mm256_set1_ps(bounds[7]), _CMP_GT_OQ);
            __m256i found = _mm256_and_si256(_mm256_castps_si256(upper), _mm256_set1_epi32(8));
            for (int step = 4; step; step >>= 1) {
                __m256i place = _mm256_add_epi32(found, _mm256_set1_epi32(step - 1));
                __m256 bound = _mm256_blendv_ps(
                    _mm256_permutevar8x32_ps(low, place), _mm256_permutevar8x32_ps(high, place), upper);
                __m256i above = _mm256_castps_si256(_mm256_cmp_ps(value, bound, _CMP_GT_OQ));
                found = _mm256_add_epi32(found, _mm256_and_si256(above, _mm256_set1_epi32(step)));
            }
            rank[k] = found;
        }
        __m256i bytes = _mm256_packus_epi16(_mm256_packs_epi32(rank[0], rank[1]), _mm256_packs_epi32(rank[2], rank[3]));
        bytes = _mm256_permutevar8x32_epi32(bytes, turn);
        _mm256_storeu_si256((__m256i *)(codes + i), _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(names), bytes));
    }
}

NQ_AVX2 static void int8_avx2(const float *values, int64_t n, float scale, int8_t *codes) {
    __m256 factor = _mm256_set1_ps(scale);
    int64_t i = 0;
    for (; i + 8 <= n; i += 8) {
        __m256i whole = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(values + i), factor));
        __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(whole), _mm256_extracti128_si256(whole, 1));
        _mm_storel_epi64((__m128i *)(codes + i), _mm_packs_epi16(words, words));
    }
    int8_portable(values + i, n - i, scale, codes + i);
}

NQ_AVX512 static void widen_avx512(const void *from, int dtype, int64_t start, int64_t n, float *to) {
    const uint16_t *words = (const uint16_t *)from + start;
    for (int64_t i = 0; i < n; i += 16) {
        __mmask16 mask = n - i >= 16 ? 0xffff : (__mmask16)((1u << (n - i)) - 1);
        __m256i half = _mm256_maskz_loadu_epi16(mask, words + i);
        __m512 value = dtype == NQ_FLOAT16
                           ? _mm512_cvtph_ps(half)
                           : _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
        _mm512_mask_storeu_ps(to + i, mask, value);
    }
}

NQ_AVX512 static float largest_avx512(const float *values, int64_t n) {
    __m512i found = _mm512_setzero_si512(), magnitude = _mm512_set1_epi32(0x7fffffff);
    for (int64_t i = 0; i < n; i += 16) {
        __mmask16 mask = n - i >= 16 ? 0xffff : (__mmask16)((1u << (n - i)) - 1);
        found = _mm512_max_epi32(found, _mm512_and_si512(_mm512_maskz_loadu_epi32(mask, values + i), magnitude));
    }
    return nq_from_bits((uint32_t)_mm512_reduce_max_epi32(found));
}

/* `n` is a multiple of 32. */
NQ_AVX512 static void nearest_avx512(
    const float *values, int64_t n, float scale, const float *bounds, const uint8_t *order, uint8_t *codes) {
    __m512 factor = _mm512_set1_ps(scale), table = _mm512_loadu_ps(bounds);
    __m512i names = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)order));
    for (int64_t i = 0; i < n; i += 16) {
        __m512 value = _mm512_mul_ps(_mm512_loadu_ps(values + i), factor);
        __m512i rank = _mm512_setzero_si512();
        for (int step = 8; step; step >>= 1) {
            __m512 bound = _mm512_permutexvar_ps(_mm512_add_epi32(rank, _mm512_set1_epi32(step - 1)), table);
            __mmask16 above = _mm512_cmp_ps_mask(value, bound, _CMP_GT_OQ);
            rank = _mm512_mask_add_epi32(rank, above, rank, _mm512_set1_epi32(step));
        }
        rank = _mm512_permutexvar_epi32(rank, names);
        _mm_storeu_si128((__m128i *)(codes + i), _mm512_cvtepi32_epi8(rank));
    }
}
#endif

static const float *widen(int isa, const void *from, int dtype, int64_t start, int64_t n, float *to) {
    if (dtype == NQ_FLOAT32) return (const float *)from + start;
#ifdef NQ_X86
    if (isa >= NQ_ISA_AVX512) return widen_avx512(from, dtype, start, n, to), to;
    if (isa >= NQ_ISA_AVX2) return widen_avx2(from, dtype, start, n, to), to;
#endif
    widen_portable(from, dtype, start, n, to);
    return to;
}

static float largest(int isa, const float *values, int64_t n) {
#ifdef NQ_X86
    if (isa >= NQ_ISA_AVX512) return largest_avx512(values, n);
    if (isa >= NQ_ISA_AVX2) return largest_avx2(values, n);
#endif
    return largest_portable(values, n);
}

/* NF4 and FP4 ------------------------------------------------------------------------------------------------- */

struct blocks {
    const void *w;
    const float *bounds;
    const uint8_t *order;
    uint8_t *codes;
    float *absmax;
    int64_t n, block;
    int dtype, isa;
};

/* Whole blocks are multiplied by the reciprocal of their absmax; a short one is divided: so bitsandbytes does. */
static void round_blocks(void *argument, int64_t begin, int64_t end) {
    const struct blocks *job = argument;
    float buffer[LONGEST_BLOCK];
    for (int64_t index = begin; index < end; index++) {
        int64_t start = index * job->block, n = nq_min(job->block, job->n - start);
        const float *values = widen(job->isa, job->w, job->dtype, start, n, buffer);
        float absmax = largest(job->isa, values, n), scale = absmax < SMALLEST_SCALE ? SMALLEST_SCALE : absmax;
        if (n < job->block) {
            job->absmax[index] = scale;
            for (int64_t i = 0; i < n; i++) buffer[i] = values[i] / scale;
            nearest_portable(buffer, n, job->bounds, job->order, job->codes + start);
            continue;
        }
        job->absmax[index] = absmax;
        scale = 1.0f / scale;
#ifdef NQ_X86
        if (job->isa >= NQ_ISA_AVX512) {
            nearest_avx512(values, n, scale, job->bounds, job->order, job->codes + start);
            continue;
        }
        if (job->isa >= NQ_ISA_AVX2) {
            nearest_avx2(values, n, scale, job->bounds, job->order, job->codes + start);
            continue;
        }
#endif
        for (int64_t i = 0; i < n; i++) buffer[i] = values[i] * scale;
        nearest_portable(buffer, n, job->bounds, job->order, job->codes + start);
    }
}

/* w[n] -> codes[n], absmax[ceil(n / block)]; bounds[16] rises and ends in infinity, block is 32 to 4096.
 * Where an absmax is not finite, the codes of its block mean nothing. */
NQ_EXPORT void nq_round_blocks(
    const void *w, int dtype, int64_t n, int64_t block, const float *bounds, const uint8_t *order,
    uint8_t *codes, float *absmax, int isa, int threads) {
    struct blocks job = {w, bounds, order, codes, absmax, n, block, dtype, isa};
    nq_parallel(threads, (n + block - 1) / block, 1, n / 2, round_blocks, &job);
}

/* int8 rows ----------------------------------------------------------------------------------------------------- */

struct rows {
    const void *w;
    int8_t *codes;
    float *absmax;
    int64_t columns;
    int dtype, isa;
};

/* A piece of the weight rounded to half precision, as bitsandbytes does first. */
static const float *half_piece(const struct rows *job, int64_t start, int64_t n, float *buffer) {
    if (job->dtype != NQ_FLOAT32) widen(job->isa, job->w, job->dtype, start, n, buffer);
    else memcpy(buffer, (const float *)job->w + start, (size_t)n * 4);
    if (job->dtype == NQ_FLOAT16) return buffer;
#ifdef NQ_X86
    if (job->isa != NQ_ISA_PORTABLE) return through_half_avx2(buffer, n), buffer;
#endif
    for (int64_t i = 0; i < n; i++) buffer[i] = through_half(buffer[i]);
    return buffer;
}

static void round_rows(void *argument, int64_t begin, int64_t end) {
    const struct rows *job = argument;
    float buffer[PIECE];
    for (int64_t row = begin; row < end; row++) {
        int64_t start = row * job->columns, stop = start + job->columns;
        uint32_t found = 0;
        for (int64_t at = start; at < stop; at += PIECE) {
            int64_t n = nq_min(PIECE, stop - at);
            uint32_t bits = nq_bits(largest(job->isa, half_piece(job, at, n, buffer), n));
            if (bits > found) found = bits;
        }
        job->absmax[row] = nq_from_bits(found);
        if (found == 0 || found >= 0x7f800000u) {
            memset(job->codes + start, 0, (size_t)job->columns);
            continue;
        }
        float scale = 1.0f / job->absmax[row] * 127.0f; /* torch's 127 / absmax: two roundings */
        for (int64_t at = start; at < stop; at += PIECE) {
            int64_t n = nq_min(PIECE, stop - at);
            const float *values = job->columns <= PIECE ? buffer : half_piece(job, at, n, buffer);
#ifdef NQ_X86
            if (job->isa != NQ_ISA_PORTABLE) {
                int8_avx2(values, n, scale, job->codes + at);
                continue;
            }
#endif
            int8_portable(values, n, scale, job->codes + at);
        }
    }
}

/* w[rows, columns] -> codes[rows, columns], absmax[rows]. A row whose absmax is not finite has codes of zero. */
NQ_EXPORT void nq_round_rows(
    const void *w, int dtype, int64_t n, int64_t columns, int8_t *codes, float *absmax, int isa, int threads) {
    struct rows job = {w, codes, absmax, columns, dtype, isa};
    nq_parallel(threads, n, 1, n * columns, round_rows, &job);
}

/* Affine groups ---------------------------------------------------------------------------------------------------- */

struct affine {
    const void *w;
    uint16_t *scales; /* [rows, groups], half precision */
    void *zeros;      /* the same, in bytes or (half_zeros) half precision; or 0: all zeros are the middle */
    uint8_t *codes;   /* or 0: only scales and zeros are wanted */
    int64_t columns, width, groups;
    int half_zeros, dtype, bits, fit, isa;
    atomic_int *overflows; /* set where a scale is not finite */
    atomic_int *starved;   /* and where memory is wanting */
};

static const float WHOLE = 0x1.8p23f; /* added and taken away, leaves the nearest whole number, ties to even */

/* The nearest half-precision number to one that is not negative. */
static uint16_t to_half(float value) {
    uint32_t bits = nq_bits(value);
    if (bits >= 0x477ff000u) return 0x7c00; /* 65520 and more are infinity */
    if (bits < 0x38800000u) return (uint16_t)(nq_bits(value + 0.5f) - nq_bits(0.5f)); /* steps of 2**-24 */
    return (uint16_t)(((bits + 0xfff + ((bits >> 13) & 1)) >> 13) - (112u << 10));
}

/* Floats as integers that are ordered as they are; what is not a number lies beyond infinity. */
NQ_INLINE int32_t rank_of(float value) {
    int32_t bits = (int32_t)nq_bits(value);
    return bits ^ (bits >> 31 & 0x7fffffff);
}

NQ_INLINE float of_rank(int32_t rank) { return nq_from_bits((uint32_t)(rank ^ (rank >> 31 & 0x7fffffff))); }

/* The scale that covers the range of values[n], and zero; and -low / scale, of which the zero is made: it is not negative. */
NQ_INLINE float fit_group(const float *values, int64_t n, int bits, int symmetric, uint16_t *scale) {
    int32_t lowest = 0, highest = 0;
    for (int64_t i = 0; i < n; i++) {
        int32_t rank = rank_of(values[i]);
        lowest = rank < lowest ? rank : lowest;
        highest = rank > highest ? rank : highest;
    }
    const float top = (float)((1 << bits) - 1);
    float low = of_rank(lowest), high = of_rank(highest);
    if (symmetric) {
        high = -low > high ? -low : high;
        low = -high;
    }
    *scale = low > -INFINITY && high < INFINITY ? to_half((high - low) / top) : 0x7c00;
    const float step = from_half(*scale);
    return -low * (step > 0 ? 1.0f / step : 0.0f);
}

/* Its zero in bytes. */
NQ_INLINE uint8_t to_code(float zero, int bits) {
    const float steps = zero + WHOLE - WHOLE, top = (float)((1 << bits) - 1);
    return (uint8_t)(int)(steps > 0 ? steps > top ? top : steps : 0);
}

NQ_INLINE void round_group(const float *values, int64_t n, int bits, float scale, float zero, uint8_t *codes) {
    const float inverse = scale > 0 ? 1.0f / scale : 0.0f, top = (float)((1 << bits) - 1);
    const float whole = zero + WHOLE - WHOLE, part = zero - whole; /* the part of an integer is 0, which adds nothing */
    for (int64_t i = 0; i < n; i++) {
        float steps = values[i] * inverse + part + WHOLE - WHOLE + whole;
        steps = steps > 0 ? steps : 0;
        codes[i] = (uint8_t)(int)(steps < top ? steps : top);
    }
}

NQ_INLINE void affine_row(const struct affine *job, int64_t row, const float *values) {
    for (int64_t group = 0; group < job->groups; group++) {
        const int64_t start = group * job->width, n = nq_min(job->width, job->columns - start);
        uint16_t *scale = &job->scales[row * job->groups + group];
        uint8_t *byte = job->zeros && !job->half_zeros ? (uint8_t *)job->zeros + row * job->groups + group : 0;
        uint16_t *half = job->half_zeros ? (uint16_t *)job->zeros + row * job->groups + group : 0;
        if (job->fit) {
            const float zero = fit_group(values + start, n, job->bits, !job->zeros, scale);
            if (byte) *byte = to_code(zero, job->bits);
            if (half) *half = zero > 0 ? to_half(zero) : 0;
        }
        if (*scale >= 0x7c00) *job->overflows = 1;
        if (!job->codes) continue;
        const float from = half ? from_half(*half) : (float)(byte ? *byte : 1 << (job->bits - 1));
        round_group(values + start, n, job->bits, from_half(*scale), from, job->codes + row * job->columns + start);
    }
}

/* The same loops, which compilers turn into the vectors that they are allowed. */
static void affine_row_portable(const struct affine *job, int64_t row, const float *values) {
    affine_row(job, row, values);
}
#ifdef NQ_X86
NQ_AVX2 static void affine_row_avx2(const struct affine *job, int64_t row, const float *values) {
    affine_row(job, row, values);
}
NQ_AVX512 static void affine_row_avx512(const struct affine *job, int64_t row, const float *values) {
    affine_row(job, row, values);
}
#endif

static void affine_range(void *argument, int64_t begin, int64_t end) {
    const struct affine *job = argument;
    float *buffer = nq_scratch(NQ_OWN, (size_t)job->columns * sizeof(float));
    if (!buffer) {
        *job->starved = 1;
        return;
    }
    for (int64_t row = begin; row < end; row++) {
        const float *values = widen(job->isa, job->w, job->dtype, row * job->columns, job->columns, buffer);
#ifdef NQ_X86
        if (job->isa >= NQ_ISA_AVX512) {
            affine_row_avx512(job, row, values);
            continue;
        }
        if (job->isa >= NQ_ISA_AVX2) {
            affine_row_avx2(job, row, values);
            continue;
        }
#endif
        affine_row_portable(job, row, values);
    }
}

/* w[rows, columns] -> codes[rows, columns] (unless 0) under scales and zeros [rows, groups] (0: symmetric; `half_zeros`:
 * in half precision, else bytes), which are fitted first if `fit`. Groups are `width` columns, the last of a row what is left. Returns whether a scale is not
 * finite in half precision, because the weight is not or its range is too wide; then nothing here means anything. Or NQ_NO_MEMORY. */
NQ_EXPORT int nq_affine(
    const void *w, int dtype, int64_t rows, int64_t columns, int64_t width, int bits, int fit, uint16_t *scales,
    void *zeros, int half_zeros, uint8_t *codes, int isa, int threads) {
    atomic_int overflows = 0, starved = 0;
    struct affine job = {w, scales, zeros, codes, columns, width, (columns + width - 1) / width,
                         half_zeros, dtype, bits, fit, isa, &overflows, &starved};
    nq_parallel(threads, rows, 1, rows * columns, affine_range, &job);
    return starved ? NQ_NO_MEMORY : overflows;
}

/* Double quantization ------------------------------------------------------------------------------------------- */

/* values[n] -> codes[n], absmax[ceil(n / 256)]. The value scaled to [-1, 1] is rounded to one of 65536 even steps;
 * code_of_step[65536] names the nearest code of each. A block of zeros has code 0: so bitsandbytes 0.50 does. */
NQ_EXPORT void nq_round_nested(
    const float *values, int64_t n, const uint8_t *code_of_step, uint8_t *codes, float *absmax, int isa) {
    for (int64_t start = 0, block = 0; start < n; start += NESTED_BLOCK, block++) {
        int64_t count = nq_min(NESTED_BLOCK, n - start);
        absmax[block] = largest(isa, values + start, count);
        if (!(absmax[block] > 0 && absmax[block] <= 3.402823466e38f)) {
            memset(codes + start, 0, (size_t)count);
            continue;
        }
        float inverse = 1.0f / absmax[block];
        for (int64_t i = start; i < start + count; i++) {
            float value = values[i] * inverse;
            value = value < -1 ? -1 : value > 1 ? 1 : value;
            codes[i] = code_of_step[(uint16_t)((value + 1.0f) * 0.5f * (NESTED_STEPS - 1) + 0.5f)];
        }
    }
}

/* Nibbles --------------------------------------------------------------------------------------------------------- */

struct nibbles {
    const uint8_t *from;
    uint8_t *to;
    int64_t n;
};

static void pack_range(void *argument, int64_t begin, int64_t end) {
    const struct nibbles *job = argument;
    const uint8_t *from = job->from;
    uint8_t *to = job->to;
    for (int64_t i = begin; i < end; i++) to[i] = (uint8_t)(from[2 * i] << 4 | from[2 * i + 1]);
}

static void unpack_range(void *argument, int64_t begin, int64_t end) {
    const struct nibbles *job = argument;
    const uint8_t *from = job->from;
    uint8_t *to = job->to;
    for (int64_t i = begin; i < end; i++) {
        to[2 * i] = from[i] >> 4;
        to[2 * i + 1] = from[i] & 15;
    }
}

/* codes[2 * n] -> bytes[n], the first of two codes in the high half. */
NQ_EXPORT void nq_pack_nibbles(const uint8_t *codes, uint8_t *bytes, int64_t n, int threads) {
    struct nibbles job = {codes, bytes, n};
    nq_parallel(threads, n, 1 << 12, n / 8, pack_range, &job);
}

/* The inverse. */
NQ_EXPORT void nq_unpack_nibbles(const uint8_t *bytes, uint8_t *codes, int64_t n, int threads) {
    struct nibbles job = {bytes, codes, n};
    nq_parallel(threads, n, 1 << 12, n / 8, unpack_range, &job);
}

/* Codes of n bits ------------------------------------------------------------------------------------------------- */

struct packing {
    const uint8_t *from;
    uint8_t *to;
    int64_t n;
    int bits;
};

#define EVEN_BYTES 0x00ff00ff00ff00ffu
#define EVEN_PAIRS 0x0000ffff0000ffffu

/* Eight codes in a byte each -> in the lowest bits of a word, and back: two bytes that are neighbours move together, or
 * apart, then two pairs of them, then the halves. */
NQ_INLINE uint64_t gather_eight(uint64_t word, const int bits) {
    word = (word & EVEN_BYTES) | (word & ~EVEN_BYTES) >> (8 - bits);
    word = (word & EVEN_PAIRS) | (word & ~EVEN_PAIRS) >> 2 * (8 - bits);
    return (word & 0xffffffffu) | word >> 32 << 4 * bits;
}

NQ_INLINE uint64_t spread_eight(uint64_t word, const int bits) {
    const uint64_t fours = ((uint64_t)1 << 4 * bits) - 1;
    const uint64_t twos = (((uint64_t)1 << 2 * bits) - 1) * 0x0000000100000001u;
    const uint64_t ones = (((uint64_t)1 << bits) - 1) * 0x0001000100010001u;
    word = (word & fours) | (word >> 4 * bits & fours) << 32;
    word = (word & twos) | (word >> 2 * bits & twos) << 16;
    return (word & ones) | (word >> bits & ones) << 8;
}

/* Eight codes, or the `count` that are left of a row, to the bytes that they are packed in, and back. */
NQ_INLINE void pack_eight(const uint8_t *codes, uint8_t *bytes, int count, const int bits) {
    uint64_t word = 0;
    memcpy(&word, codes, (size_t)count);
    word = gather_eight(word, bits);
    for (int k = 0; k < (count * bits + 7) / 8; k++) bytes[k] = (uint8_t)(word >> (8 * k));
}

NQ_INLINE void unpack_eight(const uint8_t *bytes, uint8_t *codes, int count, const int bits) {
    uint64_t word = 0;
    for (int k = 0; k < (count * bits + 7) / 8; k++) word |= (uint64_t)bytes[k] << (8 * k);
    word = spread_eight(word, bits);
    memcpy(codes, &word, (size_t)count);
}

NQ_INLINE void pack_rows(const struct packing *job, int64_t begin, int64_t end, const int bits) {
    const int64_t n = job->n, bytes = (n * bits + 7) / 8, eights = n / 8;
    for (int64_t row = begin; row < end; row++) {
        const uint8_t *from = job->from + row * n;
        uint8_t *to = job->to + row * bytes;
        if (bits == 4) /* no byte depends on another: compilers make vectors of it */
            for (int64_t i = 0; i < eights * 4; i++) to[i] = (uint8_t)(from[2 * i] | from[2 * i + 1] << 4);
        else
            for (int64_t i = 0; i < eights; i++) pack_eight(from + 8 * i, to + bits * i, 8, bits);
        if (n % 8) pack_eight(from + 8 * eights, to + bits * eights, (int)(n % 8), bits);
    }
}

NQ_INLINE void unpack_rows(const struct packing *job, int64_t begin, int64_t end, const int bits) {
    const int64_t n = job->n, bytes = (n * bits + 7) / 8, eights = n / 8;
    for (int64_t row = begin; row < end; row++) {
        const uint8_t *from = job->from + row * bytes;
        uint8_t *to = job->to + row * n;
        if (bits == 4)
            for (int64_t i = 0; i < eights * 4; i++) {
                to[2 * i] = from[i] & 15;
                to[2 * i + 1] = from[i] >> 4;
            }
        else
            for (int64_t i = 0; i < eights; i++) unpack_eight(from + bits * i, to + 8 * i, 8, bits);
        if (n % 8) unpack_eight(from + bits * eights, to + 8 * eights, (int)(n % 8), bits);
    }
}

#define OF_BITS(rows)                                                                                                 \
    const struct packing *job = argument;                                                                             \
    if (job->bits == 2) rows(job, begin, end, 2);                                                                     \
    else if (job->bits == 3) rows(job, begin, end, 3);                                                                \
    else if (job->bits == 4) rows(job, begin, end, 4);                                                                \
    else rows(job, begin, end, job->bits);

static void pack_bits_range(void *argument, int64_t begin, int64_t end) { OF_BITS(pack_rows) }
static void unpack_bits_range(void *argument, int64_t begin, int64_t end) { OF_BITS(unpack_rows) }

static void in_rows(nq_range run, const uint8_t *from, uint8_t *to, int64_t rows, int64_t n, int bits, int threads) {
    struct packing job = {from, to, n, bits};
    nq_parallel(threads, rows, 1, rows * n / 4, run, &job);
}

/* codes[rows, n] of `bits` bits -> bytes[rows, ceil(n * bits / 8)], low bits first, every row on a byte. */
NQ_EXPORT void nq_pack(const uint8_t *codes, uint8_t *bytes, int64_t rows, int64_t n, int bits, int threads) {
    in_rows(pack_bits_range, codes, bytes, rows, n, bits, threads);
}

/* The inverse. */
NQ_EXPORT void nq_unpack(const uint8_t *bytes, uint8_t *codes, int64_t rows, int64_t n, int bits, int threads) {
    in_rows(unpack_bits_range, bytes, codes, rows, n, bits, threads);
}
