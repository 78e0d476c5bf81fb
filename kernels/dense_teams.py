"""Products of hundreds of tokens on Hopper, written in Gluon: y = f(rmsnorm(x) W^T) with the sums of kernels/dense_products.py.

A program is one warp that fetches boxes of x and W into a ring of stages, and teams of four warps that multiply: each has 64
rows of W and all BM tokens of the tile, the largest wgmma for which the running slice of K and the sum of those before both
fit into registers. Programs walk over tiles, so that the next tile's boxes come while a team ends the one before, and while
a team ends a slice the others keep the tensor cores busy.

Rows of gate and up alternate in a team's 64 by eights (a box of four dimensions), so both of a pair are one thread's.
Triton's interpreter has no Gluon: there kernels/dense.py takes other tiles, whose sums are the same.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma, warpgroup_mma_wait

STEP = gl.constexpr(64)  # columns of a stage


@gluon.jit
def _pdl_wait():
    gl.inline_asm_elementwise(
        "griddepcontrol.wait; mov.u32 $0, 0;", "=r", [], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def _pdl_launch():
    gl.inline_asm_elementwise(
        "griddepcontrol.launch_dependents; mov.u32 $0, 0;", "=r", [], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def _unit(unit, columns, SLICES: gl.constexpr, APART: gl.constexpr):
    """Unit number `unit`: its tile of tokens and of rows, and the slices of K from .. to that it adds up."""
    if APART:
        return unit // SLICES % columns, unit // SLICES // columns, unit % SLICES, unit % SLICES + 1
    return unit % columns, unit // columns, 0, SLICES


@gluon.jit
def _steps(s, K: gl.constexpr, DEPTH: gl.constexpr, SLICES: gl.constexpr):
    """How many steps slice s has."""
    return (K // DEPTH - s + SLICES - 1) // SLICES * (DEPTH // STEP)


@gluon.jit
def _fetch(
    x, weight, xs, ws, ready, empty, units, columns, K: gl.constexpr, BM: gl.constexpr, DEPTH: gl.constexpr,
    SLICES: gl.constexpr, TEAMS: gl.constexpr, STAGES: gl.constexpr, BOTH: gl.constexpr, APART: gl.constexpr,
):  # fmt: skip
    """What the fetching warp does."""
    PARTS: gl.constexpr = DEPTH // STEP
    i = 0
    for unit in range(gl.program_id(0), units, gl.num_programs(0)):
        column, row, begin, end = _unit(unit, columns, SLICES, APART)
        for s in range(begin, end):
            for c in range(_steps(s, K, DEPTH, SLICES)):
                at = (c // PARTS * SLICES + s) * DEPTH + c % PARTS * STEP
                stage = i % STAGES
                full = ready.index(stage)
                mbarrier.wait(empty.index(stage), (i // STAGES & 1) ^ 1)
                mbarrier.expect(full, (BM + 64 * TEAMS) * STEP * 2)
                tma.async_copy_global_to_shared(x, [column * BM, at], full, xs.index(stage))
                for team in gl.static_range(TEAMS):
                    part, number = ws.index(stage * TEAMS + team), row * TEAMS + team
                    if BOTH:
                        tma.async_copy_global_to_shared(weight, [number * 4, 0, 0, at], full, part)
                    else:
                        tma.async_copy_global_to_shared(weight, [number * 64, at], full, part)
                i += 1


@gluon.jit
def _sums(
    xs, ws, ready, empty, i, begin, end, team: gl.constexpr, K: gl.constexpr, BM: gl.constexpr, DEPTH: gl.constexpr,
    SLICES: gl.constexpr, TEAMS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """A team's [64, BM] of a unit, and the number of the next step (`i` is that of the first)."""
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BM, 16])
    ROWS: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    total = gl.zeros([64, BM], gl.float32, LAYOUT)
    for s in range(begin, end):
        acc = gl.zeros([64, BM], gl.float32, LAYOUT)
        for c in range(_steps(s, K, DEPTH, SLICES)):
            stage = i % STAGES
            mbarrier.wait(ready.index(stage), i // STAGES & 1)
            w = ws.index(stage * TEAMS + team)._reinterpret(gl.bfloat16, [64, STEP], ROWS)
            acc = warpgroup_mma(w, xs.index(stage).permute((1, 0)), acc, use_acc=c > 0, is_async=True)
            acc = warpgroup_mma_wait(1, deps=[acc])  # the step before is done
            mbarrier.arrive(empty.index((i + STAGES - 1) % STAGES), pred=c > 0)
            i += 1
        acc = warpgroup_mma_wait(0, deps=[acc])
        mbarrier.arrive(empty.index((i + STAGES - 1) % STAGES))
        total = total + acc
    return total, i


@gluon.jit
def _team(
    team: gl.constexpr, xs, ws, ready, empty, rms, bias, residual, residual_stride, out, M, units, columns, N: gl.constexpr,
    K: gl.constexpr, BM: gl.constexpr, DEPTH: gl.constexpr, SLICES: gl.constexpr, TEAMS: gl.constexpr,
    STAGES: gl.constexpr, BOTH: gl.constexpr, APART: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """What a team does, from its sums to what it stores."""
    P: gl.constexpr = 32 if BOTH else 64
    OUT: gl.constexpr = gl.BlockedLayout([8, 1], [4, 8], [1, 4], [0, 1]) if BOTH else gl.BlockedLayout([4, 1], [8, 4], [2, 2], [0, 1])  # fmt: skip
    i = 0
    for unit in range(gl.program_id(0), units, gl.num_programs(0)):
        column, row, begin, end = _unit(unit, columns, SLICES, APART)
        y, i = _sums(xs, ws, ready, empty, i, begin, end, team, K, BM, DEPTH, SLICES, TEAMS, STAGES)
        if PDL:
            if unit + gl.num_programs(0) >= units:
                _pdl_launch()
            if rms is not None:
                _pdl_wait()
        if rms is not None:
            place = column * BM + gl.arange(0, BM, layout=gl.SliceLayout(0, y.type.layout))
            y = y * gl.load(rms + place, mask=place < M, other=0.0)[None, :]
        if bias is not None:
            number = (row * TEAMS + team) * 64 + gl.arange(0, 64, layout=gl.SliceLayout(1, y.type.layout))
            y += gl.load(bias + number, mask=number < N, other=0.0).to(gl.float32)[:, None]
        if BOTH:
            gate, up = gl.split(gl.permute(gl.reshape(y, [4, 2, 8, BM]), (0, 2, 3, 1)))
            y = gl.reshape(gate * (1 / (1 + gl.exp(-gate))) * up, [32, BM])
        if residual is None:
            y = y.to(out.dtype.element_ty)
        y = gl.convert_layout(y, OUT)
        token = (column * BM + gl.arange(0, BM, layout=gl.SliceLayout(0, OUT))).to(gl.int64)[None, :]
        n = (row * TEAMS + team) * P + gl.arange(0, P, layout=gl.SliceLayout(1, OUT))[:, None]
        keep = (token < M) & (n < N)
        if residual is not None:
            y += gl.load(residual + token * residual_stride + n, mask=keep, other=0.0).to(gl.float32)
        line = begin * M + token if APART else token
        gl.store(out + line * N + n, y.to(out.dtype.element_ty), mask=keep)


@gluon.jit
def _first(
    xs, ws, ready, empty, rms, bias, residual, residual_stride, out, M, units, columns, N: gl.constexpr, K: gl.constexpr,
    BM: gl.constexpr, DEPTH: gl.constexpr, SLICES: gl.constexpr, TEAMS: gl.constexpr, STAGES: gl.constexpr,
    BOTH: gl.constexpr, APART: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    _team(0, xs, ws, ready, empty, rms, bias, residual, residual_stride, out, M, units, columns, N, K, BM, DEPTH, SLICES, TEAMS, STAGES,
          BOTH, APART, PDL)  # fmt: skip


@gluon.jit
def _second(
    xs, ws, ready, empty, rms, bias, residual, residual_stride, out, M, units, columns, N: gl.constexpr, K: gl.constexpr,
    BM: gl.constexpr, DEPTH: gl.constexpr, SLICES: gl.constexpr, TEAMS: gl.constexpr, STAGES: gl.constexpr,
    BOTH: gl.constexpr, APART: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    _team(1, xs, ws, ready, empty, rms, bias, residual, residual_stride, out, M, units, columns, N, K, BM, DEPTH, SLICES, TEAMS, STAGES,
          BOTH, APART, PDL)  # fmt: skip


@gluon.jit
def _third(
    xs, ws, ready, empty, rms, bias, residual, residual_stride, out, M, units, columns, N: gl.constexpr, K: gl.constexpr,
    BM: gl.constexpr, DEPTH: gl.constexpr, SLICES: gl.constexpr, TEAMS: gl.constexpr, STAGES: gl.constexpr,
    BOTH: gl.constexpr, APART: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    _team(2, xs, ws, ready, empty, rms, bias, residual, residual_stride, out, M, units, columns, N, K, BM, DEPTH, SLICES, TEAMS, STAGES,
          BOTH, APART, PDL)  # fmt: skip


@gluon.jit(do_not_specialize=["M", "units", "columns", "residual_stride"])
def teams_kernel(
    x, weight, rms, bias, residual, residual_stride, out, M, units, columns, N: gl.constexpr, K: gl.constexpr, BM: gl.constexpr,
    DEPTH: gl.constexpr, SLICES: gl.constexpr, TEAMS: gl.constexpr, STAGES: gl.constexpr, BOTH: gl.constexpr,
    APART: gl.constexpr, PDL: gl.constexpr, REGISTERS: gl.constexpr,
):  # fmt: skip
    """out [M, N]: silu(gate) * up of [gate; up] (BOTH), sums of slices of K apart ([SLICES, M, N] fp32, APART), or the product
    with `bias` and `residual` added. x, weight: descriptors of boxes [BM, 64] and [64, 64], or [4, 2, 8, 64] of a weight seen as [I / 8,
    gate or up, 8, K]; units: tiles, times slices where these are apart; columns: tiles of tokens. REGISTERS: of a thread of
    the second and third team."""
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
    # a constant must be written into each tuple: a name for one would make it a value
    if TEAMS == 1:
        gl.warp_specialize([
            (_first, (xs, ws, ready, empty, rms, bias, residual, residual_stride, out, M, units, columns, N, K, BM, DEPTH, SLICES, TEAMS, STAGES, BOTH, APART, PDL)),
            (_fetch, (x, weight, xs, ws, ready, empty, units, columns, K, BM, DEPTH, SLICES, TEAMS, STAGES, BOTH, APART)),
        ], [1], [24])  # fmt: skip
    elif TEAMS == 2:
        gl.warp_specialize([
            (_first, (xs, ws, ready, empty, rms, bias, residual, residual_stride, out, M, units, columns, N, K, BM, DEPTH, SLICES, TEAMS, STAGES, BOTH, APART, PDL)),
            (_second, (xs, ws, ready, empty, rms, bias, residual, residual_stride, out, M, units, columns, N, K, BM, DEPTH, SLICES, TEAMS, STAGES, BOTH, APART, PDL)),
            (_fetch, (x, weight, xs, ws, ready, empty, units, columns, K, BM, DEPTH, SLICES, TEAMS, STAGES, BOTH, APART)),
        ], [4, 1], [REGISTERS, 24])  # fmt: skip
    else:
        gl.warp_specialize([
            (_first, (xs, ws, ready, empty, rms, bias, residual, residual_stride, out, M, units, columns, N, K, BM, DEPTH, SLICES, TEAMS, STAGES, BOTH, APART, PDL)),
            (_second, (xs, ws, ready, empty, rms, bias, residual, residual_stride, out, M, units, columns, N, K, BM, DEPTH, SLICES, TEAMS, STAGES, BOTH, APART, PDL)),
            (_third, (xs, ws, ready, empty, rms, bias, residual, residual_stride, out, M, units, columns, N, K, BM, DEPTH, SLICES, TEAMS, STAGES, BOTH, APART, PDL)),
            (_fetch, (x, weight, xs, ws, ready, empty, units, columns, K, BM, DEPTH, SLICES, TEAMS, STAGES, BOTH, APART)),
        ], [4, 4, 1], [REGISTERS, REGISTERS, 24])  # fmt: skip
