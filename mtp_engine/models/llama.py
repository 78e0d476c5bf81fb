"""LlamaForCausalLM: what its config.json means and how its weights are named."""

from typing import Any

import torch

from mtp_engine.config import AttentionConfig, LayerConfig, ModelConfig, RopeConfig
from mtp_engine.errors import EngineError
from mtp_engine.kernels.linear import Linear
from mtp_engine.models.checkpoint import Checkpoint
from mtp_engine.models.decoder import Decoder
from mtp_engine.models.layers import Block, GatedMLP, RMSNorm, SelfAttention
from mtp_engine.protocols import Progress

_UNSUPPORTED = {"attention_bias": False, "mlp_bias": False, "hidden_act": "silu"}


def parse(config: dict[str, Any]) -> ModelConfig:
    """config.json of a Llama model -> ModelConfig. Raises EngineError naming a missing or unsupported field."""
    for key, expected in _UNSUPPORTED.items():
        if config.get(key, expected) != expected:
            raise EngineError(f"config.json: {key} = {config[key]!r} is not supported (only {expected!r})")
    try:
        heads, hidden = config["num_attention_heads"], config["hidden_size"]
        dim = config.get("head_dim") or hidden // heads
        rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
        theta = config.get("rope_theta") or rope.get("rope_theta", 10000.0)
        attention = AttentionConfig(
            heads=heads,
            kv_heads=config.get("num_key_value_heads") or heads,
            qk_dim=dim,
            v_dim=dim,
            rope=RopeConfig(dim, float(theta), _rope_scaling(rope)),
        )
        eos = config.get("eos_token_id")
        return ModelConfig(
            family="llama",
            vocab_size=config["vocab_size"],
            hidden_size=hidden,
            layers=(LayerConfig(attention, config["intermediate_size"]),) * config["num_hidden_layers"],
            norm_eps=config["rms_norm_eps"],
            tied_head=config.get("tie_word_embeddings", False),
            max_context=config["max_position_embeddings"],
            eos_token_ids=() if eos is None else tuple(eos) if isinstance(eos, list) else (eos,),
        )
    except KeyError as missing:
        raise EngineError(f"config.json: the field {missing.args[0]} is missing") from None


def _rope_scaling(rope: dict[str, Any]) -> tuple[str | float, ...] | None:
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind == "default":
        return None
    if kind == "linear":
        return ("linear", rope["factor"])
    if kind == "llama3":
        names = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
        return ("llama3", *(rope[name] for name in names))
    raise EngineError(f"config.json: rope type {kind!r} is not supported (default, linear, llama3)")


def block(checkpoint: Checkpoint, prefix: str, layer: LayerConfig, hidden: int, eps: float, ffn_norm: str) -> Block:
    """The decoder layer whose tensor names start with `prefix`; `ffn_norm` is the name of the norm before its FFN."""
    a = layer.attention

    def norm(name: str) -> RMSNorm:
        return RMSNorm(checkpoint.get(f"{prefix}.{name}.weight", hidden), eps)

    def stack(names: dict[str, int]) -> Linear:
        return Linear(torch.cat([checkpoint.get(f"{prefix}.{n}.weight", rows, hidden) for n, rows in names.items()]))

    return Block(
        attention_norm=norm("input_layernorm"),
        attention=SelfAttention(
            config=a,
            qkv=stack(
                {
                    "self_attn.q_proj": a.heads * a.qk_dim,
                    "self_attn.k_proj": a.kv_heads * a.qk_dim,
                    "self_attn.v_proj": a.kv_heads * a.v_dim,
                }
            ),
            out=Linear(checkpoint.get(f"{prefix}.self_attn.o_proj.weight", hidden, a.heads * a.v_dim)),
            sink=checkpoint.get(f"{prefix}.self_attn.attention_sink_bias", a.heads) if a.sink else None,
        ),
        ffn_norm=norm(ffn_norm),
        ffn=GatedMLP(
            gate_up=stack({"mlp.gate_proj": layer.intermediate, "mlp.up_proj": layer.intermediate}),
            down=Linear(checkpoint.get(f"{prefix}.mlp.down_proj.weight", hidden, layer.intermediate)),
        ),
    )


def build(checkpoint: Checkpoint, config: ModelConfig, progress: Progress) -> Decoder:
    """The main model from a checkpoint with the hub's names."""
    hidden, vocab = config.hidden_size, config.vocab_size
    embedding = checkpoint.get("model.embed_tokens.weight", vocab, hidden)
    head = embedding if config.tied_head else checkpoint.get("lm_head.weight", vocab, hidden)
    blocks = []
    for i, layer in enumerate(config.layers):
        progress("loading weights", i + 1, len(config.layers))
        blocks.append(
            block(checkpoint, f"model.layers.{i}", layer, hidden, config.norm_eps, "post_attention_layernorm")
        )
    norm = RMSNorm(checkpoint.get("model.norm.weight", hidden), config.norm_eps)
    return Decoder(config, embedding, blocks, norm, Linear(head), head)
