"""The attention of a step with torch operations, on any device."""

from typing import final

import torch
from torch import Tensor

from mtp_engine.attention.rows import StepRows
from mtp_engine.cache import HybridKV, PagedKV, WindowKV
from mtp_engine.kernels.reference import attend, visible_bias


@final
class TorchAttention:
    """The twin of the CUDA kernels: exact, any device, any head shapes. One object per step.

    It reads the lengths of paged caches on the host, which costs a synchronisation on a GPU.
    """

    def __init__(self, cache: HybridKV, rows: StepRows) -> None:
        self._cache, self._rows = cache, rows
        self._apart = [TorchAttention(cache, each) for each in rows.apart()]
        if rows.owners is not None:
            return
        nodes = rows.positions.shape[1]
        behind = rows.lengths[:, None] + torch.arange(nodes, device=rows.lengths.device)
        self._targets = [group.rows(rows.slots, behind) for group in cache.groups]
        self._sources = [
            group.rows(rows.slots, group.prefix_positions(rows.lengths)) if isinstance(group, WindowKV) else None
            for group in cache.groups
        ]
        self._biases: dict[tuple[int, int], list[Tensor]] = {}
        self._host = list(zip(rows.slots.tolist(), rows.lengths.tolist(), strict=True)) if cache.paged else []

    def _bias(self, index: int, group: int) -> list[Tensor]:
        """What the layers of cache group `index` add to their scores: per request if paged, else one for all."""
        if (index, group) not in self._biases:
            kv, rows = self._cache.groups[index], self._rows
            if isinstance(kv, WindowKV):
                seen = [rows.window_seen(kv.window, kv.prefix_positions(rows.lengths))]
            else:
                seen = [rows.paged_seen(b, length) for b, (_, length) in enumerate(self._host)]
            self._biases[index, group] = [visible_bias(each, group) for each in seen]
        return self._biases[index, group]

    def __call__(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, *, scale: float, sink: Tensor | None = None
    ) -> Tensor:
        """q: [B, N, Hq, Dk]; k: [B, N, Hkv, Dk]; v: [B, N, Hkv, Dv] -> [B, N, Hq, Dv]."""
        if self._rows.owners is not None:
            counts = [each._rows.positions.shape[1] for each in self._apart]
            rest = q.shape[1] - sum(counts)  # rows of nobody
            parts = zip(self._apart, *(torch.split(x, [*counts, rest], 1)[:-1] for x in (q, k, v)), strict=True)
            done = [each(layer, *qkv, scale=scale, sink=sink) for each, *qkv in parts]
            return torch.cat([*done, q.new_zeros(1, rest, q.shape[2], v.shape[3])], 1)
        index, member = self._cache.place[layer]
        group, bias = self._cache.groups[index], self._bias(index, q.shape[2] // k.shape[2])
        if isinstance(group, PagedKV):
            group.write(member, self._targets[index], k, v)
            out = []
            for b, (slot, _) in enumerate(self._host):
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
