"""The attention of a step on a GPU: everything lies on the device, so that a CUDA graph can hold it."""

from dataclasses import dataclass
from functools import cached_property
from typing import final

import torch
from torch import Tensor

from mtp_engine.attention.rows import AttentionFactory, StepRows
from mtp_engine.cache import HybridKV, WindowKV
from mtp_engine.kernels.ancestry import MAX_NODES, ancestry
from mtp_engine.kernels.kv import storage_rows
from mtp_engine.kernels.tree_attention import tree_attention
from mtp_engine.protocols import Attention

MOST_ROWS = MAX_NODES  # of a request in one call; longer chains are cut


@final
@dataclass(frozen=True)
class DeviceRows:
    """What the kernels need to know of a step's rows, worked out once."""

    cache: HybridKV
    rows: StepRows

    @cached_property
    def ancestry(self) -> tuple[Tensor, Tensor]:
        """Paths [B, N, N] int32 and tree masks [B, N] int64, see kernels.ancestry."""
        rows = self.rows
        offsets = rows.positions - rows.lengths[:, None] if rows.offsets is None else rows.offsets
        return ancestry(rows.parents, offsets)

    @cached_property
    def first(self) -> Tensor:
        """[B] int64."""
        return torch.zeros_like(self.rows.lengths) if self.rows.first is None else self.rows.first

    @cached_property
    def pages(self) -> list[Tensor]:
        """[B, P] int32 per cache group: of pages, those that the bound allows."""
        bound = self.rows.bound
        tables = [
            group.device_pages if isinstance(group, WindowKV) else group.device_pages[:, : -(-bound // group.page_size)]
            for group in self.cache.groups
        ]
        return [table[self.rows.slots] for table in tables]

    @cached_property
    def targets(self) -> list[Tensor]:
        """[B, N] int64 per cache group: the storage rows that keys and values of these rows go to."""
        rows, count = self.rows, self.rows.positions.shape[1]
        return [
            storage_rows(group.device_pages, rows.lengths, count, group.page_size, requests=rows.slots)
            for group in self.cache.groups
        ]

    def destination(self, layer: int) -> tuple[Tensor, Tensor, Tensor]:
        """See protocols.DeviceAttention."""
        index, member = self.cache.place[layer]
        group = self.cache.groups[index]
        return group.k[member], group.v[member], self.targets[index].flatten()

    def write(self, layer: int, k: Tensor, v: Tensor) -> None:
        index, member = self.cache.place[layer]
        self.cache.groups[index].write(member, self.targets[index], k, v)


@final
class ExactAttention:
    """Our own kernel, whose result for a row is the same bits whatever else is in the step (a DeviceAttention)."""

    def __init__(self, cache: HybridKV, rows: StepRows) -> None:
        self._step = DeviceRows(cache, rows)

    def destination(self, layer: int) -> tuple[Tensor, Tensor, Tensor]:
        return self._step.destination(layer)

    def attend(self, layer: int, q: Tensor, *, scale: float, sink: Tensor | None) -> Tensor:
        step, rows = self._step, self._step.rows
        index, member = step.cache.place[layer]
        group = step.cache.groups[index]
        return tree_attention(
            q, group.k[member], group.v[member], step.pages[index], rows.lengths, rows.positions, step.ancestry[0],
            step.first, page_size=group.page_size, wrap=step.pages[index].shape[1],
            window=group.window if isinstance(group, WindowKV) else 0, bound=rows.bound, scale=scale, sink=sink,
        )  # fmt: skip

    def __call__(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, *, scale: float, sink: Tensor | None = None
    ) -> Tensor:
        self._step.write(layer, k, v)
        return self.attend(layer, q, scale=scale, sink=sink)


@final
class ChunkedAttention:
    """A prompt's chunk, MOST_ROWS rows at a time: a ring would lose keys that earlier rows still see."""

    def __init__(self, factory: AttentionFactory, cache: HybridKV, rows: StepRows) -> None:
        count = rows.positions.shape[1]
        self._spans = [(start, min(start + MOST_ROWS, count)) for start in range(0, count, MOST_ROWS)]
        self._parts = [factory(cache, rows.part(*span)) for span in self._spans]

    def __call__(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, *, scale: float, sink: Tensor | None = None
    ) -> Tensor:
        parts = [
            part(layer, q[:, a:b], k[:, a:b], v[:, a:b], scale=scale, sink=sink)
            for part, (a, b) in zip(self._parts, self._spans, strict=True)
        ]
        return torch.cat(parts, 1)


def exact_attention(cache: HybridKV, rows: StepRows) -> Attention:
    """An AttentionFactory."""
    if rows.positions.shape[1] > MOST_ROWS:
        return ChunkedAttention(ExactAttention, cache, rows)
    return ExactAttention(cache, rows)
