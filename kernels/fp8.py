"""FP8 (e4m3) weights with one fp32 scale per block (DeepSeek-V3 report, section 3.3): w = fp8 * scale.

A block spans `block` columns, and those rows that share a row of scales. Which row of scales a weight row uses is a
table: in a plain matrix it is row // block, in MiMo-V2-Flash's global layers it is not (`fused_rows`).
"""

from dataclasses import dataclass
from typing import final

import torch
import torch.nn.functional as F
from torch import Tensor

FP8 = torch.float8_e4m3fn
_LARGEST = 448.0  # of e4m3
_CHUNK = 4096  # rows of a matrix that are dequantised at a time


def plain_rows(sizes: list[int], block: int) -> Tensor:
    """Scale row of every weight row, [sum(sizes)] int64, where matrices of `sizes` rows and their scales are stacked."""
    tables, start = [], 0
    for rows in sizes:
        tables.append(start + torch.arange(rows) // block)
        start += -(-rows // block)
    return torch.cat(tables)


def fused_sizes(q: int, k: int, v: int, block: int) -> tuple[int, int, int]:
    """How many blocks begin in each part of a section of [q | k | v] rows."""
    ends = [-(-rows // block) for rows in (q, q + k, q + k + v)]
    return ends[0], ends[1] - ends[0], ends[2] - ends[1]


def fused_rows(sections: int, q: int, k: int, v: int, block: int) -> Tensor:
    """As `plain_rows` for a stacked [Q; K; V] that was quantised as `sections` sections of [q | k | v] rows each.

    The blocks restart at every section. The scales of a block went to the part in which it begins, so V's first rows
    may use one of K's scales. Returns [sections * (q + k + v)] int64.
    """
    table, start = [], 0
    for blocks in fused_sizes(q, k, v, block):
        table.append(start + torch.arange(sections * blocks).view(sections, blocks))
        start += sections * blocks
    rows = torch.cat(table, 1)[:, torch.arange(q + k + v) // block]  # [sections, q + k + v]
    return torch.cat([part.flatten() for part in torch.tensor_split(rows, [q, q + k], 1)])


def dequantise_blocks(weight: Tensor, scale: Tensor, rows: Tensor, block: int, dtype: torch.dtype) -> Tensor:
    """weight: [R, C] fp8; scale: [S, ceil(C / block)] fp32; rows: [R] int64, row of `scale` -> [R, C] in `dtype`."""
    count, columns = weight.shape
    factors, values = scale[rows], weight.float()
    if columns % block == 0:
        values.view(count, -1, block).mul_(factors[..., None])
    else:
        values.mul_(factors.repeat_interleave(block, 1)[:, :columns])
    return values.to(dtype)


def quantise_blocks(weight: Tensor, rows: Tensor, scale_rows: int, block: int) -> tuple[Tensor, Tensor]:
    """The inverse of `dequantise_blocks` up to rounding: [R, C] -> fp8 [R, C] and scales [scale_rows, ceil(C / block)]."""
    columns = weight.shape[1]
    padded = F.pad(weight.float().abs(), (0, -columns % block))
    largest = padded.view(len(weight), -1, block).amax(-1)  # [R, blocks]
    scale = torch.zeros(scale_rows, largest.shape[1])
    scale.scatter_reduce_(0, rows[:, None].expand_as(largest), largest, "amax")
    scale = (scale / _LARGEST).clamp(min=1e-12)
    return (weight.float() / scale[rows].repeat_interleave(block, 1)[:, :columns]).to(FP8), scale


@final
@dataclass(frozen=True)
class BlockMatrix:
    """A matrix that stays FP8 in memory, or a stack of them that share their table of scale rows."""

    data: Tensor  # [..., R, C] fp8
    scale: Tensor  # [..., S, ceil(C / block)] fp32
    rows: Tensor  # [R] int64
    block: int

    def matrix(self, index: int, dtype: torch.dtype) -> Tensor:
        """Matrix `index` of a stack, dequantised: [R, C]."""
        return dequantise_blocks(self.data[index], self.scale[index], self.rows, self.block, dtype)

    def part(self, first: int, last: int, dtype: torch.dtype) -> Tensor:
        """Rows first..last-1 of a single matrix, dequantised."""
        return dequantise_blocks(self.data[first:last], self.scale, self.rows[first:last], self.block, dtype)


@final
class BlockLinear:
    """y = x W^T + bias over an FP8 weight, called as kernels.linear.Linear is. Dequantises as it goes."""

    def __init__(self, weight: BlockMatrix, bias: Tensor | None = None) -> None:
        self.weight, self.bias = weight, bias
        self.out_features, self.in_features = weight.data.shape

    def __call__(self, x: Tensor) -> Tensor:
        starts = range(0, self.out_features, _CHUNK)
        parts = [F.linear(x, self.weight.part(start, start + _CHUNK, x.dtype)) for start in starts]
        y = parts[0] if len(parts) == 1 else torch.cat(parts, -1)
        return y if self.bias is None else y + self.bias
