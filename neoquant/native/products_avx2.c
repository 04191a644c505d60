/* The products for AVX2. */
#include "cpu.h"

#ifdef NQ_X86
#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
#endif

#include "weight.h"
#include "simd_avx2.h"
#include "products.inc.h"

#ifdef __clang__
#pragma clang attribute pop
#endif
#endif
