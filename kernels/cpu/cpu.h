/* What the library's files share: vectors of 16 floats, a team of threads, matrices.
 *
 * The library runs a decoder's step on a CPU with the same bits for a row whatever else is in the call. Products multiply
 * weights of 8 bits, a scale per output row, with activations of up to 16 bits, a scale per row; their sums are integers of
 * 32 bits that cannot overflow, so their order does not matter. Everything else (norms, rotation, attention) is done row by
 * row in fp32, in an order that depends on that row's own keys alone; compilers are told to fuse nothing by themselves
 * (-ffp-contract=off). calls.py has the same structures and says what they mean.
 */
#ifndef CPU_H
#define CPU_H
#include <math.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

enum { LANES = 16, TILE = 32 };
typedef float v16 __attribute__((vector_size(64), aligned(4)));
typedef int32_t i16 __attribute__((vector_size(64), aligned(4)));
typedef uint32_t u16 __attribute__((vector_size(64), aligned(4)));
typedef int16_t h16 __attribute__((vector_size(32), aligned(2)));
#define INLINE static inline __attribute__((always_inline))

/* What files share is theirs alone: another library of the process may have a function of the same name. */
#pragma GCC visibility push(hidden)

/* ---- a team of threads (team.c) -------------------------------------------------------------------------------------- */

typedef struct Team Team;
typedef struct Me Me; /* one of its threads in a call */
typedef void (*Job)(Me *, const void *);

/* Run a job: phases one after the other, of units that whoever has time takes. A phase ends when its units are done, so that
 * nobody waits for a thread that the system does not run. */
void run(Team *team, Job job, const void *argument);

/* A unit of the present phase, which has `count` > 0: of this thread's own share as long as there are some, in order, since
 * neighbours lie together in memory and the processor reads ahead; then what others have left. -1: there are no more. */
int claim(Me *me, int count);

/* The end of a phase: go on when all its units are done. */
void together(Me *me);

/* for every unit of a phase that this thread gets */
#define EACH(unit, count) for (int unit; (unit = claim(me, (count))) >= 0;)

int me_number(const Me *me);
char *memory_of(const Me *me); /* what the caller has taken */
int team_threads(const Team *team);

/* At least so many bytes for a call's intermediate results; NULL where there are not so many. */
char *take(Team *team, size_t bytes);

/* ---- vectors --------------------------------------------------------------------------------------------------------- */

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

/* ---- matrices (products.c) ------------------------------------------------------------------------------------------- */

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

/* y = x / rms(x) * weight */
void norm(const float *x, const float *weight, int size, float eps, float *y);

/* y = x in 16 bits or as many as a sum of `size` products with weights of 8 bits has room for. Returns its scale. */
float narrow(const float *x, int size, int16_t *y);

/* One tile of y = x W^T + bias, or y += it. to: the rows of y; NULL: as in `rows`. stride: floats from row to row. */
void product(const Matrix *m, int tile, const Rows *rows, const int32_t *to, float *y, size_t stride, int add);

/* One tile of silu(gate) * up, whose rows are one matrix, all of gate first. */
void gated(const Matrix *m, int tile, const Rows *rows, const int32_t *to, float *y, size_t stride);

INLINE int tiles(const Matrix *m) { return (m->rows + TILE - 1) / TILE; }

#pragma GCC visibility pop

#endif
