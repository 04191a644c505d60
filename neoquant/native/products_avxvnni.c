/* The products for AVX2 with AVX-VNNI: those of rounded activations, whose bytes one instruction multiplies; the rest is
 * that for AVX2. */
#include "cpu.h"

#ifdef NQ_AVXVNNI
#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
#endif

#define NQ_VNNI 1
#define ROUNDED_ONLY 1
#include "weight.h"
#include "simd_avx2.h"
#include "products.inc.h"

#ifdef __clang__
#pragma clang attribute pop
#endif
#endif
