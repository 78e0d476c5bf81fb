"""Block FP8: what is stored is what is loaded, with the fused sections of MiMo-V2-Flash's global layers."""

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mimo import CPU, Run, load, read_all
from torch import Tensor

from mtp_engine.kernels.experts import PlainStack
from mtp_engine.kernels.fp8 import (
    FP8,
    BlockLinear,
    BlockMatrix,
    dequantise_blocks,
    fused_rows,
    fused_sizes,
    plain_rows,
    quantise_blocks,
)
from mtp_engine.kernels.linear import Linear
from mtp_engine.models import loader
from mtp_engine.models.make_tiny import make_tiny

# e4m3 has 3 bits of mantissa: half a step is 1/16 of a value; below 2^-6 of the block's largest/448 it is absolute
RELATIVE, STEP = 1 / 16, 2.0**-9
REAL = {  # the real model's head dimensions and block, in four layers and a narrow residual stream
    "head_dim": 192, "v_head_dim": 128, "swa_head_dim": 192, "swa_v_head_dim": 128, "num_attention_heads": 16,
    "swa_num_attention_heads": 16, "num_key_value_heads": 4, "swa_num_key_value_heads": 8, "hidden_size": 256,
    "intermediate_size": 384, "moe_intermediate_size": 128, "n_routed_experts": 4, "num_hidden_layers": 3,
    "hybrid_layer_pattern": [0, 1, 0], "moe_layer_freq": [0, 1, 1],
}  # fmt: skip


def within_fp8(found: Tensor, original: Tensor, largest: Tensor | float) -> bool:
    """largest: the largest value of each element's block, which sets the step of small values."""
    return bool(
        ((found - original).abs() <= original.abs() * RELATIVE + torch.as_tensor(largest) / 448 * STEP * 1.01).all()
    )


def test_fused_rows_of_the_real_model() -> None:
    """64 query and 4 key heads of 192, values of 128, blocks of 128: the table of the facts file, row by row."""
    q, k, v = 64 * 192, 4 * 192, 4 * 128
    rows = fused_rows(4, q // 4, 192, 128, 128)
    assert fused_sizes(q // 4, 192, 128, 128) == (24, 2, 1)
    k_first, v_first = 96, 96 + 8
    assert rows[:q].tolist() == [r // 128 for r in range(q)]
    for s in range(4):
        keys, values = rows[q + 192 * s : q + 192 * (s + 1)], rows[q + k + 128 * s : q + k + 128 * (s + 1)]
        assert set(keys[:128].tolist()) == {k_first + 2 * s}
        assert set(keys[128:].tolist()) == {k_first + 2 * s + 1}
        assert set(values[:64].tolist()) == {k_first + 2 * s + 1}  # a scale of the keys
        assert set(values[64:].tolist()) == {v_first + s}
    assert len(rows) == q + k + v


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 50), st.integers(1, 50), st.sampled_from([4, 16, 128]), st.integers(0, 9))
def test_round_trip(rows: int, columns: int, block: int, seed: int) -> None:
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 10.0 ** (seed - 5)
    table, scale_rows = plain_rows([rows], block), -(-rows // block)
    data, scale = quantise_blocks(weight, table, scale_rows, block)
    assert (data.dtype, scale.shape) == (FP8, (scale_rows, -(-columns // block)))
    assert within_fp8(dequantise_blocks(data, scale, table, block, torch.float32), weight, weight.abs().max())


def test_block_linear_is_linear(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mtp_engine.kernels.fp8._CHUNK", 16)
    weight, bias, x = torch.randn(40, 24), torch.randn(40), torch.randn(2, 3, 24)
    rows = plain_rows([40], 16)
    data, scale = quantise_blocks(weight, rows, 3, 16)
    layer = BlockLinear(BlockMatrix(data, scale, rows, 16), bias)
    expected = Linear(dequantise_blocks(data, scale, rows, 16, torch.float32), bias)(x)
    torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-5)
    assert (layer.out_features, layer.in_features) == (40, 24)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("fp8")
    return make_tiny(root / "bf16", **REAL), make_tiny(root / "fp8", fp8=True, block=128, **REAL)


def weights_of(linear: Any) -> Tensor:
    return linear(torch.eye(linear.in_features)).T


def test_checkpoint_has_the_hubs_shapes(pair: tuple[Path, Path]) -> None:
    tensors = read_all(pair[1])
    scales = {"q": (24, 2), "k": (8, 2), "v": (4, 2)}
    for name, shape in scales.items():
        assert tensors[f"model.layers.0.self_attn.{name}_proj.weight_scale_inv"].shape == shape
    assert tensors["model.layers.1.self_attn.k_proj.weight_scale_inv"].shape == (12, 2)  # sliding: plain
    assert tensors["model.layers.1.self_attn.v_proj.weight_scale_inv"].shape == (8, 2)
    dtypes = {
        "model.layers.0.self_attn.o_proj.weight": torch.bfloat16, "model.mtp.layers.2.eh_proj.weight": torch.bfloat16,
        "model.layers.1.mlp.gate.weight": torch.float32, "model.layers.1.mlp.experts.3.down_proj.weight": FP8,
        "model.mtp.layers.0.mlp.up_proj.weight": FP8, "lm_head.weight": torch.bfloat16,
    }  # fmt: skip
    assert {name: tensors[name].dtype for name in dtypes} == dtypes


def test_loads_to_the_unquantised_weights(pair: tuple[Path, Path]) -> None:
    """Every matrix, FP8 in memory or dequantised, is the original within FP8's error; stored bf16 is bit for bit."""
    plain, kept, whole = load(pair[0]), load(pair[1]), load(pair[1], dequantize=True)
    for layer, block in enumerate(plain.blocks):
        for quantised in (kept.blocks[layer], whole.blocks[layer]):
            original, found = weights_of(block.attention.qkv), weights_of(quantised.attention.qkv)
            assert within_fp8(found, original, original.abs().max()), layer
            assert torch.equal(weights_of(block.attention.out), weights_of(quantised.attention.out))
    for model in (kept, whole):
        a, b = weights_of(plain.blocks[0].ffn.gate_up), weights_of(model.blocks[0].ffn.gate_up)  # type: ignore[attr-defined]
        assert within_fp8(b, a, a.abs().max())
        for name in ("gate_up", "down"):
            ours, theirs = getattr(model.blocks[2].ffn, name), getattr(plain.blocks[2].ffn, name)
            for e in range(4):
                a, b = theirs.matrix(e, torch.float32), ours.matrix(e, torch.float32)
                assert within_fp8(b, a, a.abs().max())


def test_stays_fp8_in_memory(pair: tuple[Path, Path]) -> None:
    model = load(pair[1])
    qkv, moe = model.blocks[0].attention.qkv, model.blocks[1].ffn
    assert isinstance(qkv, BlockLinear)
    assert qkv.weight.data.dtype == FP8
    stack: Any = moe.gate_up  # type: ignore[attr-defined]
    assert isinstance(stack, BlockMatrix)
    assert (stack.data.shape, stack.data.dtype) == ((4, 256, 256), FP8)
    assert isinstance(load(pair[1], dequantize=True).blocks[1].ffn.gate_up, PlainStack)  # type: ignore[attr-defined]
    module = loader.load_mtp(pair[1], model, 0, lambda *_: None)
    assert isinstance(module.layers[2].block.attention.qkv, BlockLinear)


def test_naive_dequantisation_would_fail(pair: tuple[Path, Path]) -> None:
    """Keys and values each with blocks of their own, as everywhere else: the values come out several times wrong."""
    plain, stored = read_all(pair[0]), read_all(pair[1])
    name = "model.layers.0.self_attn.v_proj.weight"
    original = plain[name].float()
    naive = dequantise_blocks(stored[name], stored[f"{name}_scale_inv"], plain_rows([512], 128), 128, torch.float32)
    assert not within_fp8(naive, original, original.abs().max())
    first = torch.arange(512) % 128 < 64  # of each head: these belong to a block of the keys
    ratio = naive[first].norm() / original[first].norm()
    assert ratio < 0.5 or ratio > 2
    exact = weights_of(load(pair[1]).blocks[0].attention.qkv)[-512:]
    assert within_fp8(exact, original, plain[name.replace("v_proj", "k_proj")].float().abs().max())


def test_fp8_model_is_the_model_of_its_dequantised_weights(pair: tuple[Path, Path], tmp_path: Path) -> None:
    """Logits agree whether FP8 is kept or dequantised at load, and stay near the unquantised model's."""
    tokens = torch.randint(0, 256, (40,), generator=torch.Generator().manual_seed(1))
    kept, whole, plain = (
        Run(load(folder, **options), 48).logits(tokens)
        for folder, options in ((pair[1], {}), (pair[1], {"dequantize": True}), (pair[0], {}))
    )
    torch.testing.assert_close(kept, whole, rtol=1e-4, atol=1e-4)
    assert (kept - plain).norm() < 0.2 * plain.norm()


def test_bf16_engine_reads_fp8(pair: tuple[Path, Path]) -> None:
    model = loader.load_main(pair[1], torch.bfloat16, CPU, lambda *_: None, dequantize=True)
    assert model.blocks[1].ffn.down.weight.dtype == torch.bfloat16  # type: ignore[attr-defined]
