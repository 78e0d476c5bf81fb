"""The blocks that every supported model is made of. Weights come in as plain tensors; nothing here reads files."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import final

import torch
import torch.nn.functional as F
from torch import Tensor

from mtp_engine.config import AttentionConfig, RopeConfig
from mtp_engine.protocols import Attention

BlockMap = Callable[[Tensor, Mapping[RopeConfig, tuple[Tensor, Tensor]], Attention, int], Tensor]
"""A decoder layer, called as Block is."""

Rotate = Callable[[Tensor, tuple[Tensor, Tensor]], Tensor]
"""Heads and the tables of RotaryEmbedding -> the heads turned, as `rotate`."""

RotaryMap = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Positions [B, N] -> the tables of RotaryEmbedding."""

LinearMap = Callable[[Tensor], Tensor]
"""[..., in] -> [..., out]: kernels.linear.Linear, or kernels.fp8.BlockLinear."""


@final
class RMSNorm:
    """x / rms(x) * weight over the last dimension. weight: [H]."""

    def __init__(self, weight: Tensor, eps: float) -> None:
        self.weight, self.eps = weight, eps

    def __call__(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


@final
@dataclass(frozen=True)
class Head:
    """Hidden state before its final norm -> logits."""

    norm: RMSNorm
    linear: LinearMap  # [H] -> [n]

    def __call__(self, hidden: Tensor) -> Tensor:
        """[..., H] -> [..., n] fp32."""
        return self.linear(self.norm(hidden)).float()


@final
@dataclass(frozen=True)
class Join:
    """How an MTP layer begins: the normed embedding and the normed hidden state, side by side, through one product."""

    embedding_norm: RMSNorm
    hidden_norm: RMSNorm
    projection: LinearMap  # [2H] -> [H]
    hidden_first: bool

    def __call__(self, embedded: Tensor, hidden: Tensor) -> Tensor:
        """[..., H] each -> [..., H]."""
        halves = [self.embedding_norm(embedded), self.hidden_norm(hidden)]
        return self.projection(torch.cat(halves[::-1] if self.hidden_first else halves, -1))


@final
class RotaryEmbedding:
    """Rotates the first `dim` dimensions of each head (Su et al. 2021), halves paired: dimension i with i + dim/2."""

    def __init__(self, config: RopeConfig, device: torch.device) -> None:
        exponents = torch.arange(0, config.dim, 2, dtype=torch.float32) / config.dim
        self.frequencies = _scale(1.0 / config.theta**exponents, config.scaling).to(device)

    def __call__(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """positions: [B, N] int64 -> cos and signed sin, [B, N, 1, dim] fp32, for `rotate`."""
        angles = positions[..., None, None].float() * self.frequencies
        cos, sin = angles.cos(), angles.sin()
        return torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1)


def rotate(x: Tensor, tables: tuple[Tensor, Tensor]) -> Tensor:
    """x: [B, N, heads, D]; rotates the leading dimensions that the tables cover, in fp32."""
    cos, sin = tables
    dim = cos.shape[-1]
    head = x[..., :dim].float()
    rotated = torch.addcmul(head * cos, head.roll(dim // 2, -1), sin).to(x.dtype)
    return rotated if dim == x.shape[-1] else torch.cat([rotated, x[..., dim:]], -1)


def _scale(frequencies: Tensor, scaling: tuple[str | float, ...] | None) -> Tensor:
    """Long-context scaling: "linear", or "llama3" (Llama 3.1: slow frequencies are divided, fast ones kept, a ramp between)."""
    if scaling is None:
        return frequencies
    kind, factor, *rest = scaling
    if kind == "linear":
        return frequencies / float(factor)
    low, high, context = (float(value) for value in rest)
    turns = context * frequencies / (2 * math.pi)  # full rotations over the original context
    ramp = ((turns - low) / (high - low)).clamp(0, 1)
    return frequencies * (ramp + (1 - ramp) / float(factor))


@final
@dataclass(frozen=True)
class SelfAttention:
    """Grouped-query attention with rotary positions; q, k and v are one product."""

    config: AttentionConfig
    qkv: LinearMap  # [H] -> [heads*qk + kv*qk + kv*v]
    out: LinearMap  # [heads*v] -> [H]
    sink: Tensor | None = None  # [heads]
    rotate: Rotate = rotate

    def __call__(self, x: Tensor, tables: tuple[Tensor, Tensor], attention: Attention, layer: int) -> Tensor:
        c = self.config
        batch, nodes, _ = x.shape
        qk_heads = c.heads + c.kv_heads
        qk, v = self.qkv(x).tensor_split([qk_heads * c.qk_dim], -1)
        qk = self.rotate(qk.view(batch, nodes, qk_heads, c.qk_dim), tables)
        v = v.view(batch, nodes, c.kv_heads, c.v_dim)
        if c.value_scale != 1.0:
            v = v * c.value_scale
        y = attention(layer, qk[:, :, : c.heads], qk[:, :, c.heads :], v, scale=c.qk_dim**-0.5, sink=self.sink)
        return self.out(y.flatten(2))


def gate(x: Tensor) -> Tensor:
    """silu(first half) * second half of the last dimension. [..., 2I] -> [..., I]."""
    opened, up = x.chunk(2, -1)
    return F.silu(opened) * up


@final
@dataclass(frozen=True)
class GatedMLP:
    """down(silu(gate(x)) * up(x)); gate and up are one product."""

    gate_up: LinearMap  # [H] -> [2 * intermediate]
    down: LinearMap
    gated: Callable[[Tensor], Tensor] = gate

    def __call__(self, x: Tensor) -> Tensor:
        return self.down(self.gated(self.gate_up(x)))


@final
@dataclass(frozen=True)
class Block:
    """One pre-norm decoder layer: attention, then the FFN, each added to the residual stream."""

    attention_norm: RMSNorm
    attention: SelfAttention
    ffn_norm: RMSNorm
    ffn: Callable[[Tensor], Tensor]

    def __call__(
        self, x: Tensor, tables: Mapping[RopeConfig, tuple[Tensor, Tensor]], attention: Attention, layer: int
    ) -> Tensor:
        """x: [B, N, H] -> [B, N, H]; `tables` maps each rotary setting to its tables for this step's positions."""
        x = x + self.attention(self.attention_norm(x), tables[self.attention.config.rope], attention, layer)
        return x + self.ffn(self.ffn_norm(x))
