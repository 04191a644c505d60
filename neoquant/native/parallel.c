/* A parallel for, and memory for each thread.
 *
 * The pieces run on the team in pool.c, or on the one that the loader hands over: GOMP_parallel (libgomp's stable entry
 * point, which other runtimes provide as well) of the OpenMP runtime that torch uses.
 */
#include "cpu.h"

#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>
#ifdef NQ_AVXVNNI
#include <cpuid.h>
#endif
#ifdef NQ_TILES
#include <sys/syscall.h>
#include <unistd.h>
#endif

/* In nanoseconds. A piece is short, so that a thread that is put aside with one holds the others up little; a thread is
 * asked for where it has more to do than it takes to hand it over, and woken where it takes less to wake. */
#ifndef NQ_WORTH_A_THREAD
#define NQ_WORTH_A_THREAD 10000
#define NQ_WORTH_WAKING 150000
#define NQ_LONG 1000000 /* beside the milliseconds for which a scheduler puts a thread aside */
#endif
enum { LONGEST_PIECE = 50000, PIECES_A_THREAD = 4 };

typedef void (*team_function)(void (*)(void *), void *, unsigned, unsigned);
static team_function team = nq_pool;

struct loop {
    nq_range run;
    void *job;
    int64_t n, piece;
    atomic_llong next;
};

/* Threads take the next piece until none is left: one that another program holds up does not hold up the others. */
static void work(void *argument) {
    struct loop *loop = argument;
    for (;;) {
        int64_t begin = atomic_fetch_add(&loop->next, 1) * loop->piece;
        if (begin >= loop->n) return;
        loop->run(loop->job, begin, nq_min(begin + loop->piece, loop->n));
    }
}

static int64_t worth(int threads, int64_t nanoseconds) {
    return nq_min(nq_min(threads, NQ_MOST_THREADS), nanoseconds / NQ_WORTH_A_THREAD);
}

static void nothing(void *job) { (void)job; }

void nq_rouse(int threads, int64_t nanoseconds, int64_t longest) {
    const int64_t team_size = worth(threads, longest);
    if (team == nq_pool && team_size > 1 && nanoseconds >= NQ_WORTH_WAKING)
        nq_pool(nothing, 0, (unsigned)team_size, nanoseconds < NQ_LONG ? NQ_SHORT : 0);
}

void nq_parallel(int threads, int64_t n, int64_t grain, int64_t nanoseconds, nq_range run, void *job) {
    const int64_t grains = (n + grain - 1) / grain, team_size = nq_min(grains, worth(threads, nanoseconds));
    if (team_size < 2) {
        if (n > 0) run(job, 0, n);
        return;
    }
    const int64_t fewest = team_size * PIECES_A_THREAD, short_ones = nanoseconds / LONGEST_PIECE;
    const int64_t pieces = short_ones > fewest ? short_ones : fewest;
    struct loop loop = {run, job, n, (grains + pieces - 1) / pieces * grain, 0};
    const int flags = (nanoseconds < NQ_WORTH_WAKING ? NQ_AWAKE_ONLY : 0) | (nanoseconds < NQ_LONG ? NQ_SHORT : 0);
    team(work, &loop, (unsigned)team_size, team == nq_pool ? (unsigned)flags : 0);
}

struct scratch {
    void *memory;
    size_t bytes;
};
static pthread_once_t scratch_once = PTHREAD_ONCE_INIT;
static pthread_key_t scratch_key;
static int scratch_key_made;

static void free_scratch(void *argument) {
    struct scratch *all = argument;
    for (int name = 0; name < NQ_SCRATCHES; name++) free(all[name].memory);
    free(all);
}

static void make_scratch_key(void) {
    scratch_key_made = !pthread_key_create(&scratch_key, free_scratch);
}

void *nq_scratch(enum nq_scratch_name name, size_t bytes) {
    pthread_once(&scratch_once, make_scratch_key);
    if (!scratch_key_made) return 0;
    struct scratch *all = pthread_getspecific(scratch_key);
    if (!all) {
        all = calloc(NQ_SCRATCHES, sizeof *all);
        if (!all) return 0;
        if (pthread_setspecific(scratch_key, all)) {
            free(all);
            return 0;
        }
    }
    struct scratch *one = &all[name];
    if (one->bytes < bytes || !one->memory) {
        free(one->memory);
        one->bytes = bytes ? (bytes + 4095) & ~(size_t)4095 : 4096;
        one->memory = aligned_alloc(64, one->bytes);
        if (!one->memory) one->bytes = 0;
    }
    return one->memory;
}

/* Of the signatures of every exported function: the loader refuses a library whose number is not its own. */
NQ_EXPORT int nq_version(void) { return 18; }

/* The address of another's GOMP_parallel, or 0 for the team in pool.c. */
NQ_EXPORT void nq_use_team(void *gomp_parallel) { team = gomp_parallel ? (team_function)gomp_parallel : nq_pool; }

NQ_EXPORT int nq_shuffles_are_fast;
#ifdef NQ_X86
__attribute__((constructor)) static void look_at_processor(void) {
    __builtin_cpu_init();
    nq_shuffles_are_fast = __builtin_cpu_is("amd") || __builtin_cpu_supports("gfni");
}
#endif

#ifdef NQ_X86
static int has_avxvnni(void) {
#ifdef NQ_AVXVNNI
    unsigned a, b, c, d;
    return __get_cpuid_count(7, 1, &a, &b, &c, &d) && a >> 4 & 1;
#else
    return 0;
#endif
}

/* Whether there are tiles of bytes and of bfloat16, and the system lets this process use them: it must be asked once. It
 * refuses where a signal's stack is too small for their contents. */
static int has_tiles(void) {
#ifdef NQ_TILES
    enum { BFLOAT16 = 1 << 22, TILES = 1 << 24, BYTES = 1 << 25, ALL = BFLOAT16 | TILES | BYTES };
    enum { REQUEST_PERMISSION = 0x1023, TILE_DATA = 18 }; /* ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA */
    unsigned a, b, c, d;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & ALL) != ALL) return 0;
    return !syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA);
#else
    return 0;
#endif
}
#endif

/* Whether this machine runs an instruction set. */
NQ_EXPORT int nq_runs(int isa) {
    if (isa == NQ_ISA_PORTABLE) return 1;
#ifdef NQ_X86
    __builtin_cpu_init(); /* every CPU with AVX2 and FMA has F16C, which compilers have no portable name for */
    int avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    int avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                 __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
    if (isa == NQ_ISA_AVX2) return avx2;
    if (isa == NQ_ISA_AVXVNNI) return avx2 && has_avxvnni();
    if (isa == NQ_ISA_AVX512) return avx512;
    const int vnni = avx512 && __builtin_cpu_supports("avx512vnni");
    if (isa == NQ_ISA_AVX512VNNI) return vnni;
    if (isa == NQ_ISA_AMX) return vnni && has_tiles();
#endif
#ifdef NQ_ARM
    if (isa == NQ_ISA_NEON) return 1; /* every aarch64 has it */
#endif
    return 0;
}
