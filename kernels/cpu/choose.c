/* Choosing tokens: the main model's at every node, with keyed noise, and the drafter's candidates. The noise is that of
 * sampling/sampler.py, whose words these are. */
#include "step.h"
#include <float.h>

typedef struct {
    uint32_t first, second;
} Key;

/* An integer hash with full avalanche ("lowbias32", C. Wellons 2018). */
#define MIX(x)                   \
    do {                         \
        (x) ^= (x) >> 16;        \
        (x) *= 0x7FEB352Du;      \
        (x) ^= (x) >> 15;        \
        (x) *= 0x846CA68Bu;      \
        (x) ^= (x) >> 16;        \
    } while (0)

static Key feistel(Key key, const uint32_t *rounds) {
    for (int i = 0; i < 4; i++) {
        uint32_t mixed = (i % 2 ? key.first : key.second) ^ rounds[i];
        MIX(mixed);
        if (i % 2)
            key.second ^= mixed;
        else
            key.first ^= mixed;
    }
    return key;
}

/* sampler.noise_key */
static Key noise_key(int64_t seed, int64_t position) {
    static const uint32_t seed_rounds[] = {0x9E3779B1u, 0x85EBCA77u, 0xC2B2AE3Du, 0x27D4EB2Fu};
    static const uint32_t position_rounds[] = {0x243F6A88u, 0x85A308D3u, 0x13198A2Eu, 0x03707344u};
    Key key = feistel((Key){(uint32_t)seed, (uint32_t)((uint64_t)seed >> 32)}, seed_rounds);
    key.first ^= (uint32_t)position;
    key.second ^= (uint32_t)((uint64_t)position >> 32);
    return feistel(key, position_rounds);
}

/* ln x for normal x > 0, within 2 units in the last place (the Cephes library's polynomial). */
INLINE v16 logarithm(v16 x) {
    i16 bits = (i16)x, exponent = (bits >> 23) - 126;
    v16 m = (v16)((bits & 0x007FFFFF) | 0x3F000000); /* 0.5 <= m < 1 */
    i16 small = m < 0.70710678f;
    exponent += small; /* a true comparison is -1 */
    m = pick(small, m + m, m) - 1.0f;
    v16 z = m * m, y = all(7.0376836292e-2f), e = __builtin_convertvector(exponent, v16);
    static const float c[] = {-1.1514610310e-1f, 1.1676998740e-1f, -1.2420140846e-1f, 1.4249322787e-1f,
                              -1.6668057665e-1f, 2.0000714765e-1f, -2.4999993993e-1f, 3.3333331174e-1f};
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++) y = fused(y, m, all(c[i]));
    y = y * m * z;
    y = fused(e, all(-2.12194440e-4f), y);
    y = fused(z, all(-0.5f), y);
    return fused(e, all(0.693359375f), m + y);
}

/* Standard Gumbel noise of the tokens `tokens` (sampler.gumbel). */
INLINE v16 gumbel(Key key, u16 tokens) {
    u16 bits = tokens ^ key.first;
    MIX(bits);
    bits ^= key.second;
    MIX(bits);
    v16 v = (__builtin_convertvector(bits, v16) + 0.5f) * 2.3283064365e-10f;
    v = pick(v < 1.0f - 5.9604645e-8f, v, all(1.0f - 5.9604645e-8f));
    /* ln(1 - v), accurate for small v (Kahan: what the sum lost is the same factor for v) */
    v16 u = 1.0f - v;
    v16 small = logarithm(u) * (v / (1.0f - u));
    v16 exact = pick(u == 1.0f, -v, small);
    return -logarithm(-exact);
}

static const u16 ascending = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};

/* ---- verification ---------------------------------------------------------------------------------------------------- */

typedef struct {
    const float *logits; /* [B * N, vocab] */
    const int64_t *lengths, *seed; /* [B] */
    const float *temperature;      /* [B] */
    const int64_t *tokens, *parents, *depths, *size; /* the tree: [B, N], [B] */
    int64_t *path, *emitted, *counts;                /* [B, depth + 1], [B] */
    int32_t batch, nodes, vocab, depth;
} Verify;

enum { SPAN = 4096 }; /* tokens that a thread looks at before it asks for more */

/* The best token of one span of a row, the first of equals. */
static void choose_span(const Verify *c, int row, int span, float *best, int32_t *token) {
    int b = row / c->nodes, start = span * SPAN, stop = start + SPAN < c->vocab ? start + SPAN : c->vocab, i = start;
    const float *x = c->logits + (size_t)row * c->vocab;
    float heat = c->temperature[b];
    Key key = noise_key(c->seed[b], c->lengths[b] + 1 + c->depths[row]);
    v16 top = all(-INFINITY);
    i16 at = {0};
    *best = -INFINITY;
    *token = start;
    for (; i + LANES <= stop; i += LANES) {
        v16 y = load(x + i);
        if (heat > 0.0f) y = fused(gumbel(key, ascending + (uint32_t)i), all(heat), y);
        i16 more = y > top;
        top = pick(more, y, top);
        at = ((i16)(ascending + (uint32_t)i) & more) | (at & ~more);
    }
    for (int j = 0; i > start && j < LANES; j++)
        if (top[j] > *best || (top[j] == *best && at[j] < *token)) *best = top[j], *token = at[j];
    for (; i < stop; i++) {
        float y = x[i];
        if (heat > 0.0f) y = fused(gumbel(key, ascending + (uint32_t)i), all(heat), all(y))[0];
        if (y > *best) *best = y, *token = i;
    }
}

/* verifiers.match.longest_match */
static void walk(const Verify *c, int b, const int32_t *choices) {
    const int64_t *tokens = c->tokens + b * c->nodes, *parents = c->parents + b * c->nodes, *depths = c->depths + b * c->nodes;
    int64_t *path = c->path + b * (c->depth + 1), *emitted = c->emitted + b * (c->depth + 1);
    char alive[c->nodes];
    int tip = 0;
    alive[0] = 1;
    for (int n = 1; n < c->nodes; n++) {
        alive[n] = n < c->size[b] && alive[parents[n]] && choices[parents[n]] == tokens[n];
        if (alive[n] && depths[n] > depths[tip]) tip = n;
    }
    c->counts[b] = depths[tip] + 1;
    for (int64_t n = tip;; n = parents[n]) {
        path[depths[n]] = n;
        emitted[depths[n]] = choices[n];
        if (!n) break;
    }
    for (int d = depths[tip] + 1; d <= c->depth; d++) path[d] = tip, emitted[d] = choices[tip];
}

static void verify(Me *me, const void *given) {
    const Verify *c = given;
    int rows = c->batch * c->nodes, spans = (c->vocab + SPAN - 1) / SPAN;
    float *best = (float *)memory_of(me);
    int32_t *token = (int32_t *)(best + (size_t)rows * spans), *choices = token + (size_t)rows * spans;
    EACH(unit, rows * spans) choose_span(c, unit / spans, unit % spans, best + unit, token + unit);
    together(me);
    EACH(b, c->batch) {
        for (int row = b * c->nodes; row < (b + 1) * c->nodes; row++) {
            int top = row * spans;
            for (int i = top + 1; i < (row + 1) * spans; i++)
                if (best[i] > best[top]) top = i;
            choices[row] = token[top];
        }
        walk(c, b, choices + b * c->nodes);
    }
    together(me);
}

int run_verify(Team *team, const Verify *c) {
    size_t rows = (size_t)c->batch * c->nodes, spans = (c->vocab + SPAN - 1) / SPAN;
    if (!take(team, rows * (spans * 8 + 4))) return -1;
    run(team, verify, c);
    return 0;
}

typedef struct {
    const int64_t *slots, *lengths, *sizes, *depths, *emitted, *counts;
    int64_t *slot_lengths, *slot_tokens, *table;
    int32_t batch, nodes, most, slot_count;
} Advance;

/* Move slots on, all but the last, and say of each request how many tokens it emits, the nodes and the depth of its tree, and
 * the tokens. */
void run_advance(const Advance *a) {
    for (int b = 0; b < a->batch; b++) {
        int64_t *row = a->table + (size_t)b * (3 + a->most), depth = 0;
        const int64_t *depths = a->depths + (size_t)b * a->nodes, *emitted = a->emitted + (size_t)b * a->most;
        for (int i = 0; i < a->sizes[b]; i++) depth = depths[i] > depth ? depths[i] : depth;
        row[0] = a->counts[b];
        row[1] = a->sizes[b];
        row[2] = depth;
        memcpy(row + 3, emitted, a->most * sizeof(int64_t));
        if (a->slots[b] + 1 == a->slot_count) continue;
        a->slot_lengths[a->slots[b]] = a->lengths[b] + a->counts[b];
        a->slot_tokens[a->slots[b]] = emitted[a->counts[b] - 1];
    }
}

/* ---- drafting -------------------------------------------------------------------------------------------------------- */

typedef struct {
    float score;
    int32_t index;
} Candidate;

/* Into a list of the best, best first, of equals the one that came first. */
static int enter(Candidate *list, int count, int most, float score, int index) {
    if (count == most && !(score > list[count - 1].score)) return count;
    int at = count < most ? count++ : count - 1;
    for (; at && list[at - 1].score < score; at--) list[at] = list[at - 1];
    list[at] = (Candidate){score, index};
    return count;
}

/* The candidates of a frontier node and their log-probabilities, as Candidates.rank has them. x: [n] of room. */
static void candidates(const Grow *g, int b, int f, float *x, Candidate *list) {
    const float *logits = g->logits + (size_t)(b * g->frontier + f) * g->n;
    const float *biases = g->biases ? g->biases + (size_t)b * g->n : NULL;
    float heat = g->temperature[b], inverse = 1.0f / fmaxf(heat, 1e-6f);
    Key key = noise_key(g->seed[b], g->lengths[b] + g->ahead);
    v16 top = all(-INFINITY), total = all(0.0f);
    int count = 0, whole = (g->n + LANES - 1) / LANES * LANES;
    for (int i = 0; i < whole; i += LANES) {
        v16 y = all(-INFINITY);
        u16 tokens = {0};
        for (int j = 0; j < LANES && i + j < g->n; j++) tokens[j] = (uint32_t)g->ids[i + j];
        if (i + LANES <= g->n)
            y = biases ? load(logits + i) + load(biases + i) : load(logits + i);
        else
            for (int j = 0; i + j < g->n; j++) y[j] = logits[i + j] + (biases ? biases[i + j] : 0.0f);
        if (heat > 0.0f) y = fused(y, all(inverse), gumbel(key, tokens));
        store(x + i, y);
        top = larger(top, y);
    }
    float peak = most(top);
    for (int i = 0; i < whole; i += LANES) total += exponential(load(x + i) - peak);
    float norm = peak + logf(sum(total));
    for (int i = 0; i < whole; i += LANES) {
        if (count == g->width && !(most(load(x + i)) > list[count - 1].score + norm)) continue;
        for (int j = i; j < i + LANES && j < g->n; j++) count = enter(list, count, g->width, x[j] - norm, j);
    }
}

void grow(Me *me, const Grow *g) {
    size_t room = (g->n + LANES - 1) / LANES * LANES;
    Candidate *lists = (Candidate *)memory_of(me);
    float *x = (float *)(lists + (size_t)g->batch * g->frontier * g->width) + me_number(me) * room;
    EACH(unit, g->batch * g->frontier)
        candidates(g, unit / g->frontier, unit % g->frontier, x, lists + (size_t)unit * g->width);
    together(me);
    EACH(b, g->batch) {
        Candidate best[g->keep];
        const Candidate *mine = lists + (size_t)b * g->frontier * g->width;
        int count = 0, at = b * g->cap + g->first;
        for (int i = 0; i < g->frontier * g->width; i++)
            count = enter(best, count, g->keep, mine[i].score + g->scores[at + i / g->width], i);
        for (int i = 0; i < count; i++) {
            int from = best[i].index / g->width, to = at + g->frontier + i;
            g->tokens[to] = g->ids[mine[best[i].index].index];
            g->parents[to] = g->first + from;
            g->depths[to] = g->depths[at] + 1;
            g->scores[to] = best[i].score;
        }
    }
    together(me);
}

size_t growing_bytes(const Grow *g, int threads) {
    return (size_t)g->batch * g->frontier * g->width * sizeof(Candidate) + threads * ((size_t)g->n + LANES) * sizeof(float);
}

static void job(Me *me, const void *given) { grow(me, given); }

int run_grow(Team *team, const Grow *g) {
    if (!take(team, growing_bytes(g, team_threads(team)))) return -1;
    run(team, job, g);
    return 0;
}
