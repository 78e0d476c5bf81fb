"""MiMo-V2-Flash's main model: the logits of transformers' MiMoV2FlashForCausalLM, and config.json read with care."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from mimo import Run, load, load_transformers
from torch import Tensor

from mtp_engine.errors import EngineError
from mtp_engine.models import loader
from mtp_engine.models.make_tiny import TINY, make_tiny

WINDOW = TINY["mimo_v2_flash"]["sliding_window"]
TOKENS = torch.randint(0, 256, (90,), generator=torch.Generator().manual_seed(5))  # more than 12 windows
SHAPES: dict[str, dict[str, Any]] = {
    "default": {},
    # the real model's ratios: 16 query heads per global key head, a partial rotation that is rounded down
    "wide": {"head_dim": 48, "swa_head_dim": 48, "v_head_dim": 32, "swa_v_head_dim": 32, "num_attention_heads": 16,
             "swa_num_attention_heads": 16, "num_key_value_heads": 1, "swa_num_key_value_heads": 2},
    "routing": {"n_routed_experts": 16, "num_experts_per_tok": 5, "norm_topk_prob": False, "routed_scaling_factor": 2.5,
                "moe_layer_freq": [1, 1, 0, 1, 1], "hybrid_layer_pattern": [1, 0, 1, 1, 1], "sliding_window": 20},
}  # fmt: skip


def close(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("mimo")
    return {name: make_tiny(root / name, seed=3, **changes) for name, changes in SHAPES.items()}


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("included", [False, True], ids=["window+1 keys", "window keys"])
def test_logits_equal_transformers(folders: dict[str, Path], name: str, included: bool) -> None:
    """Full forward, chunked prefill of several sizes, and cached decoding, far beyond three windows."""
    folder = folders[name]
    window = json.loads((folder / "config.json").read_text())["sliding_window"]
    model = load(folder, window_keys=window if included else 0)
    with torch.inference_mode():
        theirs = load_transformers(folder, window if included else window + 1)(TOKENS[None]).logits[0]
    close(Run(model, 96).logits(TOKENS), theirs)
    for size in (1, 5, 13, 40):
        run = Run(model, 96)
        close(torch.cat([run.logits(chunk) for chunk in TOKENS.split(size)]), theirs)
    run = Run(model, 96)
    pieces = [run.logits(TOKENS[:50]), *(run.logits(token[None]) for token in TOKENS[50:])]
    close(torch.cat(pieces), theirs)


def test_the_comparison_is_sharp(folders: dict[str, Path], tmp_path: Path) -> None:
    """Each trap, sprung, moves the logits by far more than the tolerance."""
    right = Run(load(folders["default"]), 96).logits(TOKENS)
    traps: dict[str, Any] = {
        "attention_value_scale": 1.0, "rope_theta": 10000, "swa_rope_theta": 5000000, "sliding_window": WINDOW - 1,
        "add_swa_attention_sink_bias": False, "norm_topk_prob": False, "partial_rotary_factor": 0.5,
        "layernorm_epsilon": 0.1,
    }  # fmt: skip
    for field, value in traps.items():
        folder = make_tiny(tmp_path / field, seed=3, **{field: value})
        assert (Run(load(folder), 96).logits(TOKENS) - right).abs().max() > 0.02, field


def test_router_is_fp32_in_a_bf16_model(folders: dict[str, Path]) -> None:
    model = loader.load_main(folders["default"], torch.bfloat16, torch.device("cpu"), lambda *_: None)
    moe: Any = model.blocks[1].ffn
    assert (moe.router.dtype, moe.bias.dtype, moe.gate_up.weight.dtype) == (
        torch.float32,
        torch.float32,
        torch.bfloat16,
    )


def test_experts_are_stacked_once(folders: dict[str, Path]) -> None:
    moe: Any = load(folders["default"]).blocks[1].ffn
    assert moe.gate_up.weight.shape == (8, 2 * 32, 64)
    assert moe.down.weight.shape == (8, 64, 32)
    assert moe.gate_up.weight.untyped_storage().nbytes() == 8 * 2 * 32 * 64 * 4


REQUIRED = [
    "hybrid_layer_pattern", "moe_layer_freq", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
    "v_head_dim", "swa_num_attention_heads", "swa_num_key_value_heads", "swa_head_dim", "swa_v_head_dim",
    "partial_rotary_factor", "rope_theta", "swa_rope_theta", "sliding_window", "add_swa_attention_sink_bias",
    "add_full_attention_sink_bias", "attention_value_scale", "layernorm_epsilon", "scoring_func", "topk_method",
    "n_routed_experts", "num_experts_per_tok", "moe_intermediate_size", "intermediate_size", "vocab_size", "hidden_size",
    "max_position_embeddings", "norm_topk_prob", "hidden_act",
]  # fmt: skip
WRONG: dict[str, Any] = {
    "topk_method": "greedy", "scoring_func": "softmax", "n_group": 8, "topk_group": 4, "n_shared_experts": 1,
    "hybrid_layer_pattern": [0, 1], "moe_layer_freq": [0, 1, 1, 1, 2], "sliding_window_size": 9, "attention_bias": True,
    "rope_scaling": {"rope_type": "yarn"}, "hidden_act": "gelu", "head_dim": "24", "num_attention_heads": True,
    "partial_rotary_factor": 0.3, "num_key_value_heads": 3, "swa_num_key_value_heads": 5, "num_experts_per_tok": 9,
    "attention_value_scale": 0, "layernorm_epsilon": float("nan"), "num_hidden_layers": 6, "vocab_size": 0,
    "quantization_config": {"quant_method": "mxfp4"},
}  # fmt: skip


@pytest.mark.parametrize("field", REQUIRED)
def test_missing_field_is_named(tmp_path: Path, field: str) -> None:
    raw = {key: value for key, value in TINY["mimo_v2_flash"].items() if key != field}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    with pytest.raises(EngineError, match=rf"config\.json: {field} is missing"):
        loader.read_config(tmp_path)


@pytest.mark.parametrize("field", WRONG)
def test_wrong_field_is_named(tmp_path: Path, field: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**TINY["mimo_v2_flash"], field: WRONG[field]}))
    with pytest.raises(EngineError, match=r"config\.json: \w") as error:
        loader.read_config(tmp_path)
    named = {"num_hidden_layers": "hybrid_layer_pattern"}.get(field, field)
    assert f": {named}" in str(error.value)
    assert "\n" not in str(error.value)
