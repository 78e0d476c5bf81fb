"""The FFN of a mixture-of-experts layer for few tokens on a GPU. Twin: `experts.route` and `experts.mix_experts`.

Decoding reads every chosen expert's weights once and is bound by that. Five kernels: norm + router logits; choice +
grouping by expert; gate and up; down; weighted sum + residual. Weights stay FP8 in memory and are widened in registers;
activations are bf16, sums fp32. No host synchronisation and no float atomics: every sum runs in an order that depends on
the column alone, so that a row's bits do not depend on its neighbours or their number.
"""

from dataclasses import dataclass
from math import gcd
from typing import final

import torch
import triton
import triton.language as tl
from torch import Tensor

from mtp_engine.kernels.experts import PlainStack
from mtp_engine.kernels.fp8 import BlockMatrix
from mtp_engine.kernels.launch import pdl

Stack = BlockMatrix | PlainStack
"""[E, R, C]. In a BlockMatrix C must be a multiple of the block, and rows n * block.. must share a row of scales."""

# Constants, because a tile's shape decides the order of the sums in it
_ROUTER_ROWS, _ROUTER_COLUMNS, _ROUTER_TOKENS = 64, 128, 8
_CHOICE_TOKENS = 8  # one per warp
_SUM_COLUMNS = 1024


@final
@dataclass(frozen=True)
class Tile:
    """How a product is cut up. It decides the time and no bit of the result."""

    columns: int  # of the output; `gate_up` takes as many of gate and of up
    warps: int  # 1 or 2: with 4 Triton would take wgmma, which sums otherwise and loads FP8 two bytes at a time
    stages: int
    unroll: int = 1  # blocks of inner columns that are asked for together
    tokens: int = 0  # in a tile, 0: as `_tile_tokens` says
    bits: bool = False  # which way FP8 becomes bf16, see `_widen`


GATE_UP, DOWN = Tile(32, 2, 4), Tile(64, 2, 4)


@final
@dataclass(frozen=True)
class Routing:
    """Which experts every token goes to, and what goes to every expert. Pair m * k + j is token m's j-th expert."""

    weights: Tensor  # [M, k] fp32
    experts: Tensor  # [M, k] int32, ascending in each row
    slots: Tensor  # [E] int64: expert + (its number of pairs << 32), ascending, those that have pairs first
    pairs: Tensor  # [E, M] int32: row e begins with the pairs of expert e


def route(
    x: Tensor, norm: Tensor, eps: float, router: Tensor, bias: Tensor, per_token: int, normalise: bool, scale: float
) -> tuple[Tensor, Routing]:
    """y = rmsnorm(x) and the experts of every row of y. Of experts with equal scores the lower one is chosen.

    x: [M, H] bf16; norm: [H]; router: [E, H] fp32; bias: [E] fp32. Returns y: [M, H] bf16 and the routing.
    """
    tokens, hidden = x.shape
    count, pieces = len(router), triton.cdiv(hidden, _ROUTER_COLUMNS)
    if x.dtype != torch.bfloat16 or router.dtype != torch.float32 or not x.is_contiguous():
        raise ValueError(f"route needs contiguous bf16 rows and an fp32 router, got {x.dtype} and {router.dtype}")
    y = torch.empty_like(x)
    partial = torch.empty(pieces, tokens, count, dtype=torch.float32, device=x.device)
    grid = (triton.cdiv(count, _ROUTER_ROWS), pieces, triton.cdiv(tokens, _ROUTER_TOKENS))
    _router[grid](x, norm, router, y, partial, eps, tokens, hidden, count, _ROUTER_ROWS, _ROUTER_COLUMNS,
                  _ROUTER_TOKENS, pdl(), num_warps=4, launch_pdl=pdl())  # fmt: skip
    weights = torch.empty(tokens, per_token, dtype=torch.float32, device=x.device)
    experts, pairs = (torch.empty(s, dtype=torch.int32, device=x.device) for s in (weights.shape, (count, tokens)))
    slots = torch.empty(count, dtype=torch.int64, device=x.device)
    _choose[(1,)](partial, bias, weights, experts, slots, pairs, scale, tokens, pieces, count,
                  triton.next_power_of_2(count), per_token, normalise, _CHOICE_TOKENS, pdl(),
                  num_warps=_CHOICE_TOKENS, launch_pdl=pdl())  # fmt: skip
    return y, Routing(weights, experts, slots, pairs)


def gate_up(y: Tensor, routing: Routing, stack: Stack, tile: Tile = GATE_UP) -> Tensor:
    """y: [M, H]; stack: [E, 2I, H] -> silu(gate) * up of every pair, [M * k, I] in y's dtype."""
    weight, scale, table, block = _parts(stack)
    tokens, per_token = routing.weights.shape
    inner, hidden = weight.shape[1] // 2, weight.shape[2]
    columns, width = _cut(inner, hidden, tile, block)
    h = torch.empty(tokens * per_token, inner, dtype=y.dtype, device=y.device)
    _gate_up[(inner // columns, min(len(weight), len(h)))](
        y, weight, scale, table, routing.slots, routing.pairs, h, tokens, scale.shape[1], hidden, inner, per_token,
        block > 0, tile.bits, columns, width, _tile_tokens(tokens, tile), tile.unroll, pdl(),
        num_warps=tile.warps, num_stages=tile.stages, launch_pdl=pdl())  # fmt: skip
    return h


def down(h: Tensor, routing: Routing, stack: Stack, residual: Tensor, tile: Tile = DOWN) -> Tensor:
    """residual + the weighted sum of down(h) over each token's experts, in ascending order, rounded once at the end.

    h: [M * k, I] from `gate_up`, which must have run since `route`; stack: [E, H, I]; residual: [M, H]. Returns [M, H]
    in residual's dtype.
    """
    weight, scale, table, block = _parts(stack)
    tokens, per_token = routing.weights.shape
    hidden, inner = weight.shape[1:]
    columns, width = _cut(hidden, inner, tile, block)
    y = torch.empty(len(h), hidden, dtype=torch.float32, device=h.device)
    _down[(hidden // columns, min(len(weight), len(h)))](
        h, weight, scale, table, routing.slots, routing.pairs, y, tokens, scale.shape[1], hidden, inner,
        block > 0, tile.bits, columns, width, _tile_tokens(tokens, tile), tile.unroll,
        4 if inner * weight.itemsize >= 512 else 1, pdl(),
        num_warps=tile.warps, num_stages=tile.stages, launch_pdl=pdl())  # fmt: skip
    out = torch.empty_like(residual)
    _sum[(triton.cdiv(hidden, _SUM_COLUMNS), tokens)](
        y, routing.weights, residual, out, hidden, per_token, _SUM_COLUMNS, pdl(), launch_pdl=pdl())  # fmt: skip
    return out


def _parts(stack: Stack) -> tuple[Tensor, Tensor, Tensor, int]:
    """weight, scale, table of scale rows, block. A plain stack has block 0; its weight stands in for what it lacks."""
    if isinstance(stack, PlainStack):
        return stack.weight, stack.weight, stack.weight, 0
    return stack.data, stack.scale, stack.rows, stack.block


def _cut(columns: int, inner: int, tile: Tile, block: int) -> tuple[int, int]:
    """How many output columns a program takes, and how many inner ones it takes at a time."""
    step, width = gcd(tile.columns, columns, block), block or gcd(128, inner)
    if min(step, width) < 16 or inner % width or tile.warps > 2:
        raise ValueError(f"experts of {columns} x {inner} in blocks of {block} cannot be cut into tiles")
    return step, width


def _tile_tokens(tokens: int, tile: Tile) -> int:
    """Padding costs shared memory and products; a second tile of the same expert reads its weights again."""
    return tile.tokens or min(max(triton.next_power_of_2(tokens), 8), 32)


@triton.jit(do_not_specialize=["M"])
def _router(x, norm, router, y, partial, eps, M, H: tl.constexpr, E: tl.constexpr, ROWS: tl.constexpr,
            COLUMNS: tl.constexpr, TOKENS: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """y = rmsnorm(x), and the router logits of COLUMNS columns of y: partial [H / COLUMNS, M, E].

    The fp32 router is cut into three bf16 parts of 8 bits, and y is bf16: every product is exact, the sums are fp32.
    """
    piece = tl.program_id(1)
    e = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    m = tl.program_id(2) * TOKENS + tl.arange(0, TOKENS)
    columns = piece * COLUMNS + tl.arange(0, COLUMNS)
    w = tl.load(router + e[:, None] * H + columns, (e < E)[:, None] & (columns < H), other=0.0)
    gain = tl.load(norm + columns, columns < H, other=0.0).to(tl.float32)
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    live = (m < M)[:, None]
    wide = tl.arange(0, 4 * COLUMNS)
    squares = tl.zeros([TOKENS, 4 * COLUMNS], tl.float32)
    for start in tl.static_range(0, H, 4 * COLUMNS):
        part = tl.load(x + m[:, None] * H + start + wide, live & (start + wide < H), other=0.0).to(tl.float32)
        squares += part * part
    inverse = tl.rsqrt(tl.sum(squares, 1) / H + eps)
    part = tl.load(x + m[:, None] * H + columns, live & (columns < H), other=0.0).to(tl.float32)
    rounded = (part * inverse[:, None] * gain).to(tl.bfloat16)
    if tl.program_id(0) == 0:
        tl.store(y + m[:, None] * H + columns, rounded, live & (columns < H))
    high = w.to(tl.bfloat16)
    rest = w - high.to(tl.float32)
    middle = rest.to(tl.bfloat16)
    low = (rest - middle.to(tl.float32)).to(tl.bfloat16)
    logits = tl.dot(low, rounded.T)
    logits = tl.dot(middle, rounded.T, logits)
    logits = tl.dot(high, rounded.T, logits)
    tl.store(partial + (piece * M + m) * E + e[:, None], logits, (e < E)[:, None] & (m < M))


@triton.jit(do_not_specialize=["M"])
def _choose(partial, bias, weights, experts, slots, pairs, scale, M, PIECES: tl.constexpr, E: tl.constexpr,
            E_PAD: tl.constexpr, K: tl.constexpr, NORMALISE: tl.constexpr, TOKENS: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """One program: the K experts of every token, and the pairs of every expert, as `Routing` has them."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    e = tl.arange(0, E_PAD)
    offset = tl.load(bias + e, e < E, other=0.0)
    count = tl.zeros([E_PAD], tl.int32)
    if PDL:
        tl.extra.cuda.gdc_wait()
    first = 0
    while first < M:  # not `range`: Triton's interpreter cannot take its bounds from arguments under numpy 2.4
        m = first + tl.arange(0, TOKENS)
        live = (m < M)[:, None] & (e < E)
        logits = tl.zeros([TOKENS, E_PAD], tl.float32)
        for piece in tl.static_range(PIECES):
            logits += tl.load(partial + (piece * M + m[:, None]) * E + e, live, other=0.0)
        score = tl.sigmoid(logits)
        rank = tl.where(e < E, score + offset, -float("inf"))
        taken = tl.zeros([TOKENS, E_PAD], tl.int32)
        for _ in tl.static_range(K):
            best = e == tl.argmax(rank, 1)[:, None]  # of equals the lowest
            taken = tl.where(best, 1, taken)
            rank = tl.where(best, -float("inf"), rank)
        total = tl.sum(tl.where(taken == 1, score, 0.0), 1) + 1e-20
        share = score / total[:, None] if NORMALISE else score
        pair = m[:, None] * K + tl.cumsum(taken, 1) - taken
        taken = tl.where(live, taken, 0)
        tl.store(weights + pair, share * scale, taken == 1)
        tl.store(experts + pair, tl.broadcast_to(e[None, :], [TOKENS, E_PAD]), taken == 1)
        tl.store(pairs + e * M + count + tl.cumsum(taken, 0) - taken, pair, taken == 1)
        count += tl.sum(taken, 0)
        first += TOKENS
    hit = (count > 0).to(tl.int32)
    before = tl.cumsum(hit, 0) - hit
    slot = tl.where(hit == 1, before, tl.sum(hit, 0) + e - before)
    tl.store(slots + slot, e + (count.to(tl.int64) << 32), e < E)


@triton.jit
def _widen(w, dtype: tl.constexpr, BITS: tl.constexpr):
    """e4m3 -> dtype, exactly. Directly, Triton 3.6 goes through a conversion that runs at a sixteenth of the FMA rate.

    BITS: exponent and mantissa are shifted into a bf16's place, and its other bias is made up for by 2^120.
    """
    if BITS:
        return tl.inline_asm_elementwise(
            """{
            .reg .b32 a, b, c, d, m;
            mov.b32 m, 0x7b807b80;
            prmt.b32 a, $2, 0, 0x1404;
            prmt.b32 b, $2, 0, 0x3424;
            shr.u32 c, a, 4;
            shr.u32 d, b, 4;
            and.b32 c, c, 0x07f007f0;
            and.b32 d, d, 0x07f007f0;
            lop3.b32 a, a, 0x80008000, c, 0xea;
            lop3.b32 b, b, 0x80008000, d, 0xea;
            mul.rn.bf16x2 $0, a, m;
            mul.rn.bf16x2 $1, b, m;
            }""",
            "=r,=r,r", [w], dtype=tl.bfloat16, is_pure=True, pack=4)  # fmt: skip
    return w.to(tl.float16).to(tl.float32).to(dtype)


@triton.jit
def _product(x, rows, live, w, first, scale0, scale1, upper, C: tl.constexpr, WIDTH: tl.constexpr,
             SCALED: tl.constexpr, BITS: tl.constexpr, UNROLL: tl.constexpr):  # fmt: skip
    """w[first] @ x[rows].T, [len(first), len(rows)] fp32, in ascending blocks of WIDTH columns. x, w: [., C].

    SCALED: block b's product counts scale0[b] times, or scale1[b] times in `upper` rows.
    """
    k = tl.arange(0, WIDTH)
    x_at = x + rows[:, None] * C + k
    w_at = w + first[:, None] * C + k
    total = tl.zeros([first.shape[0], rows.shape[0]], tl.float32)
    for block in tl.range(0, C // WIDTH, loop_unroll_factor=UNROLL):
        weight = tl.load(w_at + block * WIDTH)
        part = tl.load(x_at + block * WIDTH, live[:, None], other=0.0)
        if SCALED:
            factor = tl.where(upper, tl.load(scale1 + block), tl.load(scale0 + block))
            total += tl.dot(_widen(weight, part.dtype, BITS), part.T) * factor[:, None]
        else:
            total = tl.dot(weight, part.T, total)
    return total


@triton.jit(do_not_specialize=["M"])
def _gate_up(y, w, scale, table, slots, pairs, h, M, S: tl.constexpr, H: tl.constexpr, INNER: tl.constexpr,
             K: tl.constexpr, SCALED: tl.constexpr, BITS: tl.constexpr, COLUMNS: tl.constexpr, WIDTH: tl.constexpr,
             TOKENS: tl.constexpr, UNROLL: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """h[pair] = silu(gate) * up, COLUMNS columns for all pairs of one chosen expert. y: [M, H]; h: [M * K, INNER]."""
    n, slot = tl.program_id(0) * COLUMNS, tl.program_id(1)
    r = tl.arange(0, 2 * COLUMNS)
    upper = r >= COLUMNS
    first = tl.where(upper, INNER - COLUMNS, 0) + n + r  # gate's rows, then up's
    row0, row1 = 0, 0
    if SCALED:
        row0, row1 = tl.load(table + n), tl.load(table + INNER + n)
    if PDL:
        tl.extra.cuda.gdc_wait()
    packed = tl.load(slots + slot)
    e, count = packed & 0xFFFFFFFF, packed >> 32
    scale0 = scale + (e * S + row0) * (H // WIDTH)
    scale1 = scale + (e * S + row1) * (H // WIDTH)
    start = 0
    while start < count:
        t = start + tl.arange(0, TOKENS)
        pair = tl.load(pairs + e * M + t, t < count, other=0)
        both = _product(y, pair // K, t < count, w + e * (2 * INNER * H), first, scale0, scale1, upper, H, WIDTH, SCALED,
                        BITS, UNROLL)  # fmt: skip
        if PDL:  # not before: what `_down` then prefetches must not leave L2 again; nor may it read slots too early
            tl.extra.cuda.gdc_launch_dependents()
        gate, up = tl.split(tl.permute(tl.reshape(both, [2, COLUMNS, TOKENS]), [1, 2, 0]))
        value = (gate * tl.sigmoid(gate) * up).to(h.dtype.element_ty)
        at = h + pair * INNER + n + tl.arange(0, COLUMNS)[:, None]
        tl.store(at, value, tl.broadcast_to((t < count)[None, :], [COLUMNS, TOKENS]))
        start += TOKENS


@triton.jit(do_not_specialize=["M"])
def _down(h, w, scale, table, slots, pairs, y, M, S: tl.constexpr, H: tl.constexpr, INNER: tl.constexpr,
          SCALED: tl.constexpr, BITS: tl.constexpr, COLUMNS: tl.constexpr, WIDTH: tl.constexpr, TOKENS: tl.constexpr,
          UNROLL: tl.constexpr, LINES: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """y[pair] = down(h[pair]), COLUMNS columns for all pairs of one chosen expert. h: [M * K, INNER]; y: [M * K, H]."""
    n, slot = tl.program_id(0) * COLUMNS, tl.program_id(1)
    first = n + tl.arange(0, COLUMNS)
    row = tl.load(table + n) if SCALED else 0
    # complete before this kernel starts: `_gate_up` lets it start only after itself waiting for `_choose`
    packed = tl.load(slots + slot, cache_modifier=".cg")
    e, count = packed & 0xFFFFFFFF, packed >> 32
    if count == 0:
        return
    w += e * (H * INNER)
    if PDL:
        _prefetch(w + first * INNER, LINES)
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    scale += (e * S + row) * (INNER // WIDTH)
    start = 0
    while start < count:
        t = start + tl.arange(0, TOKENS)
        pair = tl.load(pairs + e * M + t, t < count, other=0)
        value = _product(h, pair, t < count, w, first, scale, scale, first < 0, INNER, WIDTH, SCALED, BITS, UNROLL)
        tl.store(y + pair * H + first[:, None], value, tl.broadcast_to((t < count)[None, :], [COLUMNS, TOKENS]))
        start += TOKENS


@triton.jit
def _prefetch(rows, LINES: tl.constexpr):
    """Asks for the first LINES * 128 bytes at each pointer to come to L2, and does not wait for them."""
    lines = rows[:, None] + tl.arange(0, LINES) * (1024 // rows.dtype.element_ty.primitive_bitwidth)
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [lines], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit
def _sum(y, weights, residual, out, H: tl.constexpr, K: tl.constexpr, COLUMNS: tl.constexpr, PDL: tl.constexpr):
    """out[m] = residual[m] + sum over k of weights[m, k] * y[m, k], k ascending, rounded once."""
    m = tl.program_id(1)
    n = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    total = tl.zeros([COLUMNS], tl.float32)
    for k in tl.static_range(K):
        total += tl.load(weights + m * K + k) * tl.load(y + (m * K + k) * H + n, n < H, other=0.0)
    total += tl.load(residual + m * H + n, n < H, other=0.0).to(tl.float32)
    tl.store(out + m * H + n, total.to(out.dtype.element_ty), n < H)
