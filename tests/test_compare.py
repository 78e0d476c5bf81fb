"""Comparing with plain decoding: warm, in turns, and long enough, by loops whose clocks are made up."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import groupby, pairwise
from types import SimpleNamespace
from typing import Any, cast

import pytest

from mtp_engine import Engine, EngineConfig, SamplingParams, TreeShape
from mtp_engine.cli.report import statistics
from mtp_engine.runtime import compare
from mtp_engine.runtime.compare import (
    ENOUGH_SECONDS,
    MOST_SECONDS,
    PIECE_TOKENS,
    QUICK_SECONDS,
    Contender,
    take_turns,
)
from mtp_engine.runtime.stats import Comparison, GenerationStats, Timed

NANO = EngineConfig(
    device="cpu", dtype="int8", threads=1, max_context=256, max_batch=2, tree=TreeShape.parse("chain:3")
)


@dataclass
class FakeLoop:
    """Emits `width` tokens a step, which takes seconds(number of the step since it was made)."""

    name: str
    log: list[str]
    tokens: int
    width: int
    seconds: Callable[[int], float]
    prompt_s: float = 0.5
    steps: int = 0
    settled: int = 0
    dropped: int = 0
    fails_after: int | None = None
    requests: list[Any] = field(default_factory=list)

    def start(self) -> Any:
        stats = GenerationStats(queued_s=9.0, prefill_s=self.prompt_s)
        self.requests.append(SimpleNamespace(stats=stats, output=[], finish_reason=None, clock=9.0 + self.prompt_s))
        return self.requests[-1]

    def step(self) -> None:
        request = self.requests[-1]
        self.log.append(self.name)
        if self.fails_after is not None and self.steps >= self.fails_after:
            request.finish_reason = "error"
            return
        request.clock += self.seconds(self.steps)
        self.steps += 1
        emitted = min(self.width, self.tokens - len(request.output))
        request.output += range(len(request.output), len(request.output) + emitted)
        request.stats.record_step(emitted, self.width, self.width - 1)
        request.stats.total_s = request.clock
        if len(request.output) == self.tokens:
            request.finish_reason = "stop"

    def settle(self) -> None:
        self.settled += 1

    def drop(self, request: Any) -> None:
        assert request is self.requests[-1]
        self.dropped += 1

    @property
    def contender(self) -> Contender:
        return Contender(self.start, self.step, self.settle, self.drop)

    @property
    def worked(self) -> float:
        return sum(self.seconds(number) for number in range(self.steps))


def race(plain: FakeLoop, drafted: FakeLoop, *, whole: bool) -> tuple[Comparison, list[int]]:
    """The wall's clock shows what both have worked."""
    return take_turns(plain.contender, drafted.contender, whole=whole, clock=lambda: plain.worked + drafted.worked)


def loops(tokens: int, plain: Callable[[int], float], drafted: Callable[[int], float], width: int = 4) -> Any:
    log: list[str] = []
    return FakeLoop("plain", log, tokens, 1, plain), FakeLoop("drafted", log, tokens, width, drafted)


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("tokens", [1, 8, 17, 200])
def test_an_engine_against_itself_is_1(tokens: int, whole: bool) -> None:
    """Though both begin cold, and the machine grows slower and slower."""

    def slower(step: int) -> float:
        return 1.0 if step < 3 else 0.01 * 1.001**step

    found, _ = race(*loops(tokens, slower, slower, width=1), whole=whole)
    assert found.speedup == pytest.approx(1, rel=0.01)


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("tokens", [8, 17, 60, 500])
def test_what_is_cold_does_not_count(tokens: int, whole: bool) -> None:
    """Steps of 4 tokens at the cost of two plain ones; plain ones that are 10 times as slow at first, as on mimo-nano."""
    found, _ = race(*loops(tokens, lambda n: 0.1 if n < 8 else 0.01, lambda n: 0.02), whole=whole)
    assert found.speedup == pytest.approx(2, rel=0.2)  # the last step of an answer may emit fewer than 4
    assert found.plain.rate == pytest.approx(100)


@pytest.mark.parametrize("whole", [True, False])
def test_they_take_turns(whole: bool) -> None:
    plain, drafted = loops(100, lambda n: 0.01, lambda n: 0.01)
    race(plain, drafted, whole=whole)
    runs = [(name, len(list(group))) for name, group in groupby(plain.log)]
    assert [name for name, _ in runs[:6]] == ["plain", "drafted"] * 3
    assert all(count <= PIECE_TOKENS for name, count in runs if name == "plain")
    assert all(a[0] != b[0] for a, b in pairwise(runs))
    assert plain.settled == drafted.settled >= 6, "what is in flight must not run into the other's piece"


def test_the_same_tokens_are_timed_on_both_sides() -> None:
    found, said = race(*loops(100, lambda n: 0.01, lambda n: 0.01), whole=True)
    assert abs(found.plain.tokens - found.drafted.tokens) < 4
    assert found.plain.tokens == 100 - PIECE_TOKENS
    assert said == list(range(100))


def test_a_short_answer_is_repeated_until_there_is_enough() -> None:
    plain, drafted = loops(8, lambda n: 0.005, lambda n: 0.005)
    found, said = race(plain, drafted, whole=False)
    assert found.plain.seconds >= ENOUGH_SECONDS
    assert found.plain.tokens == 8 * (len(plain.requests) - 1), "the first time is to get warm"
    assert said == list(range(8))


@pytest.mark.parametrize("tokens", [8, 10_000])
def test_quick_is_bounded(tokens: int) -> None:
    plain, drafted = loops(tokens, lambda n: 0.004, lambda n: 0.03)
    found, _ = race(plain, drafted, whole=False)
    assert ENOUGH_SECONDS / 2 <= found.plain.seconds <= QUICK_SECONDS + 0.1
    assert plain.worked + drafted.worked < MOST_SECONDS + 1
    assert (plain.dropped, drafted.dropped) == ((0, 0) if tokens == 8 else (1, 1)), "what has not ended is ended"


def test_a_slow_model_is_bounded_too() -> None:
    plain, drafted = loops(1000, lambda n: 2.0, lambda n: 4.0)
    found, _ = race(plain, drafted, whole=False)
    assert found.turns
    assert plain.worked + drafted.worked <= 6 + 6 + 6


def test_full_goes_to_the_end_however_slow() -> None:
    found, said = race(*loops(100, lambda n: 1.0, lambda n: 1.0), whole=True)
    assert len(said) == 100
    assert found.plain.tokens == 98  # a piece ends early when it takes long


@pytest.mark.parametrize("side", [0, 1])
@pytest.mark.parametrize("after", [0, 40])
def test_a_request_that_fails_ends_it(side: int, after: int) -> None:
    both = loops(100, lambda n: 0.01, lambda n: 0.01, width=1)
    both[side].fails_after = after
    found, _ = race(*both, whole=True)
    assert found.speedup is None
    assert found.turns == ()


def test_interrupted_it_leaves_nothing_behind() -> None:
    plain, drafted = loops(100, lambda n: 0.01, lambda n: 0.01)

    def interrupt(step: int) -> float:
        if step == 9:
            raise KeyboardInterrupt
        return 0.01

    drafted.seconds = interrupt
    with pytest.raises(KeyboardInterrupt):
        take_turns(plain.contender, drafted.contender, whole=True)
    assert drafted.dropped == 1


def rows(*turns: tuple[Timed, Timed]) -> dict[str, str]:
    stats = GenerationStats(total_s=1.0, comparison=Comparison(turns))
    stats.record_step(1, 1, 0)
    table = statistics(stats, "stop", "match")
    what, value = (list(column.cells) for column in table.columns)
    return dict(zip(cast(list[str], what), cast(list[str], value), strict=True))


def test_the_spread_is_shown_where_it_is_large() -> None:
    even = [(Timed(16, 0.160), Timed(16, 0.08)), (Timed(16, 0.165), Timed(16, 0.08))]
    assert rows(*even)["plain decoding"] == "98.5 tokens/s (32 tokens timed)"
    uneven = [*even, (Timed(16, 0.200), Timed(16, 0.1)), (Timed(2, 1.0), Timed(2, 1.0))]
    assert Comparison(tuple(uneven)).plain_range == (pytest.approx(80), pytest.approx(100))
    found = rows(*uneven[:3])
    assert found["plain decoding"] == "91.4 tokens/s, from 80.0 to 100.0 (48 tokens timed)"
    assert found["measured speed-up"].startswith("2.02x (drafted 184.6,")


def test_nothing_measured_is_nothing_shown() -> None:
    assert Comparison(()).speedup is None
    assert Comparison(()).plain_range == (0.0, 0.0)
    assert "plain decoding" not in rows()
    assert GenerationStats().speedup is None


@pytest.fixture(scope="module")
def nano() -> Iterator[Engine]:
    """The clock is real: a tenth of the time is enough to tell tokens apart, which is all that is asked of it here."""
    with pytest.MonkeyPatch.context() as patch, Engine.load("mimo-nano", NANO) as engine:
        patch.setattr(compare, "ENOUGH_SECONDS", ENOUGH_SECONDS / 10)
        patch.setattr(compare, "QUICK_SECONDS", QUICK_SECONDS / 10)
        yield engine


@pytest.mark.parametrize("full", [True, False])
def test_a_real_engine_says_the_same_before_and_after(nano: Engine, full: bool) -> None:
    prompt, params = "Once upon a time", SamplingParams(max_tokens=24, temperature=0.8, seed=3, ignore_eos=True)
    [answer] = nano.generate([prompt], params)
    said, steps = list(answer.token_ids), answer.stats.steps
    nano.compare(prompt, params, answer, full=full)
    assert answer.stats.comparison is not None
    assert answer.stats.comparison.plain.rate > 0
    assert answer.stats.identical_to_plain is (True if full else None)
    assert (answer.token_ids, answer.stats.steps, answer.stats.seed) == (said, steps, 3)
    assert not nano.loop.requests
    assert nano.generate([prompt], params)[0].token_ids == said


def test_other_tokens_are_noticed(nano: Engine) -> None:
    params = SamplingParams(max_tokens=6, ignore_eos=True)
    [answer] = nano.generate(["Once upon a time"], params)
    answer.token_ids[-1] += 1
    nano.compare("Once upon a time", params, answer, full=True)
    assert answer.stats.identical_to_plain is False
