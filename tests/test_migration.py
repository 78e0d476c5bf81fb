"""A request that moves to another worker goes on with the same text, whatever its parameters look back at."""

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mtp_engine import Engine, EngineConfig, SamplingParams
from mtp_engine.config import Structure
from mtp_engine.errors import EngineError
from mtp_engine.hub import hub
from mtp_engine.runtime.lead import Solo
from mtp_engine.serve.migration import Ledger, Turn, chunk_of, lost, read

KINDS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0}, "seeded": {"temperature": 0.9, "seed": 3}, "unseeded": {"temperature": 0.9},
    "penalties": {"frequency_penalty": 1.5, "presence_penalty": 0.5}, "repetition": {"repetition_penalty": 1.3},
    "stop": {"stop": ["the lit", "ry fo"]}, "minimum": {"min_tokens": 20}, "regex": {"guided": {"regex": "[a-z ]{40,80}"}},
    "json": {"guided": {"json": {"type": "object"}}}, "choice": {"guided": {"choice": ["yes, it is so", "no, it is not"]}},
}  # fmt: skip
STOPS = ("stop", "min_tokens", "max_tokens", "ignore_eos")


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with Engine.load(hub.NANO, EngineConfig(threads=1, max_batch=2)) as found:
        yield found


def request(tokens: list[int], **given: Any) -> dict[str, Any]:
    """As Dynamo's frontend sends it."""
    stops = {key: given.pop(key) for key in STOPS if key in given}
    guided = given.pop("guided", None)
    return {
        "token_ids": tokens,
        "stop_conditions": {"max_tokens": 32, **stops, "stop_token_ids_hidden": [8186]},
        "sampling_options": {"guided_decoding": guided, **given},
        "output_options": {},
    }


def run(engine: Engine, turn: Turn) -> list[int]:
    """The whole answer."""
    [job] = engine.loop.intake.requests(turn.prompt, turn.params, said=turn.said)
    engine.loop.submit([job])
    while job.finish_reason is None:
        engine.loop.step()
    assert not job.error
    return job.output


@pytest.mark.parametrize("kind", KINDS)
def test_a_moved_request_says_the_same(engine: Engine, tmp_path: Path, kind: str) -> None:
    prompt, given = engine.encode("Once upon a time"), KINDS[kind]
    whole = run(engine, read(request(prompt, **given), "id", 2048, Ledger(tmp_path / "undisturbed")))
    for said in range(1, len(whole), 5):
        folder = tmp_path / str(said)
        first = read(request(prompt, **given), "id", 2048, Ledger(folder))
        assert first.said == []
        left = {"max_tokens": 32 - said}
        if "min_tokens" in given:
            left["min_tokens"] = max(0, given["min_tokens"] - said)
        moved = read(request(prompt + whole[:said], **{**given, **left}), "id", 2048, Ledger(folder))
        known = moved.said == whole[:said]
        looks_back = kind not in ("greedy", "seeded", "unseeded", "repetition") and left.get("min_tokens") != 0
        assert known == looks_back, "both ways must be tested"
        assert run(engine, moved) == (whole if known else whole[said:])


def test_without_a_seed_the_id_is_one() -> None:
    first, again, other = (read(request([1, 2]), name, 100, None).params.seed for name in ("a", "a", "b"))
    assert first == again != other


def test_the_ledger_forgets(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    read(request([1, 2], frequency_penalty=1.0), "../../x", 100, ledger)
    assert len(list(tmp_path.iterdir())) == 1
    ledger.end("../../x")
    ledger.end("../../x")
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").touch()
    with pytest.raises(EngineError, match="--requests needs a folder"):
        Ledger(tmp_path / "file" / "below")


def test_what_cannot_move_is_refused(engine: Engine) -> None:
    with pytest.raises(EngineError, match="one answer"):
        read(request([1], n=2), "id", 100, None)
    with pytest.raises(EngineError, match="give one of"):
        read(request([1], guided={"regex": "a", "json": {}, "grammar": "x"}), "id", 100, None)
    prompt, seeded = engine.encode("Hello"), SamplingParams(max_tokens=4, seed=1)
    for params, said in (
        (SamplingParams(max_tokens=4), [5]), (SamplingParams(max_tokens=4, n=2, seed=1), [5]), (seeded, [-1]),
        (seeded, [5, 6, 7, 8]), (SamplingParams(max_tokens=9, seed=1, structure=Structure(regex="[a-b]")), [300, 301]),
    ):  # fmt: skip
        with pytest.raises(EngineError):
            engine.requests(prompt, params, said)


def test_chunks_carry_logprobs(engine: Engine) -> None:
    [answer] = engine.generate(["Once"], SamplingParams(max_tokens=3, logprobs=2))
    chunk = chunk_of(answer.token_ids, answer.logprobs)
    assert chunk["log_probs"] == [each.logprob for each in answer.logprobs]
    assert [len(each) for each in chunk["top_logprobs"]] == [2, 2, 2]
    assert "log_probs" not in chunk_of([1], ())


def test_a_worker_hears_of_a_lost_rank() -> None:
    async def watch() -> str:
        team: Any = Solo()
        watching = asyncio.create_task(lost(team))
        await asyncio.sleep(0.3)
        assert not watching.done()
        team.lost = "rank 1 has ended"
        return await watching

    assert asyncio.run(watch()) == "rank 1 has ended"
