/* The products for any machine. */
#include "cpu.h"
#include "weight.h"
#include "simd_portable.h"
#include "products.inc.h"
