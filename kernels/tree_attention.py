"""Attention over a tree of new rows, bit for bit what decoding one row at a time computes at the same position.

A row at position p sees one key per position: below L, the committed length, the cached one, and from L on its
ancestor's or its own. If a row's keys are always added up in the same grouping of *positions*, the other rows of the
step cannot change a bit of its result. The grouping, a function of p alone:

- Tiles of `tile` positions. Within a tile the order is the tensor core's.
- The *near* keys, in the row's own tile and the one before (in a windowed layer: all of the window), are one run of the
  online softmax, tile by tile in ascending order.
- The *far* keys, all below those, fall into splits at fixed positions (`_split_start`), each a run of its own.
- The runs are merged, the near one first, then the splits in ascending order, 16 at a time.

With at most 64 rows and tiles of at least 64 keys, every far key of every row lies below L: it is the same key for all
rows. So a far split is read once per key head, for nodes and grouped heads folded into one block of rows, while a near
run serves one node, whose ancestors it finds through `paths`. Both are programs of one kernel and run the same loop on
blocks of one shape. There a row's result does not depend on the rows beside it, and a tile of which a row sees nothing
leaves the row's state as it was, bit for bit.
"""

from dataclasses import dataclass
from typing import final

import torch
import triton
import triton.language as tl
from torch import Tensor

from mtp_engine.kernels.ancestry import MAX_NODES
from mtp_engine.kernels.launch import pdl
from mtp_engine.kernels.reference import attend, visible_bias

_MAX_NODES = tl.constexpr(MAX_NODES)
_MERGED = tl.constexpr(16)  # runs that the merge takes in at once
_SMALL = ["pages", "lengths", "positions", "paths", "first", "sink"]  # one compiled kernel, wherever these begin
_LOG2E = tl.constexpr(1.4426950408889634)


@final
@dataclass(frozen=True)
class Plan:
    """What may be tuned. `tile` and `splits` are part of the arithmetic; the others change no bit.

    splits: (keys per split, how many splits) for two stretches of positions, then the keys per split beyond.
    rows: block of (node, head) rows that share a tile's keys; with tensor cores 16 per warp or more, so that no sum
    crosses warps and blocks of any size add alike.
    depth: tiles that are fetched ahead.
    """

    tile: int = 64
    splits: tuple[int, int, int, int, int] = (128, 32, 1024, 28, 4096)
    rows: int = 64
    warps: int = 4
    depth: int = 2
    merge_warps: int = 1

    @classmethod
    def default(cls, dtype: torch.dtype, rows: int, kv_heads: int, dim: int) -> "Plan":
        """rows: (node, head) rows that share far keys, or one node's if there are none. They may not decide arithmetic.
        dim: of queries."""
        depth = 2 if dim <= 64 else 1  # measured: wide heads gain more from two programs per multiprocessor
        # few heads make few programs: shorter splits keep more of the GPU busy
        splits = (128, 32, 1024, 28, 4096) if kv_heads >= 8 else (128, 32, 512, 56, 4096)
        if dtype == torch.float32:  # without tensor cores; only exact, not fast
            return cls(splits=splits, rows=16, warps=8, depth=0)
        return cls(splits=splits, depth=depth) if rows <= 64 else cls(splits=splits, rows=128, warps=8, depth=depth)

    def far(self, bound: int) -> int:
        """How many splits the far keys of a row at position bound - 1 fall into."""
        left, count = ((bound - 1) // self.tile - 1) * self.tile, 0
        for size, most in (self.splits[:2], self.splits[2:4], (self.splits[4], 1 << 30)):
            taken = min(most, max(0, -(-left // size)))
            left, count = left - taken * size, count + taken
        return count


@final
@dataclass(frozen=True)
class Scratch:
    """Room for the runs of one call. Calls that follow one another on a stream may share it."""

    acc: Tensor  # fp32, at least rows * runs * Dv
    stats: Tensor  # fp32, at least rows * runs * 2: maximum and sum

    @classmethod
    def empty(cls, rows: int, runs: int, dim: int, device: torch.device) -> "Scratch":
        """rows: B * N * Hq; runs: 1 + Plan.far(bound); dim: Dv."""
        acc = torch.empty(rows * runs * dim, dtype=torch.float32, device=device)
        return cls(acc, torch.empty(rows * runs * 2, dtype=torch.float32, device=device))


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
        sink *= _LOG2E
        top = tl.maximum(m, sink)
        shrink = tl.exp2(m - top)
        total = tl.fma(total, shrink, tl.exp2(sink - top))
        acc *= shrink if len(acc.shape) == 1 else shrink[:, None]
    return acc / (total if len(acc.shape) == 1 else total[:, None])


@triton.jit
def _absorb(
    state, queries, k, v, rows, exists, seen, scale, k_row, v_row,
    DK: tl.constexpr, DV: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, DV_PAD: tl.constexpr,
):  # fmt: skip
    """One tile's step of the online softmax. A row that sees none of the keys keeps its state bit for bit.

    state: maximum (log2) and sum [R], accumulator [R, DV_PAD]; rows, exists: storage rows of the keys [T] and whether
    to read them; seen: [R, T].
    """
    m, total, acc = state
    q0, q1 = queries
    d0, dv = tl.arange(0, D0), tl.arange(0, DV_PAD)
    k0 = tl.load(k + (rows * k_row)[:, None] + d0, mask=exists[:, None] & (d0 < DK), other=0.0)
    s = tl.dot(q0, tl.trans(k0), input_precision="ieee")
    if D1:
        d1 = D0 + tl.arange(0, D1)
        k1 = tl.load(k + (rows * k_row)[:, None] + d1, mask=exists[:, None] & (d1 < DK), other=0.0)
        s = tl.dot(q1, tl.trans(k1), s, input_precision="ieee")
    values = tl.load(v + (rows * v_row)[:, None] + dv, mask=exists[:, None] & (dv < DV), other=0.0)
    s = tl.where(seen, s * scale, float("-inf"))
    top = tl.maximum(m, tl.max(s, 1))
    safe = tl.where(top == float("-inf"), 0.0, top)  # where a row has seen no key yet
    p = tl.exp2(s - safe[:, None])
    shrink = tl.exp2(m - safe)
    acc = tl.dot(p.to(values.dtype), values, acc * shrink[:, None], input_precision="ieee")
    return top, total * shrink + tl.sum(p, 1), acc


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


@triton.jit(
    do_not_specialize=["position_stride", "page_stride", "wrap", "nodes", "splits"],
    do_not_specialize_on_alignment=_SMALL,
)
def _runs(
    q, k_cache, v_cache, pages, lengths, positions, paths, first, sink, out, acc_out, stats_out,
    q_batch, q_node, q_head, k_row, k_head, v_row, v_head, position_stride, page_stride, wrap, nodes, splits, scale,
    GROUP: tl.constexpr, KV_HEADS: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr,
    D0: tl.constexpr, D1: tl.constexpr, DV_PAD: tl.constexpr, PAGE: tl.constexpr, WINDOW: tl.constexpr,
    TILE: tl.constexpr, SPLITS: tl.constexpr, ROWS: tl.constexpr,
    DEPTH: tl.constexpr, WHOLE: tl.constexpr, SINK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One run of one block of rows. Programs of a request: far splits, last first (the long ones), then the nodes."""
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    b = tl.program_id(1)
    blocks = tl.cdiv(nodes * GROUP, ROWS)
    far = tl.program_id(0) < splits * blocks * KV_HEADS
    task = tl.program_id(0) - tl.where(far, 0, splits * blocks * KV_HEADS)
    kv_head, task = task % KV_HEADS, task // KV_HEADS
    r = tl.arange(0, ROWS)
    origin = tl.where(far, task % blocks * ROWS, task * GROUP)  # of this block among a key head's (node, head) rows
    valid = r < tl.minimum(nodes * GROUP - origin, tl.where(far, ROWS, GROUP))
    row, head = (origin + r) // GROUP, kv_head * GROUP + (origin + r) % GROUP
    dv, e = tl.arange(0, DV_PAD), tl.arange(0, _MAX_NODES)

    # all that needs no other load is read at once
    positions += b * position_stride
    path = paths + (b * nodes + task) * nodes
    length = tl.load(lengths + b).to(tl.int32)
    begin = tl.load(first + b).to(tl.int32)
    own = tl.load(positions + task, mask=not far, other=-1).to(tl.int32)
    above = tl.load(path + e, mask=(e < nodes) & (not far), other=-1)
    position = tl.load(positions + row, mask=valid, other=0).to(tl.int32)
    queries = _queries(q + b.to(tl.int64) * q_batch + row * q_node + head * q_head, valid, DK, D0, D1)

    split, root = splits - 1 - task // blocks, length
    if far:
        low = tl.maximum(_split_start(split, SPLITS), begin)
        stop = tl.minimum(_split_start(split + 1, SPLITS), _far_end(length + nodes - 1, length, TILE))
    else:
        low, stop, root = _near(own, above, length, begin, WINDOW, TILE)
    start = low // TILE * TILE
    if start >= stop:
        return
    end = tl.where(far, _far_end(position, length, TILE), stop)  # where each row's keys of this run end

    # ancestors lie in the tile of `length` and the one after; read here, they are not in the way of the loop's loads
    ahead = length // TILE * TILE - length + tl.arange(0, TILE)
    here = tl.load(path + ahead, mask=(ahead >= 0) & (ahead < nodes) & (not far), other=0)
    there = tl.load(path + ahead + TILE, mask=(ahead + TILE < nodes) & (not far), other=0)
    m, total = tl.full([ROWS], float("-inf"), tl.float32), tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, DV_PAD], tl.float32)
    for base in tl.range(start, stop, TILE, num_stages=1 + 2 * DEPTH):  # a page's number, then its keys: two loads deep
        pos = base + tl.arange(0, TILE)
        exists = (pos >= low) & (pos < stop) & ((pos < length) | (pos >= root))
        step = tl.where(pos == own, task, tl.where(base > length, there, here))
        slot = tl.where(pos < length, pos, length + step)
        page = slot // PAGE % wrap if WINDOW else slot // PAGE
        page = tl.load(pages + b * page_stride + page, mask=exists, other=0)
        m, total, acc = _absorb(
            (m, total, acc), queries, k_cache + kv_head * k_head, v_cache + kv_head * v_head,
            page.to(tl.int64) * PAGE + slot % PAGE, exists, exists & (pos < end[:, None]), scale, k_row, v_row,
            DK, DV, D0, D1, DV_PAD,
        )  # fmt: skip

    if WHOLE:
        y = _finish(m, total, acc, tl.load(sink + head, mask=valid, other=0.0).to(tl.float32) if SINK else total, SINK)
        out += b.to(tl.int64) * nodes * (KV_HEADS * GROUP * DV)
        target = (row * (KV_HEADS * GROUP) + head) * DV
        tl.store(out + target[:, None] + dv, y.to(out.dtype.element_ty), mask=valid[:, None] & (dv < DV))
    else:
        run = ((b * KV_HEADS + kv_head) * nodes * GROUP + origin).to(tl.int64) * (splits + 1)
        run += tl.where(far, split + 1, 0)
        target = r * (splits + 1)
        tl.store(acc_out + run * DV + (target * DV)[:, None] + dv, acc, mask=valid[:, None] & (dv < DV))
        tl.store(stats_out + run * 2 + target * 2, m, mask=valid)
        tl.store(stats_out + run * 2 + target * 2 + 1, total, mask=valid)


@triton.jit(do_not_specialize=["position_stride", "nodes", "splits"], do_not_specialize_on_alignment=_SMALL)
def _merge(
    acc_in, stats_in, lengths, positions, first, sink, out, position_stride, nodes, splits,
    GROUP: tl.constexpr, KV_HEADS: tl.constexpr, DV: tl.constexpr, DV_PAD: tl.constexpr,
    TILE: tl.constexpr, SPLITS: tl.constexpr, SINK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """The runs of one node's head, added up. Run 0 is the near one, run c + 1 that of split c."""
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    row, head = tl.program_id(0) // (KV_HEADS * GROUP), tl.program_id(0) % (KV_HEADS * GROUP)
    b, node = row // nodes, row % nodes
    position = tl.load(positions + b * position_stride + node).to(tl.int32)
    end = _far_end(position, tl.load(lengths + b).to(tl.int32), TILE)
    begin = tl.load(first + b).to(tl.int32)
    weight = tl.load(sink + head).to(tl.float32) if SINK else 0.0
    dv = tl.arange(0, DV_PAD)
    m, total, acc = tl.full((), float("-inf"), tl.float32), tl.zeros((), tl.float32), tl.zeros([DV_PAD], tl.float32)
    runs = ((b * KV_HEADS + head // GROUP) * nodes * GROUP + node * GROUP + head % GROUP).to(tl.int64) * (splits + 1)
    done = 0
    while (done == 0) | (_split_start(done - 1, SPLITS) < end):
        run = done + tl.arange(0, _MERGED)
        begins = tl.maximum(_split_start(run - 1, SPLITS), begin) // TILE * TILE
        there = (run == 0) | ((begins < tl.minimum(_split_start(run, SPLITS), end)) & (run <= splits))
        tops = tl.load(stats_in + runs * 2 + run * 2, mask=there, other=float("-inf"))
        sums = tl.load(stats_in + runs * 2 + run * 2 + 1, mask=there, other=0.0)
        part = tl.load(acc_in + runs * DV + (run * DV)[:, None] + dv, mask=there[:, None] & (dv < DV), other=0.0)
        top = tl.maximum(m, tl.max(tops, 0))
        share, shrink = tl.exp2(tops - top), tl.exp2(m - top)
        acc = acc * shrink + tl.sum(part * share[:, None], 0)
        total = total * shrink + tl.sum(sums * share, 0)
        m = top
        done += _MERGED
    y = _finish(m, total, acc, weight, SINK)
    tl.store(out + tl.program_id(0).to(tl.int64) * DV + dv, y.to(out.dtype.element_ty), mask=dv < DV)


def _blocks(dim: int) -> tuple[int, int]:
    """Powers of two, at least 16, that cover a head's dimension: 192 = 128 + 64, 24 -> 16 + 16, 8 -> 16 + 0."""
    whole = max(16, 1 << dim.bit_length() - 1)
    return whole, max(16, triton.next_power_of_2(dim - whole)) if dim > whole else 0


def tree_attention(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, pages: Tensor, lengths: Tensor, positions: Tensor, paths: Tensor,
    first: Tensor, *, page_size: int, wrap: int, window: int, bound: int, scale: float, sink: Tensor | None,
    scratch: Scratch | None = None, plan: Plan | None = None,
) -> Tensor:  # fmt: skip
    """Attention of up to 64 new rows per request, whose own keys and values are already in the cache.

    q: [B, N, Hq, Dk] bf16 or fp32, k_cache: [R, Hkv, Dk], v_cache: [R, Hkv, Dv] storage rows of one layer, all with a
    contiguous last dimension. pages: [B, P] int32: cache slot t lies in storage row t % page_size of page
    pages[b, t // page_size % wrap]; wrap is smaller than what t reaches only in windowed layers. Row j of the step
    has slot lengths[b] + j. lengths, first: [B] int64, tokens cached and the first position that has a key (a row
    always sees itself). positions: [B, N] int64; paths: [B, N, N] int32 from `ancestry`. window: keys a row sees,
    itself included, 0 = all. bound: no lengths[b] + N exceeds it; it decides the grid, and programs that find nothing
    to do are cheap but not free. scale: of the scores. sink: [Hq] logits that join the denominator.
    Returns [B, N, Hq, Dv] in q's dtype.
    """
    batch, nodes, heads, dim = q.shape
    kv_heads, v_dim = v_cache.shape[1:]
    group = heads // kv_heads
    plan = plan or Plan.default(q.dtype, group if window else nodes * group, kv_heads, dim)
    assert nodes <= MAX_NODES <= plan.tile, "more rows, or smaller tiles, and far keys would differ between rows"
    assert group <= plan.rows, "a node's heads must fit into one block"
    assert all(x.stride(-1) == 1 or x.shape[-1] == 1 for x in (q, k_cache, v_cache, pages, positions)), "last dimension"
    assert all(x.is_contiguous() for x in (paths, lengths, first)), "paths come from ancestry()"
    out = torch.empty(batch, nodes, heads, v_dim, dtype=q.dtype, device=q.device)
    splits = 0 if window else plan.far(bound)
    if splits and scratch is None:
        scratch = Scratch.empty(batch * nodes * heads, 1 + splits, v_dim, q.device)
    acc, stats = (scratch.acc, scratch.stats) if splits and scratch else (out, out)
    assert not splits or acc.numel() >= batch * nodes * heads * (1 + splits) * v_dim, "the scratch is too small"
    shared = {"GROUP": group, "KV_HEADS": kv_heads, "DV": v_dim, "DV_PAD": max(16, triton.next_power_of_2(v_dim))}
    shared |= {"TILE": plan.tile, "SPLITS": plan.splits, "SINK": sink is not None, "PDL": pdl(), "launch_pdl": pdl()}
    whole, rest = _blocks(dim)
    _runs[splits * triton.cdiv(nodes * group, plan.rows) * kv_heads + nodes * kv_heads, batch](
        q, k_cache, v_cache, pages, lengths, positions, paths, first, out if sink is None else sink, out, acc, stats,
        *q.stride()[:3], *k_cache.stride()[:2], *v_cache.stride()[:2], positions.stride(0), pages.stride(0), wrap,
        nodes, splits, scale * _LOG2E.value, DK=dim, D0=whole, D1=rest, PAGE=page_size, WINDOW=window, ROWS=plan.rows,
        DEPTH=plan.depth, WHOLE=splits == 0, num_warps=plan.warps, **shared,
    )  # fmt: skip
    if splits:
        _merge[(batch * nodes * heads,)](
            acc, stats, lengths, positions, first, out if sink is None else sink, out, positions.stride(0), nodes,
            splits, num_warps=plan.merge_warps, **shared,
        )  # fmt: skip
    return out


def tree_attention_twin(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, pages: Tensor, lengths: Tensor, positions: Tensor, paths: Tensor,
    first: Tensor, *, page_size: int, wrap: int, window: int, bound: int, scale: float, sink: Tensor | None,
    scratch: Scratch | None = None, plan: Plan | None = None,
) -> Tensor:  # fmt: skip
    """`tree_attention` in torch: one dense softmax in fp32 over the first `bound` slots and the step's rows."""
    nodes = q.shape[1]
    index = torch.arange(nodes, device=q.device)
    prefix = torch.arange(bound, device=q.device).expand(len(lengths), -1)
    oldest = torch.maximum(positions - window + 1 if window else torch.zeros_like(positions), first[:, None])
    cached = (prefix < lengths[:, None])[:, None] & (prefix[:, None] >= oldest[..., None])
    offsets = (positions - lengths[:, None]).clamp(max=nodes - 1)
    above = paths.long().gather(2, offsets[:, None].expand_as(paths)) == index
    rows = (above & (positions[:, None] >= oldest[..., None])) | (index[:, None] == index)
    seen = torch.cat([cached, rows], -1)
    slots = torch.cat([prefix, lengths[:, None] + index], 1)
    storage = pages.long().gather(1, slots // page_size % wrap) * page_size + slots % page_size
    unseen = ~seen.any(1)[..., None, None]  # may hold anything
    k, v = (cache[storage].masked_fill(unseen, 0) for cache in (k_cache, v_cache))
    return attend(q.contiguous(), k, v, visible_bias(seen, q.shape[2] // k.shape[2]), scale, sink)
