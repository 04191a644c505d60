/* NEON (aarch64): vectors of four. Sixteen floats are the 64 bytes that one table instruction looks up in. */
#define LANES 4
#define NAME(name) name##_neon
#define X_FLIP 0
enum { TILE = 8, TILE8 = 6 };
#define FEW_TOGETHER(M) ((M) <= 2 ? 2 : 1)
#define FEW8_TOGETHER(M, BITS) FEW_TOGETHER(M)
#define CODES_AS_NUMBERS 0
#define TABLES_OF_BYTES 0
enum { FEW_MOST = 4 };
enum { TRELLIS_TOGETHER = 8 }; /* rows of a block: accumulators at once */

typedef float32x4_t vf;
typedef int32x4_t vi;
typedef uint8x16x4_t vtab;
typedef int8x16_t vbtab;

NQ_INLINE vf vf_set1(float a) { return vdupq_n_f32(a); }
NQ_INLINE vf vf_zero(void) { return vdupq_n_f32(0); }
NQ_INLINE vf vf_load(const float *from) { return vld1q_f32(from); }
NQ_INLINE void vf_store(float *to, vf a) { vst1q_f32(to, a); }
NQ_INLINE vf vf_add(vf a, vf b) { return vaddq_f32(a, b); }
NQ_INLINE vf vf_sub(vf a, vf b) { return vsubq_f32(a, b); }
NQ_INLINE vf vf_mul(vf a, vf b) { return vmulq_f32(a, b); }
NQ_INLINE vf vf_fma(vf a, vf b, vf c) { return vfmaq_f32(c, a, b); }
NQ_INLINE vf vf_fnma(vf a, vf b, vf c) { return vfmsq_f32(c, a, b); }
NQ_INLINE float vf_sum(vf a) { return vaddvq_f32(a); }
NQ_INLINE vf vf_spread(const float *from, int shift) {
    return (vf){from[0], from[1 >> shift], from[2 >> shift], from[3 >> shift]};
}
NQ_INLINE float half_to_float(uint16_t half) {
    __fp16 value;
    memcpy(&value, &half, 2);
    return (float)value;
}
NQ_INLINE vf vf_of_halves(const uint16_t *from) {
    return (vf){half_to_float(from[0]), half_to_float(from[1]), half_to_float(from[2]), half_to_float(from[3])};
}
NQ_INLINE vf vf_of_bytes(const uint8_t *from) { return (vf){from[0], from[1], from[2], from[3]}; }

NQ_INLINE vi vi_set1(int32_t a) { return vdupq_n_s32(a); }
NQ_INLINE vi vi_load(const void *from) { return vreinterpretq_s32_u8(vld1q_u8(from)); }
NQ_INLINE void vi_store(void *to, vi a) { vst1q_u8(to, vreinterpretq_u8_s32(a)); }
NQ_INLINE vi vi_load2(const uint8_t *from) {
    return vreinterpretq_s32_u32(vmovl_u16(vreinterpret_u16_u8(vld1_u8(from))));
}
NQ_INLINE vi vi_load3(const uint8_t *from) {
    static const uint8_t which[16] = {0, 1, 2, 255, 3, 4, 5, 255, 6, 7, 8, 255, 9, 10, 11, 255};
    uint32_t last;
    memcpy(&last, from + 8, 4);
    uint8x16_t bytes = vcombine_u8(vld1_u8(from), vreinterpret_u8_u32(vdup_n_u32(last)));
    return vreinterpretq_s32_u8(vqtbl1q_u8(bytes, vld1q_u8(which)));
}
NQ_INLINE vi vi_and(vi a, vi b) { return vandq_s32(a, b); }
NQ_INLINE vi vi_or(vi a, vi b) { return vorrq_s32(a, b); }
NQ_INLINE vi vi_xor(vi a, vi b) { return veorq_s32(a, b); }
/* Products of halves of lanes, modulo 2**16. */
NQ_INLINE vi vi_mul16(vi a, vi b) {
    return vreinterpretq_s32_s16(vmulq_s16(vreinterpretq_s16_s32(a), vreinterpretq_s16_s32(b)));
}
NQ_INLINE vi vi_srl(vi a, int n) { return vreinterpretq_s32_u32(vshlq_u32(vreinterpretq_u32_s32(a), vdupq_n_s32(-n))); }
NQ_INLINE vi vi_sll(vi a, int n) { return vshlq_s32(a, vdupq_n_s32(n)); }
NQ_INLINE vi vi_twice(vi a) { return vaddq_s32(a, a); }
NQ_INLINE vf vf_cast(vi a) { return vreinterpretq_f32_s32(a); }
NQ_INLINE vi vi_cast(vf a) { return vreinterpretq_s32_f32(a); }
NQ_INLINE vf vf_of(vi a) { return vcvtq_f32_s32(a); }
NQ_INLINE vf vf_of_byte(vi a, int k) { return vf_of(vshrq_n_s32(vi_sll(a, 24 - 8 * k), 24)); }
NQ_INLINE void vi_transpose(vi a[LANES]) {
    int32x4x2_t first = vtrnq_s32(a[0], a[1]), second = vtrnq_s32(a[2], a[3]);
    for (int i = 0; i < 2; i++) {
        a[i] = vcombine_s32(vget_low_s32(first.val[i]), vget_low_s32(second.val[i]));
        a[i + 2] = vcombine_s32(vget_high_s32(first.val[i]), vget_high_s32(second.val[i]));
    }
}

NQ_INLINE vtab vf_table(const float *table) { return vld1q_u8_x4((const uint8_t *)table); }
/* The values of the codes in the lowest four bits; the table repeats itself where codes are shorter. */
NQ_INLINE vf vf_lookup(vtab table, vi index, int bits) {
    (void)bits;
    int32x4_t places = vandq_s32(index, vdupq_n_s32(15)); /* code c is bytes 4 c to 4 c + 3 */
    places = vmlaq_s32(vdupq_n_s32(0x03020100), places, vdupq_n_s32(0x04040404));
    return vreinterpretq_f32_u8(vqtbl4q_u8(table, vreinterpretq_u8_s32(places)));
}
/* The values of the codes in the highest four bits. */
NQ_INLINE vf vf_lookup_high(vtab table, vi places) {
    return vf_lookup(table, vi_srl(places, 28), 4);
}
NQ_INLINE vbtab vb_table(const int8_t *levels) { return vld1q_s8(levels); }
NQ_INLINE vi vb_lookup(vbtab levels, vi index) {
    return vreinterpretq_s32_s8(vqtbl1q_s8(levels, vreinterpretq_u8_s32(index)));
}
NQ_INLINE vi vb_sub(vi a, vi b) {
    return vreinterpretq_s32_s8(vsubq_s8(vreinterpretq_s8_s32(a), vreinterpretq_s8_s32(b)));
}
/* acc + the products of four signed bytes a lane. */
NQ_INLINE vi vi_dot4(vi acc, vi x, vi w) {
    int8x16_t a = vreinterpretq_s8_s32(x), b = vreinterpretq_s8_s32(w);
    int16x8_t low = vmull_s8(vget_low_s8(a), vget_low_s8(b)), high = vmull_high_s8(a, b);
    return vaddq_s32(acc, vpaddq_s32(vpaddlq_s16(low), vpaddlq_s16(high)));
}
