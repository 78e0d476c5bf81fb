"""The FFN of a mixture-of-experts layer for few tokens on a GPU. Twin: `experts.route` and `experts.mix_experts`.

Decoding reads every chosen expert's weights once and is bound by that. Five kernels: norm + router logits (two with more
than eight tokens); choice + grouping by expert (three then); gate and up; down; weighted sum + residual. Weights stay FP8 in
memory and are widened in registers; activations are bf16, sums fp32. No host synchronisation and no float atomics: every
sum runs in an order that depends on the column alone, so that a row's bits do not depend on its neighbours or their number.
"""

from dataclasses import dataclass
from math import gcd
from typing import final

import torch
from torch import Tensor

from mtp_engine.kernels.experts import PlainStack
from mtp_engine.kernels.fp8 import BlockMatrix
from mtp_engine.kernels.int4 import Int4Stack
from mtp_engine.kernels.launch import cdiv, next_power_of_2, pdl
from mtp_engine.kernels.moe_kernels import (
    choose_kernel,
    choose_many_kernel,
    down_kernel,
    gate_up_kernel,
    group_kernel,
    norm_kernel,
    order_kernel,
    router_kernel,
    sum_kernel,
)

Stack = BlockMatrix | Int4Stack | PlainStack
"""[E, R, C]. In a BlockMatrix C must be a multiple of the block, and rows n * block.. must share a row of scales."""

# Constants, because a tile's shape decides the order of the sums in it
_ROUTER_COLUMNS = 128
_FEW = 8  # tokens for which one program chooses and groups; and of a tile in which rows are normalised
_CHOICE_TOKENS = 2  # in as many warps, as _FEW tokens in _FEW: two warps have a row
# Of no effect on sums, but with 64 rows or more Triton would take wgmma for more than 8 tokens, which sums otherwise
_FEW_ROWS, _MANY_ROWS, _MANY_TOKENS = 64, 32, 32
_SUM_COLUMNS = 1024
_GROUP_PAIRS = 1024  # that are looked at at a time; of no effect on sums


@final
@dataclass(frozen=True)
class Tile:
    """How a product is cut up. It decides the time and no bit of the result."""

    columns: int  # of the output; `gate_up` takes as many of gate and of up
    warps: int  # 1 or 2: with 4 Triton would take wgmma, which sums otherwise and loads FP8 two bytes at a time
    stages: int
    unroll: int = 1  # blocks of inner columns that are asked for together
    tokens: int = 0  # in a tile, 0: as `_tile_tokens` says
    crowd: int = 12  # from so many pairs of an expert on tiles of 32 tokens are faster than of 16


GATE_UP, DOWN = Tile(32, 2, 4, crowd=6), Tile(64, 2, 4)
_NARROW = 768  # columns of an expert, as a rank has them, up to which programs are few
_SPLIT = 4  # warps of each that share the inner columns then
NARROW = Tile(16, 2, 3)
INT4 = Tile(16, 2, 4, crowd=6)  # of `gate_up`; 6 to 14% faster than GATE_UP


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
    count, pieces = len(router), cdiv(hidden, _ROUTER_COLUMNS)
    if x.dtype != torch.bfloat16 or router.dtype != torch.float32 or not x.is_contiguous():
        raise ValueError(f"route needs contiguous bf16 rows and an fp32 router, got {x.dtype} and {router.dtype}")
    y, pdls = torch.empty_like(x), pdl()
    partial = torch.empty(pieces, tokens, count, dtype=torch.float32, device=x.device)
    few = tokens <= _FEW
    if not few:  # once, and not in every piece
        norm_kernel[(cdiv(tokens, _FEW),)](
            x, norm, y, eps, tokens, hidden, 4 * _ROUTER_COLUMNS, _FEW, pdls, num_warps=4, launch_pdl=pdls)  # fmt: skip
    rows, tile = (_FEW_ROWS, _FEW) if few else (_MANY_ROWS, _MANY_TOKENS)
    router_kernel[cdiv(count, rows), pieces, cdiv(tokens, tile)](
        x if few else y, norm, router, y, partial, eps, tokens, hidden, count, rows, _ROUTER_COLUMNS, tile, few, pdls,
        num_warps=4, launch_pdl=pdls)  # fmt: skip
    weights = torch.empty(tokens, per_token, dtype=torch.float32, device=x.device)
    experts, pairs = (torch.empty(s, dtype=torch.int32, device=x.device) for s in (weights.shape, (count, tokens)))
    slots = torch.empty(count, dtype=torch.int64, device=x.device)
    padded = next_power_of_2(count)
    if few:
        choose_kernel[(1,)](partial, bias, weights, experts, slots, pairs, scale, tokens, pieces, count, padded, per_token,
                      normalise, _FEW, pdls, num_warps=_FEW, launch_pdl=pdls)  # fmt: skip
        return y, Routing(weights, experts, slots, pairs)
    choose_many_kernel[(cdiv(tokens, _CHOICE_TOKENS),)](
        partial, bias, weights, experts, scale, tokens, pieces, count, padded, per_token, normalise, _CHOICE_TOKENS, pdls,
        num_warps=_CHOICE_TOKENS, launch_pdl=pdls)  # fmt: skip
    counts = torch.empty(count, dtype=torch.int32, device=x.device)
    group_kernel[(count,)](experts, pairs, counts, tokens, per_token, _GROUP_PAIRS, pdls, launch_pdl=pdls)
    order_kernel[(1,)](counts, slots, count, padded, pdls, launch_pdl=pdls)
    return y, Routing(weights, experts, slots, pairs)


def gate_up(y: Tensor, routing: Routing, stack: Stack, tile: Tile | None = None) -> Tensor:
    """y: [M, H]; stack: [E, 2I, H] -> silu(gate) * up of every pair, [M * k, I] in y's dtype."""
    weight, scale, table, kind = _parts(stack)
    tokens, per_token = routing.weights.shape
    inner, hidden = weight.shape[1] // 2, y.shape[1]
    split = _split(inner, hidden, stack)
    tile = tile or (NARROW if split > 1 else INT4 if isinstance(stack, Int4Stack) else GATE_UP)
    columns, width = _cut(inner, hidden, tile, stack)
    h = torch.empty(tokens * per_token, inner, dtype=y.dtype, device=y.device)
    gate_up_kernel[(inner // columns, min(len(weight), len(h)))](
        y, weight, scale, table, routing.slots, routing.pairs, h, tokens, scale.shape[1], hidden, inner, per_token,
        kind, columns, width, _tile_tokens(tokens, len(h) / len(weight), tile), tile.unroll, split, pdl(),
        num_warps=split if split > 1 else tile.warps, num_stages=tile.stages, launch_pdl=pdl())  # fmt: skip
    return h


def products(h: Tensor, routing: Routing, stack: Stack, tile: Tile = DOWN) -> Tensor:
    """down(h) of every pair, [M * k, H] fp32. h: [M * k, I] of `gate_up`, which must have run since `route`; stack: [E, H, I]."""
    weight, scale, table, kind = _parts(stack)
    tokens = len(routing.weights)
    hidden, inner = weight.shape[1], h.shape[1]
    columns, width = _cut(hidden, inner, tile, stack)
    y = torch.empty(len(h), hidden, dtype=torch.float32, device=h.device)
    down_kernel[(hidden // columns, min(len(weight), len(h)))](
        h, weight, scale, table, routing.slots, routing.pairs, y, tokens, scale.shape[1], hidden, inner,
        kind, columns, width, _tile_tokens(tokens, len(h) / len(weight), tile), tile.unroll,
        4 if weight.shape[2] * weight.itemsize >= 512 else 1, pdl(),
        num_warps=tile.warps, num_stages=min(tile.stages, max(inner // width, 2)), launch_pdl=pdl())  # fmt: skip
    return y


def down(h: Tensor, routing: Routing, stack: Stack, residual: Tensor, tile: Tile = DOWN) -> Tensor:
    """residual + the weighted sum of `products` over each token's experts, in ascending order, rounded once at the end.
    residual: [M, H]. Returns [M, H] in its dtype."""
    return add_up(products(h, routing, stack, tile), routing.weights, residual)


def add_up(products: Tensor, weights: Tensor, residual: Tensor) -> Tensor:
    """See `down`. products: [M * k, H] fp32; weights: [M, k]."""
    (tokens, hidden), out = residual.shape, torch.empty_like(residual)
    sum_kernel[(cdiv(hidden, _SUM_COLUMNS), tokens)](
        products, weights, residual, out, hidden, weights.shape[1], _SUM_COLUMNS, pdl(), launch_pdl=pdl())  # fmt: skip
    return out


def _parts(stack: Stack) -> tuple[Tensor, Tensor, Tensor, str]:
    """weight, scale, table of scale rows, format. What a format lacks its weight stands in for."""
    if isinstance(stack, PlainStack):
        return stack.weight, stack.weight, stack.weight, "bf16"
    if isinstance(stack, Int4Stack):
        return stack.data, stack.scale.view(torch.int32), stack.data, "int4"
    return stack.data, stack.scale, stack.rows, "fp8"


def _split(inner: int, hidden: int, stack: Stack) -> int:
    """How many warps share the inner columns of `gate_up`'s programs, which sets the order of sums."""
    if isinstance(stack, Int4Stack) or inner > _NARROW:
        return 1
    width = stack.block if isinstance(stack, BlockMatrix) else gcd(128, hidden)
    return _SPLIT if hidden % (_SPLIT * width) == 0 else 1


def _cut(columns: int, inner: int, tile: Tile, stack: Stack) -> tuple[int, int]:
    """How many output columns a program takes, and how many inner ones it takes at a time."""
    block = stack.block if isinstance(stack, BlockMatrix) else 0
    step, width = gcd(tile.columns, columns, block), block or gcd(128, inner)
    if isinstance(stack, Int4Stack):
        width = 2 * stack.group
    if min(step, width) < 16 or inner % width or tile.warps > 2:
        raise ValueError(f"experts of {columns} x {inner} in blocks of {width} cannot be cut into tiles")
    return step, width


def _tile_tokens(tokens: int, pairs: float, tile: Tile) -> int:
    """pairs: of an expert, if they are evenly spread. Padding costs shared memory and products; a second tile of the same
    expert reads its weights again."""
    most = 8 if pairs < 3 else 16 if pairs < tile.crowd else 32
    return tile.tokens or min(max(next_power_of_2(tokens), 8), most)
