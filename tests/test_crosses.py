"""A short part of bench/crosses.py: other cases than those of the last run, at every commit the same."""

from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
from crossing import Asked, Crosses, Outcome

from mtp_engine.runtime.request import Request


@pytest.fixture(scope="module")
def crosses() -> Iterator[Crosses]:
    made = Crosses("mimo-nano", device="cpu", threads=1)
    yield made
    made.close()


@pytest.mark.parametrize("start", range(50_000, 50_020, 10))
def test_ten_cases(crosses: Crosses, start: int) -> None:
    outcomes = [crosses.case(number) for number in range(start, start + 10)]
    problems = [f"case {start + at}: {problem}" for at, each in enumerate(outcomes) for problem in each.problems]
    assert not problems
    assert sum(each.accepted for each in outcomes) > 20
    assert sum(each.cached for each in outcomes) > 20


def test_a_case_is_known_by_its_number(crosses: Crosses) -> None:
    first, again = crosses.case(7), crosses.case(7)
    assert replace(first, accepted=0, cached=0, preempted=0) == replace(again, accepted=0, cached=0, preempted=0)


def _another_token(answer: Request) -> None:
    answer.output[-1] += 1


def _an_early_end(answer: Request) -> None:
    answer.output.pop()
    answer.logprobs = answer.logprobs[: len(answer.output)]


def _a_lost_logprob(answer: Request) -> None:
    answer.logprobs = answer.logprobs[1:]


@pytest.mark.parametrize(("change", "problem"), [
    (_another_token, "another token"), (_an_early_end, "ends otherwise"), (_a_lost_logprob, "other log-probabilities"),
])  # fmt: skip
def test_it_notices(
    crosses: Crosses, monkeypatch: pytest.MonkeyPatch, change: Callable[[Request], None], problem: str
) -> None:
    """A test of the test."""
    compare = Crosses._compare

    def spoilt(self: Crosses, asked: Asked, answer: Request, sample: int, outcome: Outcome) -> str:
        if answer.output and answer.finish_reason != "abort":
            change(answer)
        return compare(self, asked, answer, sample, outcome)

    monkeypatch.setattr(Crosses, "_compare", spoilt)
    assert any(problem in each for each in crosses.case(50_001).problems)


@pytest.mark.parametrize("number", [16])
def test_steps_that_are_recorded_ahead(number: int) -> None:
    """A GPU's steps. 16: one whose structure and other parameters contradict each other, beside others in flight."""
    crosses = Crosses("mimo-nano", device="cpu", dtype="fp32", recorded=True, most=7)
    outcome = crosses.case(number)
    crosses.close()
    assert not outcome.problems
    assert outcome.accepted > 0
