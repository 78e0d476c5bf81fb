"""Counting, against sums done by hand."""

import pytest

from mtp_engine.runtime.stats import Comparison, GenerationStats, Timed


@pytest.fixture
def four_steps() -> GenerationStats:
    """Steps of a 3-deep tree: 4 tokens of 7 nodes, 1 of 7, 2 of 7, and 1 where only the root was sent."""
    stats = GenerationStats(seed=9, prompt_tokens=5, prefill_s=1.0, draft_s=0.5, verify_s=1.5, total_s=4.0, ttft_s=1.25)
    for emitted, nodes, depth in ((4, 7, 3), (1, 7, 3), (2, 7, 3), (1, 1, 0)):
        stats.record_step(emitted, nodes, depth)
    return stats


def test_by_hand(four_steps: GenerationStats) -> None:
    assert (four_steps.steps, four_steps.tokens, four_steps.nodes) == (4, 8, 22)
    assert four_steps.mean_accepted_length == 2.0
    assert four_steps.nodes_per_step == 5.5
    assert four_steps.proposed_per_depth == [3, 3, 3]
    assert four_steps.accepted_per_depth == [2, 1, 1]
    assert four_steps.unconditional_acceptance() == [0.5, 0.25, 0.25]
    assert sum(four_steps.unconditional_acceptance()) == four_steps.mean_accepted_length - 1
    assert four_steps.conditional_acceptance() == [0.5, 0.5, 1.0]
    assert four_steps.tokens_per_s == pytest.approx(8 / 3)
    assert four_steps.other_s == 1.0
    assert four_steps.speedup is None


def test_speedup_is_over_plain_decoding_in_turns(four_steps: GenerationStats) -> None:
    """Not over what the answer itself took, which may have been cold."""
    four_steps.comparison = Comparison(((Timed(8, 2.0), Timed(9, 1.0)), (Timed(4, 1.0), Timed(3, 0.5))))
    assert four_steps.speedup == pytest.approx(2.0)
    found = four_steps.to_json()
    assert (found["plain_tokens_per_s"], found["drafted_tokens_per_s"], found["plain_range"]) == (4.0, 8.0, [4.0, 4.0])


def test_deeper_trees_may_come_later() -> None:
    stats = GenerationStats()
    stats.record_step(1, 1, 0)
    stats.record_step(2, 3, 1)
    stats.record_step(1, 4, 3)
    assert stats.proposed_per_depth == [2, 1, 1]
    assert stats.accepted_per_depth == [1, 0, 0]
    assert stats.conditional_acceptance() == [pytest.approx(1 / 3), 0.0, 0.0]


def test_nothing_decoded_yet() -> None:
    stats = GenerationStats()
    assert (stats.mean_accepted_length, stats.nodes_per_step, stats.tokens_per_s, stats.other_s) == (0, 0, 0, 0)
    assert stats.unconditional_acceptance() == stats.conditional_acceptance() == []
    assert stats.speedup is None


def test_json_holds_the_same_numbers(four_steps: GenerationStats) -> None:
    found = four_steps.to_json()
    assert found["mean_accepted_length"] == 2.0
    assert found["accepted_per_depth"] == [2, 1, 1]
    assert (found["seed"], found["prompt_tokens"], found["tokens"], found["steps"]) == (9, 5, 8, 4)
    assert found["identical_to_plain"] is None
    found["accepted_per_depth"].append(1)
    assert four_steps.accepted_per_depth == [2, 1, 1], "the report is a copy"
