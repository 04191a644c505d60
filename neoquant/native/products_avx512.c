/* The products for AVX-512 without VNNI. */
#include "cpu.h"

#ifdef NQ_X86
#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c")
#endif

#include "weight.h"
#include "simd_avx512.h"
#include "products.inc.h"

#ifdef __clang__
#pragma clang attribute pop
#endif
#endif
