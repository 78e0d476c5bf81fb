/* A team of threads that run one job after the other, none of which waits for a thread that does not run. */
#define _GNU_SOURCE
#include "cpu.h"
#include <pthread.h>
#include <sched.h>
#include <setjmp.h>
#include <stdlib.h>
#include <time.h>
#ifdef __linux__
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif
#if defined(__x86_64__)
#define PAUSE() _mm_pause()
#else
#define PAUSE() ((void)0)
#endif

typedef struct {
    _Alignas(64) _Atomic uint64_t next; /* phase in the upper half, and how many of its units are taken */
} Share;

struct Team {
    int threads, spins;
    pthread_t *others;
    Job job;
    const void *argument;
    char *memory; /* for a call's intermediate results */
    size_t bytes;
    Share *shares;                      /* of each thread */
    atomic_int active;                  /* threads that take part: fewer while other processes need the cores */
    int64_t waited, spent, patience, changed; /* nanoseconds, see judge() */
    uint32_t first;                     /* phase of the present call */
    _Alignas(64) atomic_uint calls;     /* so far; the others sleep on it */
    _Alignas(64) atomic_uint open;      /* number of the call that may be entered, 0: none */
    _Alignas(64) atomic_int inside;     /* others that are in the call */
    _Alignas(64) atomic_int done;       /* units of the phase */
    _Alignas(64) atomic_uint turn;      /* phase */
    atomic_int sleepers;
    atomic_int over; /* the team is to end */
};

struct Me {
    Team *team;
    int number; /* 0: the caller */
    uint32_t phase;
    int empty, finished; /* in this phase: shares found empty, and units that are done but not counted yet */
    int unit, stop;      /* those that it has claimed and not begun */
    unsigned call, seen; /* it is in, and it last woke up for */
    jmp_buf out;
};

static int64_t now(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec * INT64_C(1000000000) + time.tv_nsec;
}

static void sleep_on(Team *team, atomic_uint *word, unsigned old) {
    atomic_fetch_add(&team->sleepers, 1);
#ifdef __linux__
    if (atomic_load(word) == old) syscall(SYS_futex, word, FUTEX_WAIT_PRIVATE, old, NULL, NULL, 0);
#else
    if (atomic_load(word) == old) sched_yield();
#endif
    atomic_fetch_sub(&team->sleepers, 1);
}

static void change(Team *team, atomic_uint *word, unsigned value) {
    atomic_store(word, value);
#ifdef __linux__
    if (atomic_load(&team->sleepers)) syscall(SYS_futex, word, FUTEX_WAKE_PRIVATE, INT32_MAX, NULL, NULL, 0);
#endif
}

/* Count what this thread has done; the phase ends with its last unit. */
static void finish(Me *me, int count) {
    Team *team = me->team;
    int finished = me->finished;
    me->empty = me->finished = 0;
    if (!finished || atomic_fetch_add(&team->done, finished) + finished < count) return;
    atomic_store(&team->done, 0);
    for (int i = 0; i < team->threads; i++) atomic_store(&team->shares[i].next, (uint64_t)(me->phase + 1) << 32);
    change(team, &team->turn, me->phase + 1);
}

/* Claims are dear, as they wait for all that the thread has stored: half of what is left goes with one. */
int claim(Me *me, int count) {
    Team *team = me->team;
    if (me->unit < me->stop) return me->unit++;
    for (; me->empty < team->threads; me->empty++) {
        int64_t owner = (me->number + me->empty) % team->threads;
        uint32_t first = count * owner / team->threads, share = count * (owner + 1) / team->threads - first;
        _Atomic uint64_t *at = &team->shares[owner].next;
        uint64_t next = atomic_load(at);
        while ((uint32_t)(next >> 32) == me->phase && (uint32_t)next < share) {
            uint32_t some = (share - (uint32_t)next + 1) / 2;
            if (atomic_compare_exchange_weak(at, &next, next + some)) {
                me->finished += some; /* by the time of the next claim */
                me->unit = first + (uint32_t)next;
                me->stop = me->unit + some;
                return me->unit++;
            }
        }
    }
    finish(me, count);
    return -1;
}

static int enter(Me *me) {
    Team *team = me->team;
    atomic_fetch_add(&team->inside, 1);
    unsigned open = atomic_load(&team->open);
    if (open && (!me->call || open == me->call)) {
        me->call = open;
        return 1;
    }
    atomic_fetch_sub(&team->inside, 1);
    return 0;
}

/* Asleep, one of the others is not in the call: it may end meanwhile. */
void together(Me *me) {
    Team *team = me->team;
    int64_t begin = 0;
    for (int i = 0; atomic_load(&team->turn) == me->phase; i++) {
        if (i == 100 && !me->number && !begin) begin = now(); /* most waits are shorter */
        PAUSE();
        if (i < team->spins) continue;
        if (me->number) atomic_fetch_sub(&team->inside, 1);
        sleep_on(team, &team->turn, me->phase);
        if (me->number && !enter(me)) longjmp(me->out, 1);
        i = 0;
    }
    if (begin) team->waited += now() - begin;
    me->phase++;
}

static void *member(void *given) {
    Me me = *(Me *)given;
    Team *team = me.team;
    free(given);
    for (;;) {
        for (int i = 0; atomic_load(&team->calls) == me.seen; i++) {
            PAUSE();
            if (i >= team->spins) sleep_on(team, &team->calls, me.seen);
        }
        if (atomic_load(&team->over)) return NULL;
        me.seen = atomic_load(&team->calls);
        me.call = 0;
        if (me.number >= atomic_load(&team->active) || !enter(&me)) continue;
        me.phase = team->first;
        if (!setjmp(me.out)) {
            team->job(&me, team->argument);
            atomic_fetch_sub(&team->inside, 1);
        }
    }
}

int me_number(const Me *me) { return me->number; }
char *memory_of(const Me *me) { return me->team->memory; }

enum { WINDOW = 20000000, SHORTEST = 250000000, LONGEST = 2000000000 }; /* nanoseconds */

/* Where other processes need the cores, the caller waits at most phases for a thread that has none. Then half of them sleep,
 * and are tried again, later and later while that does not help. */
static void judge(Team *team, int64_t begin, int64_t end) {
    int active = team->active;
    team->spent += end - begin;
    if (active < team->threads && end - team->changed > team->patience) {
        team->active = active * 2 < team->threads ? active * 2 : team->threads;
    } else if (team->spent > WINDOW && active > 1 && team->waited * 5 > team->spent * 2) {
        int again = team->patience && end - team->changed < 4 * (int64_t)SHORTEST;
        team->patience = again ? team->patience * 2 : SHORTEST;
        if (team->patience > LONGEST) team->patience = LONGEST;
        team->active = (active + 1) / 2;
    } else if (team->spent <= WINDOW) {
        return;
    }
    if (team->active != active) team->changed = end;
    team->waited = team->spent = 0;
}

void run(Team *team, Job job, const void *argument) {
    int64_t begin = now();
    Me me = {.team = team, .phase = atomic_load(&team->turn)};
    unsigned call = atomic_load(&team->calls) + 1;
    if (!call) call = 1;
    team->job = job;
    team->argument = argument;
    team->first = me.phase;
    if (team->active > 1) {
        atomic_store(&team->open, call);
        change(team, &team->calls, call);
    }
    job(&me, argument);
    atomic_store(&team->open, 0);
    for (int i = 0; atomic_load(&team->inside); i++)
        if (i < team->spins)
            PAUSE();
        else
            sched_yield();
    if (team->threads > 1) judge(team, begin, now());
}

void team_free(Team *team) {
    atomic_store(&team->over, 1);
    change(team, &team->calls, atomic_load(&team->calls) + 1);
    for (int i = 0; i + 1 < team->threads; i++) pthread_join(team->others[i], NULL);
    free(team->others);
    free(team->shares);
    free(team->memory);
    free(team);
}

/* NULL where there is no memory, or no thread more. */
Team *team_new(int threads, int spins) {
    Team *team = aligned_alloc(64, (sizeof(Team) + 63) / 64 * 64);
    if (!team) return NULL;
    memset(team, 0, sizeof(Team));
    team->spins = spins;
    team->threads = 1;
    team->others = calloc(threads, sizeof(pthread_t));
    team->shares = aligned_alloc(64, threads * sizeof(Share));
    if (team->shares) memset(team->shares, 0, threads * sizeof(Share));
    for (int i = 1; team->others && team->shares && i < threads; i++) {
        Me *given = calloc(1, sizeof(Me));
        if (given) given->team = team, given->number = i;
        if (!given || pthread_create(&team->others[i - 1], NULL, member, given)) {
            free(given);
            break;
        }
        team->threads++;
    }
    if (team->threads < threads || !team->others || !team->shares) {
        team_free(team);
        return NULL;
    }
    team->active = threads;
    return team;
}

int team_threads(const Team *team) { return team->threads; }

char *take(Team *team, size_t bytes) {
    if (team->bytes < bytes) {
        bytes = (bytes + bytes / 2 + 63) / 64 * 64; /* contexts grow by a token a step */
        free(team->memory);
        team->memory = aligned_alloc(64, bytes);
        team->bytes = team->memory ? bytes : 0;
    }
    return team->memory;
}
