"""The main model: embedding, blocks, norm, head. Families differ in configuration and weight names only."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import final

from torch import Tensor

from mtp_engine.config import ModelConfig, RopeConfig
from mtp_engine.models.layers import Block, LinearMap, RMSNorm, RotaryEmbedding
from mtp_engine.protocols import Attention


@final
@dataclass(frozen=True, repr=False)
class Decoder:
    """A causal language model over an external KV cache (a TargetModel)."""

    config: ModelConfig
    embedding: Tensor  # [V, H]
    blocks: Sequence[Block]
    norm: RMSNorm
    head: LinearMap  # [H] -> [V]
    head_weight: Tensor  # [V, H], for reduced draft heads; the embedding itself where the head is tied
    _rotary: dict[RopeConfig, RotaryEmbedding] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        ropes = {layer.attention.rope for layer in self.config.layers}
        object.__setattr__(self, "_rotary", {rope: RotaryEmbedding(rope, self.embedding.device) for rope in ropes})

    @property
    def vocab_size(self) -> int:
        return self.config.vocab_size

    def forward(self, tokens: Tensor, positions: Tensor, attention: Attention) -> Tensor:
        """tokens, positions: [B, N] int64 -> hidden [B, N, H], the residual stream before the final norm."""
        tables = {rope: rotary.tables(positions) for rope, rotary in self._rotary.items()}
        x = self.embedding[tokens]
        for layer, block in enumerate(self.blocks):
            x = block(x, tables, attention, layer)
        return x

    def logits(self, hidden: Tensor) -> Tensor:
        """[..., H] -> [..., V] fp32."""
        return self.head(self.norm(hidden)).float()
