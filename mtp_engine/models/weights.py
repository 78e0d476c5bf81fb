"""From named tensors to layers: stacked once in the memory where they stay, FP8 kept with its scales or dequantised."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Literal, final

import torch
from torch import Tensor

from mtp_engine.config import AttentionConfig
from mtp_engine.kernels.experts import ExpertStack, PlainStack
from mtp_engine.kernels.fp8 import FP8, BlockLinear, BlockMatrix, dequantise_blocks, fused_rows, fused_sizes, plain_rows
from mtp_engine.kernels.linear import Linear
from mtp_engine.models.checkpoint import Checkpoint, Part, empty
from mtp_engine.models.layers import LinearMap
from mtp_engine.parallel.group import Group
from mtp_engine.parallel.linear import SummedLinear

_STAGED = 64 << 20  # bytes of the host's memory through which weights get to a GPU
Parts = Sequence[tuple[str, int]]
"""Matrices that are stacked into one: the name without `.weight`, and the rows of each."""

Split = Literal["none", "rows", "columns", "inputs"]
"""How a group shares a product. rows: each rank gives its part of the outputs. columns: each is given its part of the inputs,
and the outputs are summed over the ranks; inputs: the same, of inputs that every rank has whole. none: all do all of it."""


@final
@dataclass(frozen=True)
class Cut:
    """What a rank reads of stacked matrices: of each some rows, and of all the same columns."""

    parts: Parts  # as they are stored
    width: int  # columns of all of them
    rows: Sequence[range]
    columns: range

    @classmethod
    def of(cls, parts: Parts, width: int, split: Split, group: Group) -> "Cut":
        """Of matrices whose rows or columns are evenly divided."""
        rows = [group.shard.part(count) if split == "rows" else range(count) for _, count in parts]
        return cls(parts, width, rows, group.shard.part(width) if split in ("columns", "inputs") else range(width))

    @property
    def shape(self) -> tuple[int, int]:
        """Of what is read, stacked."""
        return sum(map(len, self.rows)), len(self.columns)

    def of_part(self, index: int, name: str) -> Part:
        """What is read of matrix `name`, which stands where the index-th of `parts` does."""
        return Part(f"{name}.weight", (self.parts[index][1], self.width), self.rows[index], self.columns)

    def grid(self, table: Tensor, scale: Tensor, block: int) -> tuple[Tensor, Tensor]:
        """The scales of what is read. table: [all rows] int64, row of `scale` of every row of the stacked matrices; scale:
        [..., S, blocks]. Returns the same of the part."""
        if self.shape == (len(table), self.width):
            return table, scale
        starts = [sum(rows for _, rows in self.parts[:index]) for index in range(len(self.parts))]
        picked = [torch.arange(each.start, each.stop) + start for each, start in zip(self.rows, starts, strict=True)]
        used, renumbered = torch.unique(table[torch.cat(picked)], return_inverse=True)
        blocks = slice(self.columns.start // block, -(-self.columns.stop // block))
        return renumbered, scale[..., used, blocks].contiguous()


Grid = tuple[Tensor, Sequence[int]]
"""Of stacked FP8 matrices as they are stored: [rows] int64, the row of scales of every row, and how many each matrix has."""


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
        group: Group = Group(),  # noqa: B008  frozen
    ) -> None:
        """fp8_block: rows and columns of a block that share a scale, if config.json announces FP8 weights. group: those who
        share the model; only this rank's part is read."""
        self.checkpoint, self.dtype, self.device = checkpoint, dtype, device
        self._block, self._dequantize = fp8_block, dequantize
        self.make, self.group = make, group

    def tensor(self, name: str, *shape: int, split: bool = False) -> Tensor:
        """In the engine's dtype. split: only this rank's rows."""
        rows = self.group.shard.part(shape[0]) if split else None
        return self.checkpoint.part(Part(name, shape, rows)).to(self.device, self.dtype)

    def exact(self, name: str, *shape: int) -> Tensor:
        """In fp32, whatever the engine's dtype."""
        return self.checkpoint.raw(name, shape).to(self.device, torch.float32)

    def linear(self, parts: Parts, columns: int, *, split: Split = "none") -> LinearMap:
        """One product for all parts, [columns] -> [sum of their rows]; see Split."""
        cut = Cut.of(parts, columns, split, self.group)
        made = self._linear(cut, None, None if not self._is_fp8([name for name, _ in parts]) else self._grid(parts))
        if split not in ("columns", "inputs") or self.group.size == 1:
            return made
        return SummedLinear(made, self.group, cut.columns if split == "inputs" else None)

    def qkv(self, prefix: str, a: AttentionConfig, columns: int) -> LinearMap:
        """The query, key and value projections of attention layer `prefix` as one product, of this rank's heads.

        MiMo-V2-Flash's global layers were quantised as one section of [q | k | v] rows per key head and then split:
        their scales are recognised by their number of rows, and taken for that where a plain grid would have as many.
        """
        sizes = (a.heads * a.qk_dim, a.kv_heads * a.qk_dim, a.kv_heads * a.v_dim)
        parts = [(f"{prefix}.{name}_proj", rows) for name, rows in zip("qkv", sizes, strict=True)]
        names = [name for name, _ in parts]
        heads, kv_heads = self.group.shard.part(a.heads), self.group.shard.kv_heads(a)
        held = ((heads, a.qk_dim), (kv_heads, a.qk_dim), (kv_heads, a.v_dim))
        cut = Cut(parts, columns, [range(h.start * dim, h.stop * dim) for h, dim in held], range(columns))
        bias = self._bias(cut) if a.bias else None
        if not self._is_fp8(names):
            return self._linear(cut, bias, None)
        assert self._block is not None
        if a.window is None and a.heads % a.kv_heads == 0:
            section = (sizes[0] // a.kv_heads, a.qk_dim, a.v_dim)
            fused = [a.kv_heads * blocks for blocks in fused_sizes(*section, self._block)]
            if [self._scale_shape(name)[0] for name in names] == fused:
                return self._linear(cut, bias, (fused_rows(a.kv_heads, *section, self._block), fused))
        return self._linear(cut, bias, self._grid(parts))

    def experts(self, names: Sequence[Parts], columns: int, *, split: Split = "none") -> ExpertStack:
        """names: per expert the parts of its matrix -> a stack [E, sum of rows, columns]."""
        cut = Cut.of(names[0], columns, split, self.group)
        if not self._is_fp8([name for parts in names for name, _ in parts]):
            return self.make.stack(self._plain(names, cut))
        if self._dequantize:
            return self.make.stack(self._dequantised(names, cut, self._grid(names[0])))
        return self._blocks(names, cut, self._grid(names[0]))

    def _bias(self, cut: Cut) -> Tensor:
        biases = (
            self.checkpoint.part(Part(f"{name}.bias", (count,), rows))
            for (name, count), rows in zip(cut.parts, cut.rows, strict=True)
        )
        return torch.cat([bias.to(self.device, self.dtype) for bias in biases])

    def _is_fp8(self, names: Sequence[str]) -> bool:
        """Whether all these weights are FP8. Raises EngineError if only some are, or config.json does not say so."""
        kinds = {self.checkpoint.torch_dtype(f"{name}.weight") == FP8: f"{name}.weight" for name in names}
        if len(kinds) == 2:
            raise self.checkpoint.error(kinds[True], f"is FP8, but {kinds[False]} is not; they belong together")
        if True in kinds and self._block is None:
            raise self.checkpoint.error(kinds[True], "is FP8, but config.json has no quantization_config")
        return True in kinds

    def _grid(self, parts: Parts) -> Grid:
        """Where every matrix has blocks of its own."""
        assert self._block is not None
        return plain_rows([r for _, r in parts], self._block), [-(-r // self._block) for _, r in parts]

    def _scale_shape(self, name: str) -> tuple[int, ...]:
        """Raises EngineError naming the file of the weight if its scales are missing."""
        if f"{name}.weight_scale_inv" not in self.checkpoint:
            raise self.checkpoint.error(f"{name}.weight", f"is FP8, but its scales {name}.weight_scale_inv are missing")
        return self.checkpoint.shape(f"{name}.weight_scale_inv")

    def _linear(self, cut: Cut, bias: Tensor | None, grid: Grid | None) -> LinearMap:
        """grid: of FP8 weights."""
        if grid is None:
            return self.make.linear(self._plain([cut.parts], cut)[0], bias)
        if self._dequantize:
            return self.make.linear(self._dequantised([cut.parts], cut, grid)[0], bias)
        stack = self._blocks([cut.parts], cut, grid)
        return BlockLinear(BlockMatrix(stack.data[0], stack.scale[0], stack.rows, stack.block), bias)

    def _plain(self, names: Sequence[Parts], cut: Cut) -> Tensor:
        """[len(names), rows, columns] in the engine's dtype."""
        stored = {self.checkpoint.torch_dtype(f"{name}.weight") for parts in names for name, _ in parts}
        if stored == {self.dtype}:
            return self._stored(names, cut, self.dtype)
        out = empty((len(names), *cut.shape), self.dtype, self.device)
        for part, target in _slots(names, cut, out):
            target.copy_(self.checkpoint.part(part))
        return out

    def _stored(self, names: Sequence[Parts], cut: Cut, dtype: torch.dtype) -> Tensor:
        """[len(names), rows, columns] of matrices that are stored in this dtype: on a CPU read in place, otherwise a few at a
        time."""
        own, out = self._read_by(cut, dtype), empty((len(names), *cut.shape), dtype, self.device)
        if self.device.type == "cpu" and own is cut:
            self.checkpoint.fill(_slots(names, cut, out))
            return out
        largest = max(prod(cut.shape), prod(own.shape) * self.group.size) * dtype.itemsize
        count = max(1, _STAGED // largest)
        for start in range(0, len(names), count):
            target = out[start : start + count]
            staged = self._stage((len(target), *own.shape), dtype)
            self.checkpoint.fill(_slots(names[start : start + count], own, staged))
            if own is cut:
                target.copy_(staged, non_blocking=True)
                continue
            sent = staged.to(self.device, non_blocking=True).view(torch.int32)
            every = self.group.gather(sent).view(dtype)
            columns = every[..., cut.columns.start : cut.columns.stop].transpose(0, 1)  # [names, ranks, rows, columns]
            target.view(columns.shape).copy_(columns)
        return out

    def _read_by(self, cut: Cut, dtype: torch.dtype) -> Cut:
        """What this rank reads for its cut: of a matrix that is divided by columns, which lie apart in a file, whole rows, a
        rank's part of them, where ranks exchange them faster than they are read."""
        rows = cut.shape[0]
        if not self.group.fast or len(cut.columns) == cut.width or len(cut.parts) > 1:
            return cut
        if rows % self.group.size or cut.width * dtype.itemsize % 4:
            return cut
        return replace(cut, rows=[self.group.shard.part(rows)], columns=range(cut.width))

    def _stage(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """The host's memory for what is on its way to the device: pinned for a GPU, which fetches it while more is read. PyTorch
        gives it out again once it has been fetched."""
        if self.device.type == "cpu" or prod(shape) * dtype.itemsize > _STAGED:
            return empty(shape, dtype)
        return torch.empty(shape, dtype=dtype, pin_memory=True)

    def _blocks(self, names: Sequence[Parts], cut: Cut, grid: Grid) -> BlockMatrix:
        assert self._block is not None
        data = self._stored(names, cut, FP8)
        rows, scale = cut.grid(grid[0], self._scales(names, cut.width, grid[1]), self._block)
        return BlockMatrix(data, scale.to(self.device), rows.to(self.device), self._block)

    def _dequantised(self, names: Sequence[Parts], cut: Cut, grid: Grid) -> Tensor:
        assert self._block is not None
        rows, scales = cut.grid(grid[0], self._scales(names, cut.width, grid[1]), self._block)
        out = empty((len(names), *cut.shape), self.dtype, self.device)
        for parts, scale, target in zip(names, scales, out, strict=True):
            start = 0
            for index, (name, _) in enumerate(parts):
                part = self.checkpoint.part(cut.of_part(index, name))
                span = slice(start, start + len(part))
                target[span] = dequantise_blocks(part, scale, rows[span], self._block, self.dtype)
                start += len(part)
        return out

    def _scales(self, names: Sequence[Parts], columns: int, scale_rows: Sequence[int]) -> Tensor:
        """[len(names), sum of scale_rows, blocks] fp32. Raises EngineError for a scale that cannot be one."""
        assert self._block is not None
        scale = torch.empty(len(names), sum(scale_rows), -(-columns // self._block))
        slots: list[tuple[Part, Tensor]] = []
        for parts, target in zip(names, scale, strict=True):
            for (name, _), rows in zip(parts, torch.split(target, list(scale_rows)), strict=True):
                self._scale_shape(name)
                slots.append((Part(f"{name}.weight_scale_inv", tuple(rows.shape)), rows))
        for part, _ in slots:
            if self.checkpoint.torch_dtype(part.name) != torch.float32:
                kind = self.checkpoint.stored_dtype(part.name)
                raise self.checkpoint.error(part.name, f"is {kind}; scales must be F32")
        self.checkpoint.fill(slots)
        if not bool(((scale >= 0) & scale.isfinite()).all()):
            wrong = next(part.name for part, rows in slots if not bool(((rows >= 0) & rows.isfinite()).all()))
            raise self.checkpoint.error(wrong, "holds a scale that is negative or no finite number; fetch it again")
        return scale


def _slots(names: Sequence[Parts], cut: Cut, out: Tensor) -> list[tuple[Part, Tensor]]:
    """What is read of each matrix, and where it lies in the stack `out`."""
    slots = []
    for parts, target in zip(names, out, strict=True):
        each = torch.split(target, [len(rows) for rows in cut.rows])
        slots += [(cut.of_part(index, name), each[index]) for index, (name, _) in enumerate(parts)]
    return slots
