"""The attention of one step: what every row may see is worked out once, then each layer calls it.

Rows of a step lie behind the cached prefix at cache slots length + row index. In a tree a row's position differs from
its slot: position = length + depth. Positions decide rotation and windows, slots decide where keys lie.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import final

import torch
from torch import Tensor

from mtp_engine.cache import HybridKV, PagedKV, WindowKV
from mtp_engine.kernels.reference import attend, visible_bias


@final
@dataclass(frozen=True)
class StepRows:
    """The rows of a step and which of them see which.

    A row sees a cached key or another row if `mask` (rows) or order (cache) allows it, if the key's position is at
    least `first`, and in a windowed layer if fewer than `window` positions lie between them. Cached keys before
    `first` hold nothing.
    """

    slots: Tensor  # [B] int64
    lengths: Tensor  # [B] int64, cached tokens
    host_slots: Sequence[int]
    host_lengths: Sequence[int]
    positions: Tensor  # [B, N] int64
    mask: Tensor  # [B, N, N] bool
    first: Tensor | None = None  # [B] int64; None = 0

    @cached_property
    def rows_seen(self) -> Tensor:
        """[B, N, N] bool: `mask` without keys before `first`; a row always sees itself."""
        if self.first is None:
            return self.mask
        exists = self.positions >= self.first[:, None]
        return self.mask & (
            exists[:, None, :] | torch.eye(self.mask.shape[1], dtype=torch.bool, device=self.mask.device)
        )

    def window_seen(self, window: int, prefix: Tensor) -> Tensor:
        """prefix: [B, S] positions of cached keys -> [B, N, S + N] bool."""
        first = 0 if self.first is None else self.first[:, None]
        near = self.positions[..., None] - prefix[:, None, :] < window
        near_rows = self.positions[..., None] - self.positions[:, None, :] < window
        return torch.cat([near & (prefix >= first)[:, None, :], near_rows & self.rows_seen], -1)

    def paged_seen(self, b: int) -> Tensor:
        """[1, N, length + N] bool for request b."""
        length = self.host_lengths[b]
        prefix = torch.ones(length, dtype=torch.bool, device=self.mask.device)
        if self.first is not None:
            prefix = torch.arange(length, device=self.mask.device) >= self.first[b]
        nodes = self.mask.shape[1]
        return torch.cat([prefix.expand(1, nodes, -1), self.rows_seen[b : b + 1]], -1)


@final
class TorchAttention:
    """The twin of the CUDA kernels: exact, any device, any head shapes. One object per step."""

    def __init__(self, cache: HybridKV, rows: StepRows) -> None:
        self._cache, self._rows = cache, rows
        nodes = rows.positions.shape[1]
        behind = rows.lengths[:, None] + torch.arange(nodes, device=rows.lengths.device)
        self._targets = [group.rows(rows.slots, behind) for group in cache.groups]
        self._sources = [
            group.rows(rows.slots, group.prefix_positions(rows.lengths)) if isinstance(group, WindowKV) else None
            for group in cache.groups
        ]
        self._biases: dict[tuple[int, int], list[Tensor]] = {}

    def _bias(self, index: int, group: int) -> list[Tensor]:
        """What the layers of cache group `index` add to their scores: per request if paged, else one for all."""
        if (index, group) not in self._biases:
            kv, rows = self._cache.groups[index], self._rows
            if isinstance(kv, WindowKV):
                seen = [rows.window_seen(kv.window, kv.prefix_positions(rows.lengths))]
            else:
                seen = [rows.paged_seen(b) for b in range(len(rows.host_slots))]
            self._biases[index, group] = [visible_bias(each, group) for each in seen]
        return self._biases[index, group]

    def __call__(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, *, scale: float, sink: Tensor | None = None
    ) -> Tensor:
        """q: [B, N, Hq, Dk]; k: [B, N, Hkv, Dk]; v: [B, N, Hkv, Dv] -> [B, N, Hq, Dv]."""
        index, member = self._cache.place[layer]
        group, bias = self._cache.groups[index], self._bias(index, q.shape[2] // k.shape[2])
        if isinstance(group, PagedKV):
            group.write(member, self._targets[index], k, v)
            out = []
            for b, slot in enumerate(self._rows.host_slots):
                keys, values = group.read(member, slot, bias[b].shape[-1])
                out.append(attend(q[b : b + 1], keys[None], values[None], bias[b], scale, sink))
            return torch.cat(out) if len(out) > 1 else out[0]
        source = self._sources[index]
        assert source is not None
        keys, values = group.read(member, source)
        y = attend(q, torch.cat([keys, k], 1), torch.cat([values, v], 1), bias[0], scale, sink)
        group.write(
            member, self._targets[index], k, v
        )  # after reading: a long chunk overwrites what its start still sees
        return y
