"""The main model: embedding, blocks, norm, head. Families differ in configuration and weight names only."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import final

import torch
from torch import Tensor

from mtp_engine.config import ModelConfig, RopeConfig
from mtp_engine.models.layers import BlockMap, LinearMap, RMSNorm, RotaryMap
from mtp_engine.parallel.group import Group
from mtp_engine.protocols import Attention


@final
@dataclass(frozen=True, repr=False)
class Decoder:
    """A causal language model over an external KV cache (a TargetModel), or one rank's part of it: its heads, its part of
    every FFN, and its tokens of the output head, the v of V."""

    config: ModelConfig  # of the layers: what this rank computes
    embedding: Tensor  # [V, H]
    blocks: Sequence[BlockMap]
    norm: RMSNorm  # the final one, which the head applies and MTP layers may
    head: Callable[[Tensor], Tensor]  # [..., H] before the final norm -> [..., v] fp32
    unembed: LinearMap  # [..., H] -> [..., v], the head without its norm
    head_weight: Tensor  # [v, H], for reduced draft heads; the embedding itself where the head is tied
    rotary: Mapping[RopeConfig, RotaryMap]  # of every rotary setting among the layers
    features: tuple[int, ...] = ()  # layers whose outputs `forward` returns too
    group: Group = field(default_factory=Group)

    @property
    def vocab_size(self) -> int:
        return self.config.vocab_size

    def forward(self, tokens: Tensor, positions: Tensor, attention: Attention) -> Tensor:
        """tokens, positions: [B, N] int64 -> hidden [B, N, H], the residual stream before the final norm.

        With F features it is [B, N, (F + 1) * H]: their layers' outputs stand before it.
        """
        tables = {rope: rotary(positions) for rope, rotary in self.rotary.items()}
        x, kept = self.embedding[tokens], []
        for layer, block in enumerate(self.blocks):
            x = block(x, tables, attention, layer)
            if layer in self.features:
                kept.append(x)
        return torch.cat([*kept, x], -1) if kept else x

    def logits(self, hidden: Tensor) -> Tensor:
        """[..., H], or what `forward` gave -> [..., V] fp32."""
        return self.group.join(self.own_logits(hidden))

    def own_logits(self, hidden: Tensor) -> Tensor:
        """The logits of this rank's tokens, [..., v] fp32."""
        return self.head(hidden[..., -self.config.hidden_size :].contiguous())
