"""The Triton kernels of kernels/tree_attention.py, whose docstring says which keys are added up in what order."""

import triton
import triton.language as tl

from mtp_engine.kernels.ancestry import MAX_NODES

_MAX_NODES = tl.constexpr(MAX_NODES)
_MERGED = tl.constexpr(8)  # runs that the merge asks for at once
_SMALL = ["pages", "lengths", "positions", "paths", "first", "sink"]  # one compiled kernel, wherever these begin
LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _split_start(c, SPLITS: tl.constexpr):
    """The first position of split c."""
    start = tl.minimum(c, SPLITS[1]) * SPLITS[0]
    start += tl.minimum(tl.maximum(c - SPLITS[1], 0), SPLITS[3]) * SPLITS[2]
    return start + tl.maximum(c - SPLITS[1] - SPLITS[3], 0) * SPLITS[4]


@triton.jit
def _far_end(position, length, TILE: tl.constexpr):
    """Where a row's far keys end. That is below `length` for the rows of a tree, and made so for padding."""
    return tl.minimum((position // TILE - 1) * TILE, length)


@triton.jit
def _finish(m, total, acc, sink, SINK: tl.constexpr):
    """acc / total, the sink in the total. m (log2), total, sink: scalars with acc [D], or [R] with acc [R, D]."""
    if SINK:
        sink *= LOG2E
        top = tl.maximum(m, sink)
        shrink = tl.exp2(m - top)
        total = tl.fma(total, shrink, tl.exp2(sink - top))
        acc *= shrink if len(acc.shape) == 1 else shrink[:, None]
    return acc / (total if len(acc.shape) == 1 else total[:, None])


@triton.jit
def _fresh(ROWS: tl.constexpr, D: tl.constexpr):
    """The state that has seen no key: maximum (log2), sum, accumulator."""
    empty = tl.full([ROWS], float("-inf"), tl.float32)
    return empty, tl.zeros([ROWS], tl.float32), tl.zeros([ROWS, D], tl.float32)


@triton.jit
def _absorb(
    state, queries, k, v, rows, exists, seen, scale, k_row, v_row,
    DK: tl.constexpr, DV: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, DV_PAD: tl.constexpr,
):  # fmt: skip
    """One tile's step of the online softmax. A row that sees none of the keys keeps its state bit for bit.

    state: as for `_soften`, with D = DV_PAD; rows, exists: storage rows of the keys [T] and whether to read them; seen:
    [R, T].
    """
    q0, q1 = queries
    d0, dv = tl.arange(0, D0), tl.arange(0, DV_PAD)
    k0 = tl.load(k + (rows * k_row)[:, None] + d0, mask=exists[:, None] & (d0 < DK), other=0.0)
    s = tl.dot(q0, tl.trans(k0), input_precision="ieee")
    if D1:
        d1 = D0 + tl.arange(0, D1)
        k1 = tl.load(k + (rows * k_row)[:, None] + d1, mask=exists[:, None] & (d1 < DK), other=0.0)
        s = tl.dot(q1, tl.trans(k1), s, input_precision="ieee")
    values = tl.load(v + (rows * v_row)[:, None] + dv, mask=exists[:, None] & (dv < DV), other=0.0)
    return _soften(state, s, values, seen, scale)


@triton.jit
def _soften(state, s, values, seen, scale):
    """The online softmax over one tile's scores. A row that sees none of the keys keeps its state bit for bit.

    Multiplications that an addition follows are written as one operation where that is meant, and these kernels are
    compiled without joining others: what the compiler joins in one kernel and not in another would change bits.
    state: maximum (log2) and sum [R], accumulator [R, D]; s: [R, T]; values: [T, D]; seen: [R, T], or None if all is.
    """
    m, total, acc = state
    if seen is not None:
        s = tl.where(seen, s, float("-inf"))
    top = tl.maximum(m, tl.max(s, 1) * scale)
    safe = tl.where(top == float("-inf"), 0.0, top)  # where a row has seen no key yet
    p = tl.exp2(tl.fma(s, tl.zeros_like(s) + scale, tl.broadcast_to(-safe[:, None], s.shape)))
    shrink = tl.exp2(m - safe)
    acc = tl.dot(p.to(values.dtype), values, acc * shrink[:, None], input_precision="ieee")
    return top, tl.fma(total, shrink, tl.sum(p, 1)), acc


@triton.jit
def _merge(state, run):
    """One more run. state and run: maximum (log2), sum and accumulator of one row ([], [], [D]) or of rows ([R], [R], [R, D])."""
    m, total, acc = state
    run_m, run_total, run_acc = run
    top = tl.maximum(m, run_m)
    safe = tl.where(top == float("-inf"), 0.0, top)
    shrink, share = tl.exp2(m - safe), tl.exp2(run_m - safe)
    if len(acc.shape) == 1:
        kept, taken = tl.broadcast_to(shrink, acc.shape), share
    else:
        kept, taken = tl.broadcast_to(shrink[:, None], acc.shape), share[:, None]
    return top, tl.fma(total, shrink, run_total * share), tl.fma(acc, kept, run_acc * taken)


@triton.jit
def _page(pages, position, stop, PAGE: tl.constexpr):
    """The number of the page of a cache slot, or of the last slot below stop, where one comes before the other."""
    return tl.load(pages + tl.maximum(tl.minimum(position, stop - 1), 0) // PAGE)


@triton.jit
def _far_step(
    run, queries, pages, page, k, v, base, stop, exists, seen, scale, k_row, v_row,
    DK: tl.constexpr, DV: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, DV_PAD: tl.constexpr, PAGE: tl.constexpr,
    TILE: tl.constexpr,
):  # fmt: skip
    """`_absorb` of the tile of far keys at `base`. page: of its first key; returns that of the next tile's, too, which is
    asked for a tile ahead, as keys cannot be asked for without it."""
    pos = base + tl.arange(0, TILE)
    if PAGE % TILE == 0:
        rows = page.to(tl.int64) * PAGE + (pos - base // PAGE * PAGE)
        page = _page(pages, base + TILE, stop, PAGE)
    else:
        rows = tl.load(pages + pos // PAGE, mask=exists, other=0).to(tl.int64) * PAGE + pos % PAGE
    return _absorb(run, queries, k, v, rows, exists, seen, scale, k_row, v_row, DK, DV, D0, D1, DV_PAD), page


@triton.jit
def _ask(
    pages, k, v, base, stop, k_row, v_row, DK: tl.constexpr, DV: tl.constexpr, PAGE: tl.constexpr, TILE: tl.constexpr
):
    """Asks for the keys and values of the tile of cached positions at `base` to come to L2, and does not wait for them."""
    pos = tl.minimum(base + tl.arange(0, TILE), tl.maximum(stop - 1, 0))
    rows = tl.load(pages + pos // PAGE).to(tl.int64) * PAGE + pos % PAGE
    LINE: tl.constexpr = 1024 // k.dtype.element_ty.primitive_bitwidth  # 128 bytes
    k_lines = (k + rows * k_row)[:, None] + tl.arange(0, 1 if DK < 2 * LINE else 2) * LINE
    v_lines = (v + rows * v_row)[:, None] + tl.arange(0, 1 if DV < 2 * LINE else 2) * LINE
    asm: tl.constexpr = "prefetch.global.L2 [$1]; mov.u32 $0, 0;"
    tl.inline_asm_elementwise(asm, "=r,l", [k_lines], dtype=tl.int32, is_pure=False, pack=1)
    tl.inline_asm_elementwise(asm, "=r,l", [v_lines], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def _queries(q, valid, DK: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr):
    """Queries at pointers q [R], cut where their dimension is no power of two: [R, D0] and, if D1 is not 0, [R, D1]."""
    d0 = tl.arange(0, D0)
    q0 = tl.load(q[:, None] + d0, mask=valid[:, None] & (d0 < DK), other=0.0)
    q1 = q0
    if D1:
        d1 = D0 + tl.arange(0, D1)
        q1 = tl.load(q[:, None] + d1, mask=valid[:, None] & (d1 < DK), other=0.0)
    return q0, q1


@triton.jit
def _near(own, above, length, begin, WINDOW: tl.constexpr, TILE: tl.constexpr):
    """The near keys of a row at position `own`: positions low..stop-1, but of those from `length` on only root..stop-1."""
    low = tl.maximum(own - WINDOW + 1, 0) if WINDOW else tl.maximum(own // TILE - 1, 0) * TILE
    e = tl.arange(0, _MAX_NODES)
    root = tl.minimum(length + tl.min(tl.where(above >= 0, e, _MAX_NODES), 0), own)
    return tl.minimum(tl.maximum(low, begin), own), own + 1, root


@triton.jit
def _block(nodes, splits, GROUP: tl.constexpr, KV_HEADS: tl.constexpr, ROWS: tl.constexpr):
    """What this program serves. Programs of a request: far splits, last first (the long ones), then the nodes.

    Returns whether it takes a far split, its key head, its node (if near), its split (if far), the first of its rows
    among the (node, head) rows of the key head, and which rows there are, their nodes and their heads, [ROWS] each.
    """
    blocks = tl.cdiv(nodes * GROUP, ROWS)
    far = tl.program_id(0) < splits * blocks * KV_HEADS
    task = tl.program_id(0) - tl.where(far, 0, splits * blocks * KV_HEADS)
    kv_head, task = task % KV_HEADS, task // KV_HEADS
    r = tl.arange(0, ROWS)
    origin = tl.where(far, task % blocks * ROWS, task * GROUP)
    valid = r < tl.minimum(nodes * GROUP - origin, tl.where(far, ROWS, GROUP))
    row, head = (origin + r) // GROUP, kv_head * GROUP + (origin + r) % GROUP
    return far, kv_head, task, splits - 1 - task // blocks, origin, valid, row, head


@triton.jit
def _ancestors(path, length, nodes, near, TILE: tl.constexpr):
    """A near run's rows of the step by position, in the tile of `length` and in the one after: [TILE] each."""
    ahead = length // TILE * TILE - length + tl.arange(0, TILE)
    here = tl.load(path + ahead, mask=(ahead >= 0) & (ahead < nodes) & near, other=0)
    there = tl.load(path + ahead + TILE, mask=(ahead + TILE < nodes) & near, other=0)
    return here, there


@triton.jit
def _add_up(
    queries, pages, k, v, span, length, own, node, ancestors, wrap, scale, k_row, v_row,
    DK: tl.constexpr, DV: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, DV_PAD: tl.constexpr, PAGE: tl.constexpr,
    WINDOW: tl.constexpr, TILE: tl.constexpr, ROWS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """A near run, over positions `span`: low, stop and root as from `_near`. Returns what `_soften` calls the state.

    pages: pointer to the request's row of the table; own: the node's position.
    """
    low, stop, root = span
    here, there = ancestors
    m, total, acc = _fresh(ROWS, DV_PAD)
    # a page's number, then its keys: two loads deep
    for base in tl.range(low // TILE * TILE, stop, TILE, num_stages=1 + 2 * DEPTH):
        pos = base + tl.arange(0, TILE)
        exists = (pos >= low) & (pos < stop) & ((pos < length) | (pos >= root))
        step = tl.where(pos == own, node, tl.where(base > length, there, here))
        slot = tl.where(pos < length, pos, length + step)
        page = tl.load(pages + (slot // PAGE % wrap if WINDOW else slot // PAGE), mask=exists, other=0)
        m, total, acc = _absorb(
            (m, total, acc), queries, k, v, page.to(tl.int64) * PAGE + slot % PAGE, exists,
            exists[None, :], scale, k_row, v_row, DK, DV, D0, D1, DV_PAD,
        )  # fmt: skip
    return m, total, acc


@triton.jit
def _store_run(state, acc_out, stats_out, run, runs, valid, dv, ROWS: tl.constexpr, DV: tl.constexpr):
    """state: from `_add_up`; run: the first row's, counted over all rows (int64); runs: how many each row has."""
    m, total, acc = state
    target = tl.arange(0, ROWS) * runs
    tl.store(acc_out + run * DV + (target * DV)[:, None] + dv, acc, mask=valid[:, None] & (dv < DV))
    tl.store(stats_out + run * 2 + target * 2, m, mask=valid)
    tl.store(stats_out + run * 2 + target * 2 + 1, total, mask=valid)


@triton.jit(
    do_not_specialize=["position_stride", "page_stride", "wrap", "nodes", "splits"],
    do_not_specialize_on_alignment=_SMALL,
)
def runs_kernel(
    q, k_cache, v_cache, pages, lengths, positions, paths, first, sink, out, acc_out, stats_out,
    q_batch, q_node, q_head, k_row, k_head, v_row, v_head, position_stride, page_stride, wrap, nodes, splits, scale,
    GROUP: tl.constexpr, KV_HEADS: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr,
    D0: tl.constexpr, D1: tl.constexpr, DV_PAD: tl.constexpr, PAGE: tl.constexpr, WINDOW: tl.constexpr,
    TILE: tl.constexpr, SPLITS: tl.constexpr, ROWS: tl.constexpr,
    DEPTH: tl.constexpr, WHOLE: tl.constexpr, SINK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One run of one block of rows, see `_block`; the result itself where there is no other run (WHOLE).

    The kernel before, which makes the queries and the rows' own keys, lets this one start only after what was before it has
    ended: all else may be read, and cached keys asked for, before waiting.
    """
    b = tl.program_id(1)
    far, kv_head, node, split, origin, valid, row, head = _block(nodes, splits, GROUP, KV_HEADS, ROWS)

    # all that needs no other load is read at once
    dv, e = tl.arange(0, DV_PAD), tl.arange(0, _MAX_NODES)
    positions += b * position_stride
    path = paths + (b * nodes + node) * nodes
    length = tl.load(lengths + b).to(tl.int32)
    begin = tl.load(first + b).to(tl.int32)
    own = tl.load(positions + node, mask=not far, other=-1).to(tl.int32)
    above = tl.load(path + e, mask=(e < nodes) & (not far), other=-1)
    position = tl.load(positions + row, mask=valid, other=0).to(tl.int32)
    pages += b * page_stride
    k_cache += kv_head * k_head
    v_cache += kv_head * v_head
    if PDL:
        if WINDOW == 0 and far:
            low = tl.maximum(_split_start(split, SPLITS), begin)
            _ask(pages, k_cache, v_cache, low // TILE * TILE, length, k_row, v_row, DK, DV, PAGE, TILE)
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    queries = _queries(q + b.to(tl.int64) * q_batch + row * q_node + head * q_head, valid, DK, D0, D1)

    root = length
    if far:
        low = tl.maximum(_split_start(split, SPLITS), begin)
        stop = tl.minimum(_split_start(split + 1, SPLITS), _far_end(length + nodes - 1, length, TILE))
    else:
        low, stop, root = _near(own, above, length, begin, WINDOW, TILE)
    if low // TILE * TILE >= stop:
        return
    ancestors = _ancestors(path, length, nodes, not far, TILE)  # read here, out of the way of the loop's loads
    if WINDOW == 0 and far:
        end = _far_end(position, length, TILE)
        page = _page(pages, low // TILE * TILE, stop, PAGE)
        run = _fresh(ROWS, DV_PAD)
        for base in tl.range(low // TILE * TILE, stop, TILE, num_stages=1 + DEPTH):
            pos = base + tl.arange(0, TILE)
            exists = (pos >= low) & (pos < stop)
            run, page = _far_step(
                run, queries, pages, page, k_cache, v_cache, base, stop, exists, exists & (pos < end[:, None]), scale,
                k_row, v_row, DK, DV, D0, D1, DV_PAD, PAGE, TILE,
            )  # fmt: skip
    else:
        run = _add_up(
            queries, pages, k_cache, v_cache, (low, stop, root), length, own, node, ancestors, wrap, scale, k_row, v_row,
            DK, DV, D0, D1, DV_PAD, PAGE, WINDOW, TILE, ROWS, DEPTH,
        )  # fmt: skip
    m, total, acc = run
    if WHOLE:
        y = _finish(m, total, acc, tl.load(sink + head, mask=valid, other=0.0).to(tl.float32) if SINK else total, SINK)
        out += b.to(tl.int64) * nodes * (KV_HEADS * GROUP * DV)
        target = (row * (KV_HEADS * GROUP) + head) * DV
        tl.store(out + target[:, None] + dv, y.to(out.dtype.element_ty), mask=valid[:, None] & (dv < DV))
    else:
        run = ((b * KV_HEADS + kv_head) * nodes * GROUP + origin).to(tl.int64) * (splits + 1)
        run += tl.where(far, split + 1, 0)
        _store_run((m, total, acc), acc_out, stats_out, run, splits + 1, valid, dv, ROWS, DV)


@triton.jit
def _load_run(acc, stats, run, there, dv, DV: tl.constexpr):
    """One row's; of a run that is not there, nothing."""
    m = tl.load(stats + run * 2, mask=there, other=float("-inf"))
    total = tl.load(stats + run * 2 + 1, mask=there, other=0.0)
    return m, total, tl.load(acc + run * DV + dv, mask=there & (dv < DV), other=0.0)


@triton.jit(do_not_specialize=["position_stride", "nodes", "splits"], do_not_specialize_on_alignment=_SMALL)
def merge_kernel(
    acc_in, stats_in, lengths, positions, first, sink, out, position_stride, nodes, splits,
    GROUP: tl.constexpr, KV_HEADS: tl.constexpr, DV: tl.constexpr, DV_PAD: tl.constexpr,
    TILE: tl.constexpr, SPLITS: tl.constexpr, SINK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """The runs of one node's head, merged one by one. Run 0 is the near one and comes last, run c + 1 is that of split c."""
    row, head = tl.program_id(0) // (KV_HEADS * GROUP), tl.program_id(0) % (KV_HEADS * GROUP)
    b, node = row // nodes, row % nodes
    position = tl.load(positions + b * position_stride + node).to(tl.int32)
    end = _far_end(position, tl.load(lengths + b).to(tl.int32), TILE)
    begin = tl.load(first + b).to(tl.int32)
    weight = tl.load(sink + head).to(tl.float32) if SINK else 0.0
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    dv = tl.arange(0, DV_PAD)
    state = tl.full((), float("-inf"), tl.float32), tl.zeros((), tl.float32), tl.zeros([DV_PAD], tl.float32)
    runs = ((b * KV_HEADS + head // GROUP) * nodes * GROUP + node * GROUP + head % GROUP).to(tl.int64) * (splits + 1)
    stats_in += runs * 2
    acc_in += runs * DV
    done = 0
    while _split_start(done, SPLITS) < end:
        for i in tl.static_range(_MERGED):  # their loads do not wait for one another
            run = done + i
            low = tl.maximum(_split_start(run, SPLITS), begin) // TILE * TILE
            there = (low < tl.minimum(_split_start(run + 1, SPLITS), end)) & (run < splits)
            state = _merge(state, _load_run(acc_in, stats_in, run + 1, there, dv, DV))
        done += _MERGED
    m, total, acc = _merge(state, _load_run(acc_in, stats_in, 0, True, dv, DV))
    y = _finish(m, total, acc, weight, SINK)
    tl.store(out + tl.program_id(0).to(tl.int64) * DV + dv, y.to(out.dtype.element_ty), mask=dv < DV)
