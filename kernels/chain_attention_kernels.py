"""The Triton kernel of kernels/chain_attention.py: all runs of a block of rows in one program, merged as they come."""

import triton
import triton.language as tl

from mtp_engine.kernels.tree_attention_kernels import (
    _SMALL,
    _absorb,
    _ask,
    _far_step,
    _finish,
    _fresh,
    _merge,
    _page,
    _queries,
    _split_start,
)


@triton.jit
def _far_runs(
    queries, pages, k, v, end, begin, scale, k_row, v_row,
    DK: tl.constexpr, DV: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, DV_PAD: tl.constexpr, PAGE: tl.constexpr,
    TILE: tl.constexpr, SPLITS: tl.constexpr, ROWS: tl.constexpr, DEPTH: tl.constexpr, FIRST: tl.constexpr,
):  # fmt: skip
    """The far keys, positions begin..end-1, one split after the other. Returns what `_merge` calls the state."""
    t = tl.arange(0, TILE)
    state, run = _fresh(ROWS, DV_PAD), _fresh(ROWS, DV_PAD)
    start, split = 0, 0
    if FIRST:
        while _split_start(split + 1, SPLITS) <= begin:
            split += 1
        start = begin // TILE * TILE
    edge = _split_start(split + 1, SPLITS)
    page = _page(pages, start, end, PAGE)
    for base in tl.range(start, end, TILE, num_stages=1 + DEPTH):
        exists = base + t >= begin if FIRST else t < TILE
        run, page = _far_step(
            run, queries, pages, page, k, v, base, end, exists, exists[None, :] if FIRST else None, scale, k_row, v_row,
            DK, DV, D0, D1, DV_PAD, PAGE, TILE,
        )  # fmt: skip
        if (base + TILE >= edge) | (base + TILE >= end):
            state = _merge(state, run)
            run = _fresh(ROWS, DV_PAD)
            split += 1
            edge = _split_start(split + 1, SPLITS)
    return state


@triton.jit(
    do_not_specialize=["page_stride", "wrap", "nodes", "per"],
    do_not_specialize_on_alignment=[*_SMALL, "ends", "counts", "blocks"],
)
def chain_kernel(
    q, k_cache, v_cache, pages, lengths, first, ends, counts, blocks, k_new, v_new, sink, out,
    q_batch, q_node, q_head, k_row, k_head, v_row, v_head, page_stride, wrap, nodes, per, scale,
    GROUP: tl.constexpr, KV_HEADS: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, D0: tl.constexpr,
    D1: tl.constexpr, DV_PAD: tl.constexpr, PAGE: tl.constexpr, WINDOW: tl.constexpr, TILE: tl.constexpr,
    SPLITS: tl.constexpr, ROWS: tl.constexpr, TAKEN: tl.constexpr, DEPTH: tl.constexpr, FIRST: tl.constexpr,
    SINK: tl.constexpr, PACKED: tl.constexpr, FRESH: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Rows of a chain: node i of request b is at position lengths[b] + i and sees what is there up to itself.

    A program serves at most TAKEN nodes, with all heads of one key head, of one tile of positions: their far keys are the
    same. per: programs for a tile of positions. FIRST: whether there are positions that have no keys. PACKED: the requests'
    rows stand one behind the other, those of request b end before row ends[b] and are counts[b]; blocks says which of them
    a program serves. FRESH: the keys and values of a windowed layer's rows are in k_new and v_new, row by row, and only
    those before them in the cache.
    """
    if PDL and PACKED:  # the table of blocks may be the newest of all; else see runs_kernel
        tl.extra.cuda.gdc_wait()
    kv_head, block = tl.program_id(0) % KV_HEADS, tl.num_programs(0) // KV_HEADS - 1 - tl.program_id(0) // KV_HEADS
    b = tl.program_id(1)
    if PACKED:
        b = tl.load(blocks + block * 2)
        if b < 0:
            return
    length = tl.load(lengths + b).to(tl.int32)
    begin = tl.load(first + b).to(tl.int32) if FIRST else 0
    origin, line = b.to(tl.int64) * q_batch, b.to(tl.int64) * nodes
    if PACKED:
        nodes = tl.load(counts + b).to(tl.int32)
        line = tl.load(ends + b) - nodes
        origin = line * q_node
        low = tl.load(blocks + block * 2 + 1)
        tile = low // TILE
    else:
        tile = length // TILE + block // per
        low = tl.maximum(tile * TILE, length) + block % per * TAKEN
    high = tl.minimum(tl.minimum(low + TAKEN, (tile + 1) * TILE), length + nodes)  # positions low..high-1
    if low >= high:
        return
    pages += b * page_stride
    k_cache += kv_head * k_head
    v_cache += kv_head * v_head
    if PDL and not PACKED:
        if not WINDOW:
            _ask(pages, k_cache, v_cache, begin // TILE * TILE, length, k_row, v_row, DK, DV, PAGE, TILE)
        tl.extra.cuda.gdc_wait()
    if PDL == 1:
        tl.extra.cuda.gdc_launch_dependents()
    r, dv, t = tl.arange(0, ROWS), tl.arange(0, DV_PAD), tl.arange(0, TILE)
    own = low + r // GROUP
    valid = own < high
    head = kv_head * GROUP + r % GROUP
    node = own - length
    queries = _queries(q + origin + node.to(tl.int64) * q_node + head * q_head, valid, DK, D0, D1)

    state, run = _fresh(ROWS, DV_PAD), _fresh(ROWS, DV_PAD)
    if not WINDOW:
        state = _far_runs(
            queries, pages, k_cache, v_cache, (tile - 1) * TILE, begin, scale, k_row, v_row, DK, DV, D0, D1, DV_PAD, PAGE,
            TILE, SPLITS, ROWS, DEPTH, FIRST,
        )  # fmt: skip

    oldest = tl.maximum(own - WINDOW + 1 if WINDOW else (tile - 1) * TILE, tl.maximum(begin, 0))
    oldest = tl.minimum(oldest, own)
    lowest = tl.min(tl.where(valid, oldest, high - 1), 0)
    for base in tl.range(lowest // TILE * TILE, high, TILE, num_stages=1 + 2 * DEPTH):
        pos = base + t
        exists = (pos >= lowest) & (pos < high)
        seen = (pos >= oldest[:, None]) & (pos <= own[:, None])
        if FRESH:
            old, row = pos < length, line + pos - length
            number = tl.load(pages + pos // PAGE % wrap, mask=exists & old, other=0)
            stored = number.to(tl.int64) * PAGE + pos % PAGE
            keys = tl.where(old, k_cache + stored * k_row, k_new + (row * KV_HEADS + kv_head) * DK)
            values = tl.where(old, v_cache + stored * v_row, v_new + (row * KV_HEADS + kv_head) * DV)
            run = _absorb(
                run, queries, keys[:, None], values[:, None], tl.zeros([TILE], tl.int64), exists, seen, scale, 0, 0,
                DK, DV, D0, D1, DV_PAD,
            )  # fmt: skip
        else:
            number = tl.load(pages + (pos // PAGE % wrap if WINDOW else pos // PAGE), mask=exists, other=0)
            run = _absorb(
                run, queries, k_cache, v_cache, number.to(tl.int64) * PAGE + pos % PAGE, exists, seen, scale, k_row,
                v_row, DK, DV, D0, D1, DV_PAD,
            )  # fmt: skip
    if PDL == 3:
        tl.extra.cuda.gdc_launch_dependents()
    m, total, acc = _merge(state, run)
    y = _finish(m, total, acc, tl.load(sink + head, mask=valid, other=0.0).to(tl.float32) if SINK else total, SINK)
    out += line * (KV_HEADS * GROUP * DV)
    target = (node.to(tl.int64) * (KV_HEADS * GROUP) + head) * DV
    tl.store(out + target[:, None] + dv, y.to(out.dtype.element_ty), mask=valid[:, None] & (dv < DV))


@triton.jit(do_not_specialize=["batch", "size"], do_not_specialize_on_alignment=["lengths", "counts"])
def blocks_kernel(
    lengths, counts, blocks, batch, size, TILE: tl.constexpr, TAKEN: tl.constexpr, B: tl.constexpr, M: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """See chain_attention.Packed.blocks. A program writes M entries."""
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    PER: tl.constexpr = (TILE + TAKEN - 1) // TAKEN  # blocks of a whole tile
    m, b = tl.program_id(0) * M + tl.arange(0, M), tl.arange(0, B)
    length = tl.load(lengths + b, mask=b < batch, other=0).to(tl.int32)
    count = tl.load(counts + b, mask=b < batch, other=0).to(tl.int32)
    head = tl.minimum(count, TILE - length % TILE)  # rows in the tile that the first one stands in
    rest = count - head
    lead = (head + TAKEN - 1) // TAKEN
    own = lead + rest // TILE * PER + (rest % TILE + TAKEN - 1) // TAKEN
    ends = tl.cumsum(own, 0)
    owner = tl.sum((m[:, None] >= ends[None, :]).to(tl.int32), 1)
    mine = owner[:, None] == b[None, :]
    number = m - tl.sum(tl.where(mine, (ends - own)[None, :], 0), 1)
    start = tl.sum(tl.where(mine, length[None, :], 0), 1)
    before = tl.sum(tl.where(mine, lead[None, :], 0), 1)
    behind = number - before
    low = (start // TILE + 1 + behind // PER) * TILE + behind % PER * TAKEN
    tl.store(blocks + m * 2, tl.where(owner < B, owner, -1), mask=m < size)
    tl.store(blocks + m * 2 + 1, tl.where(number < before, start + number * TAKEN, low), mask=m < size)
