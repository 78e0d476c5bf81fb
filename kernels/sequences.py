"""What training does to whole sequences element by element, with gradients, in one launch each: rotation, and the gate of an FFN.

Twins: models.layers.rotate and gate, which round to the tensors' dtype more often.
"""

from typing import Any, final

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 1024


@triton.jit
def _rotate(
    x, cos, sin, out, sign, row_stride, head_stride, table_stride, heads,
    DIM: tl.constexpr, WIDTH: tl.constexpr, HEADS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """A row's heads. out is contiguous; beyond DIM dimensions are copied."""
    row = tl.program_id(0).to(tl.int64)
    head, lane = tl.arange(0, HEADS)[:, None], tl.arange(0, LANES)[None]
    turned, inside = lane < DIM, (head < heads) & (lane < WIDTH)
    other = tl.where(turned, (lane + DIM // 2) % DIM, lane)
    c = tl.load(cos + row * table_stride + lane, turned, 1.0)
    # the gradient is turned back: by the sines of the dimensions that this one went to, which are the others' negated
    s = tl.load(sin + row * table_stride + lane, turned, 0.0) * sign
    at = x + row * row_stride + head * head_stride
    here = tl.load(at + lane, inside, 0.0).to(tl.float32)
    there = tl.load(at + other, inside, 0.0).to(tl.float32)
    tl.store(out + (row * heads + head) * WIDTH + lane, (here * c + there * s).to(out.dtype.element_ty), inside)


def _turn(x: Tensor, cos: Tensor, sin: Tensor, sign: float) -> Tensor:
    batch, nodes, heads, width = x.shape
    out = torch.empty(batch, nodes, heads, width, dtype=x.dtype, device=x.device)
    if x.stride(3) != 1 or x.stride(0) != nodes * x.stride(1):
        x = x.contiguous()
    _rotate[(batch * nodes,)](
        x, cos, sin, out, sign, x.stride(1), x.stride(2), cos.shape[-1], heads,
        DIM=cos.shape[-1], WIDTH=width, HEADS=triton.next_power_of_2(heads), LANES=triton.next_power_of_2(width),
        num_warps=2,
    )  # fmt: skip
    return out


@final
class _Rotation(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        context.save_for_backward(cos, sin)
        return _turn(x, cos, sin, 1.0)

    @staticmethod
    def backward(context: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = context.saved_tensors
        return _turn(grads[0], cos, sin, -1.0), None, None


def rotate(x: Tensor, tables: tuple[Tensor, Tensor]) -> Tensor:
    """x: [B, N, heads, D]; tables: cos and signed sin [B, N, 1, dim] fp32 -> [B, N, heads, D], contiguous."""
    cos, sin = (table.contiguous() for table in tables)
    turned: Tensor = _Rotation.apply(x, cos, sin)
    return turned


@triton.jit
def _gate(x, out, width, BLOCK: tl.constexpr):
    row, column = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    a = tl.load(x + row * 2 * width + column, inside, 0.0).to(tl.float32)
    b = tl.load(x + row * 2 * width + width + column, inside, 0.0).to(tl.float32)
    tl.store(out + row * width + column, (a * tl.sigmoid(a) * b).to(out.dtype.element_ty), inside)


@triton.jit
def _gate_back(x, grad, out, width, BLOCK: tl.constexpr):
    row, column = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    at = row * 2 * width + column
    a = tl.load(x + at, inside, 0.0).to(tl.float32)
    b = tl.load(x + at + width, inside, 0.0).to(tl.float32)
    g = tl.load(grad + row * width + column, inside, 0.0).to(tl.float32)
    open = tl.sigmoid(a)
    slope = open * (1.0 + a * (1.0 - open))
    tl.store(out + at, (g * b * slope).to(out.dtype.element_ty), inside)
    tl.store(out + at + width, (g * a * open).to(out.dtype.element_ty), inside)


@final
class _Gate(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, x: Tensor) -> Tensor:
        x = x.contiguous()
        context.save_for_backward(x)
        width = x.shape[-1] // 2
        out = torch.empty(*x.shape[:-1], width, dtype=x.dtype, device=x.device)
        _gate[(x.numel() // (2 * width), triton.cdiv(width, _BLOCK))](x, out, width, BLOCK=_BLOCK, num_warps=4)
        return out

    @staticmethod
    def backward(context: Any, *grads: Tensor) -> Tensor:
        (x,) = context.saved_tensors
        width, out = x.shape[-1] // 2, torch.empty_like(x)
        grid = (x.numel() // (2 * width), triton.cdiv(width, _BLOCK))
        _gate_back[grid](x, grads[0].contiguous(), out, width, BLOCK=_BLOCK, num_warps=4)
        return out


def gate(x: Tensor) -> Tensor:
    """silu(first half) * second half of the last dimension. [..., 2I] -> [..., I]."""
    gated: Tensor = _Gate.apply(x)
    return gated
