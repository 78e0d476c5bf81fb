"""Experts in 4 bits: what is packed comes out again, what is rounded stays near, and drafting changes no token."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mimo import CPU, load

from mtp_engine import Engine, EngineConfig, SamplingParams, TreeShape
from mtp_engine.errors import EngineError
from mtp_engine.hub import hub
from mtp_engine.hub.inspect import inspect_model
from mtp_engine.kernels.experts import PlainStack
from mtp_engine.kernels.fp8 import BlockMatrix
from mtp_engine.kernels.int4 import GROUP, Int4Stack, dequantise, group_of, pack, quantise, unpack
from mtp_engine.models import loader
from mtp_engine.models.make_tiny import make_tiny

WIDE = {"moe_intermediate_size": 64}  # of which 2 ranks have 32 columns each


@given(st.integers(1, 5), st.integers(1, 4), st.sampled_from([16, 32, 64]), st.integers(0, 2**31))
def test_what_is_packed_comes_out_again(rows: int, pairs: int, group: int, seed: int) -> None:
    numbers = torch.randint(-8, 8, (rows, pairs * 2 * group), generator=torch.Generator().manual_seed(seed)).float()
    data = pack(numbers, group)
    assert (data.dtype, data.shape) == (torch.uint8, (rows, pairs * group))
    assert torch.equal(unpack(data, group), numbers)


@settings(max_examples=40)
@given(st.sampled_from([16, 64]), st.integers(-15, 15), st.integers(0, 2**31), st.booleans())
def test_rounding_stays_near(group: int, size: int, seed: int, sparse: bool) -> None:
    """Within half a step of scales that reach the largest weight, in the mean; zeros stay zeros, of all sizes."""
    weight = torch.randn(3, 4 * group, generator=torch.Generator().manual_seed(seed)) * 10.0**size
    weight[0] = 0.0
    if sparse:
        weight[1, 1:] = 0.0
    numbers, scale = quantise(weight, group)
    assert (numbers >= -8).all()
    assert (numbers <= 7).all()
    found = dequantise(numbers, scale)
    assert torch.equal(found[0], weight[0])
    if sparse:
        assert torch.equal(found[1, 1:], weight[1, 1:])
        assert found[1, 0] == pytest.approx(float(weight[1, 0]), rel=2**-8)  # a scale is bf16
    step = weight.unflatten(-1, (-1, group)).abs().amax(-1) / 8
    error = (found - weight).unflatten(-1, (-1, group)).square().mean(-1).sqrt()
    assert (error <= 0.5 * step).all()


def test_a_normal_distribution_keeps_its_shape() -> None:
    """The figure of the module's text."""
    weight = torch.randn(500, 512, generator=torch.Generator().manual_seed(0))
    stack = Int4Stack.of(PlainStack(weight[None]), 1)
    assert stack.group == GROUP
    error = float((stack.matrix(0, torch.float32) - weight).norm() / weight.norm())
    assert error == pytest.approx(0.091, abs=0.001)
    held = stack.data.nbytes + stack.scale.nbytes
    assert held * 8 / weight.numel() == 4.25
    assert Int4Stack.of(stack, 1) is stack


def test_groups_fit_the_columns() -> None:
    assert [group_of(columns) for columns in (4096, 1024, 128, 192, 64, 96, 32)] == [64, 64, 64, 32, 32, 16, 16]
    with pytest.raises(ValueError, match="48 columns"):
        group_of(48)


@pytest.fixture(scope="module", params=["fp8", "bf16"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny(tmp_path_factory.mktemp("int4") / "tiny", fp8=request.param == "fp8", **WIDE)


def test_only_experts_change(folder: Path) -> None:
    """However they are stored and read, they are the same 4 bits; all else is as without."""
    plain, small, again = load(folder), load(folder, experts="int4"), load(folder, experts="int4", dequantize=True)
    for before, after, other in zip(plain.blocks, small.blocks, again.blocks, strict=True):
        for name in ("gate_up", "down"):
            old, new, same = (getattr(block.ffn, name) for block in (before, after, other))  # type: ignore[attr-defined]
            if not isinstance(old, PlainStack | BlockMatrix):
                assert type(old) is type(new)
                continue
            assert isinstance(new, Int4Stack)
            assert torch.equal(new.data, same.data)
            assert torch.equal(new.scale, same.scale)
            a, b = (stack.matrix(1, torch.float32) for stack in (old, new))
            assert 0.02 < float((a - b).norm() / a.norm()) < 0.12
        assert type(before.attention.qkv) is type(after.attention.qkv)


CONFIG = EngineConfig(
    experts="int4", device="cpu", threads=1, max_context=256, max_batch=3, prefill_chunk=16, prefix_cache=False
)
PARAMS = [SamplingParams(max_tokens=24, temperature=t, seed=7, ignore_eos=True, top_p=p) for t, p in ((0, 1), (1, 0.9))]
PROMPTS = [[5, 9, 2, 40, 17, 33, 8], [3], [7] * 4 + [11, 30] * 20]


def texts(folder: Path, tree: str | None, ranks: int = 1, **changes: Any) -> list[list[int]]:
    shape: dict[str, Any] = {"tree": TreeShape.parse(tree)} if tree else {"drafter": "root"}
    with Engine.load(str(folder), replace(CONFIG, tensor_parallel=ranks, **shape, **changes)) as engine:
        assert engine.config.dtype == "fp32"
        answers = engine.generate(PROMPTS, [PARAMS[number % 2] for number in range(3)])
    assert (max(answer.stats.mean_accepted_length for answer in answers) > 1) == (tree is not None)
    return [answer.token_ids for answer in answers]


def test_drafting_changes_no_token(folder: Path) -> None:
    plain = texts(folder, None)
    assert texts(folder, "chain:3") == texts(folder, "tree:7") == plain
    assert texts(folder, None, experts="auto", dtype="fp32") != plain


def test_ranks_say_what_one_process_says(tmp_path: Path) -> None:
    """Where their groups are the same: each rank's columns are a multiple of two."""
    folder = make_tiny(tmp_path / "tiny", fp8=True, moe_intermediate_size=256)
    assert texts(folder, "chain:3", ranks=2) == texts(folder, None)


def test_drafting_changes_no_token_of_the_kernels(tmp_path: Path) -> None:
    """By the kernels, in Triton's interpreter where there is no GPU."""
    pytest.importorskip("triton")
    from test_device_path import Model, decode

    few = {"num_hidden_layers": 1, "hybrid_layer_pattern": [1], "moe_layer_freq": [1], "n_routed_experts": 4}
    folder = make_tiny(tmp_path / "tiny", sliding_window=20, mtp_layers=1, **few, **WIDE)
    model = Model(folder, folder, torch.bfloat16, experts="int4")
    params, prompt = SamplingParams(max_tokens=3, temperature=0.9, seed=3), [5, 9]
    plain, drafted = (decode(model.loop(shape), [prompt], [params])[0].output for shape in ("root", "2"))
    assert drafted == plain


def test_refused_where_there_are_no_such_experts(folder: Path, tmp_path: Path) -> None:
    dense = make_tiny(tmp_path / "dense", family="mimo", mtp_layers=1)
    with pytest.raises(EngineError, match="no experts to be held in 4 bits; leave --experts out"):
        Engine.load(str(dense), CONFIG)
    odd = make_tiny(tmp_path / "odd", moe_intermediate_size=48)
    with pytest.raises(EngineError, match="a multiple of 32 columns, not 48"):
        Engine.load(str(odd), CONFIG)
    with pytest.raises(EngineError, match="int8 holds experts in 8 bits: use --dtype fp32"):
        Engine.load(str(folder), replace(CONFIG, dtype="int8"))
    narrow = make_tiny(tmp_path / "narrow", intermediate_size=64, moe_intermediate_size=32)
    with pytest.raises(EngineError, match="does not divide the model's 32 columns of an expert in blocks of 32"):
        Engine.load(str(narrow), replace(CONFIG, tensor_parallel=2))
    with pytest.raises(EngineError, match="no experts"):
        inspect_model(str(dense), experts="int4")


def test_inspect_tells_the_memory(folder: Path) -> None:
    """Of each rank, as it is held."""
    shares = [inspect_model(str(folder), ranks=ranks, experts="int4").share for ranks in (1, 2)]
    held = [
        sum(stack.data.nbytes + stack.scale.nbytes for stack in (block.ffn.gate_up, block.ffn.down))  # type: ignore[attr-defined]
        for block in loader.load_main(folder, torch.bfloat16, CPU, lambda *_: None, experts="int4").blocks[1:]
    ]
    assert shares[0] is not None
    assert shares[1] is not None
    assert shares[0].weights["experts"] == sum(held)
    assert shares[1].weights["experts"] < 0.6 * sum(held)
    assert inspect_model(str(folder)).share is None


def test_the_packages_model_in_4_bits() -> None:
    """Real weights: the text differs, drafts are accepted, and it is plain decoding's."""
    config = replace(CONFIG, tree=TreeShape.parse("chain:3"), max_context=512)
    with Engine.load(hub.NANO, config) as engine:
        [answer] = engine.generate(["Once upon a time"], SamplingParams(max_tokens=24))
        plain = engine.plain("Once upon a time", SamplingParams(max_tokens=24))
        assert answer.token_ids == plain.output
        assert answer.stats.mean_accepted_length > 1.3
