"""Random checkpoints in the hub's format: a test tool, and something to try the engine on without 312 GB of weights.

The weights are random, but the MTP layers agree with the main model now and then: residual branches are weak, and the
projection passes the token's embedding on, so both mostly continue from the last token.
"""

import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, final

import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from torch import Tensor

from mtp_engine.models import mimo, mimo_v2_flash
from mtp_engine.models.export import MARKS, SPECIAL, add_marks, fp8_settings, write_model, write_tokenizer
from mtp_engine.models.fields import Fields

Family = Literal["mimo_v2_flash", "mimo"]
_EOS = 256 + SPECIAL.index("<|im_end|>")
_COMMON = {
    "hidden_act": "silu", "vocab_size": 256 + len(SPECIAL) + len(MARKS), "tie_word_embeddings": False,
    "eos_token_id": _EOS, "pad_token_id": 256, "torch_dtype": "bfloat16",
}  # fmt: skip
TINY: dict[Family, dict[str, Any]] = {
    "mimo_v2_flash": {
        "architectures": ["MiMoV2FlashForCausalLM"], "model_type": "mimo_v2_flash", **_COMMON,
        "hidden_size": 64, "intermediate_size": 96, "moe_intermediate_size": 32, "num_hidden_layers": 5,
        "hybrid_layer_pattern": [0, 1, 1, 1, 0], "moe_layer_freq": [0, 1, 1, 1, 1],
        "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 24, "v_head_dim": 16,
        "swa_num_attention_heads": 8, "swa_num_key_value_heads": 4, "swa_head_dim": 24, "swa_v_head_dim": 16,
        "partial_rotary_factor": 0.334, "rope_theta": 5000000, "swa_rope_theta": 10000,
        "sliding_window": 7, "add_swa_attention_sink_bias": True, "add_full_attention_sink_bias": False,
        "attention_value_scale": 0.707, "attention_bias": False, "layernorm_epsilon": 1e-5,
        "n_routed_experts": 8, "num_experts_per_tok": 2, "n_shared_experts": None, "norm_topk_prob": True,
        "scoring_func": "sigmoid", "topk_method": "noaux_tc", "n_group": 1, "topk_group": 1,
        "routed_scaling_factor": None, "max_position_embeddings": 4096,
    },
    "mimo": {
        "architectures": ["MiMoForCausalLM"], "model_type": "mimo", **_COMMON,
        "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 8,
        "num_key_value_heads": 2, "head_dim": 8, "rms_norm_eps": 1e-5, "rope_theta": 640000,
        "attention_bias": True, "use_sliding_window": False, "sliding_window": 4096,
        "max_position_embeddings": 4096, "num_nextn_predict_layers": 1,
    },
}  # fmt: skip
_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if not (enable_thinking | default(false)) %}<think></think>{% endif %}{% endif %}"
)


def make_tiny(
    folder: Path,
    *,
    family: Family = "mimo_v2_flash",
    fp8: bool = False,
    seed: int = 0,
    mtp_layers: int | None = None,
    shards: int = 3,
    block: int = 16,
    **changes: Any,
) -> Path:
    """Write a model folder: config.json, `shards` files and an index, MTP layers, a byte-level tokenizer.

    fp8: projections and FFNs as FP8 with a scale per `block` x `block` weights, global layers in fused sections. The
    same seed gives the same weights with and without it. changes: fields of config.json.
    """
    raw = {**TINY[family], **changes}
    if fp8:
        raw["quantization_config"] = fp8_settings(block)
    module = {"mimo_v2_flash": mimo_v2_flash, "mimo": mimo}[family]
    config, names = module.parse(Fields(raw)), module.MTP_NAMES
    depth = mtp_layers if mtp_layers is not None else module.USUAL_MTP_LAYERS
    mtp = module.parse_mtp(Fields(raw), [f"{names.prefix}.{k}." for k in range(depth)])
    draw = _Draw(config.hidden_size, seed, embedding_first=mtp is not None and mtp.concat == "embedding_first")
    write_model(folder, raw, config, mtp, names, draw, shards=shards)
    write_tokenizer(folder, _tokenizer(), _TEMPLATE)
    return folder


@final
@dataclass(frozen=True)
class _Draw:
    """Random values that depend on seed and name only."""

    hidden: int
    seed: int
    embedding_first: bool

    def __call__(self, name: str, shape: tuple[int, ...]) -> Tensor:
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()) ^ (self.seed * 0x9E3779B1 & 0xFFFFFFFF))
        values = torch.randn(shape, generator=generator)
        kind = name.split(".")[-2]
        if "norm" in kind:
            return 1 + 0.2 * values
        if name.endswith(".bias"):
            return 0.3 * values
        if name.endswith("e_score_correction_bias"):
            return 0.1 * values
        if len(shape) == 1 or kind == "embed_tokens":
            return values
        values *= _GAIN.get(kind, 1.0) * shape[1] ** -0.5
        if kind in ("eh_proj", "input_proj"):
            start = 0 if self.embedding_first else self.hidden
            values[:, start : start + self.hidden] += torch.eye(self.hidden)
        return values


# Keys larger than values, as in the real model: reading a value's scale from the wrong block shows.
_GAIN = {
    "q_proj": 0.7,
    "k_proj": 3.0,
    "o_proj": 0.4,
    "down_proj": 0.4,
    "gate": 2.0,
    "lm_head": 4.0,
    "eh_proj": 0.2,
    "input_proj": 0.2,
}


def _tokenizer() -> Tokenizer:
    """A byte-level tokenizer without merges: one token per byte, then the special ones and the visible marks."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(BPE({symbol: index for index, symbol in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    add_marks(tokenizer)
    return tokenizer
