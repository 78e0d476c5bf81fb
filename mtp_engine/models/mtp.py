"""MTP layers: small decoder layers that read a main-model hidden state and a later token, and predict one further on."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import final

import torch
from torch import Tensor

from mtp_engine.config import MTPConfig
from mtp_engine.models.layers import BlockMap, LinearMap, RMSNorm, RotaryMap
from mtp_engine.parallel.group import Group
from mtp_engine.protocols import Attention


@final
@dataclass(frozen=True)
class MTPLayer:
    """x = eh_proj(concat of normed embedding and normed hidden state), then one decoder block."""

    join: Callable[[Tensor, Tensor], Tensor]
    block: BlockMap
    head: Callable[[Tensor], Tensor]  # [..., H] -> [..., n] fp32 over the draft vocabulary, its final norm included


@final
@dataclass(frozen=True)
class FeatureMix:
    """h + projection(the earlier layers' outputs, each normed, side by side)."""

    norms: Sequence[RMSNorm]
    projection: LinearMap  # [F * H] -> [H]

    def __call__(self, hidden: Tensor) -> Tensor:
        """[..., (F + 1) * H] -> [..., H]."""
        *features, last = hidden.chunk(len(self.norms) + 1, -1)
        normed = [norm(each) for norm, each in zip(self.norms, features, strict=True)]
        return last + self.projection(torch.cat(normed, -1))


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
    draft_ids: Tensor  # [n] int64, token of each head row; where ranks share the module, of this rank's rows
    rotary: RotaryMap
    mix: FeatureMix | None = None
    group: Group = field(default_factory=Group)

    def main_hidden(self, hidden: Tensor) -> Tensor:
        """The main model's pre-norm hidden state as the layers want it. [..., H], or with features more -> [..., H]."""
        if self.mix:
            return self.mix(hidden)
        return self.main_norm(hidden) if self.config.hidden == "post_norm" else hidden

    def forward(self, level: int, embedded: Tensor, hidden: Tensor, positions: Tensor, attention: Attention) -> Tensor:
        """Rows of layer `level`: tokens' embeddings and hidden [B, N, H], positions [B, N] int64 (row j) -> [B, N, H]."""
        index = 0 if self.config.reused else level
        layer = self.layers[index]
        x = layer.join(embedded, hidden)
        return layer.block(x, {self.config.layer.attention.rope: self.rotary(positions)}, attention, index)

    def logits(self, level: int, output: Tensor) -> Tensor:
        """Output rows of `level`, [..., H] -> [..., n] fp32 logits over the draft vocabulary."""
        return self.layers[0 if self.config.reused else level].head(output)
