"""From named tensors to layers: stacked once in the memory where they stay, FP8 kept with its scales or dequantised."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from mtp_engine.config import AttentionConfig
from mtp_engine.kernels.experts import ExpertStack, PlainStack
from mtp_engine.kernels.fp8 import FP8, BlockLinear, BlockMatrix, dequantise_blocks, fused_rows, fused_sizes, plain_rows
from mtp_engine.kernels.linear import Linear
from mtp_engine.models.checkpoint import Checkpoint, empty
from mtp_engine.models.layers import LinearMap

Parts = Sequence[tuple[str, int]]
"""Matrices that are stacked into one: the name without `.weight`, and the rows of each."""


@final
@dataclass(frozen=True)
class Makers:
    """What becomes of matrices that are in the engine's dtype. linear: of [out, in] and perhaps a bias [out]; stack: of
    [E, out, in]."""

    linear: Callable[[Tensor, Tensor | None], LinearMap] = Linear
    stack: Callable[[Tensor], ExpertStack] = PlainStack


@final
class Weights:
    """A checkpoint's tensors as an engine wants them, on its device."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        dtype: torch.dtype,
        device: torch.device,
        *,
        fp8_block: int | None = None,
        dequantize: bool = False,
        make: Makers = Makers(),
    ) -> None:
        """fp8_block: rows and columns of a block that share a scale, if config.json announces FP8 weights."""
        self.checkpoint, self.dtype, self.device = checkpoint, dtype, device
        self._block, self._dequantize = fp8_block, dequantize
        self.make = make

    def tensor(self, name: str, *shape: int) -> Tensor:
        """In the engine's dtype."""
        return self.checkpoint.raw(name, shape).to(self.device, self.dtype)

    def exact(self, name: str, *shape: int) -> Tensor:
        """In fp32, whatever the engine's dtype."""
        return self.checkpoint.raw(name, shape).to(self.device, torch.float32)

    def linear(self, parts: Parts, columns: int, *, bias: bool = False) -> LinearMap:
        """One product for all parts, [columns] -> [sum of their rows]."""
        added = torch.cat([self.tensor(f"{name}.bias", rows) for name, rows in parts]) if bias else None
        if not self._is_fp8([name for name, _ in parts]):
            return self.make.linear(self._plain([parts], columns)[0], added)
        rows, scale_rows = self._grid(parts)
        return self._fp8_linear(parts, columns, rows, scale_rows, added)

    def qkv(self, prefix: str, a: AttentionConfig, columns: int) -> LinearMap:
        """The query, key and value projections of attention layer `prefix` as one product.

        MiMo-V2-Flash's global layers were quantised as one section of [q | k | v] rows per key head and then split:
        their scales are recognised by their number of rows, and taken for that where a plain grid would have as many.
        """
        sizes = (a.heads * a.qk_dim, a.kv_heads * a.qk_dim, a.kv_heads * a.v_dim)
        parts = [(f"{prefix}.{name}_proj", rows) for name, rows in zip("qkv", sizes, strict=True)]
        names = [name for name, _ in parts]
        if self._block and a.window is None and a.heads % a.kv_heads == 0 and self._is_fp8(names):
            section = (sizes[0] // a.kv_heads, a.qk_dim, a.v_dim)
            fused = [a.kv_heads * blocks for blocks in fused_sizes(*section, self._block)]
            found = [self._scale_shape(name)[0] for name in names]
            if found == fused:
                added = torch.cat([self.tensor(f"{n}.bias", r) for n, r in parts]) if a.bias else None
                rows = fused_rows(a.kv_heads, *section, self._block)
                return self._fp8_linear(parts, columns, rows, fused, added)
        return self.linear(parts, columns, bias=a.bias)

    def experts(self, names: Sequence[Parts], columns: int) -> ExpertStack:
        """names: per expert the parts of its matrix -> a stack [E, sum of rows, columns]."""
        if not self._is_fp8([name for parts in names for name, _ in parts]):
            return self.make.stack(self._plain(names, columns))
        rows, scale_rows = self._grid(names[0])
        if self._dequantize:
            return self.make.stack(self._dequantised(names, columns, rows, scale_rows))
        return self._blocks(names, columns, rows, scale_rows)

    def _is_fp8(self, names: Sequence[str]) -> bool:
        """Whether all these weights are FP8. Raises EngineError if only some are, or config.json does not say so."""
        kinds = {self.checkpoint.torch_dtype(f"{name}.weight") == FP8: f"{name}.weight" for name in names}
        if len(kinds) == 2:
            raise self.checkpoint.error(kinds[True], f"is FP8, but {kinds[False]} is not; they belong together")
        if True in kinds and self._block is None:
            raise self.checkpoint.error(kinds[True], "is FP8, but config.json has no quantization_config")
        return True in kinds

    def _grid(self, parts: Parts) -> tuple[Tensor, list[int]]:
        """Scale row of every stacked row, and the scale rows of each part, where every matrix has blocks of its own."""
        assert self._block is not None
        return plain_rows([r for _, r in parts], self._block), [-(-r // self._block) for _, r in parts]

    def _scale_shape(self, name: str) -> tuple[int, ...]:
        """Raises EngineError naming the file of the weight if its scales are missing."""
        if f"{name}.weight_scale_inv" not in self.checkpoint:
            raise self.checkpoint.error(f"{name}.weight", f"is FP8, but its scales {name}.weight_scale_inv are missing")
        return self.checkpoint.shape(f"{name}.weight_scale_inv")

    def _fp8_linear(
        self, parts: Parts, columns: int, rows: Tensor, scale_rows: Sequence[int], bias: Tensor | None
    ) -> LinearMap:
        if self._dequantize:
            return self.make.linear(self._dequantised([parts], columns, rows, scale_rows)[0], bias)
        stack = self._blocks([parts], columns, rows, scale_rows)
        return BlockLinear(BlockMatrix(stack.data[0], stack.scale[0], stack.rows, stack.block), bias)

    def _plain(self, names: Sequence[Parts], columns: int) -> Tensor:
        """[len(names), rows, columns] in the engine's dtype, read in place where that is how they are stored."""
        total = sum(rows for _, rows in names[0])
        out = empty((len(names), total, columns), self.dtype, self.device)
        slots = _slots(names, out)
        direct = self.device.type == "cpu"
        in_place = [(n, t) for n, t in slots if direct and self.checkpoint.torch_dtype(n) == self.dtype]
        self.checkpoint.fill(in_place)
        done = {name for name, _ in in_place}
        for name, target in slots:
            if name not in done:
                target.copy_(self.checkpoint.raw(name, target.shape))
        return out

    def _blocks(self, names: Sequence[Parts], columns: int, rows: Tensor, scale_rows: Sequence[int]) -> BlockMatrix:
        assert self._block is not None
        data = empty((len(names), len(rows), columns), FP8)
        self.checkpoint.fill(_slots(names, data))
        scale = self._scales(names, columns, scale_rows)
        return BlockMatrix(data.to(self.device), scale.to(self.device), rows.to(self.device), self._block)

    def _dequantised(self, names: Sequence[Parts], columns: int, rows: Tensor, scale_rows: Sequence[int]) -> Tensor:
        assert self._block is not None
        scales = self._scales(names, columns, scale_rows)
        out = empty((len(names), len(rows), columns), self.dtype, self.device)
        for parts, scale, target in zip(names, scales, out, strict=True):
            start = 0
            for name, count in parts:
                part = self.checkpoint.raw(f"{name}.weight", (count, columns))
                span = slice(start, start + count)
                target[span] = dequantise_blocks(part, scale, rows[span], self._block, self.dtype)
                start += count
        return out

    def _scales(self, names: Sequence[Parts], columns: int, scale_rows: Sequence[int]) -> Tensor:
        """[len(names), sum of scale_rows, blocks] fp32. Raises EngineError for a scale that cannot be one."""
        assert self._block is not None
        scale = torch.empty(len(names), sum(scale_rows), -(-columns // self._block))
        named = [[(name, count) for (name, _), count in zip(parts, scale_rows, strict=True)] for parts in names]
        for parts in named:
            for name, _ in parts:
                self._scale_shape(name)
        slots = _slots(named, scale, ".weight_scale_inv")
        for name, _ in slots:
            if self.checkpoint.torch_dtype(name) != torch.float32:
                raise self.checkpoint.error(name, f"is {self.checkpoint.stored_dtype(name)}; scales must be F32")
        self.checkpoint.fill(slots)
        if not bool(((scale >= 0) & scale.isfinite()).all()):
            wrong = next(n for n, part in slots if not bool(((part >= 0) & part.isfinite()).all()))
            raise self.checkpoint.error(wrong, "holds a scale that is negative or no finite number; fetch it again")
        return scale


def _slots(names: Sequence[Parts], out: Tensor, suffix: str = ".weight") -> list[tuple[str, Tensor]]:
    """Where each part lies in the stack `out`."""
    slots = []
    for parts, target in zip(names, out, strict=True):
        start = 0
        for name, rows in parts:
            slots.append((name + suffix, target[start : start + rows]))
            start += rows
    return slots
