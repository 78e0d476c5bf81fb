"""The Triton kernels of kernels/forest_attention.py, whose docstring says which does what."""

import triton
import triton.language as tl

from mtp_engine.kernels.chain_attention_kernels import _far_runs
from mtp_engine.kernels.tree_attention_kernels import _SMALL, _absorb, _finish, _fresh, _merge, _queries, _store_run


@triton.jit
def _load_runs(acc, stats, run, runs, valid, dv, ROWS: tl.constexpr, DV: tl.constexpr):
    """What `_store_run` stored; of the other rows, nothing."""
    target = tl.arange(0, ROWS) * runs
    m = tl.load(stats + run * 2 + target * 2, mask=valid, other=float("-inf"))
    total = tl.load(stats + run * 2 + target * 2 + 1, mask=valid, other=0.0)
    return m, total, tl.load(acc + run * DV + (target * DV)[:, None] + dv, mask=valid[:, None] & (dv < DV), other=0.0)


@triton.jit(
    do_not_specialize=["position_stride", "page_stride", "wrap", "nodes", "blocks"],
    do_not_specialize_on_alignment=_SMALL,
)
def shared_kernel(
    q, k_cache, v_cache, pages, lengths, positions, first, acc_out, stats_out,
    q_batch, q_node, q_head, k_row, k_head, v_row, v_head, position_stride, page_stride, wrap, nodes, blocks, scale,
    GROUP: tl.constexpr, KV_HEADS: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, D0: tl.constexpr,
    D1: tl.constexpr, DV_PAD: tl.constexpr, PAGE: tl.constexpr, WINDOW: tl.constexpr, TILE: tl.constexpr,
    SPLITS: tl.constexpr, ROWS: tl.constexpr, TAKEN: tl.constexpr, DEPTH: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Of rows of a forest the keys that are the same for all: those in tiles of positions below that of `length`.

    A program serves those of TAKEN nodes that stand in one tile, and stores their far runs merged, and as much of the near
    run. blocks: of nodes.
    """
    if PDL:
        tl.extra.cuda.gdc_wait()
    if PDL == 1:
        tl.extra.cuda.gdc_launch_dependents()
    b = tl.program_id(1)
    kv_head, block = tl.program_id(0) % KV_HEADS, tl.program_id(0) // KV_HEADS
    length = tl.load(lengths + b).to(tl.int32)
    begin = tl.load(first + b).to(tl.int32)
    tile = length // TILE + block // blocks
    origin = block % blocks * TAKEN  # the first node
    r, dv, t = tl.arange(0, ROWS), tl.arange(0, DV_PAD), tl.arange(0, TILE)
    node, head = origin + r // GROUP, kv_head * GROUP + r % GROUP
    inside = (r < TAKEN * GROUP) & (node < nodes)
    own = tl.load(positions + b * position_stride + node, mask=inside, other=0).to(tl.int32)
    valid = inside & (own // TILE == tile)
    if tl.sum(valid.to(tl.int32), 0) == 0:
        return
    queries = _queries(q + b.to(tl.int64) * q_batch + node.to(tl.int64) * q_node + head * q_head, valid, DK, D0, D1)
    pages += b * page_stride
    k_cache += kv_head * k_head
    v_cache += kv_head * v_head
    state, run = _fresh(ROWS, DV_PAD), _fresh(ROWS, DV_PAD)
    if not WINDOW:
        state = _far_runs(
            queries, pages, k_cache, v_cache, (tile - 1) * TILE, begin, scale, k_row, v_row, DK, DV, D0, D1, DV_PAD, PAGE,
            TILE, SPLITS, ROWS, DEPTH, True,
        )  # fmt: skip
    oldest = tl.maximum(own - WINDOW + 1 if WINDOW else (tile - 1) * TILE, tl.maximum(begin, 0))
    oldest = tl.minimum(oldest, own)
    lowest = tl.min(tl.where(valid, oldest, (tile + 1) * TILE), 0)
    for base in tl.range(lowest // TILE * TILE, length // TILE * TILE, TILE, num_stages=1 + 2 * DEPTH):
        pos = base + t
        exists = pos >= lowest
        number = tl.load(pages + (pos // PAGE % wrap if WINDOW else pos // PAGE), mask=exists, other=0)
        run = _absorb(
            run, queries, k_cache, v_cache, number.to(tl.int64) * PAGE + pos % PAGE, exists, pos >= oldest[:, None],
            scale, k_row, v_row, DK, DV, D0, D1, DV_PAD,
        )  # fmt: skip
    if PDL == 3:
        tl.extra.cuda.gdc_launch_dependents()
    row = (((b * KV_HEADS + kv_head) * nodes + origin) * GROUP).to(tl.int64) * 2
    if not WINDOW:
        _store_run(state, acc_out, stats_out, row, 2, valid, dv, ROWS, DV)
    _store_run(run, acc_out, stats_out, row + 1, 2, valid, dv, ROWS, DV)


@triton.jit(
    do_not_specialize=["position_stride", "page_stride", "wrap", "nodes"], do_not_specialize_on_alignment=_SMALL
)
def own_kernel(
    q, k_cache, v_cache, pages, lengths, positions, paths, first, sink, out, acc_in, stats_in,
    q_batch, q_node, q_head, k_row, k_head, v_row, v_head, position_stride, page_stride, wrap, nodes, scale,
    GROUP: tl.constexpr, KV_HEADS: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, D0: tl.constexpr,
    D1: tl.constexpr, DV_PAD: tl.constexpr, PAGE: tl.constexpr, WINDOW: tl.constexpr, TILE: tl.constexpr,
    ROWS: tl.constexpr, SINK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """The rest of the near run of one node, from what `shared_kernel` stored, and the result."""
    if PDL:
        tl.extra.cuda.gdc_wait()
    if PDL == 1:
        tl.extra.cuda.gdc_launch_dependents()
    b = tl.program_id(1)
    kv_head, node = tl.program_id(0) % KV_HEADS, tl.program_id(0) // KV_HEADS
    r, dv, t = tl.arange(0, ROWS), tl.arange(0, DV_PAD), tl.arange(0, TILE)
    valid, head = r < GROUP, kv_head * GROUP + r
    length = tl.load(lengths + b).to(tl.int32)
    begin = tl.load(first + b).to(tl.int32)
    own = tl.load(positions + b * position_stride + node).to(tl.int32)
    queries = _queries(q + b.to(tl.int64) * q_batch + node * q_node + head * q_head, valid, DK, D0, D1)
    row = (((b * KV_HEADS + kv_head) * nodes + node) * GROUP).to(tl.int64) * 2
    state = _fresh(ROWS, DV_PAD)
    if not WINDOW:
        state = _load_runs(acc_in, stats_in, row, 2, valid, dv, ROWS, DV)
    run = _load_runs(acc_in, stats_in, row + 1, 2, valid, dv, ROWS, DV)
    pages += b * page_stride
    path = paths + (b * nodes + node) * nodes
    k_cache += kv_head * k_head
    v_cache += kv_head * v_head
    oldest = tl.maximum(own - WINDOW + 1 if WINDOW else (own // TILE - 1) * TILE, tl.maximum(begin, 0))
    oldest = tl.minimum(oldest, own)
    for base in tl.range(tl.maximum(oldest, length) // TILE * TILE, own + 1, TILE, num_stages=1):
        pos = base + t
        ahead = pos - length
        above = tl.load(path + ahead, mask=(ahead >= 0) & (ahead < nodes), other=-1)
        slot = tl.where(ahead < 0, pos, length + above)
        exists = (pos >= oldest) & (pos <= own) & ((ahead < 0) | (above >= 0))
        number = tl.load(pages + (slot // PAGE % wrap if WINDOW else slot // PAGE), mask=exists, other=0)
        run = _absorb(
            run, queries, k_cache, v_cache, number.to(tl.int64) * PAGE + slot % PAGE, exists, exists[None, :], scale,
            k_row, v_row, DK, DV, D0, D1, DV_PAD,
        )  # fmt: skip
    if PDL == 3:
        tl.extra.cuda.gdc_launch_dependents()
    m, total, acc = _merge(state, run)
    y = _finish(m, total, acc, tl.load(sink + head, mask=valid, other=0.0).to(tl.float32) if SINK else total, SINK)
    out += (b.to(tl.int64) * nodes + node) * (KV_HEADS * GROUP * DV)
    tl.store(out + (head * DV)[:, None] + dv, y.to(out.dtype.element_ty), mask=valid[:, None] & (dv < DV))
