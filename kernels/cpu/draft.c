/* A level of drafting in one call: committed rows that an MTP layer has not seen, the tree's nodes, and its next ones. */
#include "step.h"

typedef struct {
    Step step; /* what is made here is left out: x, y, rotary, positions, parents, nodes */
    Matrix join, head;
    const float *embedding_norm, *hidden_norm, *head_norm;
    const float *embedding;  /* [V, hidden] */
    const int64_t *ids;      /* [slots, ring]: the token of position p in row p % ring */
    const float *states;     /* [slots, state_ring, hidden]: the state of position p in row p % state_ring */
    float *outputs;          /* [slots, output_ring, hidden]: of committed rows, for the next level; NULL: not wanted */
    const float *above;      /* [B, tree_nodes, hidden]: of the nodes in the level above; NULL: they go by position, too */
    float *passed;           /* [B, tree_nodes, hidden]: of the nodes in this level */
    float *logits;           /* [B, frontier, n]; NULL: nothing is drafted */
    const int64_t *counts;   /* [B]: how many of the rows are real; the others stand behind them */
    Grow grow;               /* and the tree so far; width 0: it does not grow here */
    int32_t ring, state_ring, output_ring, rows, tree_nodes, above_nodes, lag, shift, hidden_first;
} Level;

typedef struct {
    Step step;
    Work work;
    int64_t *positions, *parents, *rotary;
    float *x, *y, *joined, *scale;
    int16_t *narrow;
} Room;

static const float *in_ring(const float *states, int64_t slot, int64_t position, int size, int hidden) {
    int64_t row = position % size;
    return states + (slot * size + (row < 0 ? row + size : row)) * hidden;
}

/* A row's place, and its token and state side by side, normed. */
static void begin(const Level *c, const Room *r, int row) {
    const Step *s = &c->step;
    int each = c->rows + c->tree_nodes, b = row / each, i = row % each, node = i - c->rows + 1, hidden = s->hidden;
    int64_t slot = s->slots[b], count = c->counts[b], position = s->lengths[b] + i, parent = i < count ? i - 1 : -1, token;
    const float *state = NULL;
    if (node > 0) {
        size_t at = (size_t)b * c->grow.cap + node;
        int64_t above = c->grow.parents[at];
        position = s->lengths[b] + count - 1 + c->grow.depths[at];
        parent = above ? c->rows + above - 1 : c->rows ? count - 1 : -1;
        token = c->grow.tokens[at];
        if (c->above && above) state = c->above + ((size_t)b * c->above_nodes + above - 1) * hidden;
    } else {
        token = c->ids[slot * c->ring + position % c->ring];
    }
    if (!state) state = in_ring(c->states, slot, position - c->lag, c->state_ring, hidden);
    r->positions[row] = position;
    r->parents[row] = parent;
    r->rotary[row] = position - 1 - c->shift;
    float *to = r->joined + (size_t)row * 2 * hidden;
    norm(c->embedding + token * hidden, c->embedding_norm, hidden, s->eps, to + (c->hidden_first ? hidden : 0));
    norm(state, c->hidden_norm, hidden, s->eps, to + (c->hidden_first ? 0 : hidden));
    r->scale[row] = narrow(to, 2 * hidden, r->narrow + (size_t)row * 2 * hidden);
}

/* Where a row's output goes. */
static void end(const Level *c, const Room *r, int row) {
    const Step *s = &c->step;
    int each = c->rows + c->tree_nodes, b = row / each, i = row % each, hidden = s->hidden;
    const float *y = r->y + (size_t)row * hidden;
    if (i >= c->rows)
        memcpy(c->passed + ((size_t)b * c->tree_nodes + i - c->rows) * hidden, y, hidden * sizeof(float));
    else if (c->outputs && i < c->counts[b])
        memcpy((float *)in_ring(c->outputs, s->slots[b], s->lengths[b] + i, c->output_ring, hidden), y, hidden * sizeof(float));
}

static void level(Me *me, const Level *c, const Room *r) {
    const Step *s = &r->step;
    int m = s->batch * s->nodes, hidden = s->hidden, front = s->batch * c->grow.frontier;
    Rows rows = {r->narrow, r->scale, NULL, m, 2 * hidden};
    EACH(row, m) begin(c, r, row);
    together(me);
    EACH(tile, tiles(&c->join)) product(&c->join, tile, &rows, NULL, r->x, hidden, 0);
    together(me);
    step(me, s, &r->work);
    EACH(row, m) end(c, r, row);
    together(me);
    if (!c->logits) return;
    EACH(unit, front) {
        int b = unit / c->grow.frontier, i = unit % c->grow.frontier;
        int64_t row = c->tree_nodes ? s->nodes - c->grow.frontier + i : c->counts[b] ? c->counts[b] - 1 : 0;
        float *to = r->joined + (size_t)unit * hidden;
        norm(r->y + (b * s->nodes + row) * hidden, c->head_norm, hidden, s->eps, to);
        r->scale[unit] = narrow(to, hidden, r->narrow + (size_t)unit * hidden);
    }
    together(me);
    rows.count = front;
    rows.columns = hidden;
    EACH(tile, tiles(&c->head)) product(&c->head, tile, &rows, NULL, c->logits, c->grow.n, 0);
    together(me);
    if (c->grow.width) grow(me, &c->grow);
}

typedef struct {
    const Level *level;
    const Room *room;
} Call;

static void job(Me *me, const void *given) { level(me, ((const Call *)given)->level, ((const Call *)given)->room); }

/* Cuts memory into pieces; with base NULL only adds up their sizes. */
static size_t cut(const Level *c, int threads, char *base, Room *r) {
    size_t m = (size_t)c->step.batch * (c->rows + c->tree_nodes), hidden = c->step.hidden, used = 0;
#define CUT(field, count)                                   \
    do {                                                    \
        if (base) r->field = (void *)(base + used);         \
        used += ((count) * sizeof(*r->field) + 63) / 64 * 64; \
    } while (0)
    CUT(positions, m);
    CUT(parents, m);
    CUT(rotary, m);
    CUT(x, m * hidden);
    CUT(y, m * hidden);
    CUT(joined, m * 2 * hidden);
    CUT(scale, m);
    CUT(narrow, m * 2 * hidden);
#undef CUT
    r->step.x = r->x;
    r->step.y = r->y;
    r->step.positions = r->positions;
    r->step.parents = r->parents;
    r->step.rotary = r->rotary;
    return used + lay_out(&r->step, threads, base ? base + used : NULL, &r->work);
}

/* 0, or -1 where there is no memory. */
int run_level(Team *team, const Level *c) {
    Room room = {.step = c->step};
    room.step.nodes = c->rows + c->tree_nodes;
    size_t bytes = cut(c, team_threads(team), NULL, &room), growing = growing_bytes(&c->grow, team_threads(team));
    char *memory = take(team, bytes > growing ? bytes : growing);
    if (!memory) return -1;
    cut(c, team_threads(team), memory, &room);
    Call call = {c, &room};
    run(team, job, &call);
    return 0;
}
