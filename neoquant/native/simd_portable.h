/* Vectors of four, in the extension that GCC and clang have for every machine. */
#define LANES 4
#define NAME(name) name##_portable
#define X_FLIP 0
enum { TILE = 4, TILE8 = 2 };
#define FEW_TOGETHER(M) 1
#define FEW8_TOGETHER(M, BITS) 1
#define CODES_AS_NUMBERS 0
#define TABLES_OF_BYTES 0
enum { FEW_MOST = 4 };
enum { TRELLIS_TOGETHER = 4 }; /* rows of a block: accumulators at once */

typedef float vf __attribute__((vector_size(16)));
typedef int32_t vi __attribute__((vector_size(16)));
typedef uint32_t vu __attribute__((vector_size(16)));
typedef const float *vtab;
typedef const int8_t *vbtab;

NQ_INLINE vf vf_set1(float a) { return (vf){a, a, a, a}; }
NQ_INLINE vf vf_zero(void) { return vf_set1(0); }
NQ_INLINE vf vf_load(const float *from) {
    vf a;
    memcpy(&a, from, 16);
    return a;
}
NQ_INLINE void vf_store(float *to, vf a) { memcpy(to, &a, 16); }
NQ_INLINE vf vf_add(vf a, vf b) { return a + b; }
NQ_INLINE vf vf_sub(vf a, vf b) { return a - b; }
NQ_INLINE vf vf_mul(vf a, vf b) { return a * b; }
NQ_INLINE vf vf_fma(vf a, vf b, vf c) { return a * b + c; }
NQ_INLINE vf vf_fnma(vf a, vf b, vf c) { return c - a * b; }
NQ_INLINE float vf_sum(vf a) { return (a[0] + a[2]) + (a[1] + a[3]); }
NQ_INLINE vf vf_spread(const float *from, int shift) {
    return (vf){from[0], from[1 >> shift], from[2 >> shift], from[3 >> shift]};
}
NQ_INLINE float half_to_float(uint16_t half) { return nq_half(half); }
NQ_INLINE vf vf_of_halves(const uint16_t *from) {
    return (vf){half_to_float(from[0]), half_to_float(from[1]), half_to_float(from[2]), half_to_float(from[3])};
}
NQ_INLINE vf vf_of_bytes(const uint8_t *from) { return (vf){from[0], from[1], from[2], from[3]}; }

NQ_INLINE vi vi_set1(int32_t a) { return (vi){a, a, a, a}; }
NQ_INLINE vi vi_load(const void *from) {
    vi a;
    memcpy(&a, from, 16);
    return a;
}
NQ_INLINE void vi_store(void *to, vi a) { memcpy(to, &a, 16); }
NQ_INLINE vi vi_load2(const uint8_t *from) {
    uint16_t a[4];
    memcpy(a, from, 8);
    return (vi){a[0], a[1], a[2], a[3]};
}
NQ_INLINE vi vi_load3(const uint8_t *from) {
    vi a;
    for (int i = 0; i < 4; i++) a[i] = from[3 * i] | from[3 * i + 1] << 8 | from[3 * i + 2] << 16;
    return a;
}
NQ_INLINE vi vi_and(vi a, vi b) { return a & b; }
NQ_INLINE vi vi_or(vi a, vi b) { return a | b; }
NQ_INLINE vi vi_xor(vi a, vi b) { return a ^ b; }
/* Products of halves of lanes, modulo 2**16. */
NQ_INLINE vi vi_mul16(vi a, vi b) {
    typedef uint16_t vh __attribute__((vector_size(16)));
    return (vi)((vh)a * (vh)b);
}
NQ_INLINE vi vi_srl(vi a, int n) { return (vi)((vu)a >> n); }
NQ_INLINE vi vi_sll(vi a, int n) { return (vi)((vu)a << n); }
NQ_INLINE vi vi_twice(vi a) { return vi_sll(a, 1); }
NQ_INLINE vf vf_cast(vi a) { return (vf)a; }
NQ_INLINE vi vi_cast(vf a) { return (vi)a; }
NQ_INLINE vf vf_of(vi a) { return __builtin_convertvector(a, vf); }
NQ_INLINE vf vf_of_byte(vi a, int k) { return vf_of(vi_sll(a, 24 - 8 * k) >> 24); }
NQ_INLINE void vi_transpose(vi a[LANES]) {
    vi b[LANES];
    for (int i = 0; i < 4; i++) b[i] = (vi){a[0][i], a[1][i], a[2][i], a[3][i]};
    memcpy(a, b, sizeof b);
}

NQ_INLINE vtab vf_table(const float *table) { return table; }
/* The values of the codes in the lowest `bits` bits; what is above them does not matter. */
NQ_INLINE vf vf_lookup(vtab table, vi index, int bits) {
    index &= vi_set1((1 << bits) - 1);
    return (vf){table[index[0]], table[index[1]], table[index[2]], table[index[3]]};
}
/* The values of the codes in the highest four bits. */
NQ_INLINE vf vf_lookup_high(vtab table, vi places) {
    return vf_lookup(table, vi_srl(places, 28), 4);
}
NQ_INLINE vbtab vb_table(const int8_t *levels) { return levels; }
/* Four bytes a lane, each below 16, to their levels. */
NQ_INLINE vi vb_lookup(vbtab levels, vi index) {
    uint8_t bytes[16];
    memcpy(bytes, &index, 16);
    for (int i = 0; i < 16; i++) bytes[i] = (uint8_t)levels[bytes[i]];
    memcpy(&index, bytes, 16);
    return index;
}
NQ_INLINE vi vb_sub(vi a, vi b) {
    typedef uint8_t vb __attribute__((vector_size(16)));
    return (vi)((vb)a - (vb)b);
}
/* acc + the products of four signed bytes a lane. */
NQ_INLINE vi vi_dot4(vi acc, vi x, vi w) {
    for (int k = 0; k < 4; k++) acc += (vi_sll(x, 24 - 8 * k) >> 24) * (vi_sll(w, 24 - 8 * k) >> 24);
    return acc;
}
