"""MiMoV2FlashForCausalLM (Xiaomi, arXiv 2601.02780): what its config.json means. Nothing is taken for granted.

Global and sliding-window layers alternate by `hybrid_layer_pattern`, each kind with heads and rotary base of its own;
keys are wider than values, and values are scaled. The MTP layers are sliding-window layers with a dense FFN.
"""

import re
from collections.abc import Sequence

from mtp_engine.config import AttentionConfig, LayerConfig, ModelConfig, MoEConfig, MTPConfig, RopeConfig
from mtp_engine.models.build import MTPNames
from mtp_engine.models.fields import Fields

MTP_NAMES = MTPNames()
USUAL_MTP_LAYERS = 3


def parse(fields: Fields, window_keys: int = 0) -> ModelConfig:
    """config.json -> ModelConfig. Raises EngineError naming a missing, contradictory or unsupported field.

    window_keys: keys that a query of a sliding-window layer sees, itself included; 0 means sliding_window + 1. SGLang
    (written with Xiaomi) and transformers read it so; vLLM, lmdeploy and Megatron-Bridge see sliding_window keys.
    """
    fields.only("hidden_act", "silu", required=True)
    fields.only("attention_bias", False, None)
    fields.only("rope_scaling", None)
    count = fields.integer("num_hidden_layers")
    sliding = fields.switches("hybrid_layer_pattern", "num_hidden_layers", count)
    sparse = fields.switches("moe_layer_freq", "num_hidden_layers", count)
    window, full = _attention(fields, window_keys), _attention(fields, None)
    dense = fields.integer("intermediate_size")
    wide, moe = (fields.integer("moe_intermediate_size"), _moe(fields)) if any(sparse) else (dense, None)
    return ModelConfig(
        family="mimo_v2_flash",
        vocab_size=fields.integer("vocab_size"),
        hidden_size=fields.integer("hidden_size"),
        layers=tuple(
            LayerConfig(window if slides else full, wide if routed else dense, moe if routed else None)
            for slides, routed in zip(sliding, sparse, strict=True)
        ),
        norm_eps=fields.number("layernorm_epsilon"),
        tied_head=fields.flag("tie_word_embeddings", False),
        max_context=fields.integer("max_position_embeddings"),
        eos_token_ids=fields.ids("eos_token_id"),
        fp8_block=_fp8_block(fields),
    )


def parse_mtp(fields: Fields, names: Sequence[str], window_keys: int = 0) -> MTPConfig | None:
    """The MTP layers, counted from the tensor names: num_nextn_predict_layers is not to be relied on.

    No layer reads another's output: all of them take the main model's hidden state before its final norm.
    """
    depth = count_layers(fields, names, MTP_NAMES.prefix)
    layer = LayerConfig(_attention(fields, window_keys), fields.integer("intermediate_size"))
    return MTPConfig(depth, layer) if depth else None


def count_layers(fields: Fields, names: Sequence[str], prefix: str) -> int:
    """How many MTP layers the names `{prefix}.{k}...` speak of. Raises EngineError where one is left out."""
    pattern = re.compile(re.escape(prefix) + r"\.(\d+)\.")
    found = {int(match[1]) for name in names if (match := pattern.match(name))}
    if missing := set(range(len(found))) - found:
        raise fields.error(f"{prefix}.{min(missing)}", "is missing among the MTP layers")
    return len(found)


def _attention(fields: Fields, window_keys: int | None) -> AttentionConfig:
    """A kind of layer: sliding if window_keys is a number."""
    swa = "" if window_keys is None else "swa_"
    heads, kv_heads = (fields.integer(f"{swa}num_{kind}_heads") for kind in ("attention", "key_value"))
    if heads % kv_heads:
        raise fields.error(f"{swa}num_key_value_heads", f"is {kv_heads}, which does not divide {heads} heads")
    dim, v_dim = fields.integer(f"{swa}head_dim"), fields.integer(f"{swa}v_head_dim")
    rotary = int(dim * fields.number("partial_rotary_factor"))
    if rotary % 2 or not 0 < rotary <= dim:
        raise fields.error("partial_rotary_factor", f"rotates {rotary} of {dim} dimensions; it must be an even number")
    return AttentionConfig(
        heads=heads,
        kv_heads=kv_heads,
        qk_dim=dim,
        v_dim=v_dim,
        rope=RopeConfig(rotary, fields.number(f"{swa}rope_theta")),
        window=None if window_keys is None else _window(fields, window_keys),
        sink=fields.flag("add_full_attention_sink_bias" if window_keys is None else "add_swa_attention_sink_bias"),
        value_scale=fields.number("attention_value_scale"),
    )


def _window(fields: Fields, keys: int) -> int:
    window = fields.integer("sliding_window")
    if fields.integer("sliding_window_size", window) != window:
        raise fields.error("sliding_window_size", f"is {fields.raw['sliding_window_size']}, sliding_window is {window}")
    return keys or window + 1


def _moe(fields: Fields) -> MoEConfig:
    fields.only("topk_method", "noaux_tc", required=True)
    fields.only("scoring_func", "sigmoid", required=True)
    fields.only("n_group", 1, None)
    fields.only("topk_group", 1, None)
    fields.only("n_shared_experts", None, 0)
    experts, per_token = fields.integer("n_routed_experts"), fields.integer("num_experts_per_tok")
    if per_token > experts:
        raise fields.error("num_experts_per_tok", f"is {per_token}, more than n_routed_experts, {experts}")
    return MoEConfig(experts, per_token, fields.flag("norm_topk_prob"), fields.number("routed_scaling_factor", 1.0))


def _fp8_block(fields: Fields) -> int | None:
    """Rows and columns of a block with one scale; None without quantization_config."""
    if fields.raw.get("quantization_config") is None:
        return None
    settings = fields.mapping("quantization_config")
    settings.only("quantization_config.quant_method", "fp8", required=True)
    settings.only("quantization_config.fmt", "e4m3", None)
    block = settings.raw.get("quantization_config.weight_block_size")
    if not isinstance(block, list) or len(block) != 2 or block[0] != block[1]:
        raise fields.error("quantization_config.weight_block_size", f"is {block!r}, not [n, n]")
    return Fields({"quantization_config.weight_block_size": block[0]}, fields.where).integer(
        "quantization_config.weight_block_size"
    )
