/* All layers of a decoder in one call. */
#include "step.h"
#include <stdlib.h>

enum { KEYS = 64 }; /* of attention that are looked at together */
#if defined(__AVX512F__)
enum { SIDE = 3 }; /* heads that are: as many as there are registers for */
#else
enum { SIDE = 1 };
#endif
/* f with so many of the heads that are left, a constant */
#define WITH_HEADS(f, left, ...) ((left) >= SIDE ? f(SIDE, __VA_ARGS__) : (left) == 2 ? f(2, __VA_ARGS__) : f(1, __VA_ARGS__))

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

size_t lay_out(const Step *s, int threads, char *base, Work *w) {
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

/* The queries of `heads` heads of a row times 16 keys. */
INLINE void dots_with(int heads, const float *q, const float *const *key, int dim, float factor, float *scores, size_t keys) {
    v16 quads[3][4];
#pragma GCC unroll 4
    for (int n = 0; n < 4; n++) {
        v16 sums[3][4];
#pragma GCC unroll 12
        for (int i = 0; i < heads * 4; i++) sums[i / 4][i % 4] = all(0.0f);
        for (int i = 0; i < dim; i += LANES) {
#pragma GCC unroll 12
            for (int j = 0; j < heads * 4; j++)
                sums[j / 4][j % 4] = fused(load(q + j / 4 * dim + i), load(key[4 * n + j % 4] + i), sums[j / 4][j % 4]);
        }
#pragma GCC unroll 3
        for (int h = 0; h < heads; h++) quads[h][n] = pairs(pairs(sums[h][0], sums[h][1]), pairs(sums[h][2], sums[h][3]));
    }
#pragma GCC unroll 3
    for (int h = 0; h < heads; h++)
        store(scores + h * keys, pairs(pairs(quads[h][0], quads[h][1]), pairs(quads[h][2], quads[h][3])) * factor);
}

/* y += the values of `count` keys, each times its share, for `heads` heads of a row and some of their columns. */
INLINE void mix(int heads, int vectors, const float *const *value, int count, const float *share, size_t keys, float *y, int dim) {
    v16 sums[3][4];
#pragma GCC unroll 12
    for (int i = 0; i < heads * vectors; i++) sums[i / vectors][i % vectors] = load(y + i / vectors * dim + i % vectors * LANES);
    for (int j = 0; j < count; j++) {
#pragma GCC unroll 12
        for (int i = 0; i < heads * vectors; i++) {
            v16 *sum = &sums[i / vectors][i % vectors];
            *sum = fused(all(share[i / vectors * keys + j]), load(value[j] + i % vectors * LANES), *sum);
        }
    }
#pragma GCC unroll 12
    for (int i = 0; i < heads * vectors; i++) store(y + i / vectors * dim + i % vectors * LANES, sums[i / vectors][i % vectors]);
}

/* The same for all heads of a row and all their columns; as many at a time as there are registers for. */
static void mix_all(int heads, const float **value, int count, const float *share, size_t keys, float *y, int dim) {
    for (int i = 0; i < dim;) {
        int wide = i + 4 * LANES <= dim, step = wide ? 4 * LANES : LANES;
        for (int h = 0; h < heads; h += SIDE) {
            const float *part = share + h * keys;
            float *to = y + h * dim + i;
            if (wide)
                WITH_HEADS(mix, heads - h, 4, value, count, part, keys, to, dim);
            else
                WITH_HEADS(mix, heads - h, 1, value, count, part, keys, to, dim);
        }
        for (int j = 0; j < count; j++) value[j] += step;
        i += step;
    }
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
                for (int h = 0; h < heads; h += SIDE)
                    WITH_HEADS(dots_with, heads - h, q + h * l->qk_dim, key, l->qk_dim, factor, SCORES(r, h) + j - low[r],
                               w->most_keys);
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
            const float *value[KEYS];
            for (int j = from; j < to; j++)
                value[j - from] = j < past ? v + cached[j] * v_row : new_v + path[r][j - past] * w->qkv_width;
            mix_all(heads, value, to - from, SCORES(r, 0) + from - low[r], w->most_keys,
                    w->attended + (first + r) * w->attended_width + head * heads * l->v_dim, l->v_dim);
        }
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

static void dense_ffn(Me *me, const Step *s, const Work *w, const Layer *l, int m) {
    Rows rows = {w->narrow, w->scale, NULL, m, s->hidden};
    EACH(tile, tiles(&l->gate_up) / 2) gated(&l->gate_up, tile, &rows, NULL, w->wide, w->wide_width);
    together(me);
    EACH(row, m) {
        w->scale[row] = narrow(w->wide + row * w->wide_width, l->wide, w->narrow + (size_t)row * l->wide);
    }
    together(me);
    rows.columns = l->wide;
    EACH(tile, tiles(&l->down)) product(&l->down, tile, &rows, NULL, w->x, s->hidden, 1);
    together(me);
}

static void sparse_ffn(Me *me, const Step *s, const Work *w, const Layer *l, int m) {
    int up_tiles = tiles(l->experts) / 2, down_tiles = tiles(l->experts + 1), slots = m * l->per_token;
    EACH(unit, 1) group_by_expert(w, l, m);
    together(me);
    EACH(unit, l->expert_count * up_tiles) {
        int e = unit / up_tiles, start = w->starts[e];
        Rows rows = {w->narrow, w->scale, w->sources + start, w->starts[e + 1] - start, s->hidden};
        gated(l->experts + 2 * e, unit % up_tiles, &rows, w->members + start, w->wide, w->wide_width);
    }
    together(me);
    EACH(slot, slots) {
        w->scale[slot] = narrow(w->wide + slot * w->wide_width, l->wide, w->narrow + (size_t)slot * l->wide);
    }
    together(me);
    EACH(unit, l->expert_count * down_tiles) {
        int e = unit / down_tiles, start = w->starts[e];
        Rows rows = {w->narrow, w->scale, w->members + start, w->starts[e + 1] - start, l->wide};
        product(l->experts + 2 * e + 1, unit % down_tiles, &rows, w->members + start, w->mixed, s->hidden, 0);
    }
    together(me);
    EACH(row, m) {
        float *x = w->x + (size_t)row * s->hidden;
        for (int i = 0; i < l->per_token; i++) {
            const float *y = w->mixed + (size_t)(row * l->per_token + i) * s->hidden, share = w->shares[row * l->per_token + i];
            for (int j = 0; j < s->hidden; j += LANES) store(x + j, fused(all(share), load(y + j), load(x + j)));
        }
    }
    together(me);
}

static void layer(Me *me, const Step *s, const Work *w, const Layer *l) {
    int m = s->batch * s->nodes, hidden = s->hidden, wide = l->heads * l->v_dim;
    Rows rows = {w->narrow, w->scale, NULL, m, hidden};
#define NORMED(weight)                                                                             \
    norm(w->x + (size_t)row * hidden, weight, hidden, s->eps, w->normed + (size_t)row * hidden);   \
    w->scale[row] = narrow(w->normed + (size_t)row * hidden, hidden, w->narrow + (size_t)row * hidden)
    EACH(row, m) { NORMED(l->attention_norm); }
    together(me);
    EACH(tile, tiles(&l->qkv)) product(&l->qkv, tile, &rows, NULL, w->qkv, w->qkv_width, 0);
    together(me);
    EACH(row, m) rotate(s, w, l, row);
    together(me);
    int few = s->nodes <= 2 ? 1 : s->nodes <= 16 ? 2 : 4, blocks = (s->nodes + few - 1) / few;
    EACH(unit, s->batch * l->kv_heads * blocks) {
        int start = unit % blocks * few, b = unit / blocks / l->kv_heads;
        attend(s, w, l, me_number(me), unit / blocks % l->kv_heads, b * s->nodes + start, s->nodes - start < few ? s->nodes - start : few);
    }
    together(me);
    EACH(row, m) {
        keep(s, w, l, row);
        w->scale[row] = narrow(w->attended + row * w->attended_width, wide, w->narrow + (size_t)row * wide);
    }
    together(me);
    rows.columns = wide;
    EACH(tile, tiles(&l->out)) product(&l->out, tile, &rows, NULL, w->x, hidden, 1);
    together(me);
    EACH(row, m) {
        NORMED(l->ffn_norm);
        if (l->experts) route(w, l, row, hidden);
    }
    together(me);
    if (l->experts)
        sparse_ffn(me, s, w, l, m);
    else
        dense_ffn(me, s, w, l, m);
#undef NORMED
}

void step(Me *me, const Step *s, const Work *w) {
    int m = s->batch * s->nodes;
    size_t width = (size_t)(s->features + 1) * s->hidden;
    EACH(unit, m + s->group_count * s->batch) {
        if (unit < m)
            prepare(s, w, unit);
        else
            look_up(s, w, (unit - m) / s->batch, (unit - m) % s->batch);
    }
    together(me);
    for (int i = 0; i < s->layer_count; i++) {
        int last = i + 1 == s->layer_count, place = s->layers[i].feature;
        layer(me, s, w, s->layers + i);
        if (place < 0 && !last) continue;
        EACH(row, m) {
            const float *x = w->x + (size_t)row * s->hidden;
            float *y = s->y + row * width;
            if (place >= 0) memcpy(y + (size_t)place * s->hidden, x, s->hidden * sizeof(float));
            if (last) memcpy(y + (size_t)s->features * s->hidden, x, s->hidden * sizeof(float));
        }
        together(me);
    }
}

typedef struct {
    const Step *step;
    const Work *work;
} Call;

static void job(Me *me, const void *given) { step(me, ((const Call *)given)->step, ((const Call *)given)->work); }

/* 0, or -1 where there is no memory. */
int run_step(Team *team, const Step *s) {
    Work work;
    size_t bytes = lay_out(s, team_threads(team), NULL, &work);
    char *memory = take(team, bytes);
    if (!memory) return -1;
    lay_out(s, team_threads(team), memory, &work);
    Call call = {s, &work};
    run(team, job, &call);
    return 0;
}
