/* The products for NEON. */
#include "cpu.h"

#ifdef NQ_ARM
#include "weight.h"
#include "simd_neon.h"
#include "products.inc.h"
#endif
