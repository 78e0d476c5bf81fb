"""Passes over prompts as they are recorded: over fixed tables, padded, for any requests; and the kernels they need."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_chain_attention import chain, straight
from test_prefix import FAMILIES, Family, drafter_of, prompt_of
from test_prompts_together import alone, finish
from test_tree_attention import TINY, make

from mtp_engine.assemble import decode_loop
from mtp_engine.attention.rows import StepRows
from mtp_engine.cache import HybridKV, Pages
from mtp_engine.config import SamplingParams
from mtp_engine.drafters import RootDrafter
from mtp_engine.kernels.chain_attention import Packed, chain_attention, chain_plan
from mtp_engine.kernels.kv import store_rows
from mtp_engine.protocols import Drafter
from mtp_engine.runtime.cuda_graph import GraphRunner
from mtp_engine.runtime.loop import DecodeLoop
from mtp_engine.runtime.recorded_prompts import rows_bucket
from mtp_engine.runtime.recorded_steps import SCRATCH_TOKENS
from mtp_engine.verifiers import MatchVerifier

CPU, DEVICE = torch.device("cpu"), torch.device("cuda" if torch.cuda.is_available() else "cpu")
CONTEXT = 160


@pytest.fixture(scope="module")
def families(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Family]:
    return {name: Family(name, tmp_path_factory.mktemp(name)) for name in FAMILIES}


def recorded(family: Family, drafter: Drafter, slots: int, chunk: int = 48, in_flight: int = 2) -> DecodeLoop:
    layers = [layer.attention for layer in family.main.config.layers]
    pages = Pages(slots=slots + 1, tokens=1400, page_size=8, device=CPU)
    cache = HybridKV(
        layers, pages, max_nodes=drafter.max_nodes, behind=(in_flight + 1) * (drafter.depth + 1), dtype=torch.float32
    )
    assert pages.reserve(slots, SCRATCH_TOKENS)
    runner: Any = partial(GraphRunner, in_flight=in_flight, scratch=slots, device=CPU, chunk=chunk)
    return decode_loop(
        family.main, cache, drafter, MatchVerifier(), device=CPU, slots=slots, max_context=CONTEXT, eos_token_ids=[],
        prefill_chunk=chunk, runner=runner, prefix_bytes=10**7, share_pages=True,
    )  # fmt: skip


class Sizes:
    """Notes the rows that a loop's passes have, of the main model and of the drafter."""

    def __init__(self, loop: DecodeLoop) -> None:
        runner: Any = loop.runner
        self.main, self.drafter = list[int](), list[int]()
        run = runner.prompts._run
        runner.prompts._run = lambda half, rows: (
            (self.main if half == runner.prompts._main else self.drafter).append(rows),
            run(half, rows),
        )


@pytest.mark.parametrize("name", FAMILIES)
@settings(max_examples=6, deadline=None)
@given(
    drafter=st.sampled_from(["root", "chain:3", "3x2", "ngram"]),
    slots=st.integers(2, 5),
    chunk=st.sampled_from([16, 48]),
    asks=st.lists(
        st.tuples(st.integers(0, 3), st.integers(0, 45), st.integers(1, 9), st.integers(0, 2)), min_size=3, max_size=6
    ),
)
def test_texts_are_those_of_each_prompt_alone(
    families: dict[str, Family], name: str, drafter: str, slots: int, chunk: int, asks: list[tuple[int, int, int, int]]
) -> None:
    """Padded passes over any chunks, some behind what is cached, some of requests that want no drafts; and again as hits."""
    family = families[name]
    prompts = [prompt_of(start, shared, own) for start, shared, own, _ in asks]
    params = [
        SamplingParams(max_tokens=8, seed=i, temperature=0.8 * (kind % 2), speculate=kind != 2)
        for i, (*_, kind) in enumerate(asks)
    ]
    loop = recorded(family, drafter_of(drafter, family, slots + 1), slots, chunk)
    sizes = Sizes(loop)
    requests = [*finish(loop, prompts, params), *finish(loop, prompts, params)]
    expected = [alone(family, request) for request in requests[: len(prompts)]]
    assert [request.output for request in requests] == [*expected, *expected]
    assert sizes.main or all(len(prompt) == 1 for prompt in prompts)
    drafts = any(p.speculate and len(prompt) > 1 for p, prompt in zip(params, prompts, strict=True))
    assert bool(sizes.drafter) == (drafts and drafter in ("chain:3", "3x2"))


@pytest.mark.parametrize("name", FAMILIES)
def test_drafts_are_those_of_prompts_that_are_not_padded(families: dict[str, Family], name: str) -> None:
    """Equal texts would not tell: drafts only decide how many steps they take."""
    family, params = families[name], SamplingParams(max_tokens=24, seed=3, temperature=0.6)
    prompts = [prompt_of(i, 30 - 9 * i, 1 + i) for i in range(4)]
    found = []
    for passes in (True, False):
        loop = recorded(family, drafter_of("chain:3", family, 5), 4)
        if not passes:
            runner: Any = loop.runner
            runner.prompts.read = loop.work.read
        found.append([(r.output, r.stats.steps) for r in finish(loop, prompts, [params] * 4)])
    assert found[0] == found[1]


def test_all_sizes_are_recorded_at_load(families: dict[str, Family]) -> None:
    """The drafter's, too; afterwards no size is new."""
    family, said = families["llama"], list[tuple[str, int, int | None]]()
    loop = recorded(family, drafter_of("chain:3", family, 4), 3, chunk=130)
    runner: Any = loop.runner
    sizes = Sizes(loop)
    loop.runner.capture(3, CONTEXT, lambda *each: said.append(each))
    assert sizes.main == [192, 128, 64, 32, 16]
    assert sizes.drafter == [*sizes.main, *((rows, 512) for rows in runner.prompts._reader.loads)]
    assert said[0] == ("capturing passes over prompts", 0, 12)
    before = set(runner.prompts._graphs)
    finish(loop, [prompt_of(i, 60, i) for i in range(3)], [SamplingParams(max_tokens=2)] * 3)
    assert set(runner.prompts._graphs) == before
    assert [rows_bucket(rows) for rows in (1, 17, 2048, 2049, 5000)] == [16, 32, 2048, 2560, 5120]


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("stream is capturing"),
        torch.OutOfMemoryError("out of memory"),
        torch.AcceleratorError("CUDA error: out of memory"),
    ],
)
def test_a_size_is_recorded_when_it_comes_again(
    families: dict[str, Family], error: Exception, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """And where that fails it is said once, and the prompt is read all the same."""
    family = families["llama"]
    loop = recorded(family, RootDrafter(), 1)
    runner: Any = loop.runner

    class Lane:
        pool, stream = None, type("Stream", (), {"wait_stream": lambda *_: None})()

    def refused(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(runner.prompts, "_lane", Lane)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", object)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: Lane.stream)
    monkeypatch.setattr(torch.cuda, "graph", refused)
    for number in range(3):
        [request] = finish(loop, [prompt_of(number, 20, 1)], [SamplingParams(max_tokens=3)])
        assert request.output == alone(family, request)
        assert caplog.text.count(f"32 rows are read without CUDA graphs, which is slower: {error}") == (number > 0)
    assert (runner.prompts.slow, runner.prompts.replayed) == (3, 0)


# ---- kernels ------------------------------------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(
    requests=st.lists(st.tuples(st.integers(0, 300), st.integers(0, 200)), min_size=1, max_size=9),
    taken=st.sampled_from([5, 16, 32, 42, 64]),
    more=st.integers(0, 70),
)
def test_blocks_hold_every_row_once(requests: list[tuple[int, int]], taken: int, more: int) -> None:
    """Of one request and one tile of positions each, in their order."""
    lengths, counts = (torch.tensor(column, device=DEVICE) for column in zip(*requests, strict=True))
    rows = int(counts.sum()) + more
    if not rows:
        return
    packed = Packed.of(lengths, counts, rows)
    blocks = packed.blocks(64, taken).tolist()
    assert len(blocks) <= rows
    expected = list[list[int]]()
    for request, (length, count) in enumerate(requests):
        low = length
        while low < length + count:
            expected.append([request, low])
            low = min(low + taken, (low // 64 + 1) * 64, length + count)
    assert [block for block in blocks if block[0] >= 0] == expected
    assert blocks[: len(expected)] == expected


@pytest.mark.parametrize("window", [0, 20])
def test_rows_of_nobody_are_zero_and_change_nothing(window: int) -> None:
    call = make(replace(TINY, window=window), straight(6, 2), [61, 190])
    counts, y = [5, 6], chain(call)
    q = torch.cat([call["q"][b, :count] for b, count in enumerate(counts)])
    q = torch.cat([q, torch.full_like(q[:4], float("nan"))])[None]
    names = ("k_cache", "v_cache", "pages", "page_size", "wrap", "window", "scale", "sink")
    given = {name: call[name] for name in names}
    lengths, table = (torch.cat([x, x.new_tensor([last])]) for x, last in ((call["lengths"], 191), (
        torch.tensor(counts, device=q.device), 0)))  # fmt: skip
    pages = torch.cat([call["pages"], call["pages"][:1]])
    heads, kv_heads = q.shape[2], call["k_cache"].shape[1]
    plan = replace(chain_plan(q.dtype, 15, heads, kv_heads, q.shape[3]), splits=call["plan"].splits)
    packed = Packed.of(lengths, table, 15, padded=True)
    found = chain_attention(q, lengths=lengths, first=None, packed=packed, plan=plan, **given | {"pages": pages})[0]
    assert torch.equal(found[:11], torch.cat([y[b, :count] for b, count in enumerate(counts)]))
    assert not found[11:].any()


def test_rows_are_stored_where_they_belong() -> None:
    k_new, v_new = (torch.randn(6, 2, dim, device=DEVICE) for dim in (8, 24))
    rows = torch.tensor([3, -1, 0, 9, -1, 5], device=DEVICE)
    stored = [torch.zeros(3, 10, 2, dim, device=DEVICE) for dim in (8, 24)]
    expected = [x.clone() for x in stored]
    for new, old in zip((k_new, v_new), expected, strict=True):
        old[1, rows[rows >= 0]] = new[rows >= 0]
    store_rows(k_new, v_new, stored[0][1], stored[1][1], rows)
    assert all(torch.equal(*each) for each in zip(stored, expected, strict=True))


@pytest.mark.parametrize("counts", [(3, 0, 70, 1, 0), (1,), (64, 64, 0)])
def test_packed_rows_and_those_behind_them(counts: Sequence[int]) -> None:
    starts = [10 * i for i in range(len(counts))]
    table = torch.tensor([list(range(len(counts))), starts, counts])
    rows = StepRows.prompts(table, sum(counts), 500)
    assert rows.owners is not None
    expected = [(b, starts[b] + i) for b, count in enumerate(counts) for i in range(count)]
    assert list(zip(rows.owners.tolist(), rows.positions[0].tolist(), strict=True)) == expected
    padded = torch.cat([table, torch.tensor([[9], [191], [0]])], 1)
    rows = StepRows.prompts(padded, sum(counts) + 5, 500, padded=True)
    assert rows.owners is not None
    found = list(zip(rows.owners.tolist(), rows.positions[0].tolist(), strict=True))
    assert found == expected + [(len(counts), 191)] * 5
    assert [(int(each.slots), int(each.lengths), each.positions.shape[1]) for each in rows.apart()] == [
        (b, starts[b], count) for b, count in enumerate(counts) if count
    ]
