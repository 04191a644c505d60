/* The products for AVX-512 with VNNI, and for AMX besides, whose tiles multiply many rows; the rest is the same. */
#include "cpu.h"

#ifdef NQ_X86
#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c")
#endif

#define NQ_VNNI 1
#include "weight.h"
#include "simd_avx512.h"
#include "products.inc.h"

#ifdef __clang__
#pragma clang attribute pop
#endif
#endif
