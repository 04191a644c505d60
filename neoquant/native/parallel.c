/* A parallel for.
 *
 * torch's OpenMP threads stay awake for a while after each of its operations; a second pool beside them would fight
 * for the same cores. So where torch runs on OpenMP, the loader hands over GOMP_parallel of torch's own runtime
 * (libgomp's stable entry point, which other runtimes provide as well), and the pieces run on torch's threads.
 * Without it, threads are started for the call, which pays for long calls only.
 */
#include "cpu.h"

#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>

enum { MOST_THREADS = 256, PIECES_A_THREAD = 4 };

typedef void (*team_function)(void (*)(void *), void *, unsigned, unsigned);
static team_function team;

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

static void *work_in_thread(void *argument) {
    work(argument);
    return 0;
}

static void run_on_own_threads(int threads, struct loop *loop) {
    pthread_t started[MOST_THREADS];
    int count = 0;
    while (count < threads - 1 && !pthread_create(&started[count], 0, work_in_thread, loop)) count++;
    work(loop);
    while (count > 0) pthread_join(started[--count], 0);
}

void nq_parallel(int threads, int64_t n, int64_t grain, nq_range run, void *job) {
    if (threads > MOST_THREADS) threads = MOST_THREADS;
    if (n <= grain || threads < 2) {
        if (n > 0) run(job, 0, n);
        return;
    }
    int64_t pieces = nq_min((int64_t)threads * PIECES_A_THREAD, (n + grain - 1) / grain);
    int64_t piece = (n + pieces - 1) / pieces;
    struct loop loop = {run, job, n, (piece + grain - 1) / grain * grain, 0};
    if (team)
        team(work, &loop, (unsigned)threads, 0);
    else
        run_on_own_threads(threads, &loop);
}

struct scratch {
    void *memory;
    size_t bytes;
};
static pthread_once_t scratch_once = PTHREAD_ONCE_INIT;
static pthread_key_t scratch_key;

static void free_scratch(void *argument) {
    struct scratch *all = argument;
    for (int name = 0; name < NQ_SCRATCHES; name++) free(all[name].memory);
    free(all);
}

static void make_scratch_key(void) {
    if (pthread_key_create(&scratch_key, free_scratch)) abort();
}

void *nq_scratch(enum nq_scratch_name name, size_t bytes) {
    pthread_once(&scratch_once, make_scratch_key);
    struct scratch *all = pthread_getspecific(scratch_key);
    if (!all) {
        all = calloc(NQ_SCRATCHES, sizeof *all);
        if (!all || pthread_setspecific(scratch_key, all)) abort();
    }
    struct scratch *one = &all[name];
    if (one->bytes < bytes) {
        free(one->memory);
        one->bytes = (bytes + 4095) & ~(size_t)4095;
        one->memory = aligned_alloc(64, one->bytes);
        if (!one->memory) abort();
    }
    return one->memory;
}

/* Of the signatures of every exported function: the loader refuses a library whose number is not its own. */
NQ_EXPORT int nq_version(void) { return 9; }

/* The address of torch's GOMP_parallel, or 0 for threads of our own. */
NQ_EXPORT void nq_use_team(void *gomp_parallel) { team = (team_function)gomp_parallel; }

/* Whether this machine runs an instruction set. */
NQ_EXPORT int nq_runs(int isa) {
    if (isa == NQ_ISA_PORTABLE) return 1;
#ifdef NQ_X86
    __builtin_cpu_init(); /* every CPU with AVX2 and FMA has F16C, which compilers have no portable name for */
    int avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    int avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                 __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
    if (isa == NQ_ISA_AVX2) return avx2;
    if (isa == NQ_ISA_AVX512) return avx512;
    if (isa == NQ_ISA_AVX512VNNI) return avx512 && __builtin_cpu_supports("avx512vnni");
#endif
#ifdef NQ_ARM
    if (isa == NQ_ISA_NEON) return 1; /* every aarch64 has it */
#endif
    return 0;
}
