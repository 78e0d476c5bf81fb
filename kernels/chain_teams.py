"""Attention of chains of few rows on Hopper, written in Gluon: the bits of kernels/tree_attention.py, see there.

A step of many requests is bound by reading their keys. Here a warp of its own fetches tiles of keys and values through the
copy engine into a ring of stages, and four warps use them. Programs walk over (request, key head): the next one's tiles come
while this one's are added up, so memory is never idle between two, as it is where each has a program of its own.

A unit's rows, (node, head) pairs, are at most 64, as many as a tile has positions. They may stand in two tiles of positions,
so that the far keys of some end a tile later: every row has its own runs, though all see a tile at the same time. Only Hopper
has wgmma, and Triton's interpreter has no Gluon: elsewhere chain_attention takes `chain_kernel`.
"""

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor as Boxes
from triton.language.core import _aggregate as aggregate

from mtp_engine.kernels import tree_attention_kernels as runs
from mtp_engine.kernels.dense_teams import _pdl_launch, _pdl_wait
from mtp_engine.kernels.launch import SHARED, SMS

TILE = gl.constexpr(64)  # positions, and (node, head) rows
_SCORES = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16]))
_LINEAR = gl.constexpr(gl.BlockedLayout([1, 8], [2, 16], [4, 1], [1, 0]))

_split_start = gluon.jit(runs._split_start.fn)


@aggregate
class _Work:
    """What all warps share. units: (request, key head); nodes: of a request."""

    ks: gl.shared_memory_descriptor
    vs: gl.shared_memory_descriptor
    ready: gl.shared_memory_descriptor
    empty: gl.shared_memory_descriptor
    lengths: gl.tensor
    units: gl.tensor
    nodes: gl.tensor
    KV_HEADS: gl.constexpr
    STAGES: gl.constexpr

    @gluon.constexpr_function
    def __init__(self, ks, vs, ready, empty, lengths, units, nodes, KV_HEADS, STAGES):  # type: ignore[no-untyped-def]
        self.ks, self.vs, self.ready, self.empty = ks, vs, ready, empty
        self.lengths, self.units, self.nodes = lengths, units, nodes
        self.KV_HEADS, self.STAGES = gl.constexpr(KV_HEADS), gl.constexpr(STAGES)


@gluon.jit
def _unit(work, unit):
    """A unit's request, key head, committed length, and the tiles of its first and last row."""
    b = unit // work.KV_HEADS
    length = gl.load(work.lengths + b).to(gl.int32)
    return b, unit % work.KV_HEADS, length, length // TILE, (length + work.nodes - 1) // TILE


@gluon.jit
def _fetch(
    work, k_cache, v_cache, pages, page_stride, DK: gl.constexpr, DV: gl.constexpr, PAGE: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """What the fetching warp does. Keys before the step's own are there before the kernel before this one has ended."""
    i = 0
    for unit in range(gl.program_id(0), work.units, gl.num_programs(0)):
        b, kv_head, _, tile, last = _unit(work, unit)
        table = pages + b * page_stride
        page = gl.load(table)
        for t in range(0, last + 1):
            if PDL:  # noqa: SIM102  one is known when this is compiled
                if t >= tile:
                    _pdl_wait()
            stage, row = i % work.STAGES, page * PAGE + t * TILE % PAGE
            page = gl.load(table + gl.minimum(t + 1, last) * TILE // PAGE)
            full = work.ready.index(stage)
            mbarrier.wait(work.empty.index(stage), (i // work.STAGES & 1) ^ 1)
            mbarrier.expect(full, TILE * (DK + DV) * 2)
            tma.async_copy_global_to_shared(k_cache, [row, kv_head * DK], full, work.ks.index(stage))
            tma.async_copy_global_to_shared(v_cache, [row, kv_head * DV], full, work.vs.index(stage))
            i += 1


@gluon.jit
def _absorb(work, state, q, i, t, own, stop, scale, NEAR: gl.constexpr):
    """One tile's step of the online softmax, `_soften` of tree_attention_kernels operation by operation. NEAR: row r sees the
    positions up to own[r] only, and those from `stop` on may hold anything."""
    m, total, acc = state
    stage = i % work.STAGES
    mbarrier.wait(work.ready.index(stage), i // work.STAGES & 1)
    s = gl.zeros([TILE, TILE], gl.float32, _SCORES)
    s = warpgroup_mma(q, work.ks.index(stage).permute((1, 0)), s, use_acc=False)
    values = work.vs.index(stage)
    if NEAR:
        position = t * TILE + gl.arange(0, TILE, layout=gl.SliceLayout(0, _SCORES))[None, :]
        s = gl.where(position <= own[:, None], s, float("-inf"))
        if stop < (t + 1) * TILE:
            there = t * TILE + gl.arange(0, TILE, layout=gl.SliceLayout(1, _LINEAR))[:, None] < stop
            held = values.load(_LINEAR)
            values.store(gl.where(there, held, gl.zeros_like(held)))
            fence_async_shared()
    top = gl.maximum(m, gl.max(s, 1) * scale)
    safe = gl.where(top == float("-inf"), 0.0, top)
    p = gl.exp2(gl.fma(s, gl.full([TILE, TILE], scale, gl.float32, _SCORES), gl.zeros_like(s) - safe[:, None]))
    shrink = gl.exp2(m - safe)
    acc = acc * gl.convert_layout(shrink, gl.SliceLayout(1, acc.type.layout))[:, None]
    weights = gl.convert_layout(p.to(gl.bfloat16), gl.DotOperandLayout(0, acc.type.layout, 2))
    acc = warpgroup_mma(weights, values, acc)
    mbarrier.arrive(work.empty.index(stage))
    return top, gl.fma(total, shrink, gl.sum(p, 1)), acc


@gluon.jit
def _fresh(DV: gl.constexpr):
    """The state that has seen no key."""
    ROW: gl.constexpr = gl.SliceLayout(1, _SCORES)
    nothing = gl.zeros([TILE], gl.float32, ROW)
    acc = gl.zeros([TILE, DV], gl.float32, gl.NVMMADistributedLayout([3, 0], [4, 1], [16, DV, 16]))
    return gl.full([TILE], float("-inf"), gl.float32, ROW), nothing, acc


@gluon.jit
def _merge(state, run):
    """`_merge` of tree_attention_kernels: sums of keys have a layout of their own here."""
    m, total, acc = state
    run_m, run_total, run_acc = run
    top = gl.maximum(m, run_m)
    safe = gl.where(top == float("-inf"), 0.0, top)
    shrink, share = gl.exp2(m - safe), gl.exp2(run_m - safe)
    ROW: gl.constexpr = gl.SliceLayout(1, acc.type.layout)
    kept = gl.zeros_like(acc) + gl.convert_layout(shrink, ROW)[:, None]
    taken = gl.convert_layout(share, ROW)[:, None]
    return top, gl.fma(total, shrink, run_total * share), gl.fma(acc, kept, run_acc * taken)


@gluon.jit
def _either(rows, a, b):
    """State a of some rows [64], and b of the others."""
    wide = gl.convert_layout(rows.to(gl.int32), gl.SliceLayout(1, a[2].type.layout))[:, None] != 0
    return gl.where(rows, a[0], b[0]), gl.where(rows, a[1], b[1]), gl.where(wide, a[2], b[2])


@gluon.jit
def _add_up(
    work, q, out, q_batch, q_node, q_head, scale, GROUP: gl.constexpr, DK: gl.constexpr, DV: gl.constexpr,
    SPLITS: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """What the four warps do."""
    if PDL:
        _pdl_wait()
    if PDL == 1:
        _pdl_launch()
    i = 0
    for unit in range(gl.program_id(0), work.units, gl.num_programs(0)):
        b, kv_head, length, tile, last = _unit(work, unit)
        first, stop = q + b.to(gl.int64) * q_batch + kv_head * GROUP * q_head, length + work.nodes
        queries = _queries(first, q_node, q_head, work.nodes, GROUP, DK)
        own = length + gl.arange(0, TILE, layout=gl.SliceLayout(1, _SCORES)) // GROUP
        late = own >= (tile + 1) * TILE  # rows whose far keys end a tile later
        state, run = _fresh(DV), _fresh(DV)
        split = 0
        edge = _split_start(1, SPLITS)
        for t in range(0, tile):
            run = _absorb(work, run, queries, i, t, own, stop, scale, False)
            i += 1
            ends = (t + 1) * TILE >= edge
            ends_early, ends_late = (t < tile - 1) & (ends | (t + 1 == tile - 1)), ends | (t + 1 == tile)
            if ends_early | (ends_late & (last > tile)):
                which = late & ends_late | (own < (tile + 1) * TILE) & ends_early
                state, run = _either(which, _merge(state, run), state), _either(which, _fresh(DV), run)
            if ends:
                split += 1
                edge = _split_start(split + 1, SPLITS)
        for t in range(tile, last + 1):
            run = _absorb(work, run, queries, i, t, own, stop, scale, True)
            i += 1
        if PDL == 3:  # noqa: SIM102
            if unit + gl.num_programs(0) >= work.units:
                _pdl_launch()
        state = _merge(state, run)
        line = b.to(gl.int64) * work.nodes * work.KV_HEADS + kv_head
        _store(state, out, line, work.nodes, GROUP, work.KV_HEADS, DV)


@gluon.jit
def _queries(q, q_node, q_head, nodes, GROUP: gl.constexpr, DK: gl.constexpr):
    """A unit's queries, [64, DK], as wgmma takes them from registers."""
    LAYOUT: gl.constexpr = gl.DotOperandLayout(0, _SCORES, 2)
    r, column = gl.arange(0, TILE, layout=gl.SliceLayout(1, LAYOUT)), gl.arange(0, DK, layout=gl.SliceLayout(0, LAYOUT))
    row = r // GROUP * q_node + r % GROUP * q_head
    return gl.load(q + row[:, None] + column[None, :], mask=(r // GROUP < nodes)[:, None], other=0.0)


@gluon.jit
def _store(state, out, line, nodes, GROUP: gl.constexpr, KV_HEADS: gl.constexpr, DV: gl.constexpr):
    """A unit's results. line: of its first node's heads, counted in groups of heads."""
    _, total, acc = state
    OUT: gl.constexpr = acc.type.layout
    y = acc / gl.convert_layout(total, gl.SliceLayout(1, OUT))[:, None]
    r, column = gl.arange(0, TILE, layout=gl.SliceLayout(1, OUT)), gl.arange(0, DV, layout=gl.SliceLayout(0, OUT))
    target = ((line + r // GROUP * KV_HEADS) * GROUP + r % GROUP) * DV
    keep = (r // GROUP < nodes)[:, None] & (column < DV)[None, :]
    gl.store(out + target[:, None] + column[None, :], y.to(out.dtype.element_ty), mask=keep)


@gluon.jit(do_not_specialize=["page_stride", "nodes", "units"], do_not_specialize_on_alignment=["pages", "lengths"])
def chain_teams_kernel(
    q, k_cache, v_cache, pages, lengths, out, q_batch, q_node, q_head, page_stride, nodes, units, scale,
    GROUP: gl.constexpr, KV_HEADS: gl.constexpr, DK: gl.constexpr, DV: gl.constexpr, PAGE: gl.constexpr, SPLITS: gl.constexpr,
    STAGES: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """`chain_kernel` of requests that are not packed, without windows, sinks, and positions that have no keys, of at most 64
    (node, head) rows. k_cache, v_cache: descriptors of boxes [64, DK] and [64, DV] over storage rows and (head, column).
    units: see `_Work`."""
    ks = gl.allocate_shared_memory(gl.bfloat16, [STAGES, TILE, DK], k_cache.layout)
    vs = gl.allocate_shared_memory(gl.bfloat16, [STAGES, TILE, DV], v_cache.layout)
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(ready.index(i), count=1)
        mbarrier.init(empty.index(i), count=1)
    work = _Work(ks, vs, ready, empty, lengths, units, nodes, KV_HEADS, STAGES)
    gl.warp_specialize([
        (_add_up, (work, q, out, q_batch, q_node, q_head, scale, GROUP, DK, DV, SPLITS, PDL)),
        (_fetch, (work, k_cache, v_cache, pages, page_stride, DK, DV, PAGE, PDL)),
    ], [1], [24])  # fmt: skip


def suits_teams(q: Tensor, k_cache: Tensor, v_cache: Tensor, page_size: int, tile: int) -> bool:
    """Whether `chain_teams_kernel` can serve a call (arguments as for chain_attention): few rows, and tiles that the copy
    engine can fetch."""
    rows = q.shape[1] * (q.shape[2] // k_cache.shape[1])
    dims = {k_cache.shape[2], v_cache.shape[2]} <= {64, 128} and k_cache.dtype == torch.bfloat16
    whole = all(x.is_contiguous() and x.data_ptr() % 16 == 0 for x in (k_cache, v_cache))
    return rows <= TILE.value == tile and dims and whole and page_size % tile == 0


def chain_teams(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, pages: Tensor, lengths: Tensor, out: Tensor, page_size: int,
    splits: tuple[int, ...], when: int, *, scale: float,
) -> Tensor:  # fmt: skip
    """`out`, written by `chain_teams_kernel`. Arguments as for chain_attention; splits: a Plan's; when: see `overlap`."""
    (batch, nodes, heads, dim), (kv_heads, v_dim), tile = q.shape, v_cache.shape[1:], TILE.value
    units, layout = batch * kv_heads, gl.NVMMASharedLayout(128, 16, 2)
    keys, values = (Boxes.from_tensor(x.flatten(1), [tile, x.shape[2]], layout) for x in (k_cache, v_cache))
    # more stages are no faster, and leave no room to begin beside the kernel before
    stages = SHARED // 2 // (tile * (dim + v_dim) * 2)
    chain_teams_kernel[(min(units, SMS),)](
        q, keys, values, pages, lengths, out, *q.stride()[:3], pages.stride(0), nodes, units, scale * runs.LOG2E.value,
        GROUP=heads // kv_heads, KV_HEADS=kv_heads, DK=dim, DV=v_dim, PAGE=page_size, SPLITS=splits,
        STAGES=stages, PDL=when, launch_pdl=when > 0, num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip
    return out
