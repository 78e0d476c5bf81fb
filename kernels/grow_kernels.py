"""The Triton side of kernels/grow.py."""

import triton
import triton.language as tl

from mtp_engine.kernels.arrival import (
    LARGEST,
    LOWEST,
    arrives_last,
    gumbel_of,
    noise_key,
    pack,
    rank_of,
    step_key,
    unpack_index,
    value_of,
)

_CANDIDATES = tl.constexpr(103)  # as in drafters.candidates


@triton.jit
def _best(rank, index, w, WIDTH: tl.constexpr, partial):
    """Ranks and indices of the WIDTH best, best first, at w = 0, 1, ...; stored packed if `partial` is given."""
    ranks = tl.full(w.shape, LOWEST, tl.int32)
    places = tl.zeros(w.shape, tl.int32)
    for i in range(WIDTH):
        top = tl.max(rank, 0)
        at = tl.min(tl.where(rank == top, index, LARGEST), 0)
        rank = tl.where(index == at, LOWEST, rank)
        ranks = tl.where(w == i, top, ranks)
        places = tl.where(w == i, at, places)
    if partial is not None:
        tl.store(partial + w, pack(ranks, places), mask=w < WIDTH)
    return ranks, places


@triton.jit
def _merged(
    row, partial, sums, w, splits, WIDTH: tl.constexpr, SP: tl.constexpr, CP: tl.constexpr
):  # fmt: skip
    """The best of all splits of a row, ranks and indices at w = 0, 1, ..., and the largest score and the sum of
    exp(score - largest)."""
    s, c = tl.arange(0, SP), tl.arange(0, CP)
    base = sums + row * splits * 2 + s * 2
    tops = tl.load(base, mask=s < splits, other=-float("inf"), cache_modifier=".cg")
    totals = tl.load(base + 1, mask=s < splits, other=0.0, cache_modifier=".cg")
    where = partial + row * splits * WIDTH + c
    packed = tl.load(where, mask=c < splits * WIDTH, other=-(1 << 63), cache_modifier=".cg")
    top = tl.max(tops, 0)
    total = tl.sum(totals * tl.exp(tops - top), 0)
    ranks, places = _best((packed >> 32).to(tl.int32), unpack_index(packed), w, WIDTH, None)
    return ranks, places, top, total


@triton.jit
def _merge(
    row, partial, sums, ids, logp, chosen, splits,
    WIDTH: tl.constexpr, WP: tl.constexpr, SP: tl.constexpr, CP: tl.constexpr,
):  # fmt: skip
    """The best of all splits of a row and their log-softmax."""
    w = tl.arange(0, WP)
    ranks, places, top, total = _merged(row, partial, sums, w, splits, WIDTH, SP, CP)
    tl.store(logp + row * WIDTH + w, (value_of(ranks) - top) - tl.log(total), mask=w < WIDTH)
    tl.store(chosen + row * WIDTH + w, tl.load(ids + places, mask=w < WIDTH, other=0), mask=w < WIDTH)


@triton.jit
def _share(
    row, partial, sums, ids, out, splits,
    WIDTH: tl.constexpr, WP: tl.constexpr, SP: tl.constexpr, CP: tl.constexpr,
):  # fmt: skip
    """What other ranks need of a row, WIDTH + 1 numbers: the best, packed with their tokens, then largest score and sum."""
    w = tl.arange(0, WP)
    ranks, places, top, total = _merged(row, partial, sums, w, splits, WIDTH, SP, CP)
    token = tl.load(ids + places, mask=w < WIDTH, other=0).to(tl.int32)
    here = out + row * (WIDTH + 1)
    tl.store(here + w, pack(ranks, token), mask=w < WIDTH)
    both = (top.to(tl.int32, bitcast=True).to(tl.int64) << 32) | (
        total.to(tl.int32, bitcast=True).to(tl.int64) & 0xFFFFFFFF
    )
    tl.store(here + WIDTH, both)


@triton.jit
def _ordered(score):
    """NaN, before which nothing would stand, comes last."""
    return tl.where(score == score, score, -float("inf"))


@triton.jit
def _standing(mine, index, scores, base, count, W: tl.constexpr, CP: tl.constexpr):
    """How many of the `count` entries stand before each of `mine`: those that score more, or as much at a lower index.

    Entry j scores scores[j], plus base[j // W] if `base` is given.
    """
    CHUNK: tl.constexpr = CP if CP <= 64 else 16
    standing = tl.zeros([CP], tl.int32)
    for start in range(0, CP, CHUNK):
        j = start + tl.arange(0, CHUNK)
        other = tl.load(scores + j, mask=j < count, other=-float("inf"), cache_modifier=".cg")
        if base is not None:
            other += tl.load(base + j // W, mask=j < count, other=0.0)
        other = _ordered(other)
        before = (other[:, None] > mine[None, :]) | ((other[:, None] == mine[None, :]) & (j[:, None] < index[None, :]))
        standing += tl.sum((before & (j < count)[:, None]).to(tl.int32), 0)
    return standing


@triton.jit
def _grow(
    b, logp, chosen, tokens, parents, depths, scores, roots, slot, cap, first,
    F: tl.constexpr, WIDTH: tl.constexpr, KEEP: tl.constexpr, CP: tl.constexpr,
):  # fmt: skip
    """drafters.expand.grow for request b: the KEEP best of the frontier's F * WIDTH candidates, in their order.

    With `roots`, whose entry `slot` is the request's, node 0 is written too.
    """
    c = tl.arange(0, CP)
    real = c < F * WIDTH
    here = b * cap
    joint = tl.load(logp + b * F * WIDTH + c, mask=real, other=-float("inf"), cache_modifier=".cg")
    if roots is not None:
        root = tl.load(roots + slot)
        tl.store(parents + here, -1)
        tl.store(depths + here, 0)
        tl.store(scores + here, 0.0)
        depth, base = 1, None
    else:
        depth, base = tl.load(depths + here + first) + 1, scores + here + first
        joint += tl.load(base + c // WIDTH, mask=real, other=0.0)
    joint = _ordered(joint)
    if KEEP < F * WIDTH:
        real &= _standing(joint, c, logp + b * F * WIDTH, base, F * WIDTH, WIDTH, CP) < KEEP
    target = here + first + F + tl.cumsum(real.to(tl.int32), 0) - 1
    found = tl.load(chosen + b * F * WIDTH + c, mask=real, other=0, cache_modifier=".cg")
    tl.store(tokens + target, found, mask=real)
    tl.store(parents + target, first + c // WIDTH, mask=real)
    tl.store(depths + target, depth + tl.zeros_like(c), mask=real)
    tl.store(scores + target, joint, mask=real)
    if roots is not None:
        tl.store(tokens + here, root)


@triton.jit
def _prune(
    b, tokens, parents, depths, scores, out_tokens, out_parents, out_depths, out_scores, cap, count,
    KEEP: tl.constexpr, QP: tl.constexpr,
):  # fmt: skip
    """drafters.expand.prune for request b, whose nodes are 0..count."""
    q = tl.arange(0, QP)
    here, there = b * cap + 1, b * (KEEP + 1)
    mine = _ordered(tl.load(scores + here + q, mask=q < count, other=-float("inf"), cache_modifier=".cg"))
    kept = (q < count) & (_standing(mine, q, scores + here, None, count, 1, QP) < KEEP)
    number = tl.cumsum(kept.to(tl.int32), 0)  # of a kept node; the root is 0
    parent = tl.load(parents + here + q, mask=kept, other=0, cache_modifier=".cg").to(tl.int32)
    parent = tl.where(parent > 0, tl.gather(number, tl.maximum(parent - 1, 0), 0), parent)
    token = tl.load(tokens + here + q, mask=kept, other=0, cache_modifier=".cg")
    depth = tl.load(depths + here + q, mask=kept, other=0, cache_modifier=".cg")
    tl.store(out_tokens + there + number, token, mask=kept)
    tl.store(out_parents + there + number, parent, mask=kept)
    tl.store(out_depths + there + number, depth, mask=kept)
    tl.store(out_scores + there + number, mine, mask=kept)
    tl.store(out_tokens + there, tl.load(tokens + here - 1, cache_modifier=".cg"))
    tl.store(out_parents + there, -1)
    tl.store(out_depths + there, 0)
    tl.store(out_scores + there, tl.load(scores + here - 1, cache_modifier=".cg"))


@triton.jit
def _finish(
    b, tokens, parents, depths, scores, out_tokens, out_parents, out_depths, out_scores, cap, count, ready, size,
    PRUNE: tl.constexpr, QP: tl.constexpr,
):  # fmt: skip
    """What follows the last level: the nodes 0..count are pruned to PRUNE drafted ones if it is not 0, size is set."""
    if PRUNE > 0:
        tl.debug_barrier()  # other threads of this program stored what is read now
        _prune(
            b, tokens, parents, depths, scores, out_tokens, out_parents, out_depths, out_scores, cap, count, PRUNE, QP
        )  # fmt: skip
        count = PRUNE
    if size is not None:
        tl.store(size + b, tl.where(tl.load(ready + b) > 0, count + 1, 1))


@triton.jit
def _last_grows(
    b, arrivals, logp, chosen, tokens, parents, depths, scores, roots, slot,
    out_tokens, out_parents, out_depths, out_scores, ready, size, cap, first,
    F: tl.constexpr, WIDTH: tl.constexpr, KEEP: tl.constexpr, GP: tl.constexpr, PRUNE: tl.constexpr, QP: tl.constexpr,
):  # fmt: skip
    """A row of request b has its candidates; the program of the last of its F rows adds the level, and finishes the tree."""
    done = True
    if F > 1:
        done = arrives_last(arrivals + b, F)
    else:
        tl.debug_barrier()
    if done:
        _grow(
            b, logp, chosen, tokens, parents, depths, scores, roots, slot, cap, first, F, WIDTH, KEEP, GP
        )  # fmt: skip
        _finish(
            b, tokens, parents, depths, scores, out_tokens, out_parents, out_depths, out_scores, cap,
            first + F + KEEP - 1, ready, size, PRUNE, QP,
        )  # fmt: skip


@triton.jit
def candidates_kernel(
    logits, positions, ids, seed, temperature, arrivals, partial, sums, logp, chosen,
    tokens, parents, depths, scores, roots, slots, out_tokens, out_parents, out_depths, out_scores, ready, size,
    n, ahead, stride_b, stride_f, splits, cap, first,
    F: tl.constexpr, WIDTH: tl.constexpr, WP: tl.constexpr, SPLIT: tl.constexpr, SP: tl.constexpr, CP: tl.constexpr,
    KEEP: tl.constexpr, GP: tl.constexpr, PRUNE: tl.constexpr, QP: tl.constexpr, DRAWN: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program (split, row): the best of a split of a row; the last of a row merges; the last row of a request grows. Without
    `logp` what was found is for other ranks, in `chosen`."""
    split, row = tl.program_id(0), tl.program_id(1)
    b = row // F
    index = split * SPLIT + tl.arange(0, SPLIT)
    real = index < n
    token = tl.load(ids + index, mask=real, other=0).to(tl.uint32)  # constant, so it need not wait
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    line = logits + b.to(tl.int64) * stride_b + (row % F).to(tl.int64) * stride_f
    x = tl.load(line + index, mask=real, other=-float("inf")).to(tl.float32)
    heat = tl.load(temperature + b)
    if heat > 0:
        if DRAWN:
            node = (first + row % F).to(tl.int64)
            low, high = noise_key(step_key(tl.load(seed + b), tl.load(positions + b), _CANDIDATES), node)
        else:
            low, high = noise_key(tl.load(seed + b), tl.load(positions + b) + ahead)
        x = x / tl.maximum(heat, 1e-6) + gumbel_of(low, high, token)
    top = tl.max(x, 0)
    here = row * splits + split
    tl.store(sums + here * 2, top)
    tl.store(sums + here * 2 + 1, tl.sum(tl.exp(x - tl.where(top == -float("inf"), 0.0, top)), 0))
    _best(tl.where(real, rank_of(x), LOWEST), index, tl.arange(0, WP), WIDTH, partial + here * WIDTH)
    slot = 0
    if slots is not None:
        slot = tl.load(slots + b)  # read now, while nothing depends on it
    if arrives_last(arrivals + row, splits):
        if logp is None:
            _share(row, partial, sums, ids, chosen, splits, WIDTH, WP, SP, CP)
        else:
            _merge(row, partial, sums, ids, logp, chosen, splits, WIDTH, WP, SP, CP)
        if KEEP > 0:
            _last_grows(
                b, arrivals + tl.num_programs(1), logp, chosen, tokens, parents, depths, scores, roots, slot,
                out_tokens, out_parents, out_depths, out_scores, ready, size, cap, first, F, WIDTH, KEEP, GP, PRUNE, QP,
            )  # fmt: skip


@triton.jit
def shared_level_kernel(
    shared, arrivals, logp, chosen,
    tokens, parents, depths, scores, roots, slots, out_tokens, out_parents, out_depths, out_scores, ready, size,
    cap, first,
    RANKS: tl.constexpr, RP: tl.constexpr, F: tl.constexpr, WIDTH: tl.constexpr, WP: tl.constexpr, CP: tl.constexpr,
    KEEP: tl.constexpr, GP: tl.constexpr, PRUNE: tl.constexpr, QP: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program row: the best of what all ranks found for it (`_share`), [RANKS, rows, WIDTH + 1]; the last row of a request
    grows."""
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    row, rows = tl.program_id(0), tl.num_programs(0)
    b = row // F
    s, c, w = tl.arange(0, RP), tl.arange(0, CP), tl.arange(0, WP)
    both = tl.load(shared + (s * rows + row) * (WIDTH + 1) + WIDTH, mask=s < RANKS, other=0)
    tops = tl.where(s < RANKS, (both >> 32).to(tl.int32).to(tl.float32, bitcast=True), -float("inf"))
    totals = both.to(tl.int32).to(tl.float32, bitcast=True)  # 0 where there is none
    packed = tl.load(
        shared + (c // WIDTH * rows + row) * (WIDTH + 1) + c % WIDTH, mask=c < RANKS * WIDTH, other=-(1 << 63)
    )
    top = tl.max(tops, 0)
    total = tl.sum(totals * tl.exp(tops - top), 0)
    ranks, found = _best((packed >> 32).to(tl.int32), unpack_index(packed), w, WIDTH, None)
    tl.store(logp + row * WIDTH + w, (value_of(ranks) - top) - tl.log(total), mask=w < WIDTH)
    tl.store(chosen + row * WIDTH + w, found.to(tl.int64), mask=w < WIDTH)
    slot = 0
    if slots is not None:
        slot = tl.load(slots + b)
    _last_grows(
        b, arrivals, logp, chosen, tokens, parents, depths, scores, roots, slot,
        out_tokens, out_parents, out_depths, out_scores, ready, size, cap, first, F, WIDTH, KEEP, GP, PRUNE, QP,
    )  # fmt: skip
