"""Experts' weights in 4 bits, with a bf16 scale per group of columns of each row: w = q * scale, q from -8 to 7.

Symmetric whole numbers in groups along the inputs are what weight-only 4-bit formats have in common (GPTQ, AWQ, Q4_0, the
experts of Kimi-K2-Thinking). A group of 64 takes 4.25 bits a weight, as MXFP4's e2m1 with a power of two per 32 does, and
leaves a smaller error: 9.1% of a normally distributed weight's size, against 11.5%. And it decodes in fewer instructions: a
number or'ed into the mantissa of bf16 128 is 128 + q + 8 exactly, and one packed addition takes 136 away, where e2m1 takes two
masks, a shift and a product.

The numbers of two groups share their bytes: the first's are the low halves and the second's the high ones. So a kernel takes a
byte apart into operands of two products, and no number changes its place.
"""

from dataclasses import dataclass
from math import gcd
from typing import final

import torch
from torch import Tensor

from mtp_engine.kernels.experts import ExpertStack

GROUP = 64  # columns, where there are enough
LEAST = 32  # whatever is in 4 bits has a multiple of so many columns: two groups of the smallest size
_SHRINKS = (1.0, 0.95, 0.9, 0.85, 0.8)  # of the scale that reaches a group's largest weight, one of which errs least


@final
@dataclass(frozen=True)
class Int4Stack:
    """The same matrix of every expert. C is a multiple of 2 * group."""

    data: Tensor  # [E, R, C / 2] uint8, see `pack`
    scale: Tensor  # [E, R, C / group] bf16
    group: int

    @classmethod
    def of(cls, stack: ExpertStack, count: int) -> "Int4Stack":
        """A stack of `count` matrices [R, C], quantised one by one; one that is already is returned. Raises ValueError for a C
        that has no groups."""
        if isinstance(stack, cls):
            return stack
        weight = stack.matrix(0, torch.float32)
        (rows, columns), group = weight.shape, group_of(weight.shape[1])
        data = torch.empty(count, rows, columns // 2, dtype=torch.uint8, device=weight.device)
        scale = torch.empty(count, rows, columns // group, dtype=torch.bfloat16, device=weight.device)
        for expert in range(count):
            numbers, scale[expert] = quantise(stack.matrix(expert, torch.float32).float(), group)
            data[expert] = pack(numbers, group)
        return cls(data, scale, group)

    def matrix(self, index: int, dtype: torch.dtype) -> Tensor:
        """Expert `index`'s, dequantised: [R, C]."""
        return dequantise(unpack(self.data[index], self.group), self.scale[index]).to(dtype)


def group_of(columns: int) -> int:
    """Columns of a group, two of which divide `columns`. Raises ValueError where they would be too small."""
    if columns % LEAST:
        raise ValueError(f"{columns} columns cannot be held in 4 bits: they are no multiple of {LEAST}")
    return gcd(columns, 2 * GROUP) // 2


def quantise(weight: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """weight: [..., C] fp32 -> whole numbers [..., C] fp32 and scales [..., C / group] bf16.

    A scale has the sign that makes its group's largest weight -8 times it, as there is no +8.
    """
    parts = weight.unflatten(-1, (-1, group))
    largest = parts.gather(-1, parts.abs().argmax(-1, keepdim=True))
    best, least = torch.zeros_like(largest), torch.full_like(largest, torch.inf)
    for shrink in _SHRINKS:
        scale = (largest * (-shrink / 8)).bfloat16().float()
        error = (_rounded(parts, scale) * scale - parts).square().sum(-1, keepdim=True)
        best, least = torch.where(error < least, scale, best), torch.minimum(error, least)
    return _rounded(parts, best).flatten(-2), best[..., 0].bfloat16()


def dequantise(numbers: Tensor, scale: Tensor) -> Tensor:
    """The inverse of `quantise` up to rounding, in fp32."""
    parts = numbers.unflatten(-1, (scale.shape[-1], -1))
    return (parts * scale.float()[..., None]).flatten(-2)


def _rounded(parts: Tensor, scale: Tensor) -> Tensor:
    return (parts / scale).nan_to_num(0.0, 0.0, 0.0).round().clamp(-8, 7)


def pack(numbers: Tensor, group: int) -> Tensor:
    """[..., C] from -8 to 7 -> [..., C / 2] uint8: of every two groups the first in the low four bits, each plus 8."""
    low, high = (numbers + 8).to(torch.uint8).unflatten(-1, (-1, 2, group)).unbind(-2)
    return (low | (high << 4)).flatten(-2)


def unpack(data: Tensor, group: int) -> Tensor:
    """The inverse of `pack`, in fp32."""
    parts = data.unflatten(-1, (-1, group))
    return torch.stack([parts & 15, parts >> 4], -2).flatten(-3).float() - 8
