"""Keys and values of rows that are all equally long, and the attentions that read and write them."""

from typing import final

import torch
import torch.nn.functional as F
from torch import Tensor

from mtp_engine.config import AttentionConfig, ModelConfig
from mtp_engine.training.attention import SequenceAttention


@final
class LockStepCache:
    """Keys [B, Hkv, L, Dk] and values [B, Hkv, L, Dv] of every layer, for rows that are all equally long."""

    def __init__(self, config: ModelConfig, rows: int, length: int, dtype: torch.dtype, device: torch.device) -> None:
        self.layers: list[AttentionConfig] = [layer.attention for layer in config.layers]

        def room(a: AttentionConfig, width: int) -> Tensor:
            return torch.empty(rows, a.kv_heads, length, width, dtype=dtype, device=device)

        self.k = [room(a, a.qk_dim) for a in self.layers]
        self.v = [room(a, a.v_dim) for a in self.layers]


@final
class PromptAttention:
    """Positions 0, 1, ... of some rows at once (an Attention)."""

    def __init__(self, cache: LockStepCache, rows: slice) -> None:
        self._cache, self._rows = cache, rows
        self._sequence = SequenceAttention([a.window for a in cache.layers])

    def __call__(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, *, scale: float, sink: Tensor | None = None
    ) -> Tensor:
        for cache, new in ((self._cache.k, k), (self._cache.v, v)):
            cache[layer][self._rows, :, : new.shape[1]] = new.transpose(1, 2)
        return self._sequence(layer, q, k, v, scale=scale, sink=sink)


@final
class StepAttention:
    """One position of all rows, on any device (an Attention)."""

    def __init__(self, cache: LockStepCache, position: int) -> None:
        self._cache, self._position = cache, position

    def __call__(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, *, scale: float, sink: Tensor | None = None
    ) -> Tensor:
        rows, _, heads, dim = q.shape
        t, kv_heads = self._position, k.shape[2]
        window = self._cache.layers[layer].window or t + 1
        keys, values = self._cache.k[layer], self._cache.v[layer]
        keys[:, :, t], values[:, :, t] = k[:, 0], v[:, 0]
        keys, values = (x[:, :, max(0, t + 1 - window) : t + 1] for x in (keys, values))
        q = q.reshape(rows, kv_heads, heads // kv_heads, dim)  # the heads of a group read their keys together
        if sink is None:
            y = F.scaled_dot_product_attention(q, keys, values, scale=scale)
        else:
            scores = (q @ keys.transpose(2, 3)).float() * scale
            extra = sink.float().view(kv_heads, -1, 1).expand(*scores.shape[:3], 1)
            y = torch.cat([scores, extra], -1).softmax(-1)[..., :-1].to(values.dtype) @ values
        return y.reshape(rows, 1, heads, -1)


@final
class KernelAttention:
    """One position of all rows, which is a tensor: what a CUDA graph can hold (an Attention).

    Our decoding kernel reads the cache as if each row were one page. A window as long as the rows lets it take a row's
    keys in one run, which suits thousands of rows.
    """

    def __init__(self, cache: LockStepCache, positions: Tensor) -> None:
        """positions: [B] int64, all equal; whoever steps moves them on."""
        from mtp_engine.kernels.tree_attention import Plan, tree_attention

        rows, device = len(positions), positions.device
        self._cache, self._positions, self._attend = cache, positions, tree_attention
        group = max(a.heads // a.kv_heads for a in cache.layers)
        self._plan = Plan(rows=max(16, 1 << (group - 1).bit_length()), warps=4, depth=2)
        self._first, self._paths = (
            torch.zeros_like(positions),
            torch.zeros(rows, 1, 1, dtype=torch.int32, device=device),
        )
        row = torch.arange(rows, dtype=torch.int32, device=device)[:, None]
        self._pages = [row * a.kv_heads for a in cache.layers]

    def __call__(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, *, scale: float, sink: Tensor | None = None
    ) -> Tensor:
        at, keys, values = self._positions[:1], self._cache.k[layer], self._cache.v[layer]
        keys.index_copy_(2, at, k.transpose(1, 2))
        values.index_copy_(2, at, v.transpose(1, 2))
        length = keys.shape[2]
        return self._attend(
            q, _by_token(keys), _by_token(values), self._pages[layer], self._positions, self._positions[:, None],
            self._paths, self._first, page_size=length, wrap=1, window=self._cache.layers[layer].window or length,
            bound=length, scale=scale, sink=sink, plan=self._plan,
        )  # fmt: skip


def _by_token(cache: Tensor) -> Tensor:
    """[B, H, L, D] -> a view [R, H, D] whose entry b * H * L + t is position t of row b."""
    rows, heads, length, dim = cache.shape
    return cache.as_strided(((rows * heads - heads + 1) * length, heads, dim), (dim, length * dim, 1))
