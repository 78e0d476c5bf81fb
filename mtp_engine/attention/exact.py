"""The attention of a step on a GPU: everything lies on the device, so that a CUDA graph can hold it."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any, final

import torch
from torch import Tensor

from mtp_engine.attention.rows import StepRows
from mtp_engine.cache import HybridKV, WindowKV
from mtp_engine.kernels.ancestry import MAX_NODES, ancestry
from mtp_engine.kernels.chain_attention import Packed, chain_attention, suits_chain
from mtp_engine.kernels.forest_attention import forest_attention, suits_forest
from mtp_engine.kernels.kv import storage_rows, store_rows
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
    def packed(self) -> Packed | None:
        rows = self.rows
        if rows.counts is None:
            return None
        return Packed.of(rows.lengths, rows.counts, rows.positions.shape[1], padded=rows.padded)

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
        lengths, slots = rows.lengths, rows.slots
        if rows.owners is not None:
            lengths, count, slots = rows.positions[0], 1, slots[rows.owners]
        return [
            storage_rows(group.device_pages, lengths, count, group.page_size, requests=slots)
            for group in self.cache.groups
        ]

    @cached_property
    def kept(self) -> list[Tensor]:
        """`targets` of packed rows, [N] int64 per cache group, with -1 for those that later ones push out of their ring."""
        rows = self.rows
        assert rows.counts is not None
        left = (rows.lengths + rows.counts)[rows.owners] - rows.positions[0]
        return [
            torch.where(left <= group.size, targets[:, 0], -1) if isinstance(group, WindowKV) else targets[:, 0]
            for group, targets in zip(self.cache.groups, self.targets, strict=True)
        ]

    def launch(self, *, tree: bool) -> None:
        """Have worked out what attention reads besides queries and keys: before what makes those, see runs_kernel."""
        _ = self.pages
        if tree:
            _ = self.ancestry, self.first

    def destination(self, layer: int) -> tuple[Tensor, Tensor, Tensor]:
        """See protocols.DeviceAttention."""
        index, member = self.cache.place[layer]
        group = self.cache.groups[index]
        return group.k[member], group.v[member], self.targets[index].flatten()


@final
class ExactAttention:
    """Our own kernels, whose result for a row is the same bits whatever else is in the step (a DeviceAttention).

    Packed rows of a windowed layer, which may be more than a ring holds, are written behind one another at first: they go
    into the rings once all have seen what the rings held before.
    """

    def __init__(self, cache: HybridKV, rows: StepRows) -> None:
        long, self._straight = rows.positions.shape[1] > MOST_ROWS, rows.chain or rows.straight
        assert self._straight or not long, "of other rows than a chain's there may be 64"
        self._step = DeviceRows(cache, rows.packed() if long else rows)
        self._fresh: dict[int, tuple[Tensor, Tensor]] = {}  # by layer, from `destination` to `attend`

    @cached_property
    def _lines(self) -> Tensor:
        return torch.arange(self._step.rows.positions.shape[1], device=self._step.rows.positions.device)

    def _chains(self, index: int) -> bool:
        """Whether layers of this cache group go through chain_attention."""
        batch, nodes = self._step.rows.positions.shape
        kv_heads = self._step.cache.groups[index].k[0].shape[1]
        return self._straight and (self._step.packed is not None or suits_chain(batch, nodes, kv_heads))

    def destination(self, layer: int) -> tuple[Tensor, Tensor, Tensor]:
        index, member = self._step.cache.place[layer]
        group = self._step.cache.groups[index]
        self._step.launch(tree=not self._chains(index))
        if self._step.packed is None or not isinstance(group, WindowKV):
            return self._step.destination(layer)
        k, v = (x[member].new_empty(len(self._lines), *x.shape[2:]) for x in (group.k, group.v))
        self._fresh[layer] = k, v
        return k, v, self._lines

    def attend(self, layer: int, q: Tensor, *, scale: float, sink: Tensor | None) -> Tensor:
        step, rows = self._step, self._step.rows
        index, member = step.cache.place[layer]
        group = step.cache.groups[index]
        window = group.window if isinstance(group, WindowKV) else 0
        k, v, pages = group.k[member], group.v[member], step.pages[index]
        given: dict[str, Any] = {
            "page_size": group.page_size,
            "wrap": pages.shape[1],
            "window": window,
            "scale": scale,
            "sink": sink,
        }
        if self._chains(index):
            fresh = self._fresh.pop(layer, None)
            y = chain_attention(q, k, v, pages, rows.lengths, rows.first, packed=step.packed, fresh=fresh, **given)
            if fresh:
                store_rows(*fresh, k, v, step.kept[index])
            return y
        tree = q, k, v, pages, rows.lengths, rows.positions, step.ancestry[0], step.first
        batch, nodes = rows.positions.shape
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
