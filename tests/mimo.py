"""MiMo-V2-Flash twice: the engine's model over its caches, and transformers' over the same files."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from mtp_engine.attention.rows import StepRows
from mtp_engine.attention.torch import TorchAttention
from mtp_engine.cache import HybridKV, Pages
from mtp_engine.models import loader
from mtp_engine.models.decoder import Decoder

torch.set_num_threads(1)  # the tensors are tiny: a second thread only waits
CPU = torch.device("cpu")


def load(folder: Path, **options: Any) -> Decoder:
    return loader.load_main(folder, torch.float32, CPU, lambda *_: None, **options)


def read_all(folder: Path) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for file in folder.glob("*.safetensors"):
        tensors |= load_file(file)
    return tensors


def transformers_config(folder: Path, window_keys: int) -> Any:
    """Its own spelling of the hub's config.json, which it would ignore silently (5.23)."""
    from transformers import MiMoV2FlashConfig

    raw = json.loads((folder / "config.json").read_text())
    assert raw["swa_num_key_value_heads"] == 2 * raw["num_key_value_heads"], "transformers cannot express anything else"
    same = [
        "vocab_size", "hidden_size", "intermediate_size", "moe_intermediate_size", "num_hidden_layers",
        "num_attention_heads", "head_dim", "num_key_value_heads", "v_head_dim", "n_routed_experts",
        "num_experts_per_tok", "norm_topk_prob", "attention_value_scale", "max_position_embeddings",
    ]  # fmt: skip
    config = MiMoV2FlashConfig(
        **{name: raw[name] for name in same},
        rms_norm_eps=raw["layernorm_epsilon"],
        layer_types=["sliding_attention" if slides else "full_attention" for slides in raw["hybrid_layer_pattern"]],
        mlp_layer_types=["sparse" if sparse else "dense" for sparse in raw["moe_layer_freq"]],
        sliding_window=window_keys,
        routed_scaling_factor=raw["routed_scaling_factor"] or 1.0,
        bos_token_id=None,
        rope_parameters={
            kind: {"rope_type": "default", "rope_theta": theta, "partial_rotary_factor": raw["partial_rotary_factor"]}
            for kind, theta in (("full_attention", raw["rope_theta"]), ("sliding_attention", raw["swa_rope_theta"]))
        },
    )
    config._attn_implementation = "eager"
    return config


def load_transformers(folder: Path, window_keys: int) -> Any:
    from transformers import MiMoV2FlashForCausalLM

    config = transformers_config(folder, window_keys)
    model, report = MiMoV2FlashForCausalLM.from_pretrained(
        folder, config=config, dtype=torch.float32, output_loading_info=True
    )
    assert not report["missing_keys"], report
    assert not report["mismatched_keys"], report
    return model.eval()


class Run:
    """One sequence through the engine's model: rows are given in chunks, and the cache keeps them."""

    def __init__(self, model: Decoder, capacity: int, max_nodes: int = 1) -> None:
        self.model = model
        attentions = [layer.attention for layer in model.config.layers]
        self.cache = HybridKV(
            attentions,
            Pages(slots=1, tokens=capacity, page_size=8, device=CPU),
            max_nodes=max_nodes,
            dtype=torch.float32,
        )
        self.cache.pages.reserve(0, capacity)
        self.length = 0

    def __call__(self, tokens: Tensor) -> Tensor:
        """tokens: [n], the next ones -> their pre-norm hidden states [n, H]."""
        count, start = len(tokens), self.length
        positions = start + torch.arange(count)[None]
        rows = StepRows.prompt(0, start, len(tokens), torch.device("cpu"))
        self.length += count
        with torch.inference_mode():
            return self.model.forward(tokens[None], positions, TorchAttention(self.cache, rows))[0]

    def logits(self, tokens: Tensor) -> Tensor:
        return self.model.logits(self(tokens))
