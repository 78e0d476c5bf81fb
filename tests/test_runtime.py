"""Whatever happens around a request, what it says is what it says alone: drawn arrivals, cancellations, and failures."""

import itertools
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any
from weakref import WeakSet

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_decode_loop import CPU, VOCAB, Models, Scripted, check_empty, check_memory, make_loop
from test_stops import Letters, text_of
from tiny import Sums
from torch import Tensor

from mtp_engine.config import SamplingParams, Structure, TreeShape
from mtp_engine.drafters import MTPDrafter, NgramDrafter, RootDrafter
from mtp_engine.errors import EngineBusy, EngineError
from mtp_engine.protocols import Drafter
from mtp_engine.runtime.request import Landed, Launched, Members, PromptChunk, Request, StepOutput
from mtp_engine.runtime.step import EagerRunner, ModelStep, RunnerFactory, Said

CONTEXT = 76  # less than the longest prompt and answer together
drawn = settings(max_examples=50, deadline=None, suppress_health_check=list(HealthCheck))


# ---- what is asked for --------------------------------------------------------------------------------------------


class FailingMask(Sums):
    """Cannot say what follows some of the texts; plain decoding comes upon one of them sooner or later, drafts sooner."""

    def mask(self, path: tuple[int, ...]) -> Tensor:
        text = [*self.answer, *path]
        if len(text) >= 3 and text[-1] % 5 == 0:
            raise ValueError(f"no mask after {text[-1]}")
        return super().mask(path)


class FailingAdvance(Sums):
    """Does not take some of the tokens it has allowed."""

    def advance(self, tokens: Sequence[int]) -> None:
        for token in tokens:
            if len(self.answer) - self.ahead >= 3 and token % 5 == 0:
                raise ValueError(f"{token} is not taken")
            super().advance([token])


def grammars(structure: Structure) -> Sums:
    return {"sums": Sums, "mask": FailingMask, "advance": FailingAdvance}[structure.regex]()


SUMS, MASK, ADVANCE = (Structure(regex=name) for name in ("sums", "mask", "advance"))
KINDS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampled": {"temperature": 0.9, "top_p": 0.9, "stop_token_ids": (5, 44)},
    "hot": {"temperature": 1.5},
    "penalties": {"frequency_penalty": 0.6, "repetition_penalty": 1.3, "presence_penalty": -0.4, "temperature": 0.8},
    "bad words": {"bad_words": ((3,), (7, 9)), "min_tokens": 5, "stop_token_ids": tuple(range(30)), "temperature": 1.0},
    "logprobs": {"logprobs": 3, "temperature": 0.7},
    "structure": {"structure": SUMS, "temperature": 0.8},
    "no drafts": {"speculate": False, "temperature": 0.9},
    "small tree": {"tree": TreeShape.parse("2x1"), "temperature": 0.9},
    "stop strings": {"stop": ("abab", "bb"), "min_tokens": 3, "temperature": 1.2},
    "two": {"n": 2, "temperature": 1.1},
    "stuck at once": {"allowed_token_ids": (3, 7), "bad_words": ((3,), (7,))},
    "stuck later": {"allowed_token_ids": (3, 7, 9), "bad_words": ((9, 3), (9, 7), (9, 9)), "temperature": 2.0},
    "stuck in a structure": {"structure": SUMS, "allowed_token_ids": (1, 4, 7, 2), "bad_words": ((7, 2),),
                             "temperature": 2.0},
    "mask fails": {"structure": MASK, "temperature": 1.0, "logprobs": 1},
    "advance fails": {"structure": ADVANCE, "temperature": 1.0, "logprobs": 1, "stop": ("aaaa",)},
    "all": {"structure": SUMS, "stop": ("babab",), "logprobs": 0, "frequency_penalty": 0.5, "bad_words": ((8,),),
            "temperature": 1.3, "top_k": 20},
}  # fmt: skip
LENGTHS = (1, 2, 9, 24, 60)  # of prompts, on both sides of pages, windows and chunks
ASKS = list(itertools.product(KINDS, LENGTHS, (6, 22)))


@dataclass(frozen=True)
class Answer:
    output: list[int]
    text: str
    reason: str | None
    logprobs: list[tuple[int, float]]

    @classmethod
    def of(cls, request: Request) -> "Answer":
        logprobs = [(each.token, pytest.approx(each.logprob, abs=1e-3)) for each in request.logprobs]
        return cls(request.output, request.text, request.finish_reason, logprobs)


def prompt_of(length: int) -> list[int]:
    """All begin alike, for two thirds of their lengths."""
    return [1 + (7 * length * (3 * i > 2 * length) + 11 * i * i) % (VOCAB - 1) for i in range(length)]


def seed_of(ask: int) -> int:
    return 100 + 2 * ask


def params_of(ask: int, **changes: Any) -> SamplingParams:
    kind, _, most = ASKS[ask]
    return SamplingParams(**{"max_tokens": most, "seed": seed_of(ask), **KINDS[kind], **changes})


class Solo(Mapping[int, list[int]]):
    """What each seed's request says alone, without drafts. As a mapping: prompt and answer, for Scripted."""

    def __init__(self, models: Models) -> None:
        self.models, self._known, self._steps = models, dict[int, Answer](), dict[tuple[str, int], int]()

    def answer(self, seed: int) -> Answer:
        if seed not in self._known:
            loop = make_loop(self.models.main, RootDrafter(), slots=1, prefill_chunk=100, max_context=CONTEXT,
                             text=Letters, grammars=grammars)  # fmt: skip
            request = loop.add(self.prompt(seed), params_of((seed - 100) // 2, seed=seed, n=1))
            while loop.requests:
                loop.step()
            self._known[seed] = Answer.of(request)
        return self._known[seed]

    def steps(self, drafter: str, seed: int) -> int:
        """With a drafter, and nothing kept."""
        if (drafter, seed) not in self._steps:
            loop = make_loop(self.models.main, make_drafter(Setup(drafter), self), slots=1, prefill_chunk=100,
                             max_context=CONTEXT, text=Letters, grammars=grammars)  # fmt: skip
            request = loop.add(self.prompt(seed), params_of((seed - 100) // 2, seed=seed, n=1))
            while loop.requests:
                loop.step()
            self._steps[drafter, seed] = request.stats.steps
        return self._steps[drafter, seed]

    def prompt(self, seed: int) -> list[int]:
        return prompt_of(ASKS[(seed - 100) // 2][1])

    def __getitem__(self, seed: int) -> list[int]:
        return self.prompt(seed) + self.answer(seed).output

    def __iter__(self) -> Iterator[int]:
        return iter(self._known)

    def __len__(self) -> int:
        return len(self._known)

    def __repr__(self) -> str:
        return "solo"


@pytest.fixture(scope="module")
def solo(tmp_path_factory: pytest.TempPathFactory) -> Solo:
    return Solo(Models(tmp_path_factory.mktemp("runtime")))


def test_the_requests_differ_and_end_in_every_way(solo: Solo) -> None:
    """What the comparisons below are worth."""
    kinds: dict[str, set[str | None]] = {kind: set() for kind in KINDS}
    for ask, (kind, _, most) in enumerate(ASKS):
        answer = solo.answer(seed_of(ask))
        kinds[kind].add(answer.reason)
        assert len(answer.output) <= most
        assert len(answer.logprobs) == (len(answer.output) if "logprobs" in KINDS[kind] else 0)
    assert all("error" in kinds[kind] for kind in KINDS if "stuck" in kind or "fails" in kind)
    assert all("error" not in kinds[kind] for kind in KINDS if not ("stuck" in kind or "fails" in kind))
    assert all("stop" in kinds[kind] for kind in ("sampled", "bad words", "stop strings"))
    errors = [solo.answer(seed_of(ask)) for ask, (kind, *_) in enumerate(ASKS) if kind in ("mask fails", "stuck later")]
    assert len({len(answer.output) for answer in errors if answer.reason == "error"}) > 3  # sooner and later


# ---- a loop, and what happens to it -------------------------------------------------------------------------------


class Ahead:
    """A Runner with `in_flight` steps in flight, which are done when they are launched. Dropped ones are forgotten."""

    def __init__(self, step: ModelStep, in_flight: int) -> None:
        self.in_flight, self._eager, self._flying = in_flight, EagerRunner(step), WeakSet[Any]()

    def capture(self, *_: Any) -> None: ...
    def prepare(self, members: Members, bound: int) -> None: ...
    def prepare_reading(self, chunks: Sequence[PromptChunk]) -> None: ...
    def settle(self) -> None: ...
    def complete(self) -> None: ...
    def proceed(self) -> None: ...

    def read(self, chunks: Sequence[PromptChunk]) -> Launched:
        return self._eager.read(chunks)

    def launch(self, members: Members, bound: int, said: Said) -> Launched:
        done, flying = self._eager.launch(members, bound, said), self._flying

        class Flight:
            def wait(self) -> Landed:
                flying.discard(self)
                return done.wait()

        flight = Flight()
        flying.add(flight)
        return flight


def runner(in_flight: int) -> RunnerFactory:
    return lambda step: Ahead(step, in_flight)


@dataclass(frozen=True)
class Setup:
    drafter: str
    in_flight: int = 1
    slots: int = 3
    tokens: int = 400
    chunk: int = 16
    max_waiting: int = 100
    prefix: int = 0  # the prefix cache's size, in smallest entries
    shares: bool = False


DRAFTERS = ("root", "chain:3", "3x2", "tree:6", "deep tree:6", "ngram", "right", "wrong", "random")
setups = st.builds(
    Setup,
    drafter=st.sampled_from(DRAFTERS),
    in_flight=st.integers(1, 3),
    slots=st.integers(1, 4),
    tokens=st.sampled_from([130, 200, 900]),
    chunk=st.sampled_from([1, 2, 5, 16]),
    max_waiting=st.sampled_from([2, 100]),
    prefix=st.sampled_from([0, 2, 12, 10**6]),
    shares=st.booleans(),
)


def make_drafter(setup: Setup, solo: Solo) -> Drafter:
    if setup.drafter == "root":
        return RootDrafter()
    if setup.drafter == "ngram":
        return NgramDrafter(4, slots=setup.slots, max_context=CONTEXT, device=CPU)
    if setup.drafter in ("right", "wrong", "random"):
        return Scripted(setup.drafter, solo)
    module = solo.models.deep if setup.drafter.startswith("deep ") else solo.models.mtp
    shape = TreeShape.parse(setup.drafter.removeprefix("deep "))
    return MTPDrafter(module, shape, slots=setup.slots)


@dataclass(eq=False)
class Followed:
    """A request, and what was handed out for it."""

    request: Request
    seed: int
    outputs: list[StepOutput] = field(default_factory=list)  # of step()
    sunk: list[StepOutput] = field(default_factory=list)
    cancelled: bool = False  # or a timeout, or a sink that fails
    may_fail: bool = False  # something failed that was done for it alone


class World:
    """A loop, its clock, and all that was asked of it."""

    def __init__(self, setup: Setup, solo: Solo, grammars: Callable[[Structure], Sums] = grammars) -> None:
        self.setup, self.solo, self.now, self.faulty = setup, solo, 0.0, False
        self.loop = make_loop(
            solo.models.main, make_drafter(setup, solo), slots=setup.slots, tokens=setup.tokens,
            prefill_chunk=setup.chunk, max_context=CONTEXT, max_waiting=setup.max_waiting, text=Letters,
            grammars=grammars, runner=runner(setup.in_flight), clock=lambda: self.now, prefix=setup.prefix,
            share_pages=setup.shares,
        )  # fmt: skip
        self.followed: dict[Request, Followed] = {}

    def add(self, ask: int, priority: int = 0, timeout: float | None = None, sink: str = "notes") -> list[Followed]:
        mine: list[Followed] = []

        def drain(output: StepOutput) -> None:
            entry = self.followed[output.request]
            entry.sunk.append(output)
            if sink == "fails" and len(entry.sunk) == 2:
                entry.cancelled = True
                raise RuntimeError("the sink is full")
            if sink == "removes" and len(entry.sunk) == 2:
                entry.cancelled = True
                self.loop.remove(output.request)
            if sink == "removes others" and len(entry.sunk) == 1:
                for other in self.loop.requests[::2]:
                    self.followed[other].cancelled = True
                    self.loop.remove(other)
            if sink == "asks" and output.finish_reason:
                self.add((ask + 31) % len(ASKS), priority, None, "notes")

        wanted = params_of(ask, priority=priority, timeout=timeout)
        try:
            first = self.loop.add(prompt_of(ASKS[ask][1]), wanted, drain)
        except EngineBusy:
            return []
        for sample, request in enumerate((first, *first.others)):
            mine.append(Followed(request, seed_of(ask) + sample))
            self.followed[request] = mine[-1]
        return mine

    def refused(self, which: int) -> None:
        """Requests that can never run, each in its way."""
        prompt, params = [
            ([1] * CONTEXT, SamplingParams()),
            ([1, VOCAB], SamplingParams()),
            ([], SamplingParams()),
            ([1, -1], SamplingParams(n=2)),
            ([1], SamplingParams(bad_words=((VOCAB,),))),
            ([1], SamplingParams(allowed_token_ids=(2, VOCAB))),
            ([1], SamplingParams(bad_words=("a word",))),
            ([1.5], SamplingParams()),
        ][which % 8]
        before = (list(self.loop.requests), list(self.loop.scheduler._free))
        with pytest.raises(EngineError):
            self.loop.add(prompt, params)  # type: ignore[arg-type]
        assert (list(self.loop.requests), list(self.loop.scheduler._free)) == before

    def step(self) -> None:
        try:
            outputs = self.loop.step()
        except KeyboardInterrupt:
            assert self.faulty
            outputs = []
        for output in outputs:
            self.followed[output.request].outputs.append(output)
        self.check()

    def check(self) -> None:
        """What holds between any two steps."""
        scheduler = self.loop.scheduler
        running, waiting = scheduler.running, scheduler.waiting
        taken = [request.slot for request in (*running, *scheduler._leaving)]
        assert sorted([*taken, *scheduler._free]) == list(range(scheduler._slots))
        assert [(r.params.priority, r.number) for r in waiting] == sorted(
            (r.params.priority, r.number) for r in waiting
        )
        assert len({*running, *waiting}) == len(running) + len(waiting)
        assert all(request.slot == -1 and not request.read for request in waiting)
        assert all(request.finish_reason is None for request in (*running, *waiting))
        alive = {r for r, entry in self.followed.items() if r.finish_reason is None}
        assert alive == {*running, *waiting}
        check_memory(self.loop)
        assert all(bool(pages) == (slot in taken) for slot, pages in enumerate(self.loop.memory.pages.table))
        assert len(self.loop._flying) <= self.loop.runner.in_flight
        for request in self.followed:
            stats = request.stats
            assert len(request.output) == len(request.drafted) <= request.limit
            if self.faulty:
                continue  # an interruption may come before a step is counted, or while it is
            assert stats.tokens == len(request.output)
            assert stats.steps <= stats.nodes
            assert not stats.steps or stats.total_s >= stats.ttft_s >= stats.queued_s

    def drain(self) -> None:
        for _ in range(3000):
            if not self.loop.requests:
                break
            self.step()
        else:
            raise AssertionError(f"stuck: {self.loop.requests}")
        self.step()
        check_empty(self.loop)
        assert not self.loop._flying
        assert not self.loop.scheduler.outputs
        assert not self.loop.scheduler.busy
        for entry in self.followed.values():
            self._check_answer(entry)

    def _check_answer(self, entry: Followed) -> None:
        request, alone = entry.request, self.solo.answer(entry.seed)
        answer = Answer.of(request)
        for outputs in (entry.outputs, *([] if request.sink is None else [entry.sunk])):
            assert [token for output in outputs for token in output.tokens] == request.output
            assert [drafted for output in outputs for drafted in output.drafted] == request.drafted
            assert "".join(output.text for output in outputs) == request.text
            assert [o.finish_reason for o in outputs] == [*[None] * (len(outputs) - 1), request.finish_reason]
        on_its_own = request.failures < 2 and not entry.may_fail
        if on_its_own and not entry.cancelled:
            assert answer == alone
            if not self.faulty and self.setup.drafter != "random":  # whose trees nobody can foresee
                assert request.stats.steps == self.solo.steps(self.setup.drafter, entry.seed)
        elif answer.reason in ("abort", "timeout", "error") and answer != alone:
            assert entry.cancelled or answer.reason == "error"
            assert answer.output == alone.output[: len(answer.output)]
            assert answer.text == text_of(answer.output)
            wanted = request.params.logprobs is not None
            assert answer.logprobs == (alone.logprobs[: len(answer.output)] if wanted else [])
        else:
            assert answer == alone
        assert bool(request.error) == (request.finish_reason == "error")


asks = st.integers(0, len(ASKS) - 1)
sinks = st.sampled_from(["notes"] * 6 + ["fails", "removes", "removes others", "asks"])
arrivals = st.tuples(st.just("add"), asks, st.integers(-1, 1), st.sampled_from([None, None, None, 1.0]), sinks)
plain_arrivals = st.tuples(st.just("add"), asks, st.integers(-1, 1), st.none(), st.just("notes"))
turns = st.tuples(st.just("step"), st.integers(1, 8))
others = st.one_of(
    st.tuples(st.just("remove"), st.integers(0, 99)),
    st.tuples(st.just("cancel"), st.integers(0, 99)),
    st.tuples(st.just("tick"), st.sampled_from([0.5, 1.5])),
    st.tuples(st.just("refused"), st.integers(0, 99)),
)
operations = st.tuples(plain_arrivals, plain_arrivals, turns, arrivals, turns, others, turns)


def perform(world: World, steps: Sequence[tuple[Any, ...]]) -> None:
    for name, *given_ in steps:
        known = list(world.followed.values())
        if name == "add":
            for entry in world.add(*given_):
                entry.cancelled = entry.request.params.timeout is not None
        elif name == "step":
            for _ in range(given_[0]):
                world.step()
        elif name == "tick":
            world.now += given_[0]
        elif name == "refused":
            world.refused(given_[0])
        elif known:
            entry = known[given_[0] % len(known)]
            entry.cancelled = True
            running = entry.request.finish_reason is None
            if name == "remove":
                try:
                    assert world.loop.remove(entry.request) is running
                except KeyboardInterrupt:
                    assert world.faulty
                assert not world.loop.remove(entry.request)
            else:
                world.loop.scheduler.cancel(entry.request)
                world.step()
            assert entry.request.finish_reason is not None
    world.drain()


@drawn
@given(setup=setups, steps=st.lists(operations, min_size=1, max_size=4))
def test_what_happens_around_a_request_does_not_matter(solo: Solo, setup: Setup, steps: list[Any]) -> None:
    perform(World(setup, solo), [each for several in steps for each in several])


def test_those_who_end_together_leave_one_by_one(solo: Solo) -> None:
    """What they leave is kept, a step for each, as long as somebody goes on; and the slots are as free as they seem."""
    loop = make_loop(solo.models.main, RootDrafter(), slots=4, prefill_chunk=100, max_context=CONTEXT, prefix=20,
                     runner=runner(2), max_waiting=0)  # fmt: skip
    requests = [loop.add(prompt_of(9 + n), SamplingParams(max_tokens=24 if n == 3 else 6, seed=n)) for n in range(4)]
    kept, keep, counts = list[Request](), loop.memory.keep, [0]

    def noted(request: Request, *args: Any, **options: Any) -> None:
        kept.extend([request] if request.finish_reason else [])
        keep(request, *args, **options)

    loop.memory.keep = noted  # type: ignore[method-assign]
    while loop.requests:
        loop.step()
        counts.append(len(kept))
        assert loop.scheduler.has_room == (len(loop.scheduler.running) < 4)
    assert max(after - before for before, after in itertools.pairwise(counts)) == 1
    assert kept == requests
    assert sorted(loop.scheduler._free) == [0, 1, 2, 3]


@pytest.mark.parametrize("name", DRAFTERS)
def test_every_kind_beside_every_other(solo: Solo, name: str) -> None:
    """All parameters in one batch, with steps in flight, slots for four, and room for fewer."""
    world = World(Setup(name, in_flight=2, slots=4, tokens=320, chunk=7), solo)
    for index in range(len(KINDS)):
        ask = (index * len(LENGTHS) + index % len(LENGTHS)) * 2 + 1
        assert world.add(ask, priority=index % 3)
        world.step()
    world.drain()


def test_a_sink_that_fails_ends_its_own_request(solo: Solo) -> None:
    world = World(Setup("root", in_flight=2), solo)
    bad, *_ = world.add(1, sink="fails")
    good, *_ = world.add(3)
    world.drain()
    assert (bad.request.finish_reason, bad.request.error) == ("error", "the sink is full")
    assert good.request.finish_reason == "length"


@pytest.mark.parametrize("name", ["right", "random", "3x2", "deep tree:6"])
@pytest.mark.parametrize("kind", ["mask fails", "advance fails"])
def test_a_structure_fails_where_it_fails_without_drafts(solo: Solo, kind: str, name: str) -> None:
    """It is asked about drafts that never become part of the answer, and several tokens come at once."""
    for ask in (ask for ask, each in enumerate(ASKS) if each[0] == kind):
        world = World(Setup(name), solo)
        [entry] = world.add(ask)
        world.drain()
        assert entry.request.error in (
            "",
            *(f"no mask after {n}" for n in range(61)),
            *(f"{n} is not taken" for n in range(61)),
        )


# ---- failures -----------------------------------------------------------------------------------------------------


class Faults:
    """Raises at the given calls of a loop's parts, before the part does its work or after it."""

    def __init__(self, world: World, planned: Sequence[tuple[str, int, bool, type[BaseException]]]) -> None:
        self.world, self.reading, world.faulty = world, None, True
        self.planned = {(name, call): (after, error) for name, call, after, error in planned}
        self.calls: dict[str, int] = {}
        self.raised: list[BaseException] = []
        loop = world.loop
        work = loop.work
        read = loop.runner.read

        def noted(chunks: Sequence[PromptChunk]) -> Launched:
            self.reading = chunks[0].request if len(chunks) == 1 else None  # several are read again, each alone
            try:
                return read(chunks)
            finally:
                self.reading = None

        loop.runner.read = noted  # type: ignore[method-assign]
        work.model = Wrapped(work.model, self, forward="forward", logits="logits")
        work.drafter = Wrapped(work.drafter, self, draft="draft", observe="observe")
        work.verifier = Wrapped(work.verifier, self, verify="verify")
        work.state = Wrapped(work.state, self, advance="advance")
        work.processors = loop.memory.processors = Wrapped(work.processors, self, apply="processors", start="start")
        loop.memory.cache = Wrapped(loop.memory.cache, self, save="save", load="load")
        loop.scheduler.commit = self.around("commit", loop.scheduler.commit)  # type: ignore[method-assign]

    def follow(self, entries: Sequence[Followed]) -> None:
        for entry in entries:
            entry.request.take = self.around("take", entry.request.take, entry)  # type: ignore[method-assign]

    def around(self, name: str, inner: Callable[..., Any], owner: Followed | None = None) -> Callable[..., Any]:
        def call(*given_: Any) -> Any:
            self.calls[name] = number = self.calls.get(name, 0) + 1
            after, error = self.planned.get((name, number), (False, None))
            result = inner(*given_) if after or error is None else None
            if error is None:
                return result
            entering = self.world.loop.scheduler.waiting[0] if name == "start" else None
            alone = self.reading or entering
            whose = self.world.followed[alone] if alone else owner
            if whose and issubclass(error, Exception):
                whose.may_fail = True
            self.raised.append(error(f"planned: {name} {number}"))
            raise self.raised[-1]

        return call


class Wrapped:
    def __init__(self, inner: Any, faults: Faults, **names: str) -> None:
        self._inner = inner
        for method, name in names.items():
            setattr(self, method, faults.around(name, getattr(inner, method)))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)


POINTS = (
    "save",
    "load",
    "start",
    "forward",
    "logits",
    "draft",
    "observe",
    "verify",
    "advance",
    "processors",
    "commit",
    "take",
)
planned_faults = st.lists(
    st.tuples(
        st.sampled_from(POINTS), st.integers(1, 30), st.booleans(),
        st.sampled_from([RuntimeError, KeyboardInterrupt]),
    ),
    min_size=1, max_size=5,
)  # fmt: skip


@drawn
@given(
    setup=setups,
    planned=planned_faults,
    steps=st.lists(operations, min_size=1, max_size=3),
)
def test_failures_and_interruptions_do_not_matter(
    solo: Solo, setup: Setup, planned: list[Any], steps: list[Any]
) -> None:
    """A step that breaks off anywhere; the requests go on as if it had not, unless it happens to them twice in a row."""
    world = World(setup, solo)
    faults = Faults(world, planned)
    add = world.add

    def watched(*given_: Any) -> list[Followed]:
        entries = add(*given_)
        faults.follow(entries)
        return entries

    world.add = watched  # type: ignore[method-assign]
    perform(world, [each for several in steps for each in several])


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("call", [1, 3])
@pytest.mark.parametrize("point", POINTS)
def test_a_part_that_raises(solo: Solo, point: str, call: int, error: type[BaseException], after: bool) -> None:
    """Every part once, early and at the end of an answer; those whose step it was not always go on."""
    world = World(Setup("right", in_flight=2, prefix=100), solo)
    faults = Faults(world, [(point, call, after, error)])
    for kind, length, most in (("logprobs", 1, 6), ("sampled", 9, 22), ("all", 2, 22), *[("hot", 9, 6)] * 4):
        faults.follow(world.add(ASKS.index((kind, length, most))))
    world.drain()
    assert len(faults.raised) == 1
    assert sum(entry.may_fail for entry in world.followed.values()) <= 1


HANDING_OVER = ("emit", "_emit", "take_outputs")  # there an interruption may lose what is in the hands


class Interruption:
    """Ctrl-C before the first line of the runtime from the `at`th one on that does not hand anything over."""

    def __init__(self, world: World, at: int) -> None:
        self.at, self.lines, self.where, self._step = at, 0, "", world.loop.step
        world.faulty, world.loop.step = True, self.step  # type: ignore[method-assign]

    def step(self) -> list[StepOutput]:
        before = sys.gettrace()
        sys.settrace(self._enter)
        try:
            return self._step()
        finally:
            sys.settrace(before)

    def _enter(self, frame: FrameType, event: str, argument: Any) -> Any:
        inside = Path(frame.f_code.co_filename).parent.name == "runtime"
        return self._line if inside and frame.f_code.co_name not in HANDING_OVER else None

    def _line(self, frame: FrameType, event: str, argument: Any) -> Any:
        self.lines += event == "line"
        if event == "line" and self.lines >= self.at and not self.where:
            self.where = f"{frame.f_code.co_name}:{frame.f_lineno}"
            raise KeyboardInterrupt
        return self._line


@pytest.mark.parametrize("setup", [Setup("3x2", 2, slots=2, chunk=4), Setup("root", 3, chunk=4)], ids=["3x2", "root"])
def test_an_interruption_anywhere(solo: Solo, setup: Setup) -> None:
    """Between any two lines of the runtime."""

    def run(at: int) -> Interruption:
        world = World(setup, solo)
        for kind, length, most in (("logprobs", 1, 6), ("stop strings", 9, 22), ("stuck later", 2, 22), ("two", 9, 6)):
            world.add(ASKS.index((kind, length, most)))
        given_ = Interruption(world, at)
        for _ in range(3):
            world.step()
        world.loop.scheduler.cancel(list(world.followed)[1])
        list(world.followed.values())[1].cancelled = True
        world.drain()
        return given_

    lines = run(1 << 40).lines
    assert lines > 1000
    for at in range(1, lines, lines // 29):
        assert run(at).where


class Unsure(Sums):
    """Raises from a point in time on, and not from a text on."""

    broken = ""

    def __init__(self) -> None:
        super().__init__()
        if self.broken == "made":
            raise ValueError("forgotten")

    def advance(self, tokens: Sequence[int]) -> None:
        if self.broken:
            raise ValueError("forgotten")
        super().advance(tokens)


@pytest.mark.parametrize("how", ["made", "followed"])
def test_who_cannot_be_taken_up_again_ends_alone(solo: Solo, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a step that broke off, a structure cannot be made again, or not be led to where it was."""
    world = World(Setup("3x2"), solo, lambda _: Unsure())
    [entry], [other] = world.add(ASKS.index(("all", 9, 22))), world.add(ASKS.index(("sampled", 9, 22)))
    for _ in range(4):
        world.step()
    assert entry.request.text
    faults = Faults(world, [("forward", 1, False, RuntimeError)])
    monkeypatch.setattr(Unsure, "broken", how)
    world.step()
    assert faults.raised
    assert (entry.request.finish_reason, entry.request.error) == ("error", "forgotten")
    entry.may_fail = True
    world.drain()
    assert other.request.finish_reason in ("length", "stop")


def test_a_decoder_that_fails_ends_its_own_request(solo: Solo) -> None:
    class Broken(Letters):
        def push(self, ids: Iterable[int]) -> str:
            raise ValueError("no such character")

        def flush(self) -> str:
            return self.push(())

    loop = make_loop(solo.models.main, RootDrafter(), text=Broken)
    requests = [loop.add([3, 4], SamplingParams(max_tokens=9, stop=stop)) for stop in ((), ("x",))]
    while loop.requests:
        loop.step()
    for request in requests:
        assert (request.finish_reason, request.error) == ("error", "no such character")
    check_empty(loop)


def test_a_number_too_large_for_a_tensor_is_no_failure(solo: Solo) -> None:
    """All members of a step share their tensors: what one of them cannot be written in ends everybody."""
    loop = make_loop(solo.models.main, RootDrafter())
    wanted = [SamplingParams(max_tokens=9, temperature=1.0, seed=4, top_k=top_k) for top_k in (0, 1 << 70)]
    requests = [loop.add([3], each) for each in wanted]
    while loop.requests:
        loop.step()
    assert requests[0].output == requests[1].output
    assert requests[1].finish_reason == "length"
