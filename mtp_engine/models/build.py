"""Putting models together from named weights. Main models share their names; those of MTP layers differ by family."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, final

import torch
from torch import Tensor

from mtp_engine.config import AttentionConfig, LayerConfig, ModelConfig, MTPConfig
from mtp_engine.kernels.experts import ExpertStack
from mtp_engine.kernels.int4 import Int4Stack
from mtp_engine.kernels.linear import Linear
from mtp_engine.models.decoder import Decoder
from mtp_engine.models.layers import Block, GatedMLP, Head, Join, LinearMap, RMSNorm, RotaryEmbedding, SelfAttention
from mtp_engine.models.moe import MoE
from mtp_engine.models.mtp import FeatureMix, MTPLayer
from mtp_engine.models.weights import Parts, Split
from mtp_engine.parallel.group import Group
from mtp_engine.protocols import Progress

FFN_NORM = "post_attention_layernorm"
FEATURES = "model.mtp.features"


class WeightSource(Protocol):
    """Where weights come from: models.weights.Weights reads them, training.trainable.TrainableWeights makes them."""

    @property
    def device(self) -> torch.device: ...
    @property
    def group(self) -> Group: ...  # those who share the model
    def tensor(self, name: str, *shape: int, split: bool = False) -> Tensor: ...
    def exact(self, name: str, *shape: int) -> Tensor: ...
    def linear(self, parts: Parts, columns: int, *, split: Split = "none") -> LinearMap: ...
    def qkv(self, prefix: str, a: AttentionConfig, columns: int) -> LinearMap: ...
    def experts(self, names: Sequence[Parts], columns: int, *, split: Split = "none") -> ExpertStack: ...


@final
@dataclass(frozen=True)
class MTPNames:
    """What the tensors of MTP layer k are called; `prefix` is followed by a dot and k."""

    prefix: str = "model.mtp.layers"
    embedding_norm: str = "enorm"
    hidden_norm: str = "hnorm"
    projection: str = "eh_proj"
    ffn_norm: str = "pre_mlp_layernorm"
    final_norm: str = "final_layernorm"


def decoder(
    weights: WeightSource, config: ModelConfig, progress: Progress,
    make_head: Callable[[Tensor, Tensor | None], LinearMap] = Linear,
) -> Decoder:  # fmt: skip
    """The main model, or this rank's part of it. make_head: of [V, H]."""
    hidden, vocab, group = config.hidden_size, config.vocab_size, weights.group
    embedding = weights.tensor("model.embed_tokens.weight", vocab, hidden)
    if config.tied_head:
        own = group.shard.part(vocab)
        head = embedding[own.start : own.stop]
    else:
        head = weights.tensor("lm_head.weight", vocab, hidden, split=True)
    blocks = []
    for i, layer in enumerate(config.layers):
        progress("loading weights", i + 1, len(config.layers))
        blocks.append(block(weights, f"model.layers.{i}", layer, hidden, config.norm_eps, FFN_NORM))
    norm = RMSNorm(weights.tensor("model.norm.weight", hidden), config.norm_eps)
    unembed = make_head(head, None)
    rotary = {rope: RotaryEmbedding(rope, weights.device) for rope in {layer.attention.rope for layer in config.layers}}
    held = group.shard.model(config)
    return Decoder(held, embedding, blocks, norm, Head(norm, unembed), unembed, head, rotary, group=group)


def mtp_layer(
    weights: WeightSource, names: MTPNames, k: int, config: MTPConfig, main: Decoder, head: LinearMap
) -> MTPLayer:
    """MTP layer k. Without a final norm of its own it ends in the main model's. head: [H] -> [n], shared by all."""
    prefix, hidden, eps = f"{names.prefix}.{k}", main.config.hidden_size, main.config.norm_eps
    return MTPLayer(
        join=Join(
            embedding_norm=_norm(weights, f"{prefix}.{names.embedding_norm}", hidden, eps),
            hidden_norm=_norm(weights, f"{prefix}.{names.hidden_norm}", hidden, eps),
            projection=weights.linear([(f"{prefix}.{names.projection}", hidden)], 2 * hidden, split="inputs"),
            hidden_first=config.concat == "hidden_first",
        ),
        block=block(weights, prefix, config.layer, hidden, eps, names.ffn_norm),
        head=Head(_norm(weights, f"{prefix}.{names.final_norm}", hidden, eps) if config.own_norm else main.norm, head),
    )


def feature_mix(weights: WeightSource, config: MTPConfig, hidden: int, eps: float) -> FeatureMix | None:
    """What mixes the features of `config` into the main model's hidden state, if there are any."""
    if not config.features:
        return None
    norms = [_norm(weights, f"{FEATURES}.{i}.norm", hidden, eps) for i in range(len(config.features))]
    width = len(config.features) * hidden
    return FeatureMix(norms, weights.linear([(f"{FEATURES}.proj", hidden)], width, split="inputs"))


def block(weights: WeightSource, prefix: str, layer: LayerConfig, hidden: int, eps: float, ffn_norm: str) -> Block:
    """The decoder layer whose tensor names start with `prefix`; `ffn_norm` is the name of the norm before its FFN."""
    a = layer.attention
    return Block(
        attention_norm=_norm(weights, f"{prefix}.input_layernorm", hidden, eps),
        attention=SelfAttention(
            config=weights.group.shard.attention(a),
            qkv=weights.qkv(f"{prefix}.self_attn", a, hidden),
            out=weights.linear([(f"{prefix}.self_attn.o_proj", hidden)], a.heads * a.v_dim, split="columns"),
            sink=weights.tensor(f"{prefix}.self_attn.attention_sink_bias", a.heads, split=True) if a.sink else None,
        ),
        ffn_norm=_norm(weights, f"{prefix}.{ffn_norm}", hidden, eps),
        ffn=_moe(weights, f"{prefix}.mlp", layer, hidden)
        if layer.moe
        else _mlp(weights, f"{prefix}.mlp", layer, hidden),
    )


def _norm(weights: WeightSource, name: str, hidden: int, eps: float) -> RMSNorm:
    return RMSNorm(weights.tensor(f"{name}.weight", hidden), eps)


def _mlp(weights: WeightSource, prefix: str, layer: LayerConfig, hidden: int) -> GatedMLP:
    wide = layer.intermediate
    return GatedMLP(
        gate_up=weights.linear([(f"{prefix}.gate_proj", wide), (f"{prefix}.up_proj", wide)], hidden, split="rows"),
        down=weights.linear([(f"{prefix}.down_proj", hidden)], wide, split="columns"),
    )


def _moe(weights: WeightSource, prefix: str, layer: LayerConfig, hidden: int) -> MoE:
    moe, wide = layer.moe, layer.intermediate
    assert moe is not None
    experts = [f"{prefix}.experts.{e}" for e in range(moe.experts)]

    def stack(names: Sequence[Parts], columns: int, split: Split) -> ExpertStack:
        read = weights.experts(names, columns, split=split)
        return Int4Stack.of(read, moe.experts) if moe.int4 else read

    return MoE(
        config=moe,
        router=weights.exact(f"{prefix}.gate.weight", moe.experts, hidden),
        bias=weights.exact(f"{prefix}.gate.e_score_correction_bias", moe.experts),
        gate_up=stack([[(f"{e}.gate_proj", wide), (f"{e}.up_proj", wide)] for e in experts], hidden, "rows"),
        down=stack([[(f"{e}.down_proj", hidden)] for e in experts], wide, "columns"),
        group=weights.group,
    )
