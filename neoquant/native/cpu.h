/* What the sources of neoquant's native library share.
 *
 * Every entry point is a plain C function that ctypes calls with addresses of CPU tensors. Each is told which
 * instruction set to use and how many threads to run on, and keeps nothing between calls. Arithmetic that decides a
 * byte is written out one rounding at a time (the sources are compiled with -ffp-contract=off).
 */
#ifndef NEOQUANT_CPU_H
#define NEOQUANT_CPU_H

#include <math.h>
#include <stdint.h>
#include <string.h>

#if defined(__x86_64__)
#define NQ_X86 1
#include <immintrin.h>
#define NQ_AVX2 __attribute__((target("avx2,fma,f16c")))
#define NQ_AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c")))
#endif

/* What came with AVX-VNNI and AMX is written in assembly, which older assemblers do not know: setup.py compiles once more
 * with NQ_OLD_ASSEMBLER then. The system must be asked for AMX's tiles. */
#if defined(NQ_X86) && !defined(NQ_OLD_ASSEMBLER) && ((defined(__clang__) && __clang_major__ >= 13) || (!defined(__clang__) && __GNUC__ >= 11))
#define NQ_AVXVNNI 1
#ifdef __linux__
#define NQ_TILES 1
#endif
#endif

#if defined(__aarch64__)
#define NQ_ARM 1
#include <arm_neon.h>
#endif

#define NQ_INLINE static inline __attribute__((always_inline))
#define NQ_EXPORT __attribute__((visibility("default")))

/* In rising order, so that code for one runs on all behind it, but that AVX-512 may come without AVX-VNNI; NEON machines
 * run the first and the last. */
enum nq_isa {
    NQ_ISA_PORTABLE = 0,
    NQ_ISA_AVX2 = 1,
    NQ_ISA_AVXVNNI = 2,
    NQ_ISA_AVX512 = 3,
    NQ_ISA_AVX512VNNI = 4,
    NQ_ISA_AMX = 5,
    NQ_ISA_NEON = 6,
};
enum nq_dtype { NQ_FLOAT32 = 0, NQ_FLOAT16 = 1, NQ_BFLOAT16 = 2 };

/* Calls run(job, begin, end) on pieces of [0, n), each a multiple of `grain` long but the last, on at most `threads`
 * threads: as many as are worth it, where all of it takes one thread about so many nanoseconds. */
typedef void (*nq_range)(void *job, int64_t begin, int64_t end);
void nq_parallel(int threads, int64_t n, int64_t grain, int64_t nanoseconds, nq_range run, void *job);

/* Wakes threads for many short loops that follow, which take about so many nanoseconds in all, the longest of them
 * `longest`: none is worth waking anybody for, but all together may be. */
void nq_rouse(int threads, int64_t nanoseconds, int64_t longest);

/* Calls run(job) on this thread and on at most threads - 1 helpers, which may come late or not at all. With flags: only on
 * those that are awake or about to be; only where none has held up its caller of late, the job being short beside what
 * that costs. */
enum { NQ_AWAKE_ONLY = 1, NQ_SHORT = 2, NQ_MOST_THREADS = 256 };
void nq_pool(void (*run)(void *), void *job, unsigned threads, unsigned flags);

/* Memory of this thread for as long as it lives, aligned to 64 bytes; the next call with the same name may reuse it.
 * 0 where there is none: then the entry point gives NQ_NO_MEMORY, and what it has written means nothing. */
enum nq_scratch_name { NQ_SHARED = 0, NQ_OWN = 1, NQ_STEP = 2, NQ_BETWEEN = 3, NQ_SCRATCHES = 4 };
void *nq_scratch(enum nq_scratch_name name, size_t bytes);
enum { NQ_NO_MEMORY = -1 };

NQ_INLINE uint32_t nq_bits(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    return bits;
}

NQ_INLINE float nq_from_bits(uint32_t bits) {
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

NQ_INLINE int64_t nq_min(int64_t a, int64_t b) { return a < b ? a : b; }

#endif
