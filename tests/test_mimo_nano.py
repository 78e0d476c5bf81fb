"""mimo-nano, the trained MiMo in the package: real text through FP8 weights, sliding windows, experts and MTP layers."""

from dataclasses import replace

import pytest

from mtp_engine import Engine, EngineConfig, SamplingParams, TreeShape
from mtp_engine.hub import hub
from mtp_engine.models.checkpoint import Checkpoint
from mtp_engine.models.loader import expected_names
from mtp_engine.training.evaluate import outside_loops
from mtp_engine.training.nano.prompts import is_held_out, prompts

FOLDER = hub.locate(hub.NANO).folder
HELD_OUT = [p for p in prompts(2000, 7) if is_held_out(p)][:16]


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine.load(hub.NANO, EngineConfig(tree=TreeShape.parse("chain:3"), dequantize=True, max_context=512))


def test_it_is_small_whole_and_fp8() -> None:
    assert sum(file.stat().st_size for file in FOLDER.iterdir()) < 24_000_000
    checkpoint = Checkpoint(FOLDER)
    assert set(expected_names(FOLDER)) == set(checkpoint)
    k_scale, v_scale = (
        checkpoint.shape(f"model.layers.0.self_attn.{name}_proj.weight_scale_inv") for name in ("k", "v")
    )
    assert (k_scale, v_scale) == ((4, 8), (2, 8))  # two per key head and one: the fused sections of a global layer


def test_accepted_length_on_its_own_domain(engine: Engine) -> None:
    chats = [[{"role": "user", "content": p}] for p in HELD_OUT]
    assert outside_loops(engine, chats, SamplingParams(max_tokens=96))[0] > 2.6


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_lossless(engine: Engine, temperature: float) -> None:
    """Past the window of 128 keys, FP8 kept and dequantised, chains and trees."""
    params = SamplingParams(max_tokens=150, temperature=temperature, seed=3)
    chats = [[{"role": "user", "content": p}] for p in HELD_OUT[:3]]
    expected = [engine.plain(chat, params).output for chat in chats]
    assert [answer.token_ids for answer in engine.generate(chats, params)] == expected
    kept = Engine.load(hub.NANO, replace(engine.config, dequantize=False, tree=TreeShape.parse("tree:7")))
    short = replace(params, max_tokens=40)
    assert [a.token_ids for a in kept.generate(chats, short)] == [kept.plain(chat, short).output for chat in chats]


def test_it_writes_english(engine: Engine) -> None:
    [answer] = engine.generate([[{"role": "user", "content": HELD_OUT[0]}]], SamplingParams(max_tokens=40))
    words = answer.text.lower().split()
    assert len({"the", "a", "and", "is", "of", "in", "was", "to"} & set(words)) >= 3, answer.text
