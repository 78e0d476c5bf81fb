"""MiMoForCausalLM (MiMo-7B, arXiv 2505.07608): Qwen2 with a bias on queries, keys and values, and one MTP layer."""

from collections.abc import Sequence

from mtp_engine.config import AttentionConfig, LayerConfig, ModelConfig, MTPConfig
from mtp_engine.models.build import FFN_NORM, MTPNames
from mtp_engine.models.fields import Fields
from mtp_engine.models.llama import rope
from mtp_engine.models.mimo_v2_flash import count_layers

MTP_NAMES = MTPNames(
    prefix="model.mtp_layers",
    embedding_norm="token_layernorm",
    hidden_norm="hidden_layernorm",
    projection="input_proj",
    ffn_norm=FFN_NORM,
)
USUAL_MTP_LAYERS = 1
_REUSED_DEPTH = 3  # how far the one layer is used recursively: it was trained for the first depth only


def parse(fields: Fields, window_keys: int = 0) -> ModelConfig:
    """config.json -> ModelConfig. Raises EngineError naming a missing or unsupported field."""
    fields.only("hidden_act", "silu", required=True)
    fields.only("use_sliding_window", False, None)
    fields.only("quantization_config", None)
    if window_keys:
        raise fields.error("use_sliding_window", "is off: leave window_keys at 0")
    layer = _layer(fields)
    return ModelConfig(
        family="mimo",
        vocab_size=fields.integer("vocab_size"),
        hidden_size=fields.integer("hidden_size"),
        layers=(layer,) * fields.integer("num_hidden_layers"),
        norm_eps=fields.number("rms_norm_eps"),
        tied_head=fields.flag("tie_word_embeddings", False),
        max_context=fields.integer("max_position_embeddings"),
        eos_token_ids=fields.ids("eos_token_id"),
    )


def parse_mtp(fields: Fields, names: Sequence[str], window_keys: int = 0) -> MTPConfig | None:
    """One layer serves every depth; several are a chain. They read [hidden, embedding], the hidden state after the
    final norm, as vLLM and SGLang feed them."""
    layers = count_layers(fields, names, MTP_NAMES.prefix)
    if not layers:
        return None
    return MTPConfig(
        depth=_REUSED_DEPTH if layers == 1 else layers,
        layer=_layer(fields),
        chained=layers > 1,
        reused=layers == 1,
        hidden="post_norm",
        concat="hidden_first",
    )


def _layer(fields: Fields) -> LayerConfig:
    heads, kv_heads = fields.integer("num_attention_heads"), fields.integer("num_key_value_heads")
    if heads % kv_heads:
        raise fields.error("num_key_value_heads", f"is {kv_heads}, which does not divide {heads} heads")
    dim = fields.integer("head_dim", fields.integer("hidden_size") // heads)
    bias = fields.flag("attention_bias")
    attention = AttentionConfig(heads, kv_heads, dim, dim, rope(fields, dim, None), bias=bias)
    return LayerConfig(attention, fields.integer("intermediate_size"))
