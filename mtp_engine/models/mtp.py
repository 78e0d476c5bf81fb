"""MTP layers: small decoder layers that read a main-model hidden state and a later token, and predict one further on."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import final

import torch
from torch import Tensor

from mtp_engine.config import MTPConfig
from mtp_engine.models.layers import Block, LinearMap, RMSNorm, RotaryEmbedding
from mtp_engine.protocols import Attention


@final
@dataclass(frozen=True)
class MTPLayer:
    """x = eh_proj(concat of normed embedding and normed hidden state), then one decoder block."""

    embedding_norm: RMSNorm
    hidden_norm: RMSNorm
    projection: LinearMap  # [2H] -> [H]
    block: Block
    final_norm: RMSNorm  # its own, or the main model's


@final
@dataclass(frozen=True, repr=False)
class MTPModule:
    """All MTP layers of a model, with what they share with it: embedding, head, and perhaps the final norm.

    Row j of layer k (from 0) joins token x[j+1+k] with a hidden state of position j and predicts x[j+2+k]
    (DeepSeek-V3 report, section 2.2; MiMo-V2-Flash report for the layers without chaining).
    """

    config: MTPConfig
    layers: Sequence[MTPLayer]
    embedding: Tensor  # [V, H]
    main_norm: RMSNorm
    head: LinearMap  # [H] -> [n], over the draft vocabulary
    draft_ids: Tensor  # [n] int64, token of each head row
    _rotary: RotaryEmbedding = field(init=False, repr=False)

    def __post_init__(self) -> None:
        rope = self.config.layer.attention.rope
        object.__setattr__(self, "_rotary", RotaryEmbedding(rope, self.embedding.device))

    def main_hidden(self, hidden: Tensor) -> Tensor:
        """The main model's pre-norm hidden state as the layers want it. [..., H] -> [..., H]."""
        return self.main_norm(hidden) if self.config.hidden == "post_norm" else hidden

    def forward(self, level: int, tokens: Tensor, hidden: Tensor, positions: Tensor, attention: Attention) -> Tensor:
        """Rows of layer `level`: tokens, positions [B, N] int64 (position = row j), hidden [B, N, H] -> [B, N, H]."""
        index = 0 if self.config.reused else level
        layer = self.layers[index]
        halves = [layer.embedding_norm(self.embedding[tokens]), layer.hidden_norm(hidden)]
        if self.config.concat == "hidden_first":
            halves.reverse()
        x = layer.projection(torch.cat(halves, -1))
        return layer.block(x, {self.config.layer.attention.rope: self._rotary.tables(positions)}, attention, index)

    def logits(self, level: int, output: Tensor) -> Tensor:
        """Output rows of `level`, [..., H] -> [..., n] fp32 logits over the draft vocabulary."""
        layer = self.layers[0 if self.config.reused else level]
        return self.head(layer.final_norm(output)).float()
