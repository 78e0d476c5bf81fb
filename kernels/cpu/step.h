/* What a decoder's step and a level of drafting share: layers, their caches, and how a tree grows. */
#ifndef STEP_H
#define STEP_H
#include "cpu.h"

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

#pragma GCC visibility push(hidden)

/* Cuts memory into the pieces that a step needs; with base NULL only adds up their sizes. */
size_t lay_out(const Step *s, int threads, char *base, Work *w);

/* All layers of a step, by all threads. */
void step(Me *me, const Step *s, const Work *w);

typedef struct {
    const float *logits; /* [B, frontier, n] */
    const int64_t *ids;  /* [n], the tokens scored */
    const int64_t *lengths, *seed;
    const float *temperature;
    const float *biases; /* [B, n], added to the logits; or NULL */
    int64_t *tokens, *parents, *depths; /* [B, cap]: the tree so far; its frontier begins at node `first` */
    float *scores;
    int32_t batch, frontier, n, cap, first, ahead, width, keep;
} Grow;

/* A tree's next level, best nodes first; it needs so much of the team's memory, from its beginning. */
void grow(Me *me, const Grow *g);
size_t growing_bytes(const Grow *g, int threads);

#pragma GCC visibility pop
#endif
