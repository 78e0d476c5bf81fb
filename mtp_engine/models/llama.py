"""LlamaForCausalLM: what its config.json means."""

from collections.abc import Sequence

from mtp_engine.config import AttentionConfig, LayerConfig, ModelConfig, MTPConfig, RopeConfig
from mtp_engine.models.build import MTPNames
from mtp_engine.models.fields import Fields

MTP_NAMES = MTPNames()
USUAL_MTP_LAYERS = 0


def parse(fields: Fields, window_keys: int = 0) -> ModelConfig:
    """config.json of a Llama model -> ModelConfig. Raises EngineError naming a missing or unsupported field."""
    fields.only("attention_bias", False, None)
    fields.only("mlp_bias", False, None)
    fields.only("hidden_act", "silu")
    fields.only("quantization_config", None)
    if window_keys:
        raise fields.error("sliding_window", "is not a Llama setting: leave window_keys at 0")
    heads, hidden = fields.integer("num_attention_heads"), fields.integer("hidden_size")
    dim = fields.integer("head_dim", hidden // heads)
    attention = AttentionConfig(
        heads=heads,
        kv_heads=fields.integer("num_key_value_heads", heads),
        qk_dim=dim,
        v_dim=dim,
        rope=rope(fields, dim, 10000.0),
    )
    if heads % attention.kv_heads:
        raise fields.error("num_key_value_heads", f"is {attention.kv_heads}, which does not divide {heads} heads")
    return ModelConfig(
        family="llama",
        vocab_size=fields.integer("vocab_size"),
        hidden_size=hidden,
        layers=(LayerConfig(attention, fields.integer("intermediate_size")),) * fields.integer("num_hidden_layers"),
        norm_eps=fields.number("rms_norm_eps"),
        tied_head=fields.flag("tie_word_embeddings", False),
        max_context=fields.integer("max_position_embeddings"),
        eos_token_ids=fields.ids("eos_token_id"),
    )


def parse_mtp(fields: Fields, names: Sequence[str], window_keys: int = 0) -> MTPConfig | None:
    """Llama checkpoints have no MTP layers of their own; ours come with a config.json that describes them."""
    return None


def rope(fields: Fields, dim: int, theta: float | None) -> RopeConfig:
    """rope_theta and the scaling, from where older and newer files keep them. theta: the default, if there is one."""
    name = "rope_parameters" if fields.raw.get("rope_parameters") else "rope_scaling"
    scaling = fields.mapping(name)
    base = fields.number("rope_theta", scaling.raw.get(f"{name}.rope_theta") or theta)
    old, new = f"{name}.type", f"{name}.rope_type"
    kind = scaling.raw.get(new) or scaling.raw.get(old) or "default"
    if kind == "default":
        return RopeConfig(dim, base)
    if kind == "linear":
        return RopeConfig(dim, base, ("linear", scaling.number(f"{name}.factor")))
    if kind == "llama3":
        wanted = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
        return RopeConfig(dim, base, ("llama3", *(scaling.number(f"{name}.{each}") for each in wanted)))
    raise fields.error(new, f"= {kind!r} is not supported (only 'default', 'linear', 'llama3')")
