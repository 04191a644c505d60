/* AVX2: vectors of eight. Sixteen values are two permutes of eight and a choice by the fourth bit. */
#define LANES 8
#ifdef NQ_VNNI
#define NAME(name) name##_avxvnni
#define X_FLIP 0x80 /* see simd_avx512.h */
enum { TILE = 6, TILE8 = 3 };
#else
#define NAME(name) name##_avx2
#define X_FLIP 0
enum { TILE = 6, TILE8 = 2 };
#endif
#define FEW_TOGETHER(M) ((M) == 1 ? 4 : 2)
#define FEW8_TOGETHER(M, BITS) ((M) == 1 ? 4 : (BITS) == 8 || ((M) == 2 && (BITS) == 4) ? 2 : 1)
#define CODES_AS_NUMBERS 1
#define TABLES_OF_BYTES 1
enum { FEW_MOST = 4 };
enum { TRELLIS_TOGETHER = 8 }; /* rows of a block: accumulators at once */

typedef __m256 vf;
typedef __m256i vi;
typedef struct {
    __m256 low, high;
} vtab;
typedef __m256i vbtab;

NQ_INLINE vf vf_set1(float a) { return _mm256_set1_ps(a); }
NQ_INLINE vf vf_zero(void) { return _mm256_setzero_ps(); }
NQ_INLINE vf vf_load(const float *from) { return _mm256_loadu_ps(from); }
NQ_INLINE void vf_store(float *to, vf a) { _mm256_storeu_ps(to, a); }
NQ_INLINE vf vf_add(vf a, vf b) { return _mm256_add_ps(a, b); }
NQ_INLINE vf vf_sub(vf a, vf b) { return _mm256_sub_ps(a, b); }
NQ_INLINE vf vf_mul(vf a, vf b) { return _mm256_mul_ps(a, b); }
NQ_INLINE vf vf_fma(vf a, vf b, vf c) { return _mm256_fmadd_ps(a, b, c); }
NQ_INLINE vf vf_fnma(vf a, vf b, vf c) { return _mm256_fnmadd_ps(a, b, c); }
NQ_INLINE float vf_sum(vf a) {
    __m128 half = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    half = _mm_add_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
}
NQ_INLINE vf vf_spread(const float *from, int shift) {
    const vi lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    return _mm256_permutevar8x32_ps(_mm256_loadu_ps(from), _mm256_srl_epi32(lane, _mm_cvtsi32_si128(shift)));
}
NQ_INLINE float half_to_float(uint16_t half) { return _mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtsi32_si128(half))); }
NQ_INLINE vf vf_of_halves(const uint16_t *from) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)from)); }
NQ_INLINE vf vf_of_bytes(const uint8_t *from) {
    return _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)from)));
}

NQ_INLINE vi vi_set1(int32_t a) { return _mm256_set1_epi32(a); }
NQ_INLINE vi vi_load(const void *from) { return _mm256_loadu_si256((const __m256i *)from); }
NQ_INLINE void vi_store(void *to, vi a) { _mm256_storeu_si256((__m256i *)to, a); }
NQ_INLINE vi vi_load2(const uint8_t *from) {
    return _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)from));
}
NQ_INLINE vi vi_load3(const uint8_t *from) { /* twelve of 24 bytes for each half, then three for each lane */
    vi bytes = _mm256_loadu2_m128i((const __m128i *)(from + 8), (const __m128i *)from);
    const vi which = _mm256_setr_epi8(
        0, 1, 2, -1, 3, 4, 5, -1, 6, 7, 8, -1, 9, 10, 11, -1, 4, 5, 6, -1, 7, 8, 9, -1, 10, 11, 12, -1, 13, 14, 15, -1);
    return _mm256_shuffle_epi8(bytes, which);
}
NQ_INLINE vi vi_and(vi a, vi b) { return _mm256_and_si256(a, b); }
NQ_INLINE vi vi_or(vi a, vi b) { return _mm256_or_si256(a, b); }
NQ_INLINE vi vi_xor(vi a, vi b) { return _mm256_xor_si256(a, b); }
/* Products of halves of lanes, modulo 2**16. */
NQ_INLINE vi vi_mul16(vi a, vi b) { return _mm256_mullo_epi16(a, b); }
NQ_INLINE vi vi_srl(vi a, int n) { return _mm256_srli_epi32(a, n); }
NQ_INLINE vi vi_sll(vi a, int n) { return _mm256_slli_epi32(a, n); }
NQ_INLINE vi vi_twice(vi a) { return _mm256_add_epi32(a, a); }
NQ_INLINE vf vf_cast(vi a) { return _mm256_castsi256_ps(a); }
NQ_INLINE vi vi_cast(vf a) { return _mm256_castps_si256(a); }
NQ_INLINE vf vf_of(vi a) { return _mm256_cvtepi32_ps(a); }
NQ_INLINE vf vf_of_byte(vi a, int k) { return vf_of(_mm256_srai_epi32(vi_sll(a, 24 - 8 * k), 24)); }
NQ_INLINE void vi_transpose(vi a[LANES]) {
    vi b[8], c[8];
    _Pragma("GCC unroll 8") for (int i = 0; i < 8; i += 2) {
        b[i] = _mm256_unpacklo_epi32(a[i], a[i + 1]);
        b[i + 1] = _mm256_unpackhi_epi32(a[i], a[i + 1]);
    }
    _Pragma("GCC unroll 8") for (int i = 0; i < 8; i += 4) {
        c[i] = _mm256_unpacklo_epi64(b[i], b[i + 2]);
        c[i + 1] = _mm256_unpackhi_epi64(b[i], b[i + 2]);
        c[i + 2] = _mm256_unpacklo_epi64(b[i + 1], b[i + 3]);
        c[i + 3] = _mm256_unpackhi_epi64(b[i + 1], b[i + 3]);
    }
    _Pragma("GCC unroll 8") for (int i = 0; i < 4; i++) {
        a[i] = _mm256_permute2x128_si256(c[i], c[i + 4], 0x20);
        a[i + 4] = _mm256_permute2x128_si256(c[i], c[i + 4], 0x31);
    }
}

NQ_INLINE vtab vf_table(const float *table) { return (vtab){_mm256_loadu_ps(table), _mm256_loadu_ps(table + 8)}; }
/* The values of the codes in the lowest four bits; the table repeats itself where codes are shorter. */
NQ_INLINE vf vf_lookup(vtab table, vi index, int bits) {
    vf low = _mm256_permutevar8x32_ps(table.low, index);
    if (bits < 4) return low;
    vf upper = _mm256_castsi256_ps(vi_sll(index, 28));
    return _mm256_blendv_ps(low, _mm256_permutevar8x32_ps(table.high, index), upper);
}
/* Bytes 0 to 3 of the sixteen values, which shuffles put together: for processors that do more of them than of permutes. */
typedef struct {
    vi bytes[4];
} vbytes;
NQ_INLINE vbytes vf_bytes(const float *table) {
    vbytes found;
    uint8_t values[16][4], apart[4][16];
    memcpy(values, table, sizeof values);
    for (int i = 0; i < 16; i++)
        for (int k = 0; k < 4; k++) apart[k][i] = values[i][k];
    for (int k = 0; k < 4; k++) found.bytes[k] = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)apart[k]));
    return found;
}
/* Of codes of four bits the low halves of the words' four bytes, or the high ones. */
NQ_INLINE void vf_lookup_halves(vbytes table, vi words, int high, vf values[4]) {
    const vi across = _mm256_setr_epi8( /* byte k of each of four words side by side */
        0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15, 0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    const vi codes = vi_and(vi_srl(_mm256_shuffle_epi8(words, across), 4 * high), _mm256_set1_epi8(15));
    vi byte[4], lower[2], upper[2];
    _Pragma("GCC unroll 4") for (int k = 0; k < 4; k++) byte[k] = _mm256_shuffle_epi8(table.bytes[k], codes);
    lower[0] = _mm256_unpacklo_epi8(byte[0], byte[1]), upper[0] = _mm256_unpacklo_epi8(byte[2], byte[3]);
    lower[1] = _mm256_unpackhi_epi8(byte[0], byte[1]), upper[1] = _mm256_unpackhi_epi8(byte[2], byte[3]);
    _Pragma("GCC unroll 2") for (int i = 0; i < 2; i++) {
        values[2 * i] = vf_cast(_mm256_unpacklo_epi16(lower[i], upper[i]));
        values[2 * i + 1] = vf_cast(_mm256_unpackhi_epi16(lower[i], upper[i]));
    }
}
/* The values of the codes in the highest four bits. */
NQ_INLINE vf vf_lookup_high(vtab table, vi places) {
    vi index = vi_srl(places, 28);
    return _mm256_blendv_ps(
        _mm256_permutevar8x32_ps(table.low, index), _mm256_permutevar8x32_ps(table.high, index), _mm256_castsi256_ps(places));
}
NQ_INLINE vbtab vb_table(const int8_t *levels) {
    return _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)levels));
}
NQ_INLINE vi vb_lookup(vbtab levels, vi index) { return _mm256_shuffle_epi8(levels, index); }
NQ_INLINE vi vb_sub(vi a, vi b) { return _mm256_sub_epi8(a, b); }
#ifdef NQ_VNNI
NQ_INLINE vi vi_dot4(vi acc, vi x, vi w) {
    __asm__("%{vex%} vpdpbusd %2, %1, %0" : "+x"(acc) : "x"(x), "x"(w));
    return acc;
}
#else
/* |w| times x with w's sign: at most 128 * 127 * 2, which 16 bits hold. */
NQ_INLINE vi vi_dot4(vi acc, vi x, vi w) {
    vi pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(w), _mm256_sign_epi8(x, w));
    return _mm256_add_epi32(acc, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}
#endif
/* The sum of eight products a lane with the codes of its word, which are numbers from 0 on. Of four bits, `first` meets the
 * low halves of bytes; of fewer, both meet two codes of the word's first half, then two of its second. */
NQ_INLINE vi vi_dot_codes(vi sum, vi words, vi first, vi second, const int bits) {
    vi low, high;
    if (bits == 4) {
        const vi mask = _mm256_set1_epi8(15);
        low = vi_and(words, mask), high = vi_and(vi_srl(words, 4), mask);
    } else {
        const vi mask = _mm256_set1_epi8((1 << bits) - 1), upper = _mm256_set1_epi16((short)0xff00);
        const vi fours = _mm256_blend_epi16(words, vi_sll(words, 16 - 4 * bits), 0xaa); /* in 16 bits each */
        const vi third = _mm256_srli_epi16(fours, 2 * bits); /* and the fourth behind it, as the second behind the first: */
        const vi fourth = bits == 3 ? _mm256_srli_epi16(fours, 1) : _mm256_slli_epi16(fours, 2);
        low = vi_and(_mm256_blendv_epi8(fours, _mm256_slli_epi16(fours, 8 - bits), upper), mask);
        high = vi_and(_mm256_blendv_epi8(third, fourth, upper), mask);
    }
#ifdef NQ_VNNI
    return vi_dot4(vi_dot4(sum, low, first), high, second);
#else
    const vi pairs = _mm256_add_epi16(_mm256_maddubs_epi16(low, first), _mm256_maddubs_epi16(high, second)); /* at most 7,620 */
    return _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
#endif
}
