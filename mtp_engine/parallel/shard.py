"""Which part of a model a process holds. Arithmetic only.

Attention is divided by heads, gated FFNs (and every expert) by their inner width, the output head by tokens, and products
over joined inputs by columns; embedding, norms and routers are whole everywhere.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from math import lcm
from typing import final

from mtp_engine.config import AttentionConfig, LayerConfig, ModelConfig, MTPConfig
from mtp_engine.errors import EngineError
from mtp_engine.kernels.int4 import LEAST


@final
@dataclass(frozen=True)
class Shard:
    """Rank `rank` of `size`, counted from 0. Each holds an even part of whatever is divided, in the order of ranks."""

    rank: int = 0
    size: int = 1

    def part(self, total: int) -> range:
        """This rank's of `total` rows, columns or heads, which `size` divides."""
        share = total // self.size
        return range(self.rank * share, (self.rank + 1) * share)

    def kv_heads(self, a: AttentionConfig) -> range:
        """The key heads that this rank's query heads read; where ranks outnumber key heads several ranks hold the same."""
        if a.kv_heads >= self.size:
            return self.part(a.kv_heads)
        head = self.rank * a.kv_heads // self.size
        return range(head, head + 1)

    def attention(self, a: AttentionConfig) -> AttentionConfig:
        return replace(a, heads=len(self.part(a.heads)), kv_heads=len(self.kv_heads(a)))

    def layer(self, layer: LayerConfig) -> LayerConfig:
        return replace(
            layer, attention=self.attention(layer.attention), intermediate=len(self.part(layer.intermediate))
        )

    def model(self, config: ModelConfig) -> ModelConfig:
        """What this rank computes of every layer. The vocabulary stays that of the model."""
        return replace(config, layers=tuple(self.layer(layer) for layer in config.layers))

    def mtp(self, config: MTPConfig) -> MTPConfig:
        return replace(config, layer=self.layer(config.layer))


def check_divides(size: int, config: ModelConfig, mtp: MTPConfig | None) -> None:
    """Raises EngineError where a model cannot be divided among `size` processes."""
    for what, count, unit in _divided(config, mtp):
        if count % (size * unit):
            blocks = f" in blocks of {unit}" if unit > 1 else ""
            raise EngineError(f"tensor_parallel is {size}, which does not divide the model's {count} {what}{blocks}")
    for layer in _layers(config, mtp):
        kv = layer.attention.kv_heads
        if kv % size and size % kv:
            raise EngineError(
                f"tensor_parallel is {size}, and {kv} key heads can neither be divided nor repeated for it"
            )


def _layers(config: ModelConfig, mtp: MTPConfig | None) -> Iterable[LayerConfig]:
    """Each kind once."""
    return dict.fromkeys((*config.layers, *([mtp.layer] if mtp else [])))


def _divided(config: ModelConfig, mtp: MTPConfig | None) -> Iterator[tuple[str, int, int]]:
    """What is divided, how much of it there is, and in pieces of what size."""
    for layer in _layers(config, mtp):
        yield "attention heads", layer.attention.heads, 1
        kind = "columns of an expert" if layer.moe else "columns of a feed-forward layer"
        yield kind, layer.intermediate, lcm(config.fp8_block or 1, LEAST if layer.moe and layer.moe.int4 else 1)
    yield "tokens of the vocabulary", config.vocab_size, 1
    if mtp:
        yield "columns of an MTP layer's projection", 2 * config.hidden_size, 1
        yield "columns of the features' projection", len(mtp.features) * config.hidden_size, 1
