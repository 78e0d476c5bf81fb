"""Weights to be trained, under the names and in the stacks that the models are built from.

The models compute with `leaf` tensors in the dtype of training. In bf16 the optimiser keeps fp32 masters beside them,
because a small step would be lost in rounding; in fp32 the two are one.
"""

import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import final

import torch
import torch.nn.functional as F
from torch import Tensor

from mtp_engine.config import AttentionConfig
from mtp_engine.kernels.experts import ExpertStack, PlainStack
from mtp_engine.models.layers import LinearMap
from mtp_engine.models.weights import Parts, Split
from mtp_engine.parallel.group import Group

Draw = Callable[[str, tuple[int, ...]], Tensor]
"""A tensor's first values by its name and shape."""


@final
@dataclass(frozen=True)
class Parameter:
    """One trained tensor, or several that lie one after another in it."""

    leaf: Tensor
    masters: Mapping[str, Tensor]  # fp32 by name: views of one tensor

    def gradients(self) -> Iterator[tuple[str, Tensor, Tensor]]:
        """(name, master, its gradient in fp32); none where the leaf took no part."""
        if self.leaf.grad is not None:
            grads = _cut(self.leaf.grad, {name: master.shape for name, master in self.masters.items()})
            for name, master in self.masters.items():
                yield name, master, grads[name].float()


@final
@dataclass
class TrainableWeights:
    """Where a model under construction takes its weights from: fresh ones of `draw`, each a parameter."""

    draw: Draw
    dtype: torch.dtype
    device: torch.device
    parameters: list[Parameter] = field(default_factory=list)
    group: Group = field(default_factory=Group)

    def tensor(self, name: str, *shape: int, split: bool = False) -> Tensor:
        return self._add({name: shape}, shape, self.dtype)

    def exact(self, name: str, *shape: int) -> Tensor:
        """In fp32, whatever the dtype of training."""
        return self._add({name: shape}, shape, torch.float32)

    def linear(self, parts: Parts, columns: int, *, split: Split = "none") -> LinearMap:
        return self._linear(parts, columns, bias=False)

    def _linear(self, parts: Parts, columns: int, *, bias: bool) -> LinearMap:
        shapes = {f"{name}.weight": (rows, columns) for name, rows in parts}
        total = sum(rows for _, rows in parts)
        weight = self._add(shapes, (total, columns), self.dtype)
        added = self._add({f"{name}.bias": (rows,) for name, rows in parts}, (total,), self.dtype) if bias else None
        return lambda x: F.linear(x, weight, added)

    def qkv(self, prefix: str, a: AttentionConfig, columns: int) -> LinearMap:
        sizes = (a.heads * a.qk_dim, a.kv_heads * a.qk_dim, a.kv_heads * a.v_dim)
        parts = [(f"{prefix}.{name}_proj", rows) for name, rows in zip("qkv", sizes, strict=True)]
        return self._linear(parts, columns, bias=a.bias)

    def experts(self, names: Sequence[Parts], columns: int, *, split: Split = "none") -> ExpertStack:
        shapes = {f"{name}.weight": (rows, columns) for parts in names for name, rows in parts}
        total = sum(rows for _, rows in names[0])
        return PlainStack(self._add(shapes, (len(names), total, columns), self.dtype))

    def named(self) -> dict[str, Tensor]:
        """Every tensor's fp32 master by name."""
        return {name: master for each in self.parameters for name, master in each.masters.items()}

    @torch.no_grad()
    def refresh(self) -> None:
        """The leaves take over what the masters have become."""
        for each in self.parameters:
            if each.leaf.dtype != torch.float32:
                for name, part in _cut(each.leaf.detach(), {n: m.shape for n, m in each.masters.items()}).items():
                    part.copy_(each.masters[name])

    def _add(self, shapes: Mapping[str, tuple[int, ...]], shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        master = torch.empty(shape, device=self.device)
        masters = _cut(master, shapes)
        for name, view in masters.items():
            view.copy_(self.draw(name, tuple(view.shape)))
        leaf = master.detach().to(dtype).requires_grad_(True)
        self.parameters.append(Parameter(leaf, masters))
        return leaf


def named_noise(name: str, shape: tuple[int, ...], seed: int) -> Tensor:
    """Standard normal values that depend on name and seed only."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(zlib.crc32(name.encode()) ^ seed))


def _cut(whole: Tensor, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """Views of `whole`, one after another."""
    views, start, flat = {}, 0, whole.view(-1)
    for name, shape in shapes.items():
        size = torch.Size(shape).numel()
        views[name] = flat[start : start + size].view(shape)
        start += size
    return views
