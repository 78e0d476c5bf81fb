"""Chunks of several prompts in one pass: the same texts as alone, no more tokens than a chunk, and failures that stay apart."""

import logging
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_decode_loop import check_empty, check_memory, nothing_noted
from test_prefix import FAMILIES, Family, drafter_of, loop_of, prompt_of

from mtp_engine.config import SamplingParams
from mtp_engine.drafters import RootDrafter
from mtp_engine.runtime.loop import DecodeLoop
from mtp_engine.runtime.request import PromptChunk, Request


@pytest.fixture(scope="module")
def families(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Family]:
    return {name: Family(name, tmp_path_factory.mktemp(name)) for name in FAMILIES}


class Reads:
    """Notes the chunks that a loop reads, pass by pass. A pass with the prompt `fails` fails."""

    def __init__(self, loop: DecodeLoop, fails: Sequence[int] = ()) -> None:
        self.passes: list[list[tuple[int, int, int]]] = []
        self._read, self._fails = loop.runner.read, list(fails)
        loop.runner.read = self.read  # type: ignore[method-assign]

    def read(self, chunks: Sequence[PromptChunk]) -> Any:
        self.passes.append([(chunk.request.number, chunk.start, chunk.stop) for chunk in chunks])
        if any(chunk.request.prompt == self._fails for chunk in chunks):
            raise RuntimeError("this prompt cannot be read")
        return self._read(chunks)


def finish(loop: DecodeLoop, prompts: Sequence[list[int]], params: Sequence[SamplingParams]) -> list[Request]:
    requests = [loop.add(prompt, each) for prompt, each in zip(prompts, params, strict=True)]
    while loop.requests:
        loop.step()
        check_memory(loop)
    return requests


def alone(family: Family, request: Request) -> list[int]:
    [plain] = finish(loop_of(family, RootDrafter(), slots=1), [request.prompt], [request.params])
    return plain.output


asked = st.tuples(st.integers(0, 5), st.integers(0, 45), st.integers(1, 9), st.integers(1, 12), st.integers(0, 3))


@pytest.mark.parametrize("name", FAMILIES)
@settings(max_examples=5, deadline=None)
@given(
    drafter=st.sampled_from(["root", "chain:3", "3x2", "tree:6", "ngram"]),
    slots=st.integers(2, 6),
    chunk=st.sampled_from([8, 16, 64]),
    tokens=st.sampled_from([220, 1000]),
    in_flight=st.integers(1, 3),
    kept=st.sampled_from([0, 10**8]),
    asks=st.lists(asked, min_size=3, max_size=6),
)
def test_texts_are_those_of_each_prompt_alone(
    families: dict[str, Family], name: str, drafter: str, slots: int, chunk: int, tokens: int, in_flight: int, kept: int,
    asks: list[tuple[int, int, int, int, int]],
) -> None:  # fmt: skip
    """Prompts of any lengths and beginnings, T = 0 and 0.8, drafting or not; in little memory, and again as hits."""
    family = families[name]
    prompts = [prompt_of(start, shared, own) for start, shared, own, _, _ in asks]
    params = [
        SamplingParams(max_tokens=most, seed=i, temperature=0.8 * (kind % 2), speculate=kind != 2)
        for i, (*_, most, kind) in enumerate(asks)
    ]
    loop = loop_of(
        family, drafter_of(drafter, family, slots), slots=slots, chunk=chunk, tokens=tokens, in_flight=in_flight,
        prefix_bytes=kept, share_pages=True,
    )  # fmt: skip
    reads = Reads(loop)
    with nothing_noted():
        requests = [*finish(loop, prompts, params), *finish(loop, prompts, params)]
    assert all(sum(stop - start for _, start, stop in each) <= chunk for each in reads.passes)
    expected = [alone(family, request) for request in requests[: len(prompts)]]
    assert [request.output for request in requests] == [*expected, *expected]
    check_empty(loop)


@pytest.mark.parametrize("drafter", ["root", "chain:3", "ngram"])
def test_preempted_requests_and_hits_among_prompts_read_together(families: dict[str, Family], drafter: str) -> None:
    family, params = families["mimo_v2_flash"], SamplingParams(max_tokens=40, seed=3, temperature=0.8)
    prompts = [prompt_of(start, length, 2) for start, length in enumerate((3, 1, 12, 5, 20))]
    loop = loop_of(
        family, drafter_of(drafter, family, 5), slots=5, tokens=150, prefix_bytes=10**8, share_pages=True, chunk=32
    )
    reads = Reads(loop)
    requests = finish(loop, prompts, [params] * 5)
    assert max(map(len, reads.passes)) >= 3
    assert sum(request.stats.preemptions for request in requests)
    again = finish(loop, prompts, [params] * 5)
    assert any(request.stats.cached_tokens for request in again)
    expected = [alone(family, request) for request in requests]
    assert [request.output for request in [*requests, *again]] == [*expected, *expected]


def test_a_step_reads_one_chunk_of_tokens_in_order(families: dict[str, Family]) -> None:
    family = families["llama"]
    loop = loop_of(family, RootDrafter(), slots=5)
    reads = Reads(loop)
    finish(
        loop, [prompt_of(i, length, 1) for i, length in enumerate((5, 6, 20, 4, 1))], [SamplingParams(max_tokens=1)] * 5
    )
    assert reads.passes == [
        [(0, 0, 5), (1, 0, 6), (2, 0, 5)], [(2, 5, 20), (3, 0, 1)], [(3, 1, 4), (4, 0, 1)]
    ]  # fmt: skip
    apart = loop_of(family, RootDrafter(), slots=5, packs=False)
    reads = Reads(apart)
    finish(apart, [prompt_of(i, 5, 1) for i in range(3)], [SamplingParams(max_tokens=1)] * 3)
    assert reads.passes == [[(i, 0, 5)] for i in range(3)]


def test_who_begins_alike_waits_for_the_first(families: dict[str, Family]) -> None:
    """And finds what it has read; where nothing is kept, or nothing more would be found, nobody waits."""
    prompts = [prompt_of(1, 11, 2), prompt_of(1, 11, 3), prompt_of(2, 5, 1), prompt_of(3, 5, 1)]
    for prefix, together in ((10**8, 1), (0, 2)):
        loop = loop_of(families["llama"], RootDrafter(), slots=4, prefix_bytes=prefix, share_pages=True)
        reads = Reads(loop)
        finish(loop, prompts, [SamplingParams(max_tokens=1)] * 4)
        assert len(reads.passes[0]) == together
    loop = loop_of(families["llama"], RootDrafter(), slots=4, prefix_bytes=10**8, share_pages=True)
    finish(loop, [[*prompts[0][:11], 50 - i] for i in range(3)], [SamplingParams(max_tokens=1)] * 3)  # a junction
    reads = Reads(loop)
    finish(loop, [[*prompts[0][:11], 40 + i, 3, 4] for i in range(3)], [SamplingParams(max_tokens=1)] * 3)
    assert reads.passes == [[(3, 11, 13), (4, 11, 13), (5, 11, 13)]]


def test_a_prompt_that_cannot_be_read_fails_alone(families: dict[str, Family]) -> None:
    family = families["mimo_v2_flash"]
    prompts = [prompt_of(i, 4, 1) for i in range(4)]
    loop = loop_of(family, drafter_of("chain:3", family, 4), slots=4)
    reads = Reads(loop, fails=prompts[1])
    logging.disable(logging.ERROR)
    try:
        requests = finish(loop, prompts, [SamplingParams(max_tokens=6, seed=1)] * 4)
    finally:
        logging.disable(logging.NOTSET)
    assert [request.finish_reason for request in requests] == ["length", "error", "length", "length"]
    assert requests[1].error == "RuntimeError: this prompt cannot be read"
    assert [request.output for request in requests if not request.error] == [
        alone(family, request) for request in requests if not request.error
    ]
    assert [len(each) for each in reads.passes] == [4, 1, 1, 1, 1]
    check_empty(loop)


def test_what_is_kept_is_taken_up_one_request_a_step(families: dict[str, Family]) -> None:
    """Where somebody decodes; where nobody does, all begin at once."""
    family = families[next(iter(families))]
    loop = loop_of(family, drafter_of("3x2", family, 6), slots=6, prefix_bytes=1 << 22)
    prompts = [prompt_of(number, 24, 1) for number in range(4)]
    finish(loop, prompts, [SamplingParams(max_tokens=2, seed=1, ignore_eos=True)] * 4)

    def running(others: int) -> list[int]:
        for number in range(others):
            loop.add(prompt_of(9 + number, 8, 1), SamplingParams(max_tokens=40, seed=1, ignore_eos=True))
            loop.step()
            loop.step()
        requests = [loop.add(each, SamplingParams(max_tokens=20, seed=2, ignore_eos=True)) for each in prompts]
        counts = list[int]()
        while any(request.slot < 0 for request in requests):
            loop.step()
            counts.append(sum(request.slot >= 0 for request in requests))
        assert all(request.stats.cached_tokens for request in requests)
        while loop.requests:
            loop.step()
        return counts

    assert running(0) == [4]
    assert running(1) == [1, 2, 3, 4]
