"""Byte floors: the least that a step must read from memory, from the configuration alone."""

from collections.abc import Iterable
from functools import cache

from mtp_engine.config import AttentionConfig, ModelConfig, MoEConfig, MTPConfig
from mtp_engine.models.build import MTPNames
from mtp_engine.models.tensors import Stored, main_tensors, mtp_tensors

_BF16 = 2
_DIVIDED = ("lm_head.weight", "eh_proj.weight")  # among ranks, though no field of the configuration says so


def hit_share(moe: MoEConfig, rows: int) -> float:
    """Share of the experts that `rows` rows choose when all choose evenly and alone: 1 - (1 - k/E)^rows."""
    return 1 - (1 - moe.per_token / moe.experts) ** rows


def kv_bytes(a: AttentionConfig, batch: int, context: int) -> int:
    """Keys and values of `batch` requests of `context` tokens in a layer, bf16; a window reads no more than itself."""
    return batch * min(context, a.window or context) * a.kv_size * _BF16


def _total(tensors: Iterable[Stored], experts: bool = False, ranks: int = 1) -> int:
    """The experts', or the rest without the embedding table, of which a token reads one row. ranks: that share what the
    configuration of a rank's part does not say."""
    return sum(
        t.nbytes // (ranks if t.name.endswith(_DIVIDED) else 1)
        for t in tensors
        if (".experts." in t.name) == experts and "embed_tokens" not in t.name
    )


@cache
def _weights(config: ModelConfig, ranks: int) -> tuple[int, int]:
    """Bytes of the main model's weights that every step reads, and of all experts."""
    tensors = list(main_tensors(config))
    head = config.vocab_size * config.hidden_size * _BF16 // ranks if config.tied_head else 0
    return _total(tensors, ranks=ranks) + head, _total(tensors, experts=True)


def main_bytes(config: ModelConfig, rows: int, batch: int, context: int, ranks: int = 1) -> float:
    """A forward pass over `rows` rows in all: dense weights once + experts' weights * hit_share(rows) + KV once. Of a rank's
    part of the model where `config` is that part's (Shard.model) and `ranks` share it.

    The head counts once (also where it is the embedding table), norms and FP8 scales as stored. Activations, logits and
    the rows written do not count. MiMo-7B, batch 1: 14.00 GB of weights + 147 KB a token = 4.58 ms at 3.06 TB/s.
    """
    moe = next((layer.moe for layer in config.layers if layer.moe), None)
    rest, experts = _weights(config, ranks)
    weights = rest + (experts * hit_share(moe, rows) if moe else 0.0)
    return weights + sum(kv_bytes(layer.attention, batch, context) for layer in config.layers)


def draft_bytes(
    config: ModelConfig,
    mtp: MTPConfig,
    names: MTPNames,
    vocab: int,
    levels: int,
    batch: int,
    context: int,
    ranks: int = 1,
) -> float:
    """`levels` times (the level's MTP layer + draft head of `vocab` rows + KV). A re-used layer is read in every level,
    as no cache holds it. ranks: see main_bytes; vocab: the part's."""
    tensors = list(mtp_tensors(config, mtp, names))
    total = 0.0
    for level in range(levels):
        prefix = f"{names.prefix}.{0 if mtp.reused else level}."
        total += _total((t for t in tensors if t.name.startswith(prefix)), ranks=ranks)
        total += vocab * config.hidden_size * _BF16 + kv_bytes(mtp.layer.attention, batch, context)
    return total


def layer_bytes(config: ModelConfig, index: int, hits: int, batch: int, context: int) -> tuple[int, float]:
    """Layer `index`: its attention with norm and KV, and its FFN with norm, `hits` experts of it."""
    layer, prefix = config.layers[index], f"model.layers.{index}."
    tensors = [t for t in main_tensors(config) if t.name.startswith(prefix)]
    first = [t for t in tensors if ".self_attn." in t.name or "input_layernorm" in t.name]
    attention = _total(first) + kv_bytes(layer.attention, batch, context)
    rest = _total(t for t in tensors if t not in first)
    share = hits / layer.moe.experts if layer.moe else 0.0
    return attention, rest + _total(tensors, experts=True) * share


def flops(config: ModelConfig, tokens: int) -> float:
    """Operations to read a prompt of so many tokens: two a weight and token (of a MoE, of the experts that a token goes
    through), the head for one token, and scores and values over the keys that each token sees."""
    total = 2.0 * config.vocab_size * config.hidden_size
    for layer in config.layers:
        a, width = layer.attention, config.hidden_size
        weights = width * (a.heads * (a.qk_dim + a.v_dim) + a.kv_heads * (a.qk_dim + a.v_dim))
        weights += 3 * width * layer.intermediate * (layer.moe.per_token if layer.moe else 1)
        window = min(a.window or tokens, tokens)
        keys = window * (window + 1) / 2 + (tokens - window) * window
        total += 2.0 * tokens * weights + 2.0 * keys * a.heads * (a.qk_dim + a.v_dim)
    return total
