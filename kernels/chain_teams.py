"""Attention of few rows of many requests on Hopper, written in Gluon: the bits of kernels/chain_attention_kernels.py.

A step of many requests is bound by reading their keys. Here a warp of its own fetches tiles of keys and values through the
copy engine into a ring of stages, and four warps use them. Programs walk over (request, key head): the next one's tiles come
while this one's are added up, so memory is never idle between two, as it is where each has a program of its own.

A tile has 64 positions, which lie in one page, and a program's 64 rows are (node, head) pairs of one tile of positions. Only
Hopper has wgmma, and Triton's interpreter has no Gluon: elsewhere chain_attention takes `chain_kernel`.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
)
from triton.language.core import _aggregate as aggregate

from mtp_engine.kernels import tree_attention_kernels as runs
from mtp_engine.kernels.dense_teams import _pdl_launch, _pdl_wait

TILE = gl.constexpr(64)  # positions, and (node, head) rows
_LINEAR = gl.constexpr(gl.BlockedLayout([1, 8], [2, 16], [4, 1], [1, 0]))

_split_start = gluon.jit(runs._split_start.fn)


@aggregate
class _Work:
    """What all warps share. units: (request, block of rows, key head); blocks: of a request's rows; per: of a tile of
    positions; taken: nodes of a block."""

    ks: gl.shared_memory_descriptor
    vs: gl.shared_memory_descriptor
    ready: gl.shared_memory_descriptor
    empty: gl.shared_memory_descriptor
    lengths: gl.tensor
    units: gl.tensor
    nodes: gl.tensor
    blocks: gl.tensor
    per: gl.tensor
    KV_HEADS: gl.constexpr
    TAKEN: gl.constexpr
    STAGES: gl.constexpr

    @gluon.constexpr_function
    def __init__(self, ks, vs, ready, empty, lengths, units, nodes, blocks, per, KV_HEADS, TAKEN, STAGES):  # type: ignore[no-untyped-def]
        self.ks, self.vs, self.ready, self.empty = ks, vs, ready, empty
        self.lengths, self.units, self.nodes, self.blocks, self.per = lengths, units, nodes, blocks, per
        self.KV_HEADS, self.TAKEN, self.STAGES = gl.constexpr(KV_HEADS), gl.constexpr(TAKEN), gl.constexpr(STAGES)


@gluon.jit
def _unit(work, unit):
    """A unit's key head, request, committed length, tile of positions, and rows: positions low..high-1, of which there may
    be none."""
    b, block = unit // work.KV_HEADS // work.blocks, unit // work.KV_HEADS % work.blocks
    length = gl.load(work.lengths + b).to(gl.int32)
    tile = length // TILE + block // work.per
    low = gl.maximum(tile * TILE, length) + block % work.per * work.TAKEN
    high = gl.minimum(gl.minimum(low + work.TAKEN, (tile + 1) * TILE), length + work.nodes)
    return unit % work.KV_HEADS, b, length, tile, low, high


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
        kv_head, b, _, tile, low, high = _unit(work, unit)
        table, count = pages + b * page_stride, gl.where(low < high, tile + 1, 0)
        page = gl.load(table)
        for t in range(0, count):
            if PDL:  # noqa: SIM102  one is known when this is compiled
                if t + 2 >= count:
                    _pdl_wait()
            stage, row = i % work.STAGES, page * PAGE + t * TILE % PAGE
            page = gl.load(table + gl.minimum(t + 1, count - 1) * TILE // PAGE)
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
    work, q, out, q_batch, q_node, q_head, scale, GROUP: gl.constexpr, DK: gl.constexpr, DV: gl.constexpr,
    SPLITS: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """What the four warps do."""
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    QUERIES: gl.constexpr = gl.DotOperandLayout(0, SCORES, 2)
    OUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, DV, 16])
    if PDL:
        _pdl_wait()
    if PDL == 1:
        _pdl_launch()
    i = 0
    for unit in range(gl.program_id(0), work.units, gl.num_programs(0)):
        kv_head, b, length, tile, low, high = _unit(work, unit)
        if low < high:
            r = gl.arange(0, TILE, layout=gl.SliceLayout(1, QUERIES))
            column = gl.arange(0, DK, layout=gl.SliceLayout(0, QUERIES))
            node = low - length + r // GROUP
            first = b.to(gl.int64) * q_batch + node * q_node + (kv_head * GROUP + r % GROUP) * q_head
            queries = gl.load(q + first[:, None] + column[None, :], mask=(low + r // GROUP < high)[:, None], other=0.0)

            own = low + gl.arange(0, TILE, layout=gl.SliceLayout(1, SCORES)) // GROUP
            oldest = gl.minimum(gl.maximum((tile - 1) * TILE, 0), own)
            state, run = _fresh(DV), _fresh(DV)
            split = 0
            edge = _split_start(1, SPLITS)
            for t in range(0, tile - 1):
                run = _absorb(work, run, queries, i, t, oldest, own, high, scale, False)
                i += 1
                if ((t + 1) * TILE >= edge) | (t + 1 == tile - 1):
                    state = _join(state, run)
                    run = _fresh(DV)
                    split += 1
                    edge = _split_start(split + 1, SPLITS)
            for t in range(gl.maximum(tile - 1, 0), tile + 1):
                run = _absorb(work, run, queries, i, t, oldest, own, high, scale, True)
                i += 1
            if PDL == 3:  # noqa: SIM102
                if unit + gl.num_programs(0) >= work.units:
                    _pdl_launch()
            _, total, acc = _join(state, run)
            y = acc / gl.convert_layout(total, gl.SliceLayout(1, OUT))[:, None]
            r = gl.arange(0, TILE, layout=gl.SliceLayout(1, OUT))
            column = gl.arange(0, DV, layout=gl.SliceLayout(0, OUT))
            row = (b.to(gl.int64) * work.nodes + low - length + r // GROUP) * work.KV_HEADS + kv_head
            target = (row * GROUP + r % GROUP) * DV
            keep = (low + r // GROUP < high)[:, None] & (column < DV)[None, :]
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
    do_not_specialize=["page_stride", "nodes", "units", "blocks", "per"],
    do_not_specialize_on_alignment=["pages", "lengths"],
)
def chain_teams_kernel(
    q, k_cache, v_cache, pages, lengths, out, q_batch, q_node, q_head, page_stride, nodes, units, blocks, per, scale,
    GROUP: gl.constexpr, KV_HEADS: gl.constexpr, DK: gl.constexpr, DV: gl.constexpr, PAGE: gl.constexpr, SPLITS: gl.constexpr,
    TAKEN: gl.constexpr, STAGES: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """`chain_kernel` of requests that are not packed, without windows, sinks, and positions that have no keys. k_cache, v_cache:
    descriptors of boxes [64, DK] and [64, DV] over storage rows and (head, column). units, blocks, per: see `_Work`."""
    ks = gl.allocate_shared_memory(gl.bfloat16, [STAGES, TILE, DK], k_cache.layout)
    vs = gl.allocate_shared_memory(gl.bfloat16, [STAGES, TILE, DV], v_cache.layout)
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(ready.index(i), count=1)
        mbarrier.init(empty.index(i), count=1)
    work = _Work(ks, vs, ready, empty, lengths, units, nodes, blocks, per, KV_HEADS, TAKEN, STAGES)
    gl.warp_specialize([
        (_add_up, (work, q, out, q_batch, q_node, q_head, scale, GROUP, DK, DV, SPLITS, PDL)),
        (_fetch, (work, k_cache, v_cache, pages, page_stride, DK, DV, PAGE, PDL)),
    ], [1], [24])  # fmt: skip
