/* A decoder's step on a CPU: all layers in one call, by a team of threads, with the same bits for a row whatever else is
 * in the call.
 *
 * Products multiply weights of 8 bits, a scale per output row, with activations of up to 16 bits, a scale per row; their
 * sums are integers of 32 bits that cannot overflow, so their order does not matter. Everything else (norms, rotation,
 * attention) is done row by row in fp32, in an order that depends on that row's own keys alone; the compiler is told to
 * fuse nothing (-ffp-contract=off). calls.py has the same structures and says what they mean.
 */
#define _GNU_SOURCE
#include <float.h>
#include <math.h>
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#ifdef __linux__
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif
#if defined(__x86_64__)
#include <immintrin.h>
#define PAUSE() _mm_pause()
#else
#define PAUSE() ((void)0)
#endif

enum { LANES = 16, TILE = 32, KEYS = 64 };
typedef float v16 __attribute__((vector_size(64), aligned(4)));
typedef int32_t i16 __attribute__((vector_size(64), aligned(4)));
typedef int16_t h16 __attribute__((vector_size(32), aligned(2)));
#define INLINE static inline __attribute__((always_inline))

/* ---- a team of threads ---------------------------------------------------------------------------------------------- */

typedef struct Team Team;
typedef void (*Job)(Team *, int, const void *);

struct Team {
    int threads, spins;
    pthread_t *others;
    Job job;
    const void *argument;
    char *memory; /* for a call's intermediate results */
    size_t bytes;
    _Alignas(64) atomic_int started; /* calls so far */
    _Alignas(64) atomic_int turn;    /* phases so far */
    _Alignas(64) atomic_int arrived, sleepers;
    _Alignas(64) atomic_int next; /* unit of this phase that nobody has taken */
};

typedef struct {
    Team *team;
    int number;
} Member;

/* Wait until *word is no longer `old`: at first in a loop, then asleep, since the thread that is waited for may need this
 * very core. */
static void wait_for(Team *team, atomic_int *word, int old) {
    for (int i = 0; i < team->spins; i++) {
        if (atomic_load_explicit(word, memory_order_acquire) != old) return;
        PAUSE();
    }
    atomic_fetch_add(&team->sleepers, 1);
    while (atomic_load(word) == old) {
#ifdef __linux__
        syscall(SYS_futex, word, FUTEX_WAIT_PRIVATE, old, NULL, NULL, 0);
#else
        sched_yield();
#endif
    }
    atomic_fetch_sub(&team->sleepers, 1);
}

static void change(Team *team, atomic_int *word, int value) {
    atomic_store(word, value);
#ifdef __linux__
    if (atomic_load(&team->sleepers)) syscall(SYS_futex, word, FUTEX_WAKE_PRIVATE, INT32_MAX, NULL, NULL, 0);
#endif
}

/* The end of a phase: nobody goes on before all are here. */
static void together(Team *team) {
    int turn = atomic_load(&team->turn);
    if (atomic_fetch_add(&team->arrived, 1) + 1 == team->threads) {
        atomic_store(&team->arrived, 0);
        atomic_store(&team->next, 0);
        change(team, &team->turn, turn + 1);
    } else {
        wait_for(team, &team->turn, turn);
    }
}

/* for every unit of a phase that this thread can get */
#define EACH(unit, count) \
    for (int unit; (unit = atomic_fetch_add_explicit(&team->next, 1, memory_order_relaxed)) < (count);)

static void *member(void *given) {
    Member me = *(Member *)given;
    Team *team = me.team;
    free(given);
    for (int call = 0;; call++) {
        wait_for(team, &team->started, call);
        if (!team->job) return NULL;
        team->job(team, me.number, team->argument);
    }
}

static void run(Team *team, Job job, const void *argument) {
    team->job = job;
    team->argument = argument;
    if (team->threads > 1) change(team, &team->started, atomic_load(&team->started) + 1);
    if (job) job(team, 0, argument);
}

void team_free(Team *team) {
    run(team, NULL, NULL);
    for (int i = 0; i + 1 < team->threads; i++) pthread_join(team->others[i], NULL);
    free(team->others);
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
    for (int i = 1; team->others && i < threads; i++) {
        Member *given = malloc(sizeof(Member));
        if (given) *given = (Member){team, i};
        if (!given || pthread_create(&team->others[i - 1], NULL, member, given)) {
            free(given);
            break;
        }
        team->threads++;
    }
    if (team->threads < threads || !team->others) {
        team_free(team);
        return NULL;
    }
    return team;
}

static char *take(Team *team, size_t bytes) {
    if (team->bytes < bytes) {
        bytes = (bytes + bytes / 2 + 63) / 64 * 64; /* contexts grow by a token a step */
        free(team->memory);
        team->memory = aligned_alloc(64, bytes);
        team->bytes = team->memory ? bytes : 0;
    }
    return team->memory;
}

/* ---- single rows ----------------------------------------------------------------------------------------------------- */

INLINE v16 all(float x) { return x - (v16){0}; }
INLINE v16 load(const float *p) { return *(const v16 *)p; }
INLINE void store(float *p, v16 x) { *(v16 *)p = x; }
INLINE v16 pick(i16 mask, v16 yes, v16 no) { return (v16)(((i16)yes & mask) | ((i16)no & ~mask)); }
INLINE v16 larger(v16 a, v16 b) { return pick(a > b, a, b); }

#define TURN(x, n)                                                                                                       \
    __builtin_shufflevector(x, x, (0 + n) & 15, (1 + n) & 15, (2 + n) & 15, (3 + n) & 15, (4 + n) & 15, (5 + n) & 15,      \
                            (6 + n) & 15, (7 + n) & 15, (8 + n) & 15, (9 + n) & 15, (10 + n) & 15, (11 + n) & 15,          \
                            (12 + n) & 15, (13 + n) & 15, (14 + n) & 15, (15 + n) & 15)

INLINE float sum(v16 x) {
    x += TURN(x, 8);
    x += TURN(x, 4);
    x += TURN(x, 2);
    x += TURN(x, 1);
    return x[0];
}

/* Sums of neighbours: of a's lanes, then of b's. Four times, over 16 vectors, it gives the sum of each. */
INLINE v16 pairs(v16 a, v16 b) {
    return __builtin_shufflevector(a, b, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30) +
           __builtin_shufflevector(a, b, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
}

/* a * b + c, rounded once where the processor can: in every place or in none. */
INLINE v16 fused(v16 a, v16 b, v16 c) {
#if defined(__AVX512F__)
    return (v16)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__)
    union { v16 whole; __m256 half[2]; } x = {a}, y = {b}, z = {c};
    for (int i = 0; i < 2; i++) z.half[i] = _mm256_fmadd_ps(x.half[i], y.half[i], z.half[i]);
    return z.whole;
#else
    return a * b + c;
#endif
}

INLINE float most(v16 x) {
    x = larger(x, TURN(x, 8));
    x = larger(x, TURN(x, 4));
    x = larger(x, TURN(x, 2));
    x = larger(x, TURN(x, 1));
    return x[0];
}

/* e^x for x <= 88, within 2 units in the last place (Cody and Waite's reduction, a Taylor polynomial of degree 6). */
INLINE v16 exponential(v16 x) {
    const float magic = 12582912.0f; /* 1.5 * 2^23: adding it rounds to an integer */
    v16 low = larger(x, all(-87.0f));
    v16 n = (low * 1.44269504f + magic) - magic;
    v16 r = (low - n * 0.693359375f) + n * 2.12194440e-4f;
    v16 y = all(1.0f / 720);
    y = fused(y, r, all(1.0f / 120));
    y = fused(y, r, all(1.0f / 24));
    y = fused(y, r, all(1.0f / 6));
    y = fused(y, r, all(0.5f));
    y = fused(y, r, all(1.0f));
    y = fused(y, r, all(1.0f));
    i16 power = (__builtin_convertvector(n, i16) + 127) << 23;
    return pick(x < -87.0f, all(0.0f), y * (v16)power);
}

INLINE v16 silu(v16 x) {
    v16 e = exponential(pick(x < 0.0f, x, -x)); /* of -|x| */
    return pick(x < 0.0f, x * e, x) / (1.0f + e);
}

/* y = x / rms(x) * weight */
static void norm(const float *x, const float *weight, int size, float eps, float *y) {
    v16 squares = all(0.0f);
    for (int i = 0; i < size; i += LANES) squares = fused(load(x + i), load(x + i), squares);
    float factor = 1.0f / sqrtf(sum(squares) / size + eps);
    for (int i = 0; i < size; i += LANES) store(y + i, load(x + i) * factor * load(weight + i));
}

/* y = x in 16 bits or as many as a sum of `size` products with weights of 8 bits has room for. Returns its scale. */
static float narrow(const float *x, int size, int16_t *y) {
    v16 largest = all(0.0f);
    for (int i = 0; i < size; i += LANES) {
        v16 part = load(x + i);
        largest = larger(largest, pick(part < 0.0f, -part, part));
    }
    float peak = most(largest), limit = fminf(32767.0f, (float)(INT32_MAX / (127 * size)));
    if (!(peak > 0.0f)) {
        memset(y, 0, size * sizeof(int16_t));
        return 0.0f;
    }
    float factor = limit / peak;
    for (int i = 0; i < size; i += LANES) {
        v16 part = (load(x + i) * factor + 12582912.0f) - 12582912.0f;
        *(h16 *)(y + i) = __builtin_convertvector(__builtin_convertvector(part, i16), h16);
    }
    return peak / limit;
}

/* ---- products -------------------------------------------------------------------------------------------------------- */

typedef struct {
    const int8_t *values; /* tiles of 32 rows: pairs of columns, and of each pair 2 bytes per row */
    const float *scale, *bias;
    int32_t rows, columns;
} Matrix;

/* Rows of 16 bits with their scales, and which of them take part; NULL: all, in order. */
typedef struct {
    const int16_t *x;
    const float *scale;
    const int32_t *which;
    int count, columns;
} Rows;

/* dots_n: n rows times a tile -> out [n, TILE]. Sums of rows are variables of their own, as compilers keep those in
 * registers. */
#if defined(__AVX512BW__)
enum { GROUP = 8 };
#if defined(__AVX512VNNI__)
#define MULTIPLY_ADD(sum, w, x) sum = _mm512_dpwssd_epi32(sum, w, x)
#else
#define MULTIPLY_ADD(sum, w, x) sum = _mm512_add_epi32(sum, _mm512_madd_epi16(w, x))
#endif
#define ZERO(r)                                        \
    __m512i a##r = _mm512_setzero_si512(), b##r = a##r; \
    const int32_t *x##r = (const int32_t *)x[r];
#define ADD(r)                                     \
    both = _mm512_set1_epi32(x##r[p]);              \
    MULTIPLY_ADD(a##r, low, both);                 \
    MULTIPLY_ADD(b##r, high, both);
#define STORE(r)                                   \
    _mm512_storeu_si512(out + r * TILE, a##r);      \
    _mm512_storeu_si512(out + r * TILE + LANES, b##r);
#define PAIR                                                                            \
    __m512i both, low = _mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i *)w)),     \
                  high = _mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i *)(w + TILE)));
#elif defined(__AVX2__)
enum { GROUP = 2 };
#define BYTES(n) _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)(w + n * LANES)))
#define MULTIPLY_ADD(sum, w, x) sum = _mm256_add_epi32(sum, _mm256_madd_epi16(w, x))
#define ZERO(r)                                                                          \
    __m256i a##r = _mm256_setzero_si256(), b##r = a##r, c##r = a##r, d##r = a##r;           \
    const int32_t *x##r = (const int32_t *)x[r];
#define ADD(r)                             \
    both = _mm256_set1_epi32(x##r[p]);      \
    MULTIPLY_ADD(a##r, first, both);       \
    MULTIPLY_ADD(b##r, second, both);      \
    MULTIPLY_ADD(c##r, third, both);       \
    MULTIPLY_ADD(d##r, fourth, both);
#define PUT(r, n, sum) _mm256_storeu_si256((__m256i *)(out + r * TILE + n * 8), sum);
#define STORE(r) PUT(r, 0, a##r) PUT(r, 1, b##r) PUT(r, 2, c##r) PUT(r, 3, d##r)
#define PAIR __m256i both, first = BYTES(0), second = BYTES(1), third = BYTES(2), fourth = BYTES(3);
#else
enum { GROUP = 4 };
#define ZERO(r)                                      \
    i16 a##r = {0}, b##r = {0};                        \
    const int16_t *x##r = x[r];
#define ADD(r)                                                                              \
    for (int j = 0; j < LANES; j++) a##r[j] += w[2 * j] * x##r[2 * p] + w[2 * j + 1] * x##r[2 * p + 1]; \
    for (int j = 0; j < LANES; j++)                                                          \
        b##r[j] += w[TILE + 2 * j] * x##r[2 * p] + w[TILE + 2 * j + 1] * x##r[2 * p + 1];
#define STORE(r)                          \
    *(i16 *)(out + r * TILE) = a##r;        \
    *(i16 *)(out + r * TILE + LANES) = b##r;
#define PAIR
#endif
#define ROWS_1(DO) DO(0)
#define ROWS_2(DO) ROWS_1(DO) DO(1)
#define ROWS_3(DO) ROWS_2(DO) DO(2)
#define ROWS_4(DO) ROWS_3(DO) DO(3)
#define ROWS_5(DO) ROWS_4(DO) DO(4)
#define ROWS_6(DO) ROWS_5(DO) DO(5)
#define ROWS_7(DO) ROWS_6(DO) DO(6)
#define ROWS_8(DO) ROWS_7(DO) DO(7)
#define DOTS(n)                                                                             \
    static void dots_##n(const int8_t *w, const int16_t *const *x, int pairs, int32_t *out) { \
        ROWS_##n(ZERO)                                                                      \
        for (int p = 0; p < pairs; p++, w += 2 * TILE) {                                     \
            PAIR                                                                            \
            ROWS_##n(ADD)                                                                   \
        }                                                                                   \
        ROWS_##n(STORE)                                                                     \
    }
DOTS(1) DOTS(2) DOTS(3) DOTS(4) DOTS(5) DOTS(6) DOTS(7) DOTS(8)
typedef void (*Dots)(const int8_t *, const int16_t *const *, int, int32_t *);
static const Dots dots[] = {NULL, dots_1, dots_2, dots_3, dots_4, dots_5, dots_6, dots_7, dots_8};

/* Tile `tile` for at most GROUP of the rows, from `first` on -> y [GROUP, TILE]. */
static void tile_of(const Matrix *m, int tile, const Rows *rows, int first, int count, float *y) {
    const int16_t *x[GROUP];
    int32_t sums[GROUP * TILE];
    for (int r = 0; r < count; r++) {
        int row = rows->which ? rows->which[first + r] : first + r;
        x[r] = rows->x + (size_t)row * rows->columns;
    }
    int pairs = m->columns / 2;
    const int8_t *w = m->values + (size_t)tile * TILE * m->columns;
    dots[count](w, x, pairs, sums);
    for (int r = 0; r < count; r++) {
        int row = rows->which ? rows->which[first + r] : first + r;
        for (int j = 0; j < TILE; j += LANES) {
            v16 whole = __builtin_convertvector(*(const i16 *)(sums + r * TILE + j), v16);
            store(y + r * TILE + j, whole * (load(m->scale + tile * TILE + j) * rows->scale[row]));
        }
    }
}

static int tiles(const Matrix *m) { return (m->rows + TILE - 1) / TILE; }

/* One tile of y = x W^T + bias, or y += it. to: the rows of y; NULL: as in `rows`. stride: floats from row to row. */
static void product(const Matrix *m, int tile, const Rows *rows, const int32_t *to, float *y, size_t stride, int add) {
    float part[GROUP * TILE];
    int start = tile * TILE, width = m->rows - start < TILE ? m->rows - start : TILE;
    for (int first = 0; first < rows->count; first += GROUP) {
        int count = rows->count - first < GROUP ? rows->count - first : GROUP;
        tile_of(m, tile, rows, first, count, part);
        for (int r = 0; r < count; r++) {
            float *target = y + (size_t)(to ? to[first + r] : first + r) * stride + start, *from = part + r * TILE;
            if (m->bias)
                for (int j = 0; j < width; j++) from[j] += m->bias[start + j];
            if (add)
                for (int j = 0; j < width; j++) target[j] += from[j];
            else
                memcpy(target, from, width * sizeof(float));
        }
    }
}

/* One tile of silu(gate) * up, whose rows are one matrix, all of gate first. */
static void gated(const Matrix *m, int tile, const Rows *rows, const int32_t *to, float *y, size_t stride) {
    float gate[GROUP * TILE], up[GROUP * TILE];
    for (int first = 0; first < rows->count; first += GROUP) {
        int count = rows->count - first < GROUP ? rows->count - first : GROUP;
        tile_of(m, tile, rows, first, count, gate);
        tile_of(m, tile + tiles(m) / 2, rows, first, count, up);
        for (int r = 0; r < count; r++) {
            float *target = y + (size_t)(to ? to[first + r] : first + r) * stride + tile * TILE;
            for (int j = 0; j < TILE; j += LANES)
                store(target + j, silu(load(gate + r * TILE + j)) * load(up + r * TILE + j));
        }
    }
}

typedef struct {
    const float *weight; /* [rows, columns] */
    int8_t *values;
    float *scale;
    int32_t rows, columns;
} Packing;

static void pack(Team *team, int thread, const void *given) {
    const Packing *p = given;
    (void)thread;
    EACH(tile, (p->rows + TILE - 1) / TILE) {
        int8_t *out = p->values + (size_t)tile * TILE * p->columns;
        for (int j = 0; j < TILE; j++) {
            int row = tile * TILE + j;
            const float *w = p->weight + (size_t)row * p->columns;
            float peak = 0.0f;
            for (int i = 0; row < p->rows && i < p->columns; i++) peak = fmaxf(peak, fabsf(w[i]));
            p->scale[row] = peak / 127.0f;
            float factor = peak > 0.0f ? 127.0f / peak : 0.0f;
            for (int i = 0; i < p->columns; i++)
                out[(size_t)(i / 2) * 2 * TILE + 2 * j + i % 2] = row < p->rows ? (int8_t)rintf(w[i] * factor) : 0;
        }
    }
    together(team);
}

void pack_matrix(Team *team, const Packing *packing) { run(team, pack, packing); }

/* ---- a product behind norms: heads, joins --------------------------------------------------------------------------- */

typedef struct {
    const float *x, *weight; /* rows of `size` floats; the weights of their norm, NULL: none */
    int64_t stride;          /* floats from row to row */
    int32_t size;
} Part;

typedef struct {
    Matrix matrix;
    const Part *parts; /* side by side they are what is multiplied */
    float *y;
    int64_t stride;
    int32_t part_count, count, add;
    float eps;
} Linear;

static void linear(Team *team, int thread, const void *given) {
    const Linear *l = given;
    int columns = l->matrix.columns;
    float *joined = (float *)team->memory, *scale = joined + (size_t)l->count * columns;
    int16_t *x = (int16_t *)(scale + (l->count + 15) / 16 * 16);
    (void)thread;
    EACH(row, l->count) {
        float *whole = joined + (size_t)row * columns, *to = whole;
        for (int i = 0; i < l->part_count; i++) {
            const Part *part = l->parts + i;
            const float *from = part->x + row * part->stride;
            if (part->weight)
                norm(from, part->weight, part->size, l->eps, to);
            else
                memcpy(to, from, part->size * sizeof(float));
            to += part->size;
        }
        scale[row] = narrow(whole, columns, x + (size_t)row * columns);
    }
    together(team);
    Rows rows = {x, scale, NULL, l->count, columns};
    EACH(tile, tiles(&l->matrix)) product(&l->matrix, tile, &rows, NULL, l->y, l->stride, l->add);
    together(team);
}

/* 0, or -1 where there is no memory. */
int run_linear(Team *team, const Linear *l) {
    size_t rows = (l->count + 15) / 16 * 16;
    if (!take(team, rows * (l->matrix.columns * 6 + 4) + 64)) return -1;
    run(team, linear, l);
    return 0;
}

/* ---- all layers ------------------------------------------------------------------------------------------------------ */

typedef struct {
    Matrix qkv, out, gate_up, down;
    const Matrix *experts; /* gate_up and down of each in turn; NULL: the layer is dense */
    const float *router, *router_bias, *attention_norm, *ffn_norm, *sink;
    int32_t heads, kv_heads, qk_dim, v_dim, group, place, rope, wide, expert_count, per_token, normalise, feature;
    float value_scale, route_scale;
} Layer;

typedef struct {
    float *k, *v; /* of the group's first layer; a row of keys is [kv_heads, dim] */
    int64_t k_layer, v_layer; /* floats from layer to layer */
    const int32_t *pages;     /* [slots, wrap]: token t of a slot is in page t / page_size % wrap */
    int32_t page_size, wrap, window;
} Group;

typedef struct {
    const float *frequencies;
    int32_t half;
} Rope;

typedef struct {
    const Layer *layers;
    const Group *groups;
    const Rope *ropes;
    const float *x;
    float *y;
    const int64_t *slots, *lengths, *rotary, *positions, *parents, *first; /* first: NULL is 0 */
    int32_t layer_count, group_count, rope_count, batch, nodes, hidden, features;
    float eps;
} Step;

typedef struct {
    float *x, *normed, *qkv, *attended, *wide, *mixed, *scale, *turns, *scores, *shares;
    int16_t *narrow;
    int32_t *past, *counts, *kept, *paths, *lengths, *chosen, *starts, *members, *sources;
    size_t qkv_width, attended_width, wide_width, narrow_width, most_past, most_keys, most_heads, most_half;
} Work;

static size_t at_least(size_t a, size_t b) { return a > b ? a : b; }

/* The first cached token of a request that any of the step's rows sees. */
static int64_t oldest(const Step *s, int group, int b) {
    int64_t first = s->first ? s->first[b] : 0, window = s->groups[group].window;
    if (window && first < s->lengths[b] - window + 1) first = s->lengths[b] - window + 1;
    return first < 0 ? 0 : first < s->lengths[b] ? first : s->lengths[b];
}

static int32_t storage_row(const Group *g, int64_t slot, int64_t token) {
    return g->pages[slot * g->wrap + token / g->page_size % g->wrap] * g->page_size + token % g->page_size;
}

/* Cuts the team's memory into pieces; with base NULL only adds up their sizes. */
static size_t lay_out(const Step *s, int threads, char *base, Work *w) {
    size_t m = (size_t)s->batch * s->nodes, used = 0, per_token = 1, experts = 0;
    memset(w, 0, sizeof(*w));
    for (int i = 0; i < s->layer_count; i++) {
        const Layer *l = s->layers + i;
        w->qkv_width = at_least(w->qkv_width, l->qkv.rows);
        w->attended_width = at_least(w->attended_width, l->heads * l->v_dim);
        w->wide_width = at_least(w->wide_width, l->wide);
        w->most_heads = at_least(w->most_heads, l->heads / l->kv_heads);
        per_token = at_least(per_token, l->per_token);
        experts = at_least(experts, l->expert_count);
    }
    for (int i = 0; i < s->group_count * s->batch; i++)
        w->most_past = at_least(w->most_past, s->lengths[i % s->batch] - oldest(s, i / s->batch, i % s->batch));
    w->most_keys = (w->most_past + s->nodes) / LANES * LANES + 2 * LANES; /* scores come in sixteens, from any key on */
    for (int i = 0; i < s->rope_count; i++) w->most_half = at_least(w->most_half, s->ropes[i].half);
    w->narrow_width = at_least(at_least(w->wide_width, w->attended_width), s->hidden);
#define CUT(field, count)                                                  \
    do {                                                                   \
        if (base) w->field = (void *)(base + used);                        \
        used += ((count) * sizeof(*w->field) + 63) / 64 * 64;              \
    } while (0)
    CUT(x, m * s->hidden);
    CUT(normed, m * s->hidden);
    CUT(qkv, m * w->qkv_width);
    CUT(attended, m * w->attended_width);
    CUT(wide, m * per_token * w->wide_width);
    CUT(mixed, experts ? m * per_token * s->hidden : 0);
    CUT(scale, m * per_token);
    CUT(turns, s->rope_count * m * 2 * w->most_half);
    CUT(scores, threads * 4 * w->most_heads * w->most_keys);
    CUT(shares, m * per_token);
    CUT(narrow, m * per_token * w->narrow_width);
    CUT(past, s->group_count * s->batch * w->most_past);
    CUT(counts, s->group_count * s->batch);
    CUT(kept, s->group_count * m);
    CUT(paths, m * s->nodes);
    CUT(lengths, m);
    CUT(chosen, m * per_token);
    CUT(starts, experts + 1);
    CUT(members, m * per_token);
    CUT(sources, m * per_token);
#undef CUT
    return used;
}

/* Where a request's cached keys lie, by position, and where the step's own go; -1: of a long chunk a ring keeps the end. */
static void look_up(const Step *s, const Work *w, int group, int b) {
    const Group *g = s->groups + group;
    int64_t start = oldest(s, group, b), length = s->lengths[b], slot = s->slots[b], size = (int64_t)g->wrap * g->page_size;
    int32_t *past = w->past + (size_t)(group * s->batch + b) * w->most_past;
    int32_t *kept = w->kept + (size_t)(group * s->batch + b) * s->nodes;
    for (int64_t t = start; t < length; t++) past[t - start] = storage_row(g, slot, t);
    for (int i = 0; i < s->nodes; i++) kept[i] = s->nodes - i > size ? -1 : storage_row(g, slot, length + i);
    w->counts[group * s->batch + b] = length - start;
}

/* The rows that row `row` sees, itself last, and the angles it is turned by. */
static void prepare(const Step *s, const Work *w, int row) {
    int b = row / s->nodes, base = b * s->nodes, count = 0;
    int32_t *path = w->paths + (size_t)row * s->nodes;
    int64_t first = s->first ? s->first[b] : 0;
    for (int node = row - base; node >= 0; node = s->parents[base + node])
        if (base + node == row || s->positions[base + node] >= first) path[count++] = base + node;
    for (int i = 0; i < count / 2; i++) {
        int32_t swapped = path[i];
        path[i] = path[count - 1 - i];
        path[count - 1 - i] = swapped;
    }
    w->lengths[row] = count;
    memcpy(w->x + (size_t)row * s->hidden, s->x + (size_t)row * s->hidden, s->hidden * sizeof(float));
    for (int r = 0; r < s->rope_count; r++) {
        float *turn = w->turns + ((size_t)r * s->batch * s->nodes + row) * 2 * w->most_half;
        for (int i = 0; i < s->ropes[r].half; i++) {
            float angle = (float)s->rotary[row] * s->ropes[r].frequencies[i];
            turn[i] = (float)cos(angle);
            turn[w->most_half + i] = (float)sin(angle);
        }
    }
}

static void rotate(const Step *s, const Work *w, const Layer *l, int row) {
    float *x = w->qkv + (size_t)row * w->qkv_width;
    const float *c = w->turns + ((size_t)l->rope * s->batch * s->nodes + row) * 2 * w->most_half, *d = c + w->most_half;
    int half = s->ropes[l->rope].half;
    for (int h = 0; h < l->heads + l->kv_heads; h++, x += l->qk_dim)
        for (int i = 0; i < half; i++) {
            float a = x[i], b = x[i + half];
            x[i] = a * c[i] - b * d[i];
            x[i + half] = b * c[i] + a * d[i];
        }
    for (int i = 0; l->value_scale != 1.0f && i < l->kv_heads * l->v_dim; i++) x[i] *= l->value_scale;
}

/* q times 16 keys. */
INLINE v16 dots_with(const float *q, const float *const *key, int size) {
    v16 quads[4];
#pragma GCC unroll 4
    for (int n = 0; n < 4; n++) {
        v16 a = all(0.0f), b = a, c = a, d = a;
        for (int i = 0; i < size; i += LANES) {
            v16 x = load(q + i);
            a = fused(x, load(key[4 * n] + i), a);
            b = fused(x, load(key[4 * n + 1] + i), b);
            c = fused(x, load(key[4 * n + 2] + i), c);
            d = fused(x, load(key[4 * n + 3] + i), d);
        }
        quads[n] = pairs(pairs(a, b), pairs(c, d));
    }
    return pairs(pairs(quads[0], quads[1]), pairs(quads[2], quads[3]));
}

/* One key head for up to 4 rows of a request. Keys go by in blocks that stay in the nearest cache. */
static void attend(const Step *s, const Work *w, const Layer *l, int thread, int head, int first, int count) {
    const Group *g = s->groups + l->group;
    int b = first / s->nodes, past = w->counts[l->group * s->batch + b], heads = l->heads / l->kv_heads;
    int total[4], low[4], begin = INT32_MAX, end = 0;
    const int32_t *path[4], *cached = w->past + (size_t)(l->group * s->batch + b) * w->most_past;
    size_t k_row = (size_t)l->kv_heads * l->qk_dim, v_row = (size_t)l->kv_heads * l->v_dim;
    const float *k = g->k + l->place * g->k_layer + head * l->qk_dim, *v = g->v + l->place * g->v_layer + head * l->v_dim;
    const float *new_k = w->qkv + (l->heads + head) * l->qk_dim;
    const float *new_v = w->qkv + (l->heads + l->kv_heads) * l->qk_dim + head * l->v_dim;
    float *scores = w->scores + thread * 4 * w->most_heads * w->most_keys, factor = 1.0f / sqrtf(l->qk_dim);
    for (int r = 0; r < count; r++) {
        path[r] = w->paths + (size_t)(first + r) * s->nodes;
        total[r] = past + w->lengths[first + r];
        low[r] = g->window && total[r] > g->window ? total[r] - g->window : 0;
        begin = low[r] < begin ? low[r] : begin;
        end = total[r] > end ? total[r] : end;
    }
#define SCORES(r, h) (scores + ((size_t)(r) * heads + (h)) * w->most_keys)
#define BLOCK(r)                                                             \
    int from = low[r] > block ? low[r] : block, to = total[r] < block + KEYS ? total[r] : block + KEYS
    for (int block = begin; block < end; block += KEYS)
        for (int r = 0; r < count; r++) {
            BLOCK(r);
            const float *q = w->qkv + (first + r) * w->qkv_width + head * heads * l->qk_dim;
            for (int j = from; j < to; j += LANES) {
                const float *key[LANES];
                for (int n = 0; n < LANES; n++) { /* behind the last one it again */
                    int at = j + n < to ? j + n : to - 1;
                    key[n] = at < past ? k + cached[at] * k_row : new_k + path[r][at - past] * w->qkv_width;
                }
                for (int h = 0; h < heads; h++)
                    store(SCORES(r, h) + j - low[r], dots_with(q + h * l->qk_dim, key, l->qk_dim) * factor);
            }
        }
    for (int r = 0; r < count; r++)
        for (int h = 0; h < heads; h++) {
            float *x = SCORES(r, h), *y = w->attended + (first + r) * w->attended_width + (head * heads + h) * l->v_dim;
            int keys = total[r] - low[r];
            while (keys % LANES) x[keys++] = -INFINITY;
            v16 peaks = all(l->sink ? l->sink[head * heads + h] : -INFINITY), sums = all(0.0f);
            for (int j = 0; j < keys; j += LANES) peaks = larger(peaks, load(x + j));
            float peak = most(peaks);
            for (int j = 0; j < keys; j += LANES) {
                v16 e = exponential(load(x + j) - peak);
                store(x + j, e);
                sums += e;
            }
            float whole = sum(sums);
            if (l->sink) whole += exponential(all(l->sink[head * heads + h] - peak))[0];
            for (int j = 0; j < keys; j += LANES) store(x + j, load(x + j) / whole);
            memset(y, 0, l->v_dim * sizeof(float));
        }
    for (int block = begin; block < end; block += KEYS)
        for (int r = 0; r < count; r++) {
            BLOCK(r);
            for (int h = 0; h < heads; h++) {
                float *y = w->attended + (first + r) * w->attended_width + (head * heads + h) * l->v_dim;
                const float *share = SCORES(r, h) - low[r];
#define VALUE(j) ((j) < past ? v + cached[j] * v_row : new_v + path[r][(j) - past] * w->qkv_width)
                int i = 0;
                for (; i + 4 * LANES <= l->v_dim; i += 4 * LANES) {
                    v16 a = load(y + i), b = load(y + i + LANES), c = load(y + i + 2 * LANES), d = load(y + i + 3 * LANES);
                    for (int j = from; j < to; j++) {
                        const float *value = VALUE(j) + i;
                        v16 x = all(share[j]);
                        a = fused(x, load(value), a);
                        b = fused(x, load(value + LANES), b);
                        c = fused(x, load(value + 2 * LANES), c);
                        d = fused(x, load(value + 3 * LANES), d);
                    }
                    store(y + i, a), store(y + i + LANES, b), store(y + i + 2 * LANES, c), store(y + i + 3 * LANES, d);
                }
                for (; i < l->v_dim; i += LANES) {
                    v16 a = load(y + i);
                    for (int j = from; j < to; j++) a = fused(all(share[j]), load(VALUE(j) + i), a);
                    store(y + i, a);
                }
            }
        }
#undef VALUE
#undef SCORES
#undef BLOCK
}

/* A row's keys and values go into the cache, once nobody reads what they replace. */
static void keep(const Step *s, const Work *w, const Layer *l, int row) {
    const Group *g = s->groups + l->group;
    int32_t to = w->kept[(size_t)l->group * s->batch * s->nodes + row];
    if (to < 0) return;
    size_t k_row = (size_t)l->kv_heads * l->qk_dim, v_row = (size_t)l->kv_heads * l->v_dim;
    const float *k = w->qkv + (size_t)row * w->qkv_width + (size_t)l->heads * l->qk_dim;
    memcpy(g->k + l->place * g->k_layer + to * k_row, k, k_row * sizeof(float));
    memcpy(g->v + l->place * g->v_layer + to * v_row, k + k_row, v_row * sizeof(float));
}

/* The experts of a row, the smaller number first, and their shares (DeepSeek-V3 report, section 2.1.2). */
static void route(const Work *w, const Layer *l, int row, int hidden) {
    const float *x = w->normed + (size_t)row * hidden;
    int32_t *chosen = w->chosen + row * l->per_token;
    float *shares = w->shares + row * l->per_token, all_of_them = 1e-20f;
    float score[l->expert_count], rank[l->expert_count];
    for (int e = 0; e < l->expert_count; e++) {
        v16 dot = all(0.0f);
        for (int i = 0; i < hidden; i += LANES) dot = fused(load(x + i), load(l->router + (size_t)e * hidden + i), dot);
        score[e] = 1.0f / (1.0f + exponential(all(-sum(dot)))[0]);
        rank[e] = score[e] + l->router_bias[e];
    }
    for (int i = 0; i < l->per_token; i++) {
        int best = 0;
        for (int e = 1; e < l->expert_count; e++)
            if (rank[e] > rank[best]) best = e;
        rank[best] = -INFINITY;
        int place = i;
        for (; place && chosen[place - 1] > best; place--) chosen[place] = chosen[place - 1];
        chosen[place] = best;
    }
    for (int i = 0; i < l->per_token; i++) all_of_them += shares[i] = score[chosen[i]];
    for (int i = 0; i < l->per_token; i++)
        shares[i] = (l->normalise ? shares[i] / all_of_them : shares[i]) * l->route_scale;
}

/* Which rows each expert has: members[starts[e]..], numbered row * per_token + place, and their rows in `sources`. */
static void group_by_expert(const Work *w, const Layer *l, int m) {
    int all_of_them = m * l->per_token;
    memset(w->starts, 0, (l->expert_count + 1) * sizeof(int32_t));
    for (int i = 0; i < all_of_them; i++) w->starts[w->chosen[i] + 1]++;
    for (int e = 0; e < l->expert_count; e++) w->starts[e + 1] += w->starts[e];
    for (int e = 0; e < l->expert_count; e++) {
        int at = w->starts[e];
        for (int i = 0; i < all_of_them; i++)
            if (w->chosen[i] == e) {
                w->members[at] = i;
                w->sources[at++] = i / l->per_token;
            }
    }
}

static void dense_ffn(Team *team, const Step *s, const Work *w, const Layer *l, int m) {
    Rows rows = {w->narrow, w->scale, NULL, m, s->hidden};
    EACH(tile, tiles(&l->gate_up) / 2) gated(&l->gate_up, tile, &rows, NULL, w->wide, w->wide_width);
    together(team);
    EACH(row, m) {
        w->scale[row] = narrow(w->wide + row * w->wide_width, l->wide, w->narrow + (size_t)row * l->wide);
    }
    together(team);
    rows.columns = l->wide;
    EACH(tile, tiles(&l->down)) product(&l->down, tile, &rows, NULL, w->x, s->hidden, 1);
    together(team);
}

static void sparse_ffn(Team *team, const Step *s, const Work *w, const Layer *l, int m) {
    int up_tiles = tiles(l->experts) / 2, down_tiles = tiles(l->experts + 1), slots = m * l->per_token;
    EACH(unit, 1) group_by_expert(w, l, m);
    together(team);
    EACH(unit, l->expert_count * up_tiles) {
        int e = unit / up_tiles, start = w->starts[e];
        Rows rows = {w->narrow, w->scale, w->sources + start, w->starts[e + 1] - start, s->hidden};
        gated(l->experts + 2 * e, unit % up_tiles, &rows, w->members + start, w->wide, w->wide_width);
    }
    together(team);
    EACH(slot, slots) {
        w->scale[slot] = narrow(w->wide + slot * w->wide_width, l->wide, w->narrow + (size_t)slot * l->wide);
    }
    together(team);
    EACH(unit, l->expert_count * down_tiles) {
        int e = unit / down_tiles, start = w->starts[e];
        Rows rows = {w->narrow, w->scale, w->members + start, w->starts[e + 1] - start, l->wide};
        product(l->experts + 2 * e + 1, unit % down_tiles, &rows, w->members + start, w->mixed, s->hidden, 0);
    }
    together(team);
    EACH(row, m) {
        float *x = w->x + (size_t)row * s->hidden;
        for (int i = 0; i < l->per_token; i++) {
            const float *y = w->mixed + (size_t)(row * l->per_token + i) * s->hidden, share = w->shares[row * l->per_token + i];
            for (int j = 0; j < s->hidden; j += LANES) store(x + j, fused(all(share), load(y + j), load(x + j)));
        }
    }
    together(team);
}

static void layer(Team *team, int thread, const Step *s, const Work *w, const Layer *l) {
    int m = s->batch * s->nodes, hidden = s->hidden, wide = l->heads * l->v_dim;
    Rows rows = {w->narrow, w->scale, NULL, m, hidden};
#define NORMED(weight)                                                                             \
    norm(w->x + (size_t)row * hidden, weight, hidden, s->eps, w->normed + (size_t)row * hidden);   \
    w->scale[row] = narrow(w->normed + (size_t)row * hidden, hidden, w->narrow + (size_t)row * hidden)
    EACH(row, m) { NORMED(l->attention_norm); }
    together(team);
    EACH(tile, tiles(&l->qkv)) product(&l->qkv, tile, &rows, NULL, w->qkv, w->qkv_width, 0);
    together(team);
    EACH(row, m) rotate(s, w, l, row);
    together(team);
    int few = s->nodes <= 2 ? 1 : s->nodes <= 16 ? 2 : 4, blocks = (s->nodes + few - 1) / few;
    EACH(unit, s->batch * l->kv_heads * blocks) {
        int start = unit % blocks * few, b = unit / blocks / l->kv_heads;
        attend(s, w, l, thread, unit / blocks % l->kv_heads, b * s->nodes + start, s->nodes - start < few ? s->nodes - start : few);
    }
    together(team);
    EACH(row, m) {
        keep(s, w, l, row);
        w->scale[row] = narrow(w->attended + row * w->attended_width, wide, w->narrow + (size_t)row * wide);
    }
    together(team);
    rows.columns = wide;
    EACH(tile, tiles(&l->out)) product(&l->out, tile, &rows, NULL, w->x, hidden, 1);
    together(team);
    EACH(row, m) {
        NORMED(l->ffn_norm);
        if (l->experts) route(w, l, row, hidden);
    }
    together(team);
    if (l->experts)
        sparse_ffn(team, s, w, l, m);
    else
        dense_ffn(team, s, w, l, m);
#undef NORMED
}

typedef struct {
    const Step *step;
    const Work *work;
} Call;

static void step(Team *team, int thread, const void *given) {
    const Step *s = ((const Call *)given)->step;
    const Work *w = ((const Call *)given)->work;
    int m = s->batch * s->nodes;
    size_t width = (size_t)(s->features + 1) * s->hidden;
    EACH(unit, m + s->group_count * s->batch) {
        if (unit < m)
            prepare(s, w, unit);
        else
            look_up(s, w, (unit - m) / s->batch, (unit - m) % s->batch);
    }
    together(team);
    for (int i = 0; i < s->layer_count; i++) {
        int last = i + 1 == s->layer_count, place = s->layers[i].feature;
        layer(team, thread, s, w, s->layers + i);
        if (place < 0 && !last) continue;
        EACH(row, m) {
            const float *x = w->x + (size_t)row * s->hidden;
            float *y = s->y + row * width;
            if (place >= 0) memcpy(y + (size_t)place * s->hidden, x, s->hidden * sizeof(float));
            if (last) memcpy(y + (size_t)s->features * s->hidden, x, s->hidden * sizeof(float));
        }
        together(team);
    }
}

/* 0, or -1 where there is no memory. */
int run_step(Team *team, const Step *s) {
    Work work;
    size_t bytes = lay_out(s, team->threads, NULL, &work);
    char *memory = take(team, bytes);
    if (!memory) return -1;
    lay_out(s, team->threads, memory, &work);
    Call call = {s, &work};
    run(team, step, &call);
    return 0;
}
