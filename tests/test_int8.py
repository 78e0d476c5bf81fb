"""int8 on a CPU through the engine: drafting, batches, chunks, kept beginnings and preemption change no token."""

from typing import Any

import pytest

from mtp_engine import Engine, EngineConfig, SamplingParams, TreeShape
from mtp_engine.config import Structure
from mtp_engine.errors import EngineError
from mtp_engine.hub import hub
from mtp_engine.kernels.cpu import build

PROMPTS = (
    "The capital of France is",
    "def fibonacci(n):\n    if n < 2:\n        return n\n    return fibonacci(n - 1) +",
    "One two three four, one two three four, one two",
)
PARAMS = (
    SamplingParams(max_tokens=24, ignore_eos=True),
    SamplingParams(max_tokens=24, temperature=0.8, seed=1, top_p=0.95, ignore_eos=True),
    SamplingParams(max_tokens=20, temperature=0.8, seed=2, frequency_penalty=0.5, logprobs=2, ignore_eos=True),
    SamplingParams(max_tokens=20, seed=3, structure=Structure(regex="[a-z ]{12,60}")),
)


def load(**options: Any) -> Engine:
    return Engine.load(config=EngineConfig(**{"dtype": "int8", "threads": 1, "max_context": 1024, **options}))


@pytest.fixture(scope="module")
def plain() -> list[list[int]]:
    with load(drafter="root", max_batch=1, prefix_cache=False) as engine:
        return [engine.generate([prompt], each)[0].token_ids for each in PARAMS for prompt in PROMPTS]


@pytest.mark.model
@pytest.mark.parametrize(
    "options",
    [
        {"tree": TreeShape.parse("chain:3"), "max_batch": 6, "threads": 2},
        {"tree": TreeShape.parse("tree:7"), "max_batch": 1},
        {"tree": TreeShape.parse("2x2x1"), "max_batch": 8, "prefill_chunk": 5},
        {"drafter": "ngram", "max_batch": 3},
        {"tree": TreeShape.parse("tree:7"), "max_batch": 4, "kv_tokens": 128, "max_context": 100, "page_size": 16},
    ],
    ids=["chain", "one", "tree", "ngram", "starved"],
)
def test_text_is_that_of_plain_decoding(plain: list[list[int]], options: dict[str, Any]) -> None:
    """Every token, as a miss and as a hit; in fp32 only a near tie may differ, here nothing may."""
    with load(**options) as engine:
        prompts, params = [*PROMPTS] * len(PARAMS), [each for each in PARAMS for _ in PROMPTS]
        for _ in range(2):
            answers = engine.generate(prompts, params)
            assert [answer.token_ids for answer in answers] == plain
        assert sum(answer.stats.cached_tokens for answer in answers) or "kv_tokens" in options
        assert sum(answer.stats.preemptions for answer in answers) or "kv_tokens" not in options


@pytest.mark.parametrize("rule", ["match", "rrs", "rejection", "block", "traversal"])
def test_rules_and_candidates_of_all_kinds(rule: str) -> None:
    """They draft with the drafter of GPUs (MTPDrafter), which is given one prompt's chunk at a time here."""
    tree = TreeShape.parse("chain:3" if rule in ("rejection", "block") else "2x2")
    params, config = PARAMS[1], {"dtype": "int8", "threads": 1, "tree": tree, "verifier": rule, "candidates": "best"}
    with Engine.load(hub.NANO, EngineConfig(**config, prefill_chunk=8)) as engine:  # type: ignore[arg-type]
        answers = engine.generate(PROMPTS, params)
        assert [(len(each.token_ids), each.error) for each in answers] == [(params.max_tokens, "")] * len(PROMPTS)
        assert sum(each.stats.tokens for each in answers) > sum(each.stats.steps for each in answers)
        if rule == "match":
            plain = engine.undrafted().generate(PROMPTS, params)
            assert [each.token_ids for each in answers] == [each.token_ids for each in plain]


def test_experts_windows_and_sinks_draft_the_same_text() -> None:
    options: list[dict[str, Any]] = [
        {"drafter": "root"},
        {"tree": "tree:15"},
        {"tree": "4x2x2"},
        {"tree": "chain:3", "prefill_chunk": 3},
    ]
    found = []
    for each in options:
        with Engine.load(hub.NANO, EngineConfig(dtype="int8", threads=2, **each)) as engine:
            found.append(
                [answer.token_ids for answer in engine.generate([*PROMPTS] * 4, [p for p in PARAMS for _ in PROMPTS])]
            )
    assert all(each == found[0] for each in found)


def test_without_a_compiler_a_cpu_runs_in_fp32(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: object) -> None:
        raise build.NoCompiler("there is no C compiler: pip install ziglang")

    monkeypatch.setattr(build, "compiled", refuse)
    with Engine.load(hub.NANO, EngineConfig(device="cpu")) as engine:
        assert engine.config.dtype == "fp32"
    assert "fp32 is used, which is several times slower" in caplog.text
    assert "pip install ziglang" in caplog.text
    with pytest.raises(EngineError, match=r"there is no C compiler: pip install ziglang; or use --dtype fp32"):
        Engine.load(hub.NANO, EngineConfig(dtype="int8"))
