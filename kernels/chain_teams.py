"""Attention of chains of few rows on Hopper, written in Gluon: the bits of kernels/tree_attention.py, see there.

Such a step is bound by reading its requests' keys. Here a warp of its own fetches tiles of keys and values through the copy
engine into a ring of stages, and four warps use them. Programs walk over units of work, each all keys of (request, key head),
or one run of them where these are few: the next unit's tiles come while this one's are added up, so memory is never idle
between two, as it is where each has a program of its own.

A tile has 64 positions, which lie in one page, and a program's 64 rows are (node, head) pairs of one tile of positions. Only
Hopper has wgmma, and Triton's interpreter has no Gluon: elsewhere chain_attention takes `chain_kernel`.
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
from mtp_engine.kernels.launch import SHARED, SMS, cdiv

TILE = gl.constexpr(64)  # positions, and (node, head) rows
_LINEAR = gl.constexpr(gl.BlockedLayout([1, 8], [2, 16], [4, 1], [1, 0]))

_split_start = gluon.jit(runs._split_start.fn)


@aggregate
class _Work:
    """What all warps share. units: (split, request, block of rows, key head); splits: of far keys, 0 where a unit has all keys;
    blocks: of a request's rows; per: of a tile of positions; TAKEN: nodes of a block."""

    ks: gl.shared_memory_descriptor
    vs: gl.shared_memory_descriptor
    ready: gl.shared_memory_descriptor
    empty: gl.shared_memory_descriptor
    lengths: gl.tensor
    units: gl.tensor
    splits: gl.tensor
    batch: gl.tensor
    nodes: gl.tensor
    blocks: gl.tensor
    per: gl.tensor
    KV_HEADS: gl.constexpr
    TAKEN: gl.constexpr
    STAGES: gl.constexpr
    SPLITS: gl.constexpr
    APART: gl.constexpr

    @gluon.constexpr_function
    def __init__(  # type: ignore[no-untyped-def]
        self,
        ks,
        vs,
        ready,
        empty,
        lengths,
        units,
        splits,
        batch,
        nodes,
        blocks,
        per,
        KV_HEADS,
        TAKEN,
        STAGES,
        SPLITS,
        APART,
    ):
        self.ks, self.vs, self.ready, self.empty = ks, vs, ready, empty
        self.lengths, self.units, self.splits, self.batch = lengths, units, splits, batch
        self.nodes, self.blocks, self.per = nodes, blocks, per
        self.KV_HEADS, self.TAKEN, self.STAGES = gl.constexpr(KV_HEADS), gl.constexpr(TAKEN), gl.constexpr(STAGES)
        self.SPLITS, self.APART = gl.constexpr(SPLITS), gl.constexpr(APART)


@gluon.jit
def _unit(work, unit):
    """A unit's key head, request, committed length, tile of positions, rows (positions low..high-1), tiles of keys
    (begin..end-1, of which there may be none), and, where units are runs (APART), its run's number: 0 is the near one, which
    comes last, as far ones are longer."""
    kv_head, rest = unit % work.KV_HEADS, unit // work.KV_HEADS
    b, block = rest % work.batch, rest // work.batch % work.blocks  # the last blocks are empty, but for a few requests
    length = gl.load(work.lengths + b).to(gl.int32)
    tile = length // TILE + block // work.per
    low = gl.maximum(tile * TILE, length) + block % work.per * work.TAKEN
    high = gl.minimum(gl.minimum(low + work.TAKEN, (tile + 1) * TILE), length + work.nodes)
    begin, end, run = 0, tile + 1, 0
    if work.APART:
        run = work.splits - rest // work.blocks // work.batch
        far = gl.minimum(_split_start(run, work.SPLITS) // TILE, tile - 1)
        begin = gl.where(run > 0, _split_start(run - 1, work.SPLITS) // TILE, gl.maximum(tile - 1, 0))
        end = gl.where(run > 0, far, end)
    return kv_head, b, length, tile, low, high, begin, gl.where(low < high, end, begin), run


@gluon.jit
def _fetch(
    work,
    k_cache,
    v_cache,
    pages,
    page_stride,
    DK: gl.constexpr,
    DV: gl.constexpr,
    PAGE: gl.constexpr,
    PDL: gl.constexpr,
):
    """What the fetching warp does. Far keys are there before the kernel before has ended, the step's own are not."""
    i = 0
    for unit in range(gl.program_id(0), work.units, gl.num_programs(0)):
        kv_head, b, _, tile, _, _, begin, end, _ = _unit(work, unit)
        if begin < end:
            table = pages + b * page_stride
            page = gl.load(table + begin * TILE // PAGE)
            for t in range(begin, end):
                if PDL:  # noqa: SIM102  one is known when this is compiled
                    if t + 1 >= tile:
                        _pdl_wait()
                stage, row = i % work.STAGES, page * PAGE + t * TILE % PAGE
                page = gl.load(table + gl.minimum(t + 1, end - 1) * TILE // PAGE)
                full = work.ready.index(stage)
                mbarrier.wait(work.empty.index(stage), (i // work.STAGES & 1) ^ 1)
                mbarrier.expect(full, TILE * (DK + DV) * 2)
                tma.async_copy_global_to_shared(k_cache, [row, kv_head * DK], full, work.ks.index(stage))
                tma.async_copy_global_to_shared(v_cache, [row, kv_head * DV], full, work.vs.index(stage))
                i += 1


@gluon.jit
def _absorb(work, state, q, i, t, oldest, own, high, scale, NEAR: gl.constexpr):
    """One tile's step of the online softmax, `_soften` of tree_attention_kernels operation by operation. NEAR: row r sees
    positions oldest[r]..own[r] only, and those from `high` on may hold anything."""
    m, total, acc = state
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    stage = i % work.STAGES
    mbarrier.wait(work.ready.index(stage), i // work.STAGES & 1)
    s = gl.zeros([TILE, TILE], gl.float32, SCORES)
    s = warpgroup_mma(q, work.ks.index(stage).permute((1, 0)), s, use_acc=False)
    values = work.vs.index(stage)
    if NEAR:
        position = t * TILE + gl.arange(0, TILE, layout=gl.SliceLayout(0, SCORES))[None, :]
        s = gl.where((position >= oldest[:, None]) & (position <= own[:, None]), s, float("-inf"))
        if high < (t + 1) * TILE:
            there = t * TILE + gl.arange(0, TILE, layout=gl.SliceLayout(1, _LINEAR))[:, None] < high
            held = values.load(_LINEAR)
            values.store(gl.where(there, held, gl.zeros_like(held)))
            fence_async_shared()
    top = gl.maximum(m, gl.max(s, 1) * scale)
    safe = gl.where(top == float("-inf"), 0.0, top)
    p = gl.exp2(gl.fma(s, gl.full([TILE, TILE], scale, gl.float32, SCORES), gl.zeros_like(s) - safe[:, None]))
    shrink = gl.exp2(m - safe)
    acc = acc * gl.convert_layout(shrink, gl.SliceLayout(1, acc.type.layout))[:, None]
    weights = gl.convert_layout(p.to(gl.bfloat16), gl.DotOperandLayout(0, acc.type.layout, 2))
    acc = warpgroup_mma(weights, values, acc)
    mbarrier.arrive(work.empty.index(stage))
    return top, gl.fma(total, shrink, gl.sum(p, 1)), acc


@gluon.jit
def _fresh(DV: gl.constexpr):
    """The state that has seen no key."""
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    ROW: gl.constexpr = gl.SliceLayout(1, SCORES)
    empty, nothing = gl.full([TILE], float("-inf"), gl.float32, ROW), gl.zeros([TILE], gl.float32, ROW)
    return empty, nothing, gl.zeros([TILE, DV], gl.float32, gl.NVMMADistributedLayout([3, 0], [4, 1], [16, DV, 16]))


@gluon.jit
def _add_up(
    work, q, out, stats, q_batch, q_node, q_head, scale, GROUP: gl.constexpr, DK: gl.constexpr, DV: gl.constexpr,
    PDL: gl.constexpr,
):  # fmt: skip
    """What the four warps do."""
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    QUERIES: gl.constexpr = gl.DotOperandLayout(0, SCORES, 2)
    if PDL:
        _pdl_wait()
    if PDL == 1:
        _pdl_launch()
    i = 0
    for unit in range(gl.program_id(0), work.units, gl.num_programs(0)):
        kv_head, b, length, tile, low, high, begin, end, number = _unit(work, unit)
        if begin < end:
            r = gl.arange(0, TILE, layout=gl.SliceLayout(1, QUERIES))
            column = gl.arange(0, DK, layout=gl.SliceLayout(0, QUERIES))
            node = low - length + r // GROUP
            first = b.to(gl.int64) * q_batch + node * q_node + (kv_head * GROUP + r % GROUP) * q_head
            queries = gl.load(q + first[:, None] + column[None, :], mask=(low + r // GROUP < high)[:, None], other=0.0)

            own = low + gl.arange(0, TILE, layout=gl.SliceLayout(1, SCORES)) // GROUP
            oldest = gl.minimum(gl.maximum((tile - 1) * TILE, 0), own)
            state, run = _fresh(DV), _fresh(DV)
            split = 0
            edge = _split_start(1, work.SPLITS)
            for t in range(begin, gl.minimum(end, tile - 1)):
                run = _absorb(work, run, queries, i, t, oldest, own, high, scale, False)
                i += 1
                if not work.APART:  # noqa: SIM102
                    if ((t + 1) * TILE >= edge) | (t + 1 == tile - 1):
                        state = _join(state, run)
                        run = _fresh(DV)
                        split += 1
                        edge = _split_start(split + 1, work.SPLITS)
            for t in range(gl.maximum(tile - 1, begin), end):
                run = _absorb(work, run, queries, i, t, oldest, own, high, scale, True)
                i += 1
            if PDL == 3:  # noqa: SIM102
                if unit + gl.num_programs(0) >= work.units:
                    _pdl_launch()
            if work.APART:
                line = ((b * work.KV_HEADS + kv_head) * work.nodes + low - length) * GROUP
                _store_run(run, out, stats, line, work.splits + 1, number, (high - low) * GROUP, DV)
            else:
                line = (b.to(gl.int64) * work.nodes + low - length) * work.KV_HEADS + kv_head
                _store(_join(state, run), out, line, high - low, GROUP, work.KV_HEADS, DV)


@gluon.jit
def _store_run(run, acc_out, stats_out, line, runs, number, count, DV: gl.constexpr):
    """A run of `count` rows from `line` on, as merge_kernel takes it. runs: of each row."""
    m, total, acc = run
    OUT: gl.constexpr = acc.type.layout
    r, column = gl.arange(0, TILE, layout=gl.SliceLayout(1, OUT)), gl.arange(0, DV, layout=gl.SliceLayout(0, OUT))
    at = (line + r).to(gl.int64) * runs + number
    gl.store(acc_out + (at * DV)[:, None] + column[None, :], acc, mask=(r < count)[:, None] & (column < DV)[None, :])
    r = gl.arange(0, TILE, layout=m.type.layout)
    at = (line + r).to(gl.int64) * runs + number
    gl.store(stats_out + at * 2, m, mask=r < count)
    gl.store(stats_out + at * 2 + 1, total, mask=r < count)


@gluon.jit
def _store(state, out, line, nodes, GROUP: gl.constexpr, KV_HEADS: gl.constexpr, DV: gl.constexpr):
    """The results of `nodes` nodes, the first of which has its key head's rows at `line`, counted in groups of heads."""
    _, total, acc = state
    OUT: gl.constexpr = acc.type.layout
    y = acc / gl.convert_layout(total, gl.SliceLayout(1, OUT))[:, None]
    r, column = gl.arange(0, TILE, layout=gl.SliceLayout(1, OUT)), gl.arange(0, DV, layout=gl.SliceLayout(0, OUT))
    target = ((line + r // GROUP * KV_HEADS) * GROUP + r % GROUP) * DV
    keep = (r // GROUP < nodes)[:, None] & (column < DV)[None, :]
    gl.store(out + target[:, None] + column[None, :], y.to(out.dtype.element_ty), mask=keep)


@gluon.jit
def _join(state, run):
    """`_merge` of rows: sums of keys have a layout of their own."""
    m, total, acc = state
    run_m, run_total, run_acc = run
    top = gl.maximum(m, run_m)
    safe = gl.where(top == float("-inf"), 0.0, top)
    shrink, share = gl.exp2(m - safe), gl.exp2(run_m - safe)
    ROW: gl.constexpr = gl.SliceLayout(1, acc.type.layout)
    kept = gl.zeros_like(acc) + gl.convert_layout(shrink, ROW)[:, None]
    taken = gl.convert_layout(share, ROW)[:, None]
    return top, gl.fma(total, shrink, run_total * share), gl.fma(acc, kept, run_acc * taken)


@gluon.jit(
    do_not_specialize=["page_stride", "batch", "nodes", "units", "splits", "blocks", "per"],
    do_not_specialize_on_alignment=["pages", "lengths"],
)
def chain_teams_kernel(
    q, k_cache, v_cache, pages, lengths, out, stats, q_batch, q_node, q_head, page_stride, batch, nodes, units, splits,
    blocks, per, scale, GROUP: gl.constexpr, KV_HEADS: gl.constexpr, DK: gl.constexpr, DV: gl.constexpr, PAGE: gl.constexpr,
    SPLITS: gl.constexpr, TAKEN: gl.constexpr, STAGES: gl.constexpr, APART: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """Attention of chains that are not packed, without windows, sinks, and positions that have no keys. k_cache, v_cache:
    descriptors of boxes [64, DK] and [64, DV] over storage rows and (head, column). units, splits, blocks, per: see `_Work`.
    Writes `out` as `chain_kernel` does, or, APART, the runs for merge_kernel: fp32 accumulators, and maxima and sums to stats."""
    ks = gl.allocate_shared_memory(gl.bfloat16, [STAGES, TILE, DK], k_cache.layout)
    vs = gl.allocate_shared_memory(gl.bfloat16, [STAGES, TILE, DV], v_cache.layout)
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(ready.index(i), count=1)
        mbarrier.init(empty.index(i), count=1)
    work = _Work(
        ks, vs, ready, empty, lengths, units, splits, batch, nodes, blocks, per, KV_HEADS, TAKEN, STAGES, SPLITS, APART
    )
    gl.warp_specialize([
        (_add_up, (work, q, out, stats, q_batch, q_node, q_head, scale, GROUP, DK, DV, PDL)),
        (_fetch, (work, k_cache, v_cache, pages, page_stride, DK, DV, PAGE, PDL)),
    ], [1], [24])  # fmt: skip


def suits_teams(k_cache: Tensor, v_cache: Tensor, page_size: int, tile: int) -> bool:
    """Whether the copy engine can fetch tiles of this cache ([R, Hkv, Dk] and [R, Hkv, Dv]) for `chain_teams_kernel`."""
    dims = {k_cache.shape[2], v_cache.shape[2]} <= {64, 128} and k_cache.dtype == torch.bfloat16
    whole = all(x.is_contiguous() and x.data_ptr() % 16 == 0 for x in (k_cache, v_cache))
    return dims and whole and tile == TILE.value and page_size % tile == 0


def add_up(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, pages: Tensor, lengths: Tensor, out: Tensor, stats: Tensor | None = None, *,
    page_size: int, scale: float, splits: tuple[int, ...], when: int, apart: int = 0,
) -> None:  # fmt: skip
    """Launches `chain_teams_kernel`. Arguments as for tree_attention; out, or, of so many far splits that stand apart, fp32
    accumulators with stats; splits: a Plan's; when: see `overlap`."""
    (batch, nodes, heads, dim), (kv_heads, v_dim), tile = q.shape, v_cache.shape[1:], TILE.value
    group, layout = heads // kv_heads, gl.NVMMASharedLayout(128, 16, 2)
    assert group <= tile, "a node's heads must fit into one block"
    taken = tile // group
    per = cdiv(min(nodes, tile), taken)
    blocks = (1 + cdiv(nodes - 1, tile)) * per  # of positions: the first row may stand anywhere in its own tile
    units = (1 + apart) * batch * blocks * kv_heads
    keys, values = (Boxes.from_tensor(x.flatten(1), [tile, x.shape[2]], layout) for x in (k_cache, v_cache))
    chain_teams_kernel[(min(units, SMS),)](
        q, keys, values, pages, lengths, out, out if stats is None else stats, *q.stride()[:3], pages.stride(0), batch, nodes,
        units, apart, blocks, per, scale * runs.LOG2E.value, GROUP=group, KV_HEADS=kv_heads, DK=dim, DV=v_dim, PAGE=page_size,
        SPLITS=splits, TAKEN=taken, STAGES=min(8, SHARED // (tile * (dim + v_dim) * 2)), APART=stats is not None, PDL=when,
        launch_pdl=when > 0, num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip
