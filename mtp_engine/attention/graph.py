"""The attention of a step that runs as one graph (models/onnx): what its rows see, and where their keys and values go.

The graph's sums do not round, so it does not matter where a key lies: the graph gets a stretch of the cache's storage as
it is, with other requests' rows and free ones in it, and a mask that hides them.
"""

from itertools import accumulate
from typing import NoReturn, final

import torch
from torch import Tensor

from mtp_engine.attention.rows import StepRows
from mtp_engine.cache import HybridKV, PagedKV, WindowKV

_STRETCH = 64  # rows; stretches begin and end at multiples
_SPARSE = 4  # a stretch of more than so many times the rows in use is gathered instead


@final
class GraphAttention:
    """One step's rows over a cache, for a model whose forward pass is a graph. Made like TorchAttention."""

    def __init__(self, cache: HybridKV, rows: StepRows) -> None:
        self._cache, self._rows = cache, rows

    def __call__(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, *, scale: float, sink: Tensor | None = None
    ) -> NoReturn:
        raise AssertionError("a graph attends by itself")

    def past(self, group: int) -> tuple[Tensor, Tensor, Tensor]:
        """Keys and values of a cache group, [layers, S, kv_heads, dim], and the mask [B * N, S + B * N] fp32: 0 where a row
        sees a key and -inf elsewhere. The last columns are the step's own rows."""
        kv, rows = self._cache.groups[group], self._rows
        batch, nodes = rows.positions.shape
        sources = self._sources(kv)
        begin, end = self._stretch(sources, kv.k.shape[1])
        used = sum(map(len, sources))
        if end - begin <= _SPARSE * used + _STRETCH:
            keys, values = kv.k[:, begin:end], kv.v[:, begin:end]
            columns = [source - begin for source in sources]
        else:
            everything = torch.cat(sources)
            keys, values = kv.k.index_select(1, everything), kv.v.index_select(1, everything)
            ends = accumulate(map(len, sources))
            columns = [torch.arange(end - len(source), end) for source, end in zip(sources, ends, strict=True)]
        size = keys.shape[1]
        mask = torch.full((batch, nodes, size + batch * nodes), -float("inf"))
        if isinstance(kv, WindowKV):
            seen = rows.window_seen(kv.window, kv.prefix_positions(rows.lengths))
            hidden = torch.zeros(seen.shape).masked_fill_(~seen, -float("inf"))
        for b, column in enumerate(columns):
            own = mask[b, :, size + b * nodes : size + (b + 1) * nodes]
            if isinstance(kv, WindowKV):
                mask[b].index_copy_(1, column, hidden[b, :, : len(column)])
                own.copy_(hidden[b, :, len(column) :])
            else:
                mask[b, :, column] = 0.0
                own.masked_fill_(rows.seen[b], 0.0)
        return keys, values, mask.view(batch * nodes, -1)

    def _sources(self, kv: PagedKV | WindowKV) -> list[Tensor]:
        """Per request the storage rows of the cached keys that it may see."""
        rows = self._rows
        if isinstance(kv, WindowKV):
            return list(kv.rows(rows.slots, kv.prefix_positions(rows.lengths)))
        lengths = rows.lengths.tolist()
        first = [0] * len(lengths) if rows.first is None else rows.first.tolist()
        places = kv.rows(rows.slots, torch.arange(max(lengths)).expand(len(lengths), -1))
        return [place[start:length] for place, start, length in zip(places, first, lengths, strict=True)]

    def _stretch(self, sources: list[Tensor], size: int) -> tuple[int, int]:
        found = [place for place in sources if len(place)]
        if not found:
            return 0, min(_STRETCH, size)
        begin = min(int(place.min()) for place in found)
        end = max(int(place.max()) for place in found) + 1
        return begin // _STRETCH * _STRETCH, min(-(-end // _STRETCH) * _STRETCH, size)

    def write(self, group: int, k: Tensor, v: Tensor, first: int = 0) -> None:
        """Store new keys and values of the group's layers from `first` on, [layers, B * N, kv_heads, dim]."""
        kv, rows = self._cache.groups[group], self._rows
        behind = rows.lengths[:, None] + torch.arange(rows.positions.shape[1])
        places = kv.rows(rows.slots, behind)
        if isinstance(kv, WindowKV) and places.shape[1] > kv.size:  # of a long chunk only the end stays
            kept = places.shape[1] - kv.size
            k, v = (x.view(len(x), *places.shape, *x.shape[2:])[:, :, kept:].flatten(1, 2) for x in (k, v))
            places = places[:, kept:]
        kv.k[first : first + len(k)].index_copy_(1, places.flatten(), k)
        kv.v[first : first + len(v)].index_copy_(1, places.flatten(), v)
