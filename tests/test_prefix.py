"""The prefix cache: who begins like somebody before goes on from there, with the same text in as many steps."""

import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mimo import load
from real_config import REAL
from test_decode_loop import CPU, Models, check_empty, check_memory, nothing_noted
from test_runtime import Ahead
from test_stops import Letters
from tiny import Sums
from torch import Tensor

from mtp_engine import Engine, EngineConfig, SamplingParams, TreeShape
from mtp_engine.assemble import decode_loop
from mtp_engine.assemble.backend import _RULES
from mtp_engine.cache import Entry, HybridKV, Pages, PrefixCache
from mtp_engine.cache.prefix import as_tokens
from mtp_engine.config import Structure
from mtp_engine.drafters import MTPDrafter, NgramDrafter, RootDrafter, TorchDraftOps
from mtp_engine.errors import EngineError
from mtp_engine.models import loader
from mtp_engine.models.make_tiny import make_tiny
from mtp_engine.protocols import Drafter, Verifier
from mtp_engine.runtime.loop import DecodeLoop
from mtp_engine.runtime.request import PromptChunk, Request
from mtp_engine.verifiers import MatchVerifier

SLOTS, PAGE = 3, 4


# ---- pages --------------------------------------------------------------------------------------------------------


page_operations = st.lists(
    st.one_of(
        st.tuples(st.just("reserve"), st.integers(0, SLOTS - 1), st.integers(0, 40), st.integers(0, 60)),
        st.tuples(st.just("release"), st.integers(0, SLOTS - 1)),
        st.tuples(st.just("hold"), st.integers(0, SLOTS - 1), st.integers(0, 5)),
        st.tuples(st.just("unhold"), st.integers(0, 5)),
        st.tuples(st.just("share"), st.integers(0, SLOTS - 1), st.integers(0, 5)),
    ),
    max_size=40,
)


@settings(max_examples=150, deadline=None)
@given(operations=page_operations)
def test_pages_are_counted_whatever_happens(operations: list[tuple[Any, ...]]) -> None:
    """Slots take, share and give back, others hold; who needs pages gets those that others have in advance, and what
    `short` gives up; nobody loses a page that it needs."""
    pages, held = Pages(slots=SLOTS, tokens=10 * PAGE, page_size=PAGE, device=CPU), list[list[int]]()
    needed = [0] * SLOTS

    def give_up(missing: int) -> None:
        while held and missing > 0:
            before = pages.free
            pages.unhold(held.pop(0))
            missing -= pages.free - before

    pages.short = give_up
    for name, *given_ in operations:
        if name == "reserve":
            slot, tokens, wish = given_
            before = [list(table[: needed[at]]) for at, table in enumerate(pages.table)]
            if pages.reserve(slot, tokens, wish):
                needed[slot] = -(-tokens // PAGE)
                before[slot] = before[slot][: needed[slot]]
            else:
                others = {page for at, table in enumerate(pages.table) if at != slot for page in table}
                assert not held
                assert len(others | set(pages.table[slot])) + -(-tokens // PAGE) - len(pages.table[slot]) > 10
            assert all(table[: len(own)] == own for table, own in zip(pages.table, before, strict=True))
        elif name == "release":
            pages.release(given_[0])
            needed[given_[0]] = 0
        elif name == "hold":
            held.append(pages.table[given_[0]][: min(given_[1], needed[given_[0]])])
            pages.hold(held[-1])
        elif held and name == "unhold":
            pages.unhold(held.pop(given_[0] % len(held)))
        elif held and name == "share" and not pages.table[given_[0]]:
            shared = held[given_[1] % len(held)]
            pages.share(given_[0], shared)
            needed[given_[0]] = len(shared)
        pages.check([page for each in held for page in each])
    for slot in range(SLOTS):
        pages.release(slot)
    for each in held:
        pages.unhold(each)
    assert pages.free == 10


def test_pages_come_in_runs_where_there_are_some() -> None:
    pages = Pages(slots=3, tokens=12 * PAGE, page_size=PAGE, device=CPU)
    pages.reserve(0, 2 * PAGE, wish=5 * PAGE)
    assert pages.table[0] == [0, 1, 2, 3, 4]
    pages.reserve(1, 4 * PAGE)
    assert pages.table[1] == [5, 6, 7, 8]
    pages.reserve(0, 6 * PAGE)  # behind its own there is nothing free
    assert pages.table[0] == [0, 1, 2, 3, 4, 9]
    pages.release(0)
    assert pages.reserve(2, 7 * PAGE)  # no such run
    assert sorted(pages.table[2]) == [0, 1, 2, 3, 4, 9, 10]


# ---- entries ------------------------------------------------------------------------------------------------------


def entry(pages: Pages, tokens: list[int], drafts: bool = True, size: int = 10) -> Entry:
    """As a request that has read `tokens` would leave it, in the last slot."""
    assert pages.reserve(pages.slots - 1, len(tokens))
    full = tuple(pages.table[-1][: len(tokens) // PAGE])
    return Entry(as_tokens(tokens), full, (torch.zeros(size, dtype=torch.uint8),), drafts)


texts = st.lists(st.integers(0, 1), min_size=1, max_size=14)
entry_operations = st.lists(
    st.tuples(st.sampled_from(["add", "add spare", "find", "drop"]), texts, st.booleans()), max_size=30
)


@settings(max_examples=150, deadline=None)
@given(operations=entry_operations, budget=st.sampled_from([30, 100, 10**6]))
def test_the_longest_entry_is_found_and_the_oldest_goes_first(operations: list[Any], budget: int) -> None:
    pages = Pages(slots=2, tokens=30 * PAGE, page_size=PAGE, device=CPU)
    cache = PrefixCache(pages, budget=budget, page_bytes=5)
    known: list[Entry] = []  # least recently used first
    spare: list[Entry] = []  # those of them that go before all others
    for name, text, drafts in operations:
        if name.startswith("add"):
            if any(each.tokens.tolist() == text and each.drafts == drafts for each in known):
                continue
            made = entry(pages, text, drafts)
            cache.add(made, spare=name == "add spare")
            pages.release(1)
            known.append(made)
            spare += [made] if name == "add spare" else []
            while 10 * len(known) + 5 * len({page for each in known for page in each.pages}) > budget:
                known.remove(spare[0] if spare else known[0])
                spare = [each for each in spare if each in known]
        elif name == "drop" and known:
            cache.drop(known.pop(len(text) % len(known)))
            spare = [each for each in spare if each in known]
        else:
            most = len(text) - 1
            fits = [e for e in known if len(e.tokens) <= most and e.tokens.tolist() == text[: len(e.tokens)]]
            fits = [e for e in fits if e.drafts or not drafts]
            hit = cache.find(as_tokens(text), most, drafts=drafts)
            assert hit.length == max((len(e.tokens) for e in fits), default=0)
            if hit.entry:
                known.remove(hit.entry)
                known.append(hit.entry)
                spare = [each for each in spare if each is not hit.entry]
            shared = [common(e.tokens.tolist(), text) for e in known]
            longest = max((n for n in shared if n >= PAGE), default=0)
            assert hit.common == max(longest, hit.length)
        assert list(cache._entries) == known
        assert list(cache._spare) == spare
        cache.check()
    cache.clear()
    assert pages.free == pages.count


def common(first: list[int], second: list[int]) -> int:
    return next(
        (i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), min(len(first), len(second))
    )


def test_a_slot_that_needs_pages_gets_those_of_entries() -> None:
    pages = Pages(slots=2, tokens=6 * PAGE, page_size=PAGE, device=CPU)
    cache = PrefixCache(pages, budget=10**6, page_bytes=1)
    for start in (0, 1, 9):
        made = entry(pages, [start, *range(2, 9)])  # two pages each
        cache.add(made)
        pages.release(1)
    assert pages.free == 0
    assert pages.reserve(0, 3 * PAGE)
    assert len(cache) == 1
    cache.check()


def test_pages_of_dropped_entries_stay_while_others_use_them() -> None:
    pages = Pages(slots=3, tokens=6 * PAGE, page_size=PAGE, device=CPU)
    cache = PrefixCache(pages, budget=10**6, page_bytes=1)
    made = entry(pages, list(range(2 * PAGE)))
    cache.add(made)
    pages.share(0, made.pages)
    pages.release(2)
    cache.drop(made)
    assert pages.free == 4
    pages.release(0)
    assert pages.free == 6


# ---- loops --------------------------------------------------------------------------------------------------------


class Family:
    """A tiny main model with MTP layers."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name = name
        if name == "llama":
            models = Models(folder)
            self.main, self.module = models.main, models.mtp
        else:
            make_tiny(folder / "m", family=name, seed=2)
            self.main = load(folder / "m")
            self.module = loader.load_mtp(folder / "m", self.main, 0, lambda *_: None)

    def __repr__(self) -> str:
        return self.name


FAMILIES = ("llama", "mimo_v2_flash", "mimo")
CONTEXT = 120


@pytest.fixture(autouse=True)
def loud(request: pytest.FixtureRequest) -> Iterator[None]:
    if "caplog" in request.fixturenames:
        yield
        return
    with nothing_noted():
        yield


@pytest.fixture(scope="module")
def families(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Family]:
    return {name: Family(name, tmp_path_factory.mktemp(name)) for name in FAMILIES}


def drafter_of(name: str, family: Family, slots: int) -> Drafter:
    if name == "root":
        return RootDrafter()
    if name == "ngram":
        return NgramDrafter(3, slots=slots, max_context=CONTEXT, device=CPU)
    return MTPDrafter(family.module, TreeShape.parse(name), slots=slots)


def loop_of(
    family: Family, drafter: Drafter, *, slots: int = 3, tokens: int = 1000, in_flight: int = 1,
    chunk: int = 16, verifier: Verifier | None = None, **options: Any,
) -> DecodeLoop:  # fmt: skip
    layers = [layer.attention for layer in family.main.config.layers]
    cache = HybridKV(
        layers, Pages(slots=slots, tokens=tokens, page_size=8, device=CPU), max_nodes=drafter.max_nodes,
        behind=in_flight * (drafter.depth + 1), dtype=torch.float32,
    )  # fmt: skip
    return decode_loop(
        family.main, cache, drafter, verifier or MatchVerifier(), device=CPU, slots=slots, max_context=CONTEXT, eos_token_ids=[],
        prefill_chunk=chunk, runner=lambda step: Ahead(step, in_flight), **options,
    )  # fmt: skip


def prompt_of(start: int, shared: int, own: int) -> list[int]:
    """All of a `start` begin alike, `own` tokens of the end are its own."""
    rng = random.Random(start)
    text = [rng.randrange(1, 60) for _ in range(70)]
    return text[:shared] + [1 + (i * i + own * 7) % 59 for i in range(own)]


asked = st.tuples(st.integers(0, 1), st.integers(1, 50), st.integers(0, 12), st.integers(0, 3), st.integers(2, 24))


@pytest.mark.parametrize("name", FAMILIES)
@settings(max_examples=12, deadline=None)
@given(
    drafter=st.sampled_from(["root", "chain:3", "3x2", "tree:6", "ngram"]),
    tokens=st.sampled_from([200, 330, 2000]),
    in_flight=st.integers(1, 3),
    shares=st.booleans(),
    spacing=st.sampled_from([8, 16, 1000]),
    gigabytes=st.sampled_from([1e-4, 4e-4, 1.0]),
    asks=st.lists(st.tuples(asked, st.integers(0, 3)), min_size=2, max_size=9),
)
def test_hits_say_the_same_in_as_many_steps(
    families: dict[str, Family], name: str, drafter: str, tokens: int, in_flight: int, shares: bool, spacing: int,
    gigabytes: float, asks: list[Any],
) -> None:  # fmt: skip
    """Random prompts with random beginnings, answers cut at random places and asked on from, little memory."""
    family = families[name]
    loop = loop_of(family, drafter_of(drafter, family, 3), tokens=tokens, in_flight=in_flight, share_pages=shares,
                   prefix_bytes=int(gigabytes * 1e9))  # fmt: skip
    loop.memory._spacing = spacing
    requests: list[Request] = []
    for (start, shared, own, kind, most), steps in asks:
        prompt = prompt_of(start, shared, own or 1)
        if requests and kind == 3 and requests[-1].output:  # the last answer so far, and a question behind it
            prompt = [*requests[-1].prompt, *requests[-1].output, 5, 9][: CONTEXT - 30]
        params = SamplingParams(
            max_tokens=most, seed=len(prompt), temperature=0.9 * (kind % 2), speculate=own != 5,
            frequency_penalty=0.5 * (kind == 2), logprobs=1 if kind == 1 else None,
        )  # fmt: skip
        requests.append(loop.add(prompt, params))
        for _ in range(steps):
            loop.step()
        check_memory(loop)
    while loop.requests:
        loop.step()
        check_memory(loop)
    check_empty(loop)
    plain, drafting = (loop_of(family, each, slots=1) for each in (RootDrafter(), drafter_of(drafter, family, 1)))
    for request in requests:
        for alone in (plain, drafting):
            expected = alone.add(request.prompt, replace(request.params, seed=request.seed))
            while alone.requests:
                alone.step()
            assert request.output == expected.output
            assert [each.token for each in request.logprobs] == [each.token for each in expected.logprobs]
        assert request.stats.steps == expected.stats.steps


@pytest.mark.parametrize("rule", [name for name in _RULES if name != "match"])
def test_other_rules_say_the_same_after_hits_and_preemptions(families: dict[str, Family], rule: str) -> None:
    """Their texts depend on what was drafted, which a hit does not change."""
    family, found = families["llama"], []
    shape = "chain:3" if rule in ("rejection", "block", "typical") else "3x2"
    ops = TorchDraftOps("best" if rule == "typical" else "drawn")
    for tokens, prefix in ((2000, 0), (2000, 10**9), (200, 10**9)):
        drafter = MTPDrafter(family.module, TreeShape.parse(shape), slots=3, ops=ops)
        loop = loop_of(family, drafter, verifier=_RULES[rule](), tokens=tokens, prefix_bytes=prefix)
        for _ in range(2):
            requests = [
                loop.add(prompt_of(i, 20, 3), SamplingParams(max_tokens=60, seed=i, temperature=0.9)) for i in range(3)
            ]
            while loop.requests:
                loop.step()
            found.append([(request.output, request.stats.steps) for request in requests])
        if tokens == 2000:
            assert bool(sum(request.stats.cached_tokens for request in requests)) == bool(prefix)
        assert bool(sum(request.stats.preemptions for request in requests)) == (tokens == 200)
    assert all(each == found[0] for each in found)


class Reading:
    """Notes what a loop reads."""

    def __init__(self, loop: DecodeLoop) -> None:
        self.tokens, self._read = 0, loop.runner.read
        loop.runner.read = self.read  # type: ignore[method-assign]

    def read(self, chunks: Sequence[PromptChunk]) -> Any:
        self.tokens += sum(chunk.stop - chunk.start for chunk in chunks)
        return self._read(chunks)


def run(loop: DecodeLoop, prompt: list[int], **params: Any) -> Request:
    request = loop.add(prompt, SamplingParams(**{"max_tokens": 8, "seed": 3, **params}))
    while loop.requests:
        loop.step()
    return request


@pytest.mark.parametrize("in_flight", [1, 3])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_chat_reads_each_token_once(families: dict[str, Family], name: str, in_flight: int) -> None:
    """Ten turns; each answer is taken up in mid-step, with steps in flight behind it."""
    family = families[name]
    loop = loop_of(family, drafter_of("3x2", family, 3), in_flight=in_flight, prefix_bytes=10**9)
    reading, text = Reading(loop), prompt_of(0, 9, 4)
    for turn in range(10):
        request = run(loop, text, max_tokens=5, temperature=0.8, seed=turn)
        alone = run(
            loop_of(family, drafter_of("3x2", family, 1), slots=1), text, max_tokens=5, temperature=0.8, seed=turn
        )
        assert (request.output, request.stats.steps) == (alone.output, alone.stats.steps)
        assert request.stats.cached_tokens == (len(text) - 4 if turn else 0)
        text = [*text, *request.output, 7, 8, 9]
    assert reading.tokens == 12 + 9 * 3  # the last token of an answer, and the new ones but the last
    assert loop.memory.prefix is not None
    assert loop.memory.prefix.hit_tokens == loop.memory.prefix.asked_tokens - reading.tokens


def test_answers_to_one_prompt_read_it_once(families: dict[str, Family]) -> None:
    loop = loop_of(families["llama"], drafter_of("3x2", families["llama"], 3), prefix_bytes=10**9)
    reading, prompt = Reading(loop), prompt_of(0, 40, 1)
    run(loop, prompt, n=5, temperature=1.0)
    assert reading.tokens == len(prompt) - 1


def test_others_leave_a_text_where_two_have_left_it_before(families: dict[str, Family]) -> None:
    """The second to leave a text makes an entry there, the third reads only its own."""
    family = families["mimo_v2_flash"]
    loop = loop_of(family, RootDrafter(), prefix_bytes=10**9)
    loop.memory._spacing = 1000  # no entries in between
    reading, junction = Reading(loop), 45
    for number, expected in enumerate([45 + 9, 45 + 10, 11]):
        reading.tokens = 0
        request = run(loop, prompt_of(0, junction, 10 + number))
        assert reading.tokens == expected
        assert request.stats.cached_tokens == (junction if number == 2 else 0)


def test_a_prompt_is_kept_at_places_in_between(families: dict[str, Family]) -> None:
    """Who leaves it in its middle for the first time need not begin at its beginning."""
    loop = loop_of(families["llama"], drafter_of("3x2", families["llama"], 3), prefix_bytes=10**9)
    loop.memory._spacing = 16
    run(loop, prompt_of(0, 60, 1))
    assert loop.memory.prefix is not None
    assert sorted(len(entry.tokens) for entry in loop.memory.prefix._spare) == [
        16,
        32,
        48,
    ]  # nobody has needed them yet
    reading = Reading(loop)
    other = run(loop, prompt_of(0, 50, 3))
    assert other.stats.cached_tokens == 48
    assert reading.tokens == 4


@pytest.mark.parametrize("drafts", [True, False])
def test_who_drafts_needs_what_was_drafted_from(families: dict[str, Family], drafts: bool) -> None:
    """A request without drafts leaves nothing that a drafter could go on from; the other way round it does."""
    loop = loop_of(families["llama"], drafter_of("3x2", families["llama"], 3), prefix_bytes=10**9)
    prompt = prompt_of(0, 40, 2)
    run(loop, prompt, speculate=drafts)
    again = run(loop, prompt, speculate=not drafts)
    assert again.stats.cached_tokens == (41 if drafts else 0)


def test_who_is_preempted_does_not_read_again(families: dict[str, Family]) -> None:
    """Its state is kept apart from the pages, which others need."""
    family = families["llama"]
    outputs = []
    for prefix in (0, 10**9):
        loop = loop_of(family, drafter_of("3x2", family, 3), tokens=200, prefix_bytes=prefix)
        reading = Reading(loop)
        requests = [loop.add(prompt_of(i, 20, 3), SamplingParams(max_tokens=60, seed=i)) for i in range(3)]
        while loop.requests:
            loop.step()
        assert sum(request.stats.preemptions for request in requests) > 0
        assert (reading.tokens == 3 * 22) == bool(prefix)
        outputs.append([(request.output, request.stats.steps) for request in requests])
    assert outputs[0] == outputs[1]


def test_a_starved_loop_says_what_a_fed_one_does(families: dict[str, Family]) -> None:
    """Sixteen requests, room for about two, penalties, structures, stop strings and tokens and log-probabilities among them."""
    family, found = families["mimo_v2_flash"], []
    for tokens in (4000, 200):
        loop = loop_of(
            family,
            drafter_of("3x2", family, 8),
            slots=8,
            tokens=tokens,
            in_flight=2,
            prefix_bytes=10**9,
            text=Letters,
            grammars=lambda _: Sums(family.main.config.vocab_size),
        )
        requests = [
            loop.add(
                prompt_of(i % 3, 20, 1 + i % 5),
                SamplingParams(
                    max_tokens=70, seed=i, temperature=0.4 * (i % 3), frequency_penalty=0.6 * (i % 4 == 1),
                    logprobs=2 if i % 4 == 2 else None, stop_token_ids=(200, 201), priority=i % 2,
                    structure=Structure(regex="sums") if i % 4 == 3 else None, stop=("abab",) if i % 4 == 0 else (),
                ),
            )
            for i in range(16)
        ]  # fmt: skip
        while loop.requests:
            loop.step()
        assert (sum(r.stats.preemptions for r in requests) > 0) == (tokens == 200)
        found.append([(r.output, r.finish_reason, [each.token for each in r.logprobs]) for r in requests])
    assert found[0] == found[1]


def test_nothing_leaks_in_two_thousand_requests(families: dict[str, Family]) -> None:
    family = families["llama"]
    loop = loop_of(family, RootDrafter(), slots=8, tokens=900, prefix_bytes=60_000)
    rng = random.Random(1)
    for number in range(2_000):
        prompt = prompt_of(rng.randrange(4), rng.randrange(1, 12), rng.randrange(1, 4))
        request = loop.add(prompt, SamplingParams(max_tokens=rng.randrange(1, 3), seed=number))
        if number % 7 == 0:
            loop.remove(request)
        while len(loop.scheduler.waiting) > 20:
            loop.step()
        if number % 100 == 0:
            check_memory(loop)
    while loop.requests:
        loop.step()
    assert loop.memory.prefix is not None
    assert loop.memory.prefix.size <= 60_000
    check_empty(loop)


# ---- sizes, files and failures ------------------------------------------------------------------------------------


def test_bytes_of_an_entry_of_the_real_model(tmp_path: Path) -> None:
    """39 windowed layers of 128 keys and 3 MTP layers, 8 heads of 192 + 128, in bf16; 9 full layers of 4 heads."""
    (tmp_path / "config.json").write_text(json.dumps(REAL))
    config = loader.read_config(tmp_path)
    pages = Pages(slots=1, tokens=64, page_size=64, device=torch.device("meta"))
    layers = [layer.attention for layer in config.layers]
    cache = HybridKV(layers, pages, max_nodes=4, dtype=torch.bfloat16)
    window = next(layer for layer in layers if layer.window)
    assert cache.entry_bytes(0) == 39 * 128 * 8 * (192 + 128) * 2
    assert cache.entry_bytes(0) / 1e6 == pytest.approx(25.6, abs=0.05)
    assert cache.token_bytes == 23_040
    mtp = HybridKV([window] * 3, pages, max_nodes=16, dtype=torch.bfloat16)
    assert mtp.entry_bytes(0) / 1e6 == pytest.approx(2.0, abs=0.05)
    assert mtp.entry_bytes(0, more=5) - mtp.entry_bytes(0) == 3 * 5 * 8 * (192 + 128) * 2


def test_an_entry_weighs_what_was_said(families: dict[str, Family]) -> None:
    for family in families.values():
        loop = loop_of(
            family, drafter_of("chain:1" if family.name == "mimo" else "chain:3", family, 3), prefix_bytes=10**9
        )
        run(loop, prompt_of(0, 60, 1))
        assert loop.memory.prefix is not None
        for made in loop.memory.prefix._entries:
            tail = len(made.tokens) - 8 * len(made.pages)
            state = made.rows[-1]
            assert made.copied - state.numel() * 4 <= loop.memory._copied_bytes(tail)
            assert len(made.pages) == (len(made.tokens) - loop.work.drafter.reread) // 8


def test_a_budget_for_less_than_an_entry_is_refused(families: dict[str, Family]) -> None:
    with pytest.raises(EngineError, match=r"prefix_cache_gb is 1e-08 and one entry takes .*: raise it, or set"):
        loop_of(families["llama"], RootDrafter(), prefix_bytes=10)


def test_a_save_or_load_that_fails_costs_nobody_anything(
    families: dict[str, Family], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    family, prompt = families["mimo_v2_flash"], prompt_of(0, 40, 2)
    alone = run(loop_of(family, RootDrafter()), prompt)
    loop = loop_of(family, drafter_of("3x2", family, 3), prefix_bytes=10**9)

    def full(*_: object) -> list[Tensor]:
        raise torch.OutOfMemoryError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(HybridKV, "save", full)
        assert run(loop, prompt).output == alone.output
    assert "could not be kept (out of memory); nothing else is affected" in caplog.text
    assert loop.memory.prefix is not None
    assert len(loop.memory.prefix) == 0
    run(loop, prompt)
    assert len(loop.memory.prefix) > 0
    with monkeypatch.context() as patch:
        patch.setattr(HybridKV, "load", full)
        again = run(loop, prompt)
    assert (again.output, again.stats.cached_tokens) == (alone.output, 0)
    assert "could not be used (out of memory); it is read again" in caplog.text
    check_empty(loop)


NANO = EngineConfig(max_context=512, threads=1, dequantize=True, tree=TreeShape.parse("chain:3"))


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    path = tmp_path_factory.mktemp("saved") / "system.safetensors"
    with Engine.load("mimo-nano", NANO) as engine:
        assert engine.save_prefix(path, SYSTEM) == len(engine.encode(SYSTEM)) - 1
        return path, engine.generate([SYSTEM + " Tom"], ANSWER)[0]


SYSTEM = (
    "Once upon a time there was a small house in the woods. In it lived a bear, who liked honey and long walks." * 6
)
ANSWER = SamplingParams(max_tokens=30, temperature=0.8, seed=4)


def test_a_prefix_survives_a_restart(saved: tuple[Path, Any]) -> None:
    path, before = saved
    with Engine.load("mimo-nano", NANO) as engine:
        tokens = engine.load_prefix(path)
        assert engine.load_prefix(path) == tokens
        answer = engine.generate([SYSTEM + " Tom"], ANSWER)[0]
        assert answer.token_ids == before.token_ids
        assert answer.stats.steps == before.stats.steps
        assert answer.stats.cached_tokens == tokens > 60
        assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize(
    "fault", ["missing", "cut", "flipped", "another", "text", "nowhere", "off", "small", "one token"]
)
def test_files_that_are_of_no_use(saved: tuple[Path, Any], tmp_path: Path, fault: str) -> None:
    path, data = tmp_path / "system.safetensors", bytearray(saved[0].read_bytes())
    config = {
        "another": replace(NANO, tree=TreeShape.parse("chain:2")), "off": replace(NANO, prefix_cache=False),
        "small": replace(NANO, prefix_cache_gb=0.0013),
    }.get(fault, NANO)  # fmt: skip
    message = {
        "missing": "cannot be read", "cut": "is damaged", "flipped": "is damaged", "text": "is damaged",
        "another": "another model, version, device or drafter", "nowhere": "cannot be written", "off": "prefix_cache=True",
        "small": "raise prefix_cache_gb", "one token": "more than one token",
    }[fault]  # fmt: skip
    if fault == "cut":
        del data[len(data) // 2 :]
    elif fault == "flipped":
        data[-1000] ^= 1
    elif fault == "text":
        data = bytearray(b"hello")
    if fault != "missing":
        path.write_bytes(data)
    with Engine.load("mimo-nano", config) as engine:
        act = {
            "nowhere": lambda: engine.save_prefix(tmp_path / "no" / "folder", SYSTEM),
            "one token": lambda: engine.save_prefix(path, [5]),
        }.get(fault, lambda: engine.load_prefix(path))
        with pytest.raises(EngineError, match=message):
            act()
        cache = engine.loop.memory.prefix
        assert cache is None or len(cache) == 0 or fault in ("nowhere", "one token")
        if fault != "another":
            assert engine.generate([SYSTEM + " Tom"], ANSWER)[0].token_ids == saved[1].token_ids
