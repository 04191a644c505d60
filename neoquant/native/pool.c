/* A team of threads that waits politely: GOMP_parallel's signature, for a machine that others use as well.
 *
 * Who calls posts a job, works on it, closes it, and waits only for helpers that entered it: one that the scheduler has
 * put aside, or that is still asleep, holds nobody up. Whoever waits looks again and again for SPIN_NS, and then sleeps,
 * so that an idle team leaves the cores to others. A caller that finds the team at work for another runs alone.
 */
#include "cpu.h"

#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <time.h>

#if defined(__linux__) && !defined(NQ_NO_FUTEX)
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>
#define NQ_FUTEX 1
#endif

enum {
    SPIN_NS = 50000,      /* how long to look before sleeping */
    LOOKS = 16,           /* between two at the clock */
    HELD_UP_NS = 2000000, /* that a caller sleeps for a helper: longer than a piece takes, so it was put aside */
    ALONE_NS = 20000000,  /* for how long short jobs are not shared then */
    MOST_HELPERS = NQ_MOST_THREADS - 1,
};

/* Helpers inside the job are counted in the lowest bits of `state`, those that may still enter above them. */
#define INSIDE 0x0fffu
#define CALLER_SLEEPS 0x1000u
#define PLACE 0x10000u

static struct {
    atomic_uint state, posted; /* `posted` counts jobs */
    atomic_int awake;          /* helpers that are not asleep */
    atomic_int taken;          /* whether a caller has the team */
    int helpers, most;         /* that there are, and can be; only whoever has the team looks at them */
    atomic_llong alone_until;
    void (*run)(void *);
    void *job;
} team = {.most = MOST_HELPERS};

/* Sleeping while a word has a value ------------------------------------------------------------------------------------ */

#ifdef NQ_FUTEX
static void sleep_while(atomic_uint *word, unsigned value) { syscall(SYS_futex, word, FUTEX_WAIT_PRIVATE, value, 0, 0, 0); }
static void wake(atomic_uint *word, unsigned count) { syscall(SYS_futex, word, FUTEX_WAKE_PRIVATE, count, 0, 0, 0); }
#else
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t changed = PTHREAD_COND_INITIALIZER;

static void sleep_while(atomic_uint *word, unsigned value) {
    pthread_mutex_lock(&lock);
    if (atomic_load(word) == value) pthread_cond_wait(&changed, &lock);
    pthread_mutex_unlock(&lock);
}

static void wake(atomic_uint *word, unsigned count) {
    (void)word, (void)count;
    pthread_mutex_lock(&lock);
    pthread_cond_broadcast(&changed);
    pthread_mutex_unlock(&lock);
}
#endif

static int64_t now(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (int64_t)time.tv_sec * 1000000000 + time.tv_nsec;
}

static void pause_briefly(void) {
#if defined(NQ_X86)
    _mm_pause();
#elif defined(NQ_ARM)
    __asm__ volatile("yield");
#endif
}

/* Whether the word lost a value (of the bits in `mask`) while it was looked at. */
static int loses(atomic_uint *word, unsigned mask, unsigned value) {
    for (const int64_t end = now() + SPIN_NS; now() < end;)
        for (int look = 0; look < LOOKS; look++) {
            if ((atomic_load_explicit(word, memory_order_acquire) & mask) != value) return 1;
            pause_briefly();
        }
    return 0;
}

/* Helpers -------------------------------------------------------------------------------------------------------------- */

static int enter(void) {
    unsigned state = atomic_load(&team.state);
    while (state >= PLACE)
        if (atomic_compare_exchange_weak(&team.state, &state, state - PLACE + 1)) return 1;
    return 0;
}

static void leave(void) {
    if (atomic_fetch_sub(&team.state, 1) == (CALLER_SLEEPS | 1)) wake(&team.state, 1);
}

static void *help(void *argument) {
    unsigned seen = (unsigned)(uintptr_t)argument; /* jobs before it was started for one */
    for (;;) {
        if (!loses(&team.posted, ~0u, seen)) {
            atomic_fetch_sub(&team.awake, 1);
            while (atomic_load(&team.posted) == seen) sleep_while(&team.posted, seen);
            atomic_fetch_add(&team.awake, 1);
        }
        seen = atomic_load(&team.posted);
        if (!enter()) continue;
        team.run(team.job);
        leave();
    }
    return 0;
}

/* As many as are wanted, or as the system gives. Signals are for the program's own threads. */
static void start_helpers(int wanted) {
    if (team.helpers >= nq_min(wanted, team.most)) return;
    sigset_t all, before;
    pthread_attr_t detached;
    pthread_attr_init(&detached);
    pthread_attr_setdetachstate(&detached, PTHREAD_CREATE_DETACHED);
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    while (team.helpers < nq_min(wanted, team.most)) {
        pthread_t thread;
        void *seen = (void *)(uintptr_t)atomic_load(&team.posted);
        atomic_fetch_add(&team.awake, 1);
        if (!pthread_create(&thread, &detached, help, seen)) {
            team.helpers++;
            continue;
        }
        atomic_fetch_sub(&team.awake, 1);
        team.most = team.helpers;
    }
    pthread_sigmask(SIG_SETMASK, &before, 0);
    pthread_attr_destroy(&detached);
}

/* Callers -------------------------------------------------------------------------------------------------------------- */

/* A child has none of the threads, and whoever had the team may not be in it. */
static void forget_helpers(void) {
    atomic_store(&team.state, 0);
    atomic_store(&team.awake, 0);
    atomic_store(&team.taken, 0);
    team.helpers = 0;
    team.most = MOST_HELPERS;
#ifndef NQ_FUTEX
    lock = (pthread_mutex_t)PTHREAD_MUTEX_INITIALIZER;
    changed = (pthread_cond_t)PTHREAD_COND_INITIALIZER;
#endif
}

static void watch_forks(void) {
#ifndef _WIN32
    pthread_atfork(0, 0, forget_helpers);
#endif
}

static void wait_for_those_inside(void) {
    unsigned state = atomic_fetch_and(&team.state, INSIDE) & INSIDE; /* nobody enters any more */
    while (state) {
        if (!loses(&team.state, INSIDE, state) && atomic_compare_exchange_strong(&team.state, &state, state | CALLER_SLEEPS)) {
            const int64_t begun = now();
            sleep_while(&team.state, state | CALLER_SLEEPS);
            if (now() - begun > HELD_UP_NS) atomic_store(&team.alone_until, now() + ALONE_NS); /* others want the cores */
            atomic_fetch_and(&team.state, INSIDE);
        }
        state = atomic_load(&team.state) & INSIDE;
    }
}

void nq_pool(void (*run)(void *), void *job, unsigned threads, unsigned flags) {
    static pthread_once_t once = PTHREAD_ONCE_INIT;
    pthread_once(&once, watch_forks);
    const int wanted = (int)threads - 1, wakes = !(flags & NQ_AWAKE_ONLY);
    const int held_up = flags & NQ_SHORT && now() < atomic_load(&team.alone_until);
    if (wanted < 1 || held_up || atomic_exchange(&team.taken, 1)) {
        run(job);
        return;
    }
    if (wakes) start_helpers(wanted);
    team.run = run;
    team.job = job;
    atomic_store(&team.state, (unsigned)nq_min(wanted, MOST_HELPERS) * PLACE);
    atomic_fetch_add(&team.posted, 1);
    if (wakes && atomic_load(&team.awake) < team.helpers) wake(&team.posted, (unsigned)wanted);
    run(job);
    wait_for_those_inside();
    atomic_store(&team.taken, 0);
}
