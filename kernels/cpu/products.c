/* Products of narrow rows with packed matrices. */
#include "cpu.h"
#include <float.h>
#include <stdlib.h>

void norm(const float *x, const float *weight, int size, float eps, float *y) {
    v16 squares = all(0.0f);
    for (int i = 0; i < size; i += LANES) squares = fused(load(x + i), load(x + i), squares);
    float factor = 1.0f / sqrtf(sum(squares) / size + eps);
    for (int i = 0; i < size; i += LANES) store(y + i, load(x + i) * factor * load(weight + i));
}

float narrow(const float *x, int size, int16_t *y) {
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

enum { AHEAD = 8192 }; /* bytes: processors look less far ahead, and then 8 rows take twice as long as one */

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
    __builtin_prefetch(w + AHEAD);                                                      \
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
#define PAIR                   \
    __builtin_prefetch(w + AHEAD); \
    __m256i both, first = BYTES(0), second = BYTES(1), third = BYTES(2), fourth = BYTES(3);
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

void product(const Matrix *m, int tile, const Rows *rows, const int32_t *to, float *y, size_t stride, int add) {
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

void gated(const Matrix *m, int tile, const Rows *rows, const int32_t *to, float *y, size_t stride) {
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

static void pack(Me *me, const void *given) {
    const Packing *p = given;
    EACH(tile, (p->rows + TILE - 1) / TILE) {
        int8_t *out = p->values + (size_t)tile * TILE * p->columns;
        for (int j = 0; j < TILE; j++) {
            int row = tile * TILE + j;
            const float *w = p->weight + (size_t)row * p->columns;
            float peak = 0.0f;
            for (int i = 0; row < p->rows && i < p->columns; i++) {
                float size = fabsf(w[i]);
                peak = size <= FLT_MAX ? (peak < size ? size : peak) : NAN; /* once it is, it stays */
            }
            p->scale[row] = peak / 127.0f;
            float factor = peak > 0.0f ? 127.0f / peak : 0.0f;
            for (int i = 0; i < p->columns; i++)
                out[(size_t)(i / 2) * 2 * TILE + 2 * j + i % 2] = row < p->rows ? (int8_t)rintf(w[i] * factor) : 0;
        }
    }
    together(me);
}

void pack_matrix(Team *team, const Packing *packing) { run(team, pack, packing); }

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

static void linear(Me *me, const void *given) {
    const Linear *l = given;
    int columns = l->matrix.columns;
    float *joined = (float *)memory_of(me), *scale = joined + (size_t)l->count * columns;
    int16_t *x = (int16_t *)(scale + (l->count + 15) / 16 * 16);
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
    together(me);
    Rows rows = {x, scale, NULL, l->count, columns};
    EACH(tile, tiles(&l->matrix)) product(&l->matrix, tile, &rows, NULL, l->y, l->stride, l->add);
    together(me);
}

/* 0, or -1 where there is no memory. */
int run_linear(Team *team, const Linear *l) {
    size_t rows = (l->count + 15) / 16 * 16;
    if (!take(team, rows * (l->matrix.columns * 6 + 4) + 64)) return -1;
    run(team, linear, l);
    return 0;
}

