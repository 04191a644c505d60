/* AVX-512: vectors of sixteen. One permute looks sixteen floats up by the lowest four bits of each lane. */
#define LANES 16
enum { TILE = 12, TILE8 = 6 };
#define FEW_TOGETHER(M) ((M) <= 2 ? 4 : 2)
#define FEW8_TOGETHER(M, BITS) FEW_TOGETHER(M)
#define CODES_AS_NUMBERS 0
#define TABLES_OF_BYTES 0
enum { FEW_MOST = 8 };
enum { TRELLIS_TOGETHER = 8 }; /* rows of a block: accumulators at once */

typedef __m512 vf;
typedef __m512i vi;
typedef __m512 vtab;
typedef __m512i vbtab;

NQ_INLINE vf vf_set1(float a) { return _mm512_set1_ps(a); }
NQ_INLINE vf vf_zero(void) { return _mm512_setzero_ps(); }
NQ_INLINE vf vf_load(const float *from) { return _mm512_loadu_ps(from); }
NQ_INLINE void vf_store(float *to, vf a) { _mm512_storeu_ps(to, a); }
NQ_INLINE vf vf_add(vf a, vf b) { return _mm512_add_ps(a, b); }
NQ_INLINE vf vf_sub(vf a, vf b) { return _mm512_sub_ps(a, b); }
NQ_INLINE vf vf_mul(vf a, vf b) { return _mm512_mul_ps(a, b); }
NQ_INLINE vf vf_fma(vf a, vf b, vf c) { return _mm512_fmadd_ps(a, b, c); }
NQ_INLINE vf vf_fnma(vf a, vf b, vf c) { return _mm512_fnmadd_ps(a, b, c); }
NQ_INLINE float vf_sum(vf a) { return _mm512_reduce_add_ps(a); }
NQ_INLINE vf vf_spread(const float *from, int shift) {
    const vi lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const vi which = _mm512_srl_epi32(lane, _mm_cvtsi32_si128(shift));
    if (shift >= 2) return _mm512_permutexvar_ps(which, _mm512_castps128_ps512(_mm_loadu_ps(from))); /* of one line */
    return _mm512_permutexvar_ps(which, _mm512_loadu_ps(from));
}
NQ_INLINE float half_to_float(uint16_t half) { return _mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtsi32_si128(half))); }
NQ_INLINE vf vf_of_halves(const uint16_t *from) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)from)); }
NQ_INLINE vf vf_of_bytes(const uint8_t *from) {
    return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)from)));
}

/* The first n lanes, or bytes, which alone are read; zeros behind them. */
#define SOME_LANES
NQ_INLINE vf vf_of_some_halves(const uint16_t *from, int n) {
    return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16((__mmask16)((1u << n) - 1), from));
}
NQ_INLINE vf vf_of_some_bytes(const uint8_t *from, int n) {
    return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8((__mmask16)((1u << n) - 1), from)));
}
NQ_INLINE __m512i vi_load_some_bytes(const uint8_t *from, int n) {
    return _mm512_maskz_loadu_epi8(((__mmask64)1 << n) - 1, from);
}

NQ_INLINE vi vi_set1(int32_t a) { return _mm512_set1_epi32(a); }
NQ_INLINE vi vi_load(const void *from) { return _mm512_loadu_si512(from); }
NQ_INLINE void vi_store(void *to, vi a) { _mm512_storeu_si512(to, a); }
NQ_INLINE vi vi_load2(const uint8_t *from) {
    return _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)from));
}
NQ_INLINE vi vi_load3(const uint8_t *from) {
    vi bytes = _mm512_maskz_loadu_epi32(0x0fff, from); /* twelve bytes for each quarter, then three for each lane */
    bytes = _mm512_permutexvar_epi32(_mm512_setr_epi32(0, 1, 2, 2, 3, 4, 5, 5, 6, 7, 8, 8, 9, 10, 11, 11), bytes);
    return _mm512_shuffle_epi8(
        bytes, _mm512_broadcast_i32x4(_mm_setr_epi8(0, 1, 2, -1, 3, 4, 5, -1, 6, 7, 8, -1, 9, 10, 11, -1)));
}
NQ_INLINE vi vi_and(vi a, vi b) { return _mm512_and_si512(a, b); }
NQ_INLINE vi vi_or(vi a, vi b) { return _mm512_or_si512(a, b); }
NQ_INLINE vi vi_xor(vi a, vi b) { return _mm512_xor_si512(a, b); }
/* Products of halves of lanes, modulo 2**16. */
NQ_INLINE vi vi_mul16(vi a, vi b) { return _mm512_mullo_epi16(a, b); }
NQ_INLINE vi vi_srl(vi a, int n) { return _mm512_srli_epi32(a, (unsigned)n); }
NQ_INLINE vi vi_sll(vi a, int n) { return _mm512_slli_epi32(a, (unsigned)n); }
NQ_INLINE vi vi_twice(vi a) { return _mm512_add_epi32(a, a); }
NQ_INLINE vf vf_cast(vi a) { return _mm512_castsi512_ps(a); }
NQ_INLINE vi vi_cast(vf a) { return _mm512_castps_si512(a); }
NQ_INLINE vf vf_of(vi a) { return _mm512_cvtepi32_ps(a); }
NQ_INLINE vf vf_of_byte(vi a, int k) { return vf_of(_mm512_srai_epi32(vi_sll(a, 24 - 8 * k), 24)); }
NQ_INLINE void vi_transpose(vi a[LANES]) {
    vi b[16];
    _Pragma("GCC unroll 16") for (int i = 0; i < 16; i += 2) {
        b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
        b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
    }
    _Pragma("GCC unroll 16") for (int i = 0; i < 16; i += 4) {
        a[i] = _mm512_unpacklo_epi64(b[i], b[i + 2]);
        a[i + 1] = _mm512_unpackhi_epi64(b[i], b[i + 2]);
        a[i + 2] = _mm512_unpacklo_epi64(b[i + 1], b[i + 3]);
        a[i + 3] = _mm512_unpackhi_epi64(b[i + 1], b[i + 3]);
    }
    _Pragma("GCC unroll 16") for (int i = 0; i < 4; i++) {
        vi even = _mm512_shuffle_i32x4(a[i], a[i + 4], 0x88), odd = _mm512_shuffle_i32x4(a[i], a[i + 4], 0xdd);
        vi even2 = _mm512_shuffle_i32x4(a[i + 8], a[i + 12], 0x88), odd2 = _mm512_shuffle_i32x4(a[i + 8], a[i + 12], 0xdd);
        b[i] = _mm512_shuffle_i32x4(even, even2, 0x88);
        b[i + 8] = _mm512_shuffle_i32x4(even, even2, 0xdd);
        b[i + 4] = _mm512_shuffle_i32x4(odd, odd2, 0x88);
        b[i + 12] = _mm512_shuffle_i32x4(odd, odd2, 0xdd);
    }
    _Pragma("GCC unroll 16") for (int i = 0; i < 16; i++) a[i] = b[i];
}

NQ_INLINE vtab vf_table(const float *table) { return _mm512_loadu_ps(table); }
/* The values of the codes in the lowest four bits; the table repeats itself where codes are shorter. */
NQ_INLINE vf vf_lookup(vtab table, vi index, int bits) {
    (void)bits;
    return _mm512_permutexvar_ps(index, table);
}
/* The values of the codes in the highest four bits. */
NQ_INLINE vf vf_lookup_high(vtab table, vi places) {
    return _mm512_permutexvar_ps(vi_srl(places, 28), table);
}
/* The values of the codes in the four bits below the highest, which is their sign: lookups take no more than four bits. */
#define SIGNED_TABLES
NQ_INLINE vf vf_lookup_signed(vtab table, vi places) {
    const vf value = _mm512_permutexvar_ps(vi_srl(places, 27), table);
    return vf_cast(_mm512_ternarylogic_epi32(vi_cast(value), places, vi_set1(INT32_MIN), 0x78)); /* value ^ (places & sign) */
}
NQ_INLINE vbtab vb_table(const int8_t *levels) {
    return _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *)levels));
}
/* Of words of eight codes of two bits: codes 0 and 1, or 4 and 5, in the lowest bits of the first two bytes, 2 and 3, or 6 and 7,
 * in those of the others. */
#define TWO_BITS_TOGETHER
NQ_INLINE vi vi_two_bits(vi words, int second) {
    const vi both = _mm512_xor_si512(words, _mm512_slli_epi32(words, 12)); /* codes 2 and 6 begin the third and fourth byte */
    const vi which = _mm512_add_epi8(
        _mm512_broadcast_i32x4(_mm_setr_epi8(0, 0, 2, 2, 4, 4, 6, 6, 8, 8, 10, 10, 12, 12, 14, 14)), _mm512_set1_epi8((char)second));
    return _mm512_shuffle_epi8(both, which);
}
NQ_INLINE vi vb_lookup(vbtab levels, vi index) { return _mm512_shuffle_epi8(levels, index); }
NQ_INLINE vi vb_sub(vi a, vi b) { return _mm512_sub_epi8(a, b); }

#ifdef NQ_VNNI
/* The instruction wants one side without a sign: activations are stored 128 too high, which every sum starts less. */
#define NAME(name) name##_avx512vnni
#define X_FLIP 0x80
/* Not the intrinsic: compilers copy its accumulators to and fro where a loop has many. */
NQ_INLINE vi vi_dot4(vi acc, vi x, vi w) {
    __asm__("vpdpbusd {%2, %1, %0|%0, %1, %2}" : "+v"(acc) : "v"(x), "v"(w));
    return acc;
}
#else
#define NAME(name) name##_avx512
#define X_FLIP 0
/* |w| times x with w's sign: at most 128 * 127 * 2, which 16 bits hold. */
NQ_INLINE vi vi_dot4(vi acc, vi x, vi w) {
    vi turned = _mm512_mask_sub_epi8(x, _mm512_movepi8_mask(w), _mm512_setzero_si512(), x);
    vi pairs = _mm512_maddubs_epi16(_mm512_abs_epi8(w), turned);
    return _mm512_add_epi32(acc, _mm512_madd_epi16(pairs, _mm512_set1_epi16(1)));
}
#endif
