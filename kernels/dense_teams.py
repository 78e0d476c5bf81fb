"""Products of many tokens on Hopper, written in Gluon: y = f(rmsnorm(x) W^T) with the sums of kernels/dense_products.py.

A program is one warp that fetches boxes of x and W into a ring of stages, and teams of four warps that multiply. A team has 64
rows of W and all tokens of the tile, so that wgmma is of the largest size for which the running slice of K and the sum of
those before it fit into registers. Programs walk over tiles: the next one's boxes come while teams end the one before, and
while a team ends a slice the others keep the tensor cores busy.

Rows of gate and up alternate by eights in a team's 64 (a box of four dimensions), so that one thread has both of a pair.
Only Hopper has wgmma, and Triton's interpreter has no Gluon: elsewhere kernels/dense_tiles.py chooses other tiles.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma, warpgroup_mma_wait
from triton.language.core import _aggregate as aggregate

STEP = gl.constexpr(64)  # columns of a stage


@aggregate
class _Work:
    """What all warps of a program share. ready, empty: barriers of the stages; units, columns: of `teams_kernel`."""

    xs: gl.shared_memory_descriptor
    ws: gl.shared_memory_descriptor
    ready: gl.shared_memory_descriptor
    empty: gl.shared_memory_descriptor
    units: gl.tensor
    columns: gl.tensor
    K: gl.constexpr
    BM: gl.constexpr
    DEPTH: gl.constexpr
    SLICES: gl.constexpr
    TEAMS: gl.constexpr
    STAGES: gl.constexpr
    BOTH: gl.constexpr
    APART: gl.constexpr

    @gluon.constexpr_function
    def __init__(self, xs, ws, ready, empty, units, columns, K, BM, DEPTH, SLICES, TEAMS, STAGES, BOTH, APART):  # type: ignore[no-untyped-def]
        self.xs, self.ws, self.ready, self.empty, self.units, self.columns = xs, ws, ready, empty, units, columns
        self.K, self.BM = gl.constexpr(K), gl.constexpr(BM)
        self.DEPTH, self.SLICES = gl.constexpr(DEPTH), gl.constexpr(SLICES)
        self.TEAMS, self.STAGES = gl.constexpr(TEAMS), gl.constexpr(STAGES)
        self.BOTH, self.APART = gl.constexpr(BOTH), gl.constexpr(APART)


@gluon.jit
def _pdl_wait():
    gl.inline_asm_elementwise("griddepcontrol.wait; mov.u32 $0, 0;", "=r", [], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def _pdl_launch():
    asm: gl.constexpr = "griddepcontrol.launch_dependents; mov.u32 $0, 0;"
    gl.inline_asm_elementwise(asm, "=r", [], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def _unit(work, unit):
    """A unit's tile of tokens and of rows, and which slices of K it adds up: begin..end-1."""
    begin, end = 0, work.SLICES
    if work.APART:
        begin = unit % work.SLICES
        end = begin + 1
        unit = unit // work.SLICES
    return unit % work.columns, unit // work.columns, begin, end


@gluon.jit
def _steps(work, s):
    """How many steps slice s has."""
    return (work.K // work.DEPTH - s + work.SLICES - 1) // work.SLICES * (work.DEPTH // STEP)


@gluon.jit
def _fetch(work, x, weight):
    """What the fetching warp does."""
    PARTS: gl.constexpr = work.DEPTH // STEP
    i = 0
    for unit in range(gl.program_id(0), work.units, gl.num_programs(0)):
        column, row, begin, end = _unit(work, unit)
        for s in range(begin, end):
            for c in range(_steps(work, s)):
                at = (c // PARTS * work.SLICES + s) * work.DEPTH + c % PARTS * STEP
                stage = i % work.STAGES
                full = work.ready.index(stage)
                mbarrier.wait(work.empty.index(stage), (i // work.STAGES & 1) ^ 1)
                mbarrier.expect(full, (work.BM + 64 * work.TEAMS) * STEP * 2)
                tma.async_copy_global_to_shared(x, [column * work.BM, at], full, work.xs.index(stage))
                for team in gl.static_range(work.TEAMS):
                    part, number = work.ws.index(stage * work.TEAMS + team), row * work.TEAMS + team
                    if work.BOTH:
                        tma.async_copy_global_to_shared(weight, [number * 4, 0, 0, at], full, part)
                    else:
                        tma.async_copy_global_to_shared(weight, [number * 64, at], full, part)
                i += 1


@gluon.jit
def _sums(work, team: gl.constexpr, i, begin, end):
    """A team's [64, BM] of slices begin..end-1, and the number of the step after (`i` is that of the first)."""
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, work.BM, 16])
    ROWS: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    total = gl.zeros([64, work.BM], gl.float32, LAYOUT)
    for s in range(begin, end):
        acc = gl.zeros([64, work.BM], gl.float32, LAYOUT)
        for c in range(_steps(work, s)):
            stage = i % work.STAGES
            mbarrier.wait(work.ready.index(stage), i // work.STAGES & 1)
            w = work.ws.index(stage * work.TEAMS + team)._reinterpret(gl.bfloat16, [64, STEP], ROWS)
            acc = warpgroup_mma(w, work.xs.index(stage).permute((1, 0)), acc, use_acc=c > 0, is_async=True)
            acc = warpgroup_mma_wait(1, deps=[acc])  # for the step before
            mbarrier.arrive(work.empty.index((i + work.STAGES - 1) % work.STAGES), pred=c > 0)
            i += 1
        acc = warpgroup_mma_wait(0, deps=[acc])
        mbarrier.arrive(work.empty.index((i + work.STAGES - 1) % work.STAGES))
        total = total + acc
    return total, i


@gluon.jit
def _team(
    team: gl.constexpr, work, rms, bias, residual, residual_stride, out, M, N: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """What a team does, from its sums to what it stores."""
    P: gl.constexpr = 32 if work.BOTH else 64  # columns of `out`
    GATED: gl.constexpr = gl.BlockedLayout([8, 1], [4, 8], [1, 4], [0, 1])
    OUT: gl.constexpr = GATED if work.BOTH else gl.BlockedLayout([4, 1], [8, 4], [2, 2], [0, 1])
    i = 0
    for unit in range(gl.program_id(0), work.units, gl.num_programs(0)):
        column, row, begin, end = _unit(work, unit)
        y, i = _sums(work, team, i, begin, end)
        if PDL:
            if unit + gl.num_programs(0) >= work.units:
                _pdl_launch()
            if rms is not None:
                _pdl_wait()
        if rms is not None:
            place = column * work.BM + gl.arange(0, work.BM, layout=gl.SliceLayout(0, y.type.layout))
            y = y * gl.load(rms + place, mask=place < M, other=0.0)[None, :]
        if bias is not None:
            number = (row * work.TEAMS + team) * 64 + gl.arange(0, 64, layout=gl.SliceLayout(1, y.type.layout))
            y += gl.load(bias + number, mask=number < N, other=0.0).to(gl.float32)[:, None]
        if work.BOTH:
            gate, up = gl.split(gl.permute(gl.reshape(y, [4, 2, 8, work.BM]), (0, 2, 3, 1)))
            y = gl.reshape(gate * (1 / (1 + gl.exp(-gate))) * up, [32, work.BM])
        if residual is None:
            y = y.to(out.dtype.element_ty)
        y = gl.convert_layout(y, OUT)
        token = (column * work.BM + gl.arange(0, work.BM, layout=gl.SliceLayout(0, OUT))).to(gl.int64)[None, :]
        n = (row * work.TEAMS + team) * P + gl.arange(0, P, layout=gl.SliceLayout(1, OUT))[:, None]
        keep = (token < M) & (n < N)
        if residual is not None:
            y += gl.load(residual + token * residual_stride + n, mask=keep, other=0.0).to(gl.float32)
        line = begin * M + token if work.APART else token
        gl.store(out + line * N + n, y.to(out.dtype.element_ty), mask=keep)


@gluon.jit(do_not_specialize=["M", "units", "columns", "residual_stride"])
def teams_kernel(
    x, weight, rms, bias, residual, residual_stride, out, M, units, columns, N: gl.constexpr, K: gl.constexpr,
    BM: gl.constexpr, DEPTH: gl.constexpr, SLICES: gl.constexpr, TEAMS: gl.constexpr, STAGES: gl.constexpr,
    BOTH: gl.constexpr, APART: gl.constexpr, PDL: gl.constexpr, REGISTERS: gl.constexpr,
):  # fmt: skip
    """out [M, N]: silu(gate) * up of [gate; up] (BOTH), sums of slices of K apart ([SLICES, M, N] fp32, APART), or the product
    with `bias` and `residual` added. x, weight: descriptors of boxes [BM, 64] and [64, 64], or [4, 2, 8, 64] of a weight seen
    as [I / 8, gate or up, 8, K]; units: tiles, times slices where these are apart; columns: tiles of tokens; REGISTERS: of a
    thread of the second and third team. `slice_kernel`'s sums, and `linear_kernel`'s and `gated_kernel`'s results."""
    SHAPE: gl.constexpr = [STAGES * TEAMS, 4, 2, 8, STEP] if BOTH else [STAGES * TEAMS, 64, STEP]
    xs = gl.allocate_shared_memory(gl.bfloat16, [STAGES, BM, STEP], x.layout)
    ws = gl.allocate_shared_memory(gl.bfloat16, SHAPE, weight.layout)
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(ready.index(i), count=1)
        mbarrier.init(empty.index(i), count=TEAMS)
    if PDL and rms is None:
        _pdl_wait()
    work = _Work(xs, ws, ready, empty, units, columns, K, BM, DEPTH, SLICES, TEAMS, STAGES, BOTH, APART)
    # N and PDL stand in each tuple: a tuple that has a name holds no constants
    if TEAMS == 1:
        gl.warp_specialize([
            (_team, (0, work, rms, bias, residual, residual_stride, out, M, N, PDL)),
            (_fetch, (work, x, weight)),
        ], [1], [24])  # fmt: skip
    elif TEAMS == 2:
        gl.warp_specialize([
            (_team, (0, work, rms, bias, residual, residual_stride, out, M, N, PDL)),
            (_team, (1, work, rms, bias, residual, residual_stride, out, M, N, PDL)),
            (_fetch, (work, x, weight)),
        ], [4, 1], [REGISTERS, 24])  # fmt: skip
    else:
        gl.warp_specialize([
            (_team, (0, work, rms, bias, residual, residual_stride, out, M, N, PDL)),
            (_team, (1, work, rms, bias, residual, residual_stride, out, M, N, PDL)),
            (_team, (2, work, rms, bias, residual, residual_stride, out, M, N, PDL)),
            (_fetch, (work, x, weight)),
        ], [4, 4, 1], [REGISTERS, REGISTERS, 24])  # fmt: skip
