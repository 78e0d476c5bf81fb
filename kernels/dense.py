"""The dense layers of steps and prompts. Of few rows, whose time is the time to read the weights once, up to thousands.

Under programmatic dependent launch a kernel asks for the first part of its weights before it waits for its input.
"""

from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from triton.experimental.gluon.language import NVMMASharedLayout
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor as Boxes
from triton.tools.tensor_descriptor import TensorDescriptor

from mtp_engine.kernels.dense_kernels import (
    add_kernel,
    gated_kernel,
    linear_kernel,
    place_kernel,
    qkv_kernel,
    rms_kernel,
    scale_kernel,
    slice_kernel,
)
from mtp_engine.kernels.dense_teams import teams_kernel
from mtp_engine.kernels.dense_tiles import PREFETCH, Tile, many, many_fp8, tile_for
from mtp_engine.kernels.fp8 import BlockMatrix
from mtp_engine.kernels.launch import SHARED, SMS, cdiv, next_power_of_2, overlap

Weight = Tensor | BlockMatrix
"""[out, in], last dimension contiguous: bf16 or fp32, or FP8 with scales."""

_APART = 256  # from so many tokens on, placing queries, keys and values is a kernel of its own


def _matrix(weight: Weight) -> Tensor:
    return weight.data if isinstance(weight, BlockMatrix) else weight


def _exact(x: Tensor, weight: Weight) -> bool:
    """Whether the product is in fp32."""
    return (x if isinstance(weight, BlockMatrix) else weight).dtype == torch.float32


def _tile(x: Tensor, weight: Weight) -> Tile:
    data, block = _matrix(weight), weight.block if isinstance(weight, BlockMatrix) else 0
    exact = _exact(x, weight)
    several = x.dtype == torch.bfloat16 and (block > 0 or data.dtype == torch.bfloat16)
    return _choose(*data.shape, data.element_size(), exact, block, len(x) if several else 1)


@lru_cache(maxsize=1 << 12)  # a prompt's launches are not to wait for this
def _choose(rows: int, k: int, itemsize: int, exact: bool, block: int, m: int) -> Tile:
    tile = tile_for(rows, k, itemsize, exact)
    return many_fp8(replace(tile, depth=min(tile.depth, block)), rows, k, m) if block else many(tile, rows, k, m)


def _normed(x: Tensor, norm: Tensor, eps: float, weight: Weight, tile: Tile) -> tuple[Tensor, Tensor]:
    """x * norm, rounded, and 1 / rms(x): [M, K] and [M] fp32. The product need not wait for the second: it is done long
    before the sums are."""
    (m, k), y = x.shape, torch.empty(x.shape, dtype=x.dtype, device=x.device)
    rms = torch.empty(m, dtype=torch.float32, device=x.device)
    when, byte = overlap(m), weight.data if isinstance(weight, BlockMatrix) else None
    scale_kernel[(cdiv(m, 8), cdiv(k, 1024))](
        x, x.stride(0), norm, y, m, K=k, BM=8, COLUMNS=1024, PDL=when, launch_pdl=when > 0
    )  # fmt: skip
    rms_kernel[(cdiv(m, 8),)](
        x, x.stride(0), eps, rms, byte, m, K=k, BM=8, DEPTH=tile.depth, WARPS=tile.warps, PDL=when, launch_pdl=when > 0,
        num_warps=tile.warps, num_stages=6,
    )  # fmt: skip
    return y, rms


def _launch(
    kernel: Any, units: int, x: Tensor, norm: Tensor | None, eps: float, weight: Weight, tile: Tile, **own: Any
) -> None:
    """units: CTAs per tile of tokens; own: the kernel's arguments besides those that `_product` and `_begin` take."""
    data, scale, table, block = _matrix(weight), None, None, 1
    if isinstance(weight, BlockMatrix):
        scale, table, block = weight.scale, weight.rows, weight.block
        assert scale.stride(1) == 1
        assert block % tile.depth == 0, (block, tile)
    (m, k), itemsize, inputs = x.shape, data.element_size(), None
    assert data.shape[1] == k, (x.shape, data.shape)
    assert data.stride(1) == x.stride(1) == 1, (x.stride(), data.stride())
    # what is read in less than 3 us is bound by latency: more CTAs then beat larger ones, and starting the next kernel
    # early only takes their places. Attention starts when QKV has waited, see runs_kernel
    small = data.numel() * itemsize <= PREFETCH
    tokens = tile.tokens or (16 if m <= 16 or small or _exact(x, weight) else 32)
    warps, registers = tile.wide or tile.warps, None
    assert tile.warps in (1, 2, 4), tile
    ahead_of_it = tile.wide > 0 or (scale is not None and m > 16)  # where the norm is; else part of the product
    rms = norm is not None and ahead_of_it
    if norm is not None and rms:
        x, norm = _normed(x, norm, eps, weight, tile)
    if tile.wide:
        assert scale is None, "FP8's products take the columns of K in another order, which wgmma has not"
        assert x.dtype == data.dtype, (x.dtype, data.dtype)
        step = min(tile.depth, 64)
        stages = min(tile.stages, SHARED // (step * (tile.rows + tokens) * itemsize))
        registers = tile.registers or None
        if tile.boxes:
            box = tile.rows // 2 if kernel is gated_kernel else tile.rows  # gate's rows and up's are apart
            inputs = TensorDescriptor.from_tensor(x, [tokens, step]), TensorDescriptor.from_tensor(data, [box, step])
    else:
        stage = tile.depth * tile.warps * (tile.rows * itemsize + (tokens + 1) * x.element_size())  # bytes
        stages = min(tile.stages, 1 + SHARED // stage)
    when = overlap(m)
    pieces = 0 if inputs or rms else min(max(32 * warps // tile.rows, 1), 8)
    ahead = min(k * itemsize, PREFETCH // data.shape[0]) // 128 * 128 // max(pieces, 1)
    aligned = data.data_ptr() % 16 == 0 and data.stride(0) * itemsize % 16 == 0
    first, second = inputs or (x, data)
    kernel[(cdiv(m, tokens), units)](
        first, x.stride(0) if m > 1 else k, norm, eps, second, data.stride(0), scale, table,
        0 if scale is None else scale.stride(0), m, ahead if aligned else 0, **own,
        K=k, ROWS=tile.rows, BM=tokens, DEPTH=tile.depth, WARPS=tile.warps, BLOCK=block, WIDE=tile.wide, BOXES=tile.boxes,
        PIECES=pieces, PDL=2 if when == 1 and (small or kernel is qkv_kernel) else when, RMS=rms,
        launch_pdl=when > 0, num_warps=warps, num_stages=stages, maxnreg=registers,
    )  # fmt: skip


def _slices(x: Tensor, norm: Tensor | None, eps: float, weight: Tensor, tile: Tile) -> tuple[Tensor, Tensor | None]:
    """The sums of `slice_kernel`, [slices, M, N] fp32, and 1 / rms(x) if there is a norm."""
    (m, k), factors, rms = x.shape, None, norm is not None
    sums = torch.empty(tile.warps, m, len(weight), dtype=torch.float32, device=x.device)
    if tile.teams:
        return sums, _teams(x, norm, eps, weight, tile, sums)
    if norm is not None:
        x, factors = _normed(x, norm, eps, weight, tile)
    step, when = min(tile.depth, 64), overlap(m)
    inputs = (
        TensorDescriptor.from_tensor(x, [tile.tokens, step]),
        TensorDescriptor.from_tensor(weight, [tile.rows, step]),
    )
    slice_kernel[(cdiv(m, tile.tokens), cdiv(len(weight), tile.rows), tile.warps)](
        *inputs, sums, m, N=len(weight), K=k, ROWS=tile.rows, BM=tile.tokens, DEPTH=tile.depth, SLICES=tile.warps,
        PDL=when, RMS=rms, launch_pdl=when > 0, num_warps=tile.wide, num_stages=tile.stages,
    )  # fmt: skip
    return sums, factors


def _teams(
    x: Tensor,
    norm: Tensor | None,
    eps: float,
    weight: Tensor,
    tile: Tile,
    out: Tensor,
    *,
    both: bool = False,
    **added: Any,
) -> Tensor | None:
    """Writes `out` by `teams_kernel`, and returns 1 / rms(x) if there is a norm. both: the rows are gate's and up's; added: bias,
    residual, residual_stride."""
    (m, k), factors = x.shape, None
    assert k % tile.depth == 0, (k, tile)
    assert k >= tile.warps * tile.depth, (k, tile)
    if norm is not None:
        x, factors = _normed(x, norm, eps, weight, tile)
    columns, layout = cdiv(m, tile.tokens), NVMMASharedLayout(128, 16, 2)
    inputs = Boxes.from_tensor(x, [tile.tokens, 64], layout)
    if both:
        halves = weight.view(2, len(weight) // 16, 8, k).transpose(0, 1)
        weights = Boxes.from_tensor(halves, [4, 2, 8, 64], NVMMASharedLayout(128, 16, 4))
    else:
        weights = Boxes.from_tensor(weight, [64, 64], layout)
    units, when = columns * cdiv(len(weight), 64 * tile.teams) * (tile.warps if tile.apart else 1), overlap(m)
    given = {"bias": None, "residual": None, "residual_stride": 0} | added
    pairs = tile.teams == 1 and tile.stages * (tile.tokens + 64) * 128 <= SHARED // 2  # of programs on a multiprocessor
    teams_kernel[(min(units, SMS * (2 if pairs else 1)),)](
        inputs, weights, None if tile.apart else factors, out=out, **given, M=m, units=units, columns=columns,
        N=len(weight) // (2 if both else 1), K=k, BM=tile.tokens, DEPTH=tile.depth, SLICES=tile.warps, TEAMS=tile.teams,
        STAGES=tile.stages, BOTH=both, APART=tile.apart, PDL=when, REGISTERS=tile.registers, launch_pdl=when > 0,
        num_warps=4, maxnreg=128 if tile.teams == 1 else None,
    )  # fmt: skip
    return factors


def linear(
    x: Tensor,
    weight: Weight,
    *,
    norm: Tensor | None = None,
    eps: float = 0.0,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    tile: Tile | None = None,
) -> Tensor:
    """residual + rmsnorm(x) W^T + bias, rounded once; without `norm` there is no RMS norm.

    x: [M, K] bf16 or fp32; norm: [K]; bias: [N]; residual: [M, N] -> [M, N] in `out_dtype`, by default x's.
    x * norm is rounded to the type of the product (the weight's, or x's where that is FP8) and the sum is scaled by
    1 / rms(x). `tile` is for measurements.
    """
    rows, tile = _matrix(weight).shape[0], tile or _tile(x, weight)
    out = x.new_empty(len(x), rows, dtype=out_dtype or x.dtype)
    assert residual is None or residual.stride(1) == 1
    stride = 0 if residual is None else residual.stride(0) if len(x) > 1 else rows
    if tile.apart:
        assert isinstance(weight, Tensor)
        sums, factors = _slices(x, norm, eps, weight, tile)
        add_kernel[(len(x), cdiv(rows, 512))](
            sums, factors, bias, residual, stride, out, len(x), N=rows, SLICES=tile.warps, COLUMNS=512,
            PDL=overlap(len(x)), launch_pdl=overlap(len(x)) > 0,
        )  # fmt: skip
        return out
    if tile.teams and norm is not None and residual is not None:  # which teams would add with one rounding more
        tile = replace(tile, teams=0, tokens=0)
    if tile.teams:
        assert isinstance(weight, Tensor)
        _teams(x, norm, eps, weight, tile, out, bias=bias, residual=residual, residual_stride=stride)
        return out
    _launch(
        linear_kernel, cdiv(rows, tile.rows), x, norm, eps, weight, tile,
        bias=bias, residual=residual, residual_stride=stride, out=out, N=rows,
    )  # fmt: skip
    return out


def gated(
    x: Tensor, weight: Weight, *, norm: Tensor | None = None, eps: float = 0.0, tile: Tile | None = None
) -> Tensor:
    """silu(gate) * up with [gate; up] = rmsnorm(x) W^T, rounded once. weight: [2I, K]; x: [M, K] -> [M, I] in x's type."""
    columns, tile = _matrix(weight).shape[0] // 2, tile or _tile(x, weight)
    if tile.apart:  # what gate and up are not added up for
        tile = replace(tile, rows=64, tokens=64, wide=4, stages=8, apart=False, teams=0)
    out = x.new_empty(len(x), columns)
    if tile.teams:
        assert isinstance(weight, Tensor)
        _teams(x, norm, eps, weight, tile, out, both=True)
        return out
    _launch(gated_kernel, cdiv(columns, tile.rows // 2), x, norm, eps, weight, tile, out=out, N=columns)
    return out


def qkv(
    x: Tensor,
    weight: Weight,
    *,
    norm: Tensor | None,
    eps: float,
    bias: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    heads: int,
    kv_heads: int,
    qk_dim: int,
    v_dim: int,
    value_scale: float,
    k_cache: Tensor,
    v_cache: Tensor,
    rows: Tensor,
    tile: Tile | None = None,
) -> Tensor:
    """The projections of attention: rotated queries are returned, rotated keys and scaled values go into the cache.

    x: [M, K]; weight: [heads * qk + kv * qk + kv * v, K]; cos, sin: [M, rotary] fp32 of `RotaryEmbedding`
    (signed sine, halves paired: a pair's second sine is the first's opposite);
    k_cache: [R, kv, qk], v_cache: [R, kv, v] in x's type; rows: [M] int64, the rows of
    the caches. Returns [M, heads, qk]. Rounds after the product and again after the rotation or the scale.
    """
    assert qk_dim % 2 == v_dim % 2 == 0, (qk_dim, v_dim)
    assert cos.shape[1] % 2 == 0, "a pair's two dimensions turn by the same angle"
    assert k_cache.dtype == v_cache.dtype == x.dtype, (k_cache.dtype, v_cache.dtype, x.dtype)
    assert k_cache.stride(2) == v_cache.stride(2) == 1
    cos, sin = cos.contiguous(), sin.contiguous()
    tile, q = tile or _tile(x, weight), x.new_empty(len(x), heads, qk_dim)
    shared = {
        "cos": cos, "sin": sin, "value_scale": value_scale, "q": q, "slots": rows,
        "k_cache": k_cache, "k_row": k_cache.stride(0), "k_head": k_cache.stride(1),
        "v_cache": v_cache, "v_row": v_cache.stride(0), "v_head": v_cache.stride(1),
        "HEADS": heads, "KV_HEADS": kv_heads, "QK_DIM": qk_dim, "V_DIM": v_dim, "ROTARY": cos.shape[1],
    }  # fmt: skip
    if len(x) > _APART or tile.boxes or tile.apart or tile.teams:
        y = linear(x, weight, norm=norm, eps=eps, bias=bias, tile=tile)
        pairs = next_power_of_2(max(qk_dim, v_dim) // 2)
        place_kernel[(cdiv(len(x), 16), heads + 2 * kv_heads)](
            y, **shared, M=len(x), WIDTH=y.shape[1], P=pairs, BM=16, PDL=overlap(len(x)), launch_pdl=overlap(len(x)) > 0
        )  # fmt: skip
        return q
    pairs = tile.rows // 2
    units = (heads + kv_heads) * cdiv(qk_dim // 2, pairs) + kv_heads * cdiv(v_dim // 2, pairs)
    _launch(qkv_kernel, units, x, norm, eps, weight, tile, bias=bias, **shared)
    return q
