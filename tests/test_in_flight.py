"""Steps in flight: whatever requests want, steps overlap, and nothing that is emitted depends on it."""

from collections.abc import Sequence
from typing import Any

import pytest
from test_decode_loop import SLOTS, Models, check_memory, make_drafter, make_loop, prompts
from tiny import Sums, new_request

from mtp_engine.config import SamplingParams, Structure, TreeShape
from mtp_engine.drafters import MTPDrafter, RootDrafter
from mtp_engine.runtime.loop import DecodeLoop
from mtp_engine.runtime.request import Landed, Launched, Members, PromptChunk, Request
from mtp_engine.runtime.step import EagerRunner, ModelStep, Said

PLAIN = {"temperature": 0.7, "top_p": 0.9, "stop_token_ids": (5, 44)}
OTHERS: dict[str, dict[str, Any]] = {
    "penalties": {"frequency_penalty": 0.6, "repetition_penalty": 1.2, "temperature": 0.8},
    "bad words": {"bad_words": ((3,), (7, 9)), "min_tokens": 12, "stop_token_ids": tuple(range(30))},
    "logprobs": {"logprobs": 3, "temperature": 0.5},
    "structure": {"structure": Structure(regex="any"), "temperature": 0.5},
    "no drafts": {"speculate": False, "temperature": 0.9},
    "small trees": {"tree": TreeShape.parse("2x1"), "temperature": 0.9},
}


class Queue:
    """A Runner whose steps are done when they are launched, but counted as in flight until they are waited for."""

    in_flight = 3

    def __init__(self, step: ModelStep) -> None:
        self._eager, self._flying = EagerRunner(step), 0
        self.most = 0

    def capture(self, *_: Any) -> None: ...
    def prepare(self, members: Members, bound: int) -> None: ...
    def prepare_reading(self, chunks: Sequence[PromptChunk]) -> None: ...
    def settle(self) -> None: ...
    def complete(self) -> None: ...
    def proceed(self) -> None: ...

    def read(self, chunks: Sequence[PromptChunk]) -> Launched:
        return self._eager.read(chunks)

    def launch(self, members: Members, bound: int, said: Said) -> Launched:
        done, owner = self._eager.launch(members, bound, said), self
        self._flying += 1
        self.most = max(self.most, self._flying)

        class Flight:
            waited = False

            def wait(self) -> Landed:
                owner._flying -= not self.waited
                self.waited = True
                return done.wait()

        return Flight()


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    return Models(tmp_path_factory.mktemp("flight"))


def run(loop: DecodeLoop, waves: Sequence[Sequence[SamplingParams]]) -> list[Request]:
    """Each wave joins two steps after the one before; in the end all have ended by themselves."""
    requests: list[Request] = []
    for wave in waves:
        for params in wave:
            requests.append(loop.add(prompts()[len(requests) % SLOTS], params))
        loop.step()
        loop.step()
    while loop.requests:
        loop.step()
    check_memory(loop)
    return requests


@pytest.mark.parametrize("name", OTHERS)
def test_steps_overlap_whatever_requests_want(models: Models, name: str) -> None:
    """A request that wants more joins while steps are in flight, and leaves before the others."""
    waves = [
        [SamplingParams(max_tokens=40, seed=index, **PLAIN) for index in range(2)],
        [SamplingParams(max_tokens=16, seed=2, **OTHERS[name])],
        [SamplingParams(max_tokens=30, seed=3, **PLAIN)],
    ]
    runners: list[Queue] = []

    def runner(step: ModelStep) -> Queue:
        runners.append(Queue(step))
        return runners[-1]

    drafter = MTPDrafter(models.mtp, TreeShape.parse("3x2"), slots=SLOTS)
    grammars = {"grammars": lambda _: Sums(), "tokens": 2048}
    found = run(make_loop(models.main, drafter, runner=runner, **grammars), waves)
    expected = run(make_loop(models.main, RootDrafter(), **grammars), waves)
    assert [request.output for request in found] == [request.output for request in expected]
    assert all(len(request.logprobs) == len(request.output) for request in found if request.params.logprobs)
    assert [[p.token for p in r.logprobs] for r in found] == [[p.token for p in r.logprobs] for r in expected]
    assert runners[0].most == 3


@pytest.mark.parametrize("ahead", [1, 2, 3])
@pytest.mark.parametrize("name", ["ngram", "3x2", "deep tree:6"])
def test_steps_run_past_the_end_of_the_context(models: Models, name: str, ahead: int) -> None:
    """Answers that fill the context to its last token, while steps behind them are in flight already."""

    def runner(step: ModelStep) -> Queue:
        queue = Queue(step)
        queue.in_flight = ahead
        return queue

    params = [SamplingParams(max_tokens=100, temperature=0.0, seed=i, ignore_eos=True) for i in range(SLOTS)]
    expected = run(make_loop(models.main, RootDrafter(), max_context=60), [params])
    loop = make_loop(models.main, make_drafter(name, models, {}), max_context=60, runner=runner, tokens=2048)
    found = run(loop, [params])
    assert [request.output for request in found] == [request.output for request in expected]
    assert all(len(request.prompt) + len(request.output) == 60 for request in found)


def test_what_is_known_of_a_request() -> None:
    """Any part of prompt and answer is that part of both together, and the last token is the newest."""
    request = new_request(0, [1, 2, 3])
    assert request.last == 3
    request.output += [4, 5]
    assert request.last == 5
    whole = [1, 2, 3, 4, 5]
    assert all(request.known(a, b) == whole[a:b] for a in range(6) for b in range(a, 8))
