"""Attention over whole sequences, with gradients: what the step-by-step attention of decoding computes, all at once."""

from collections.abc import Sequence
from typing import final

import torch
import torch.nn.functional as F
from torch import Tensor

from mtp_engine.models.decoder import Decoder

_ALIGNED = 8  # head dimensions of the fused kernels are multiples of this
_WIDEST = 256  # and no more than that


@final
class SequenceAttention:
    """Implements the Attention protocol for [B, N] rows that are N consecutive positions, 0 first. No cache."""

    def __init__(self, windows: Sequence[int | None]) -> None:
        """windows: per layer, how many keys a row sees, itself included; None is all."""
        self._windows = windows
        self._masks: dict[tuple[int | None, int, bool], Tensor] = {}

    def __call__(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, *, scale: float, sink: Tensor | None = None
    ) -> Tensor:
        """q: [B, N, Hq, Dk]; k: [B, N, Hkv, Dk]; v: [B, N, Hkv, Dv] -> [B, N, Hq, Dv]."""
        window, length = self._windows[layer], q.shape[1]
        if window is not None and window >= length:
            window = None
        width = v.shape[3]
        if sink is None and width == q.shape[3] and flash_takes(q):
            return flash(q, k, v, scale, window)
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        if window is None and sink is None and width == q.shape[3]:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True)
            return y.transpose(1, 2)
        group = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
        if sink is not None:
            q, k, v = _with_sink(q, k, v, sink, scale)
        mask = self._mask(window, length, sink is not None, q.device)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale).transpose(1, 2)

    def _mask(self, window: int | None, length: int, sink: bool, device: torch.device) -> Tensor:
        """[N, N] bool, with the sink [N, N + 8]: one more key that every row sees, and seven that none does."""
        key = (window, length, sink)
        if key not in self._masks:
            distance = torch.arange(length, device=device)[:, None] - torch.arange(length, device=device)
            seen = (distance >= 0) & (distance < (window or length))
            if sink:
                extra = torch.zeros(length, _ALIGNED, dtype=torch.bool, device=device)
                extra[:, 0] = True
                seen = torch.cat([seen, extra], 1)
            self._masks[key] = seen
        return self._masks[key]


def flash_takes(q: Tensor) -> bool:
    """Whether `flash` does."""
    return q.is_cuda and q.dtype == torch.bfloat16 and q.shape[3] % _ALIGNED == 0 and q.shape[3] <= _WIDEST


def flash(q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None) -> Tensor:
    """Flash attention with a window, which scaled_dot_product_attention has no argument for. Shapes as SequenceAttention;
    bf16 on a GPU, with gradients."""
    length, before = q.shape[1], None if window is None else window - 1
    found: Tensor = torch.ops.aten._flash_attention_forward(
        q, k, v, None, None, length, length, 0.0, True, False, scale=scale, window_size_left=before,
        window_size_right=None if window is None else 0,
    )[0]  # fmt: skip
    return found


def sequence_hidden(main: Decoder, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """What main.forward gives for whole sequences, tokens [B, L] int64, and their positions [B, L]."""
    positions = torch.arange(tokens.shape[1], device=tokens.device).expand(len(tokens), -1)
    attention = SequenceAttention([layer.attention.window for layer in main.config.layers])
    return main.forward(tokens, positions, attention), positions


def _with_sink(q: Tensor, k: Tensor, v: Tensor, sink: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """One more key per head whose score is the sink and whose value is zero; its score comes from a dimension of its own.

    q, k: [B, H, N, Dk]; v: [B, H, N, Dv]; sink: [H] -> the same with 8 more keys and Dk + 8 dimensions.
    """
    batch, heads, length, _ = q.shape
    more = q.new_zeros(_ALIGNED)
    more[0] = 1 / scale
    q = torch.cat([q, more.expand(batch, heads, length, _ALIGNED)], -1)
    unit = torch.zeros(_ALIGNED, q.shape[3], dtype=q.dtype, device=q.device)
    unit[0, k.shape[3]] = 1
    keys = sink.to(q.dtype)[:, None, None] * unit  # [H, 8, Dk + 8]
    k = torch.cat([F.pad(k, (0, _ALIGNED)), keys.expand(batch, -1, -1, -1)], 2)
    return q, k, F.pad(v, (0, 0, 0, _ALIGNED))
