"""Random checkpoints in the hub's format: a test tool, and something to try the engine on without 312 GB of weights.

The weights are random, but the MTP layers agree with the main model now and then: residual branches are weak, and the
projection passes the token's embedding on, so both mostly continue from the last token.
"""

import json
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, final

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from torch import Tensor

from mtp_engine.config import ModelConfig
from mtp_engine.kernels.fp8 import fused_rows, plain_rows, quantise_blocks
from mtp_engine.models import mimo, mimo_v2_flash
from mtp_engine.models.fields import Fields
from mtp_engine.models.tensors import Stored, main_tensors, mtp_tensors, qkv_scale_rows

Family = Literal["mimo_v2_flash", "mimo"]
_SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
_MARKS = ("<think>", "</think>", "<tool_call>", "</tool_call>", "<reserved>")
_EOS = 256 + _SPECIAL.index("<|im_end|>")
_COMMON = {
    "hidden_act": "silu", "vocab_size": 256 + len(_SPECIAL) + len(_MARKS), "tie_word_embeddings": False,
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
        raw["quantization_config"] = {
            "quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [block, block],
        }  # fmt: skip
    module = {"mimo_v2_flash": mimo_v2_flash, "mimo": mimo}[family]
    config, names = module.parse(Fields(raw)), module.MTP_NAMES
    depth = mtp_layers if mtp_layers is not None else {"mimo_v2_flash": 3, "mimo": 1}[family]
    mtp = module.parse_mtp(Fields(raw), [f"{names.prefix}.{k}." for k in range(depth)])
    files = _shards(list(main_tensors(config)), shards)
    if mtp:
        files["model_mtp.safetensors"] = list(mtp_tensors(config, mtp, names))
    folder.mkdir(parents=True, exist_ok=True)
    draw = _Draw(config, seed, embedding_first=mtp is not None and mtp.concat == "embedding_first")
    for file, tensors in files.items():
        save_file({tensor.name: draw.tensor(tensor) for tensor in tensors}, folder / file, metadata={"format": "pt"})
    total = sum(tensor.nbytes for tensors in files.values() for tensor in tensors)
    where = {tensor.name: file for file, tensors in files.items() for tensor in tensors}
    _write_json(folder / "config.json", raw)
    _write_json(
        folder / "model.safetensors.index.json",
        {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))},
    )
    _write_tokenizer(folder)
    return folder


def _shards(tensors: Sequence[Stored], count: int) -> dict[str, list[Stored]]:
    """`count` files of about equal size, in the tensors' order."""
    files: dict[str, list[Stored]] = {f"model-{n + 1:05}-of-{count:05}.safetensors": [] for n in range(count)}
    lists, total, done = list(files.values()), sum(tensor.nbytes for tensor in tensors), 0
    for tensor in tensors:
        lists[min(done * count // total, count - 1)].append(tensor)
        done += tensor.nbytes
    return files


@final
class _Draw:
    """Random values that depend on seed and name only, stored as a `Stored` says."""

    def __init__(self, config: ModelConfig, seed: int, *, embedding_first: bool) -> None:
        self._seed, self._block, self._hidden = seed, config.fp8_block, config.hidden_size
        self._embedding_first = embedding_first
        self._fused = {
            f"model.layers.{i}.self_attn": layer.attention
            for i, layer in enumerate(config.layers)
            if config.fp8_block and layer.attention.window is None
        }
        self._last: tuple[str, dict[str, Tensor]] = ("", {})

    def tensor(self, stored: Stored) -> Tensor:
        name, shape = stored.name, stored.shape
        if self._block and (stored.dtype == "F8_E4M3" or not stored.is_parameter):
            weight = name.removesuffix("_scale_inv")
            prefix = weight.rsplit(".", 2)[0]
            group = prefix if prefix in self._fused else weight
            if self._last[0] != group:
                self._last = (group, self._fused_group(group) if group in self._fused else self._plain(weight, shape))
            return self._last[1][name]
        return self._values(name, shape).to({"F32": torch.float32, "BF16": torch.bfloat16}[stored.dtype])

    def _plain(self, name: str, shape: tuple[int, ...]) -> dict[str, Tensor]:
        """An FP8 matrix and its scales. It is bf16 before, so that both kinds of checkpoint start from the same."""
        assert self._block is not None
        weight = self._values(name, shape).bfloat16()
        pair = quantise_blocks(weight, plain_rows([shape[0]], self._block), -(-shape[0] // self._block), self._block)
        return dict(zip((name, f"{name}_scale_inv"), pair, strict=True))

    def _fused_group(self, prefix: str) -> dict[str, Tensor]:
        """Queries, keys and values of a global layer: one section per key head, quantised together, then split."""
        assert self._block is not None
        a = self._fused[prefix]
        sizes = [a.heads * a.qk_dim, a.kv_heads * a.qk_dim, a.kv_heads * a.v_dim]
        names = [f"{prefix}.{name}_proj.weight" for name in "qkv"]
        stacked = torch.cat([self._values(n, (rows, self._hidden)) for n, rows in zip(names, sizes, strict=True)])
        rows = fused_rows(a.kv_heads, sizes[0] // a.kv_heads, a.qk_dim, a.v_dim, self._block)
        scale_rows = qkv_scale_rows(a, self._block)
        data, scale = quantise_blocks(stacked.bfloat16(), rows, sum(scale_rows), self._block)
        scales = scale.split(list(scale_rows))  # type: ignore[no-untyped-call]
        parts = dict(zip(names, data.split(sizes), strict=True))  # type: ignore[no-untyped-call]
        parts |= {f"{name}_scale_inv": part for name, part in zip(names, scales, strict=True)}
        return {name: part.contiguous() for name, part in parts.items()}

    def _values(self, name: str, shape: tuple[int, ...]) -> Tensor:
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()) ^ (self._seed * 0x9E3779B1 & 0xFFFFFFFF))
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
            start = 0 if self._embedding_first else self._hidden
            values[:, start : start + self._hidden] += torch.eye(self._hidden)
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


def _write_tokenizer(folder: Path) -> None:
    """A byte-level tokenizer without merges: one token per byte, then the special ones and the visible marks."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(BPE({symbol: index for index, symbol in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(text, normalized=False) for text in _SPECIAL])
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in _MARKS])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    _write_json(folder / "tokenizer_config.json", settings)
    _write_json(folder / "generation_config.json", {"eos_token_id": _EOS})
    (folder / "chat_template.jinja").write_text(_TEMPLATE, encoding="utf-8")


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
