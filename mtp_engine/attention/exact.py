"""The attention of a step on a GPU: everything lies on the device, so that a CUDA graph can hold it."""

from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any, final

import torch
from torch import Tensor

from mtp_engine.attention.rows import StepRows
from mtp_engine.cache import HybridKV, WindowKV
from mtp_engine.kernels.ancestry import MAX_NODES, ancestry
from mtp_engine.kernels.chain_attention import Packed, chain_attention, suits_chain
from mtp_engine.kernels.forest_attention import forest_attention, suits_forest
from mtp_engine.kernels.kv import storage_rows
from mtp_engine.kernels.tree_attention import tree_attention
from mtp_engine.protocols import Attention

MOST_ROWS = MAX_NODES  # of a request that rings take at once, and that may form a tree


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
        """[B, N], or [N, 1] where they are packed, int64 per cache group: the storage rows that keys and values of these rows
        go to."""
        rows, count = self.rows, self.rows.positions.shape[1]
        if rows.owners is not None:
            slots, each = rows.slots[rows.owners], rows.positions[0]
            return [
                storage_rows(group.device_pages, each, 1, group.page_size, requests=slots)
                for group in self.cache.groups
            ]
        return [
            storage_rows(group.device_pages, rows.lengths, count, group.page_size, requests=rows.slots)
            for group in self.cache.groups
        ]

    def destination(self, layer: int) -> tuple[Tensor, Tensor, Tensor]:
        """See protocols.DeviceAttention."""
        index, member = self.cache.place[layer]
        group = self.cache.groups[index]
        return group.k[member], group.v[member], self.targets[index].flatten()


@final
class Stretch:
    """Room for a long chunk's keys and values of a windowed layer, with those that its first row still sees before them.

    A ring would lose keys that the chunk's first rows see. This is a larger one, for one call of one layer: what is in the
    ring goes in, the chunk's own rows are written behind it, and when the chunk is read its end goes into the ring.
    """

    def __init__(self, group: WindowKV, rows: StepRows) -> None:
        batch, device = len(rows.lengths), rows.lengths.device
        counts = [count for _, _, count in rows.spans] or [rows.positions.shape[1]] * batch
        size, ring = group.page_size, -(-(group.window + max(counts)) // group.page_size)  # in tokens, in pages
        self.pages = torch.arange(batch * ring, dtype=torch.int32, device=device).view(batch, ring)
        self.rows = batch * ring * size
        own, positions = torch.arange(batch, device=device), rows.positions.flatten()
        owners = own.repeat_interleave(counts[0]) if rows.owners is None else rows.owners
        self.targets = storage_rows(self.pages, positions, 1, size, requests=owners)
        before = group.prefix_positions(rows.lengths).clamp(min=0)
        self._before = group.rows(rows.slots, before), own[:, None] * ring * size + before % (ring * size)
        ends = zip(accumulate(counts), counts, strict=True)
        kept = torch.cat([torch.arange(end - min(count, group.size), end, device=device) for end, count in ends])
        self._last = self.targets[kept], group.rows(rows.slots[owners[kept]], positions[kept][:, None])

    def begin(self, stored: Tensor) -> Tensor:
        """stored: a layer's keys or values in the rings, [R, Hkv, D] -> the same of the stretch."""
        room, (source, target) = stored.new_empty(self.rows, *stored.shape[1:]), self._before
        room[target] = stored[source]
        return room

    def end(self, room: Tensor, stored: Tensor) -> None:
        source, target = self._last
        stored[target] = room[source]


@final
class ExactAttention:
    """Our own kernels, whose result for a row is the same bits whatever else is in the step (a DeviceAttention)."""

    def __init__(self, cache: HybridKV, rows: StepRows) -> None:
        self._step, self._straight = DeviceRows(cache, rows), rows.chain or rows.straight
        most = max((count for _, _, count in rows.spans), default=rows.positions.shape[1])
        self._long, self._packed = most > MOST_ROWS, None if rows.counts is None else Packed.of(rows.counts, most)
        assert self._straight or not self._long, "of other rows than a chain's there may be 64"
        self._stretches: dict[int, Stretch] = {}  # by cache group
        self._rooms: dict[int, tuple[Tensor, Tensor]] = {}  # by layer, from `destination` to `attend`

    def destination(self, layer: int) -> tuple[Tensor, Tensor, Tensor]:
        index, member = self._step.cache.place[layer]
        group = self._step.cache.groups[index]
        if not self._long or not isinstance(group, WindowKV):
            return self._step.destination(layer)
        if index not in self._stretches:
            self._stretches[index] = Stretch(group, self._step.rows)
        stretch = self._stretches[index]
        k, v = self._rooms[layer] = stretch.begin(group.k[member]), stretch.begin(group.v[member])
        return k, v, stretch.targets.flatten()

    def attend(self, layer: int, q: Tensor, *, scale: float, sink: Tensor | None) -> Tensor:
        step, rows = self._step, self._step.rows
        index, member = step.cache.place[layer]
        group = step.cache.groups[index]
        window = group.window if isinstance(group, WindowKV) else 0
        k, v, pages = group.k[member], group.v[member], step.pages[index]
        if layer in self._rooms:
            k, v, pages = *self._rooms[layer], self._stretches[index].pages
        given: dict[str, Any] = {
            "page_size": group.page_size,
            "wrap": pages.shape[1],
            "window": window,
            "scale": scale,
            "sink": sink,
        }
        batch, nodes = q.shape[:2]
        if self._straight and (rows.spans or suits_chain(batch, nodes, k.shape[1])):
            y = chain_attention(q, k, v, pages, rows.lengths, rows.first, packed=self._packed, **given)
            if layer in self._rooms:
                for room, stored in zip(self._rooms.pop(layer), (group.k[member], group.v[member]), strict=True):
                    self._stretches[index].end(room, stored)
            return y
        tree = q, k, v, pages, rows.lengths, rows.positions, step.ancestry[0], step.first
        if suits_forest(batch, nodes, k.shape[1], rows.bound):
            return forest_attention(*tree, **given)
        return tree_attention(*tree, bound=rows.bound, **given)

    def __call__(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, *, scale: float, sink: Tensor | None = None
    ) -> Tensor:
        keys, values, rows = self.destination(layer)
        keys[rows], values[rows] = k.flatten(0, 1), v.flatten(0, 1)
        return self.attend(layer, q, scale=scale, sink=sink)


def exact_attention(cache: HybridKV, rows: StepRows) -> Attention:
    """An AttentionFactory."""
    return ExactAttention(cache, rows)
