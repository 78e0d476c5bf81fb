"""The runner of CUDA graphs, on a CPU: the same padded steps over the same fixed tensors, operation by operation."""

import gc
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from crossing import steps_left_open
from test_decode_loop import CONTEXT, CPU, SLOTS, VOCAB, Models, prompts
from tiny import Recites, Sums

from mtp_engine import Engine, EngineConfig
from mtp_engine.assemble import decode_loop, make_loop
from mtp_engine.cache import HybridKV, Pages
from mtp_engine.config import SamplingParams, Structure, TreeShape
from mtp_engine.drafters import MTPDrafter, NgramDrafter, RootDrafter, TorchDraftOps
from mtp_engine.errors import EngineError
from mtp_engine.protocols import Drafter, Verifier
from mtp_engine.runtime import cuda_graph, recorded_steps, structures
from mtp_engine.runtime.cuda_graph import GraphRunner
from mtp_engine.runtime.flight import HostMark, HostRoom, Opened
from mtp_engine.runtime.loop import DecodeLoop
from mtp_engine.runtime.recorded import Uncaptured
from mtp_engine.runtime.recorded_steps import SCRATCH_TOKENS, Key, RecordedSteps
from mtp_engine.runtime.request import Request
from mtp_engine.runtime.scheduler import Scheduler
from mtp_engine.runtime.step import EagerRunner
from mtp_engine.sampling.batch import Batch
from mtp_engine.sampling.masks import Guide
from mtp_engine.verifiers import (
    BlockVerifier,
    MatchVerifier,
    RejectionVerifier,
    RRSVerifier,
    TraversalVerifier,
)

KINDS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampled": {"temperature": 0.9, "stop_token_ids": (5, 44)},
    "truncated": {"temperature": 1.2, "top_k": 20, "top_p": 0.9, "min_p": 0.02},
    "penalties": {"frequency_penalty": 0.6, "repetition_penalty": 1.2, "presence_penalty": 0.3, "temperature": 0.8},
    "bias": {"logit_bias": {5: 3.0}, "bad_words": ((3,), (7, 9)), "allowed_token_ids": tuple(range(1, VOCAB))},
    "early": {"min_tokens": 12, "stop_token_ids": tuple(range(30)), "temperature": 0.7},
    "logprobs": {"logprobs": 3, "temperature": 0.5},
    "structure": {"structure": Structure(regex="any"), "temperature": 0.8},
    "recited": {"structure": Structure(regex="recite"), "temperature": 0.7},
    "no drafts": {"speculate": False, "temperature": 0.9},
    "small tree": {"tree": TreeShape.parse("2x1"), "temperature": 0.9},
    "all": {"structure": Structure(regex="any"), "logprobs": 1, "frequency_penalty": 0.5, "bad_words": ((8, 8), (4,)),
            "temperature": 1.1, "top_p": 0.95, "tree": TreeShape.parse("chain:2")},
    "stuck": {"allowed_token_ids": (3, 7, 9), "bad_words": ((9, 3), (9, 7), (9, 9)), "temperature": 2.0},
}  # fmt: skip


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    return Models(tmp_path_factory.mktemp("graphs"))


def loop_of(
    models: Models, drafter: Drafter, verifier: Verifier | None = None, in_flight: int = 2, **changes: Any
) -> DecodeLoop:
    """One whose steps are recorded. in_flight 0: one whose steps are not."""
    layers = [layer.attention for layer in models.main.config.layers]
    cache = HybridKV(
        [replace(layers[0], window=12), *layers[1:]],
        Pages(slots=SLOTS + 1, tokens=changes.pop("tokens", 2048), page_size=8, device=CPU), max_nodes=drafter.max_nodes,
        behind=3 * (drafter.depth + 1), dtype=torch.float32,
    )  # fmt: skip
    assert cache.pages.reserve(SLOTS, SCRATCH_TOKENS)
    runner: Any = partial(GraphRunner, in_flight=in_flight, scratch=SLOTS, device=CPU) if in_flight else EagerRunner
    given: dict[str, Any] = {
        "slots": SLOTS,
        "max_context": CONTEXT,
        "prefill_chunk": 16,
        "eos_token_ids": [],
        **changes,
    }
    return decode_loop(
        models.main,
        cache,
        drafter,
        verifier or MatchVerifier(),
        device=CPU,
        runner=runner,
        grammars=lambda structure: Recites() if structure.regex == "recite" else Sums(),
        **given,
    )


def drafter_of(name: str, models: Models) -> Drafter:
    if name == "root":
        return RootDrafter()
    if name == "ngram":
        return NgramDrafter(4, slots=SLOTS + 1, max_context=CONTEXT, device=CPU)
    return MTPDrafter(models.mtp, TreeShape.parse(name), slots=SLOTS + 1)


def waves(loop: DecodeLoop, params: Sequence[SamplingParams]) -> list[Request]:
    """A request joins at every second step; the third is dropped and asked anew on the way, the fifth preempted."""
    requests: list[Request] = []
    for number, each in enumerate(params):
        requests.append(loop.add(prompts()[number % SLOTS], each))
        for _ in range(2):
            loop.step()
        if number == 2:
            loop.remove(requests.pop())
            requests.append(loop.add(prompts()[number], each))
        if number == 4 and (running := [r for r in loop.scheduler.running if not r.finish_reason]):
            while loop._flying:
                loop._land()
            loop.scheduler._requeue(next((r for r in running if not r.finish_reason), running[0]))
    while loop.requests:
        loop.step()
    return requests


@pytest.fixture(scope="module")
def alone(models: Models) -> list[Request]:
    """Each kind alone, plain and not recorded."""
    return [solo(loop_of(models, RootDrafter(), in_flight=0), number, each) for number, each in enumerate(params())]


def solo(loop: DecodeLoop, number: int, params: SamplingParams) -> Request:
    request = loop.add(prompts()[number % SLOTS], params)
    while loop.requests:
        loop.step()
    return request


def params() -> list[SamplingParams]:
    return [SamplingParams(max_tokens=20, seed=50 + i, **kind) for i, kind in enumerate(KINDS.values())]


@pytest.mark.parametrize(("name", "in_flight"), [("root", 2), ("3x2", 1), ("3x2", 3), ("tree:6", 2), ("ngram", 2)])
def test_all_kinds_together_say_what_each_says_alone(
    models: Models, alone: list[Request], name: str, in_flight: int
) -> None:
    """Requests of all kinds join, leave, are dropped and preempted while steps are in flight; nothing is recorded late."""
    loop = loop_of(models, drafter_of(name, models), in_flight=in_flight)
    loop.work.processors.start(0, [1], SamplingParams(bad_words=((1, 2),) * 3))  # tables for all that comes
    loop.runner.capture(SLOTS, CONTEXT, lambda *_: None)
    runner: Any = loop.runner
    recorded = runner.steps.recorded
    found = waves(loop, params())
    for number, kind in enumerate(KINDS):
        mine, theirs = found[number], alone[number]
        assert (mine.output, mine.finish_reason, mine.error) == (theirs.output, theirs.finish_reason, theirs.error), (
            kind
        )
        assert [(p.token, p.rank) for p in mine.logprobs] == [(p.token, p.rank) for p in theirs.logprobs]
    assert (runner.steps.late, runner.steps.recorded) == (0, recorded)
    bare = {key.bare for key, held in runner.steps.prepared.items() if held.loaded}
    assert bare == {True, False}, "both kinds of recorded steps ran"
    recited = found[list(KINDS).index("recited")]
    if isinstance(loop.work.drafter, MTPDrafter):
        # a chain begins where a step does, and the model agrees with all of it
        assert sum(recited.drafted) > len(recited.output) // 3


@pytest.mark.parametrize("rule", [RejectionVerifier, BlockVerifier, RRSVerifier, TraversalVerifier])
def test_other_rules_are_recorded(models: Models, rule: Any) -> None:
    """Padding and fixed tensors change nothing of what a rule says."""
    shape = "chain:3" if rule in (RejectionVerifier, BlockVerifier) else "3x2"

    def drafter() -> MTPDrafter:
        return MTPDrafter(models.mtp, TreeShape.parse(shape), slots=SLOTS + 1, ops=TorchDraftOps("drawn"))

    wanted = [each for each in params() if each.structure is None]  # a guide has no part in recorded drafts
    found = waves(loop_of(models, drafter(), rule()), wanted)
    expected = [solo(loop_of(models, drafter(), rule(), in_flight=0), *each) for each in enumerate(wanted)]
    assert [r.output for r in found] == [r.output for r in expected]


def test_words_beyond_the_tables_are_recorded_anew(models: Models, caplog: pytest.LogCaptureFixture) -> None:
    """Tables that grow leave no step that reads the old ones; it is said, as it holds all up."""
    loop = loop_of(models, drafter_of("3x2", models))
    loop.runner.capture(SLOTS, CONTEXT, lambda *_: None)
    wanted = [
        SamplingParams(max_tokens=20, temperature=1.0, seed=1, bad_words=((4, 5),)),
        SamplingParams(max_tokens=20, temperature=1.0, seed=2, bad_words=((9, 8, 7, 6), (1, 2))),
    ]
    found = waves(loop, wanted)
    expected = [solo(loop_of(models, RootDrafter(), in_flight=0), *each) for each in enumerate(wanted)]
    assert [r.output for r in found] == [r.output for r in expected]
    runner: Any = loop.runner
    assert runner.steps.late > 0
    assert "in the midst of the work" in caplog.text
    assert {key.tables for key in runner.steps.prepared if not key.bare} == {loop.work.processors.grown}


def test_what_is_captured_at_load(models: Models) -> None:
    """All batch sizes up to the largest, all bounds, and for each five kinds of steps."""
    loop = loop_of(models, drafter_of("3x2", models))
    said: list[tuple[str, int, int | None]] = []
    loop.runner.capture(SLOTS, 600, lambda *each: said.append(each))
    runner: Any = loop.runner
    assert set(runner.steps.prepared) == {
        Key(batch, bound, *kind)
        for batch in (1, 2, 3, 4) for bound in (512, 2048)
        for kind in ((False, True), (False, False), (True, True), (True, False), (True, False, True))
    }  # fmt: skip
    assert next(each for each in said if each[0] == "capturing CUDA graphs")[1:] == (0, 40)
    assert said[-1][1:] == (40, 40)


def test_a_full_memory_names_what_to_lower(models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    loop = loop_of(models, drafter_of("3x2", models))
    recorded = RecordedSteps._record

    def record(self: RecordedSteps, key: Key, *, compiled: bool = False) -> None:
        if key.batch < 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        recorded(self, key, compiled=compiled)

    monkeypatch.setattr(RecordedSteps, "_record", record)
    with pytest.raises(
        EngineError, match=r"full after 10 of 20 CUDA graphs: lower max_batch, max_context or kv_tokens"
    ):
        loop.runner.capture(SLOTS, CONTEXT, lambda *_: None)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU would compile kernels for what is refused here")
@pytest.mark.parametrize("full", [torch.OutOfMemoryError("no"), torch.AcceleratorError("CUDA error: out of memory")])
@pytest.mark.parametrize("breaks_off", [False, True])
def test_a_memory_that_is_full_in_a_capture_is_not_taken_for_something_else(
    models: Models,
    full: RuntimeError,
    breaks_off: bool,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """breaks_off: the end of the capture fails as well, and hides why."""

    class Full:
        def __init__(self, *_: Any) -> None:
            try:
                raise full
            finally:
                if breaks_off:
                    raise RuntimeError("operation failed due to a previous error during capture")

    loop = loop_of(models, drafter_of("3x2", models))
    runner: Any = loop.runner
    monkeypatch.setattr(recorded_steps, "Captured", Full)
    monkeypatch.setattr(runner.steps, "_lane", "of a GPU")
    with pytest.raises(EngineError, match="memory is full after 0 of 20 CUDA graphs: lower max_batch"):
        loop.runner.capture(SLOTS, CONTEXT, lambda *_: None)
    request = solo(loop, 1, params()[1])  # captured when it is needed
    assert request.error.startswith("the GPU's memory is full: lower kv_tokens, max_batch or max_context")
    assert "many times slower" not in caplog.text


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU would compile kernels for what is refused here")
def test_what_cannot_be_captured_says_so_once_and_runs(
    models: Models, alone: list[Request], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Refused:
        def __init__(self, *_: Any) -> None:
            raise RuntimeError("operation not permitted when stream is capturing")

    loop, told = loop_of(models, drafter_of("3x2", models)), list[str]()
    runner: Any = loop.runner
    monkeypatch.setattr(recorded_steps, "Captured", Refused)
    monkeypatch.setattr(runner.steps, "_lane", "of a GPU")
    monkeypatch.setattr(runner.steps, "_progress", lambda what, *_: told.append(what))
    request = solo(loop, 1, params()[1])
    solo(loop, 3, params()[3])
    assert request.output == alone[1].output
    assert caplog.text.count("without CUDA graphs, which is many times slower: operation not permitted") == 1
    assert [said.split(":")[0] for said in told] == ["steps run without CUDA graphs, which is many times slower"]
    assert request.stats.steps > runner.steps.recorded > 1


def test_getting_ready_has_a_time_of_its_own(models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    """What compiling and capturing takes is in none of the other times, of those alone who waited for it."""
    loop = loop_of(models, drafter_of("3x2", models))
    recorded = RecordedSteps._record

    def record(self: RecordedSteps, key: Key) -> None:
        time.sleep(0.3)
        recorded(self, key)

    monkeypatch.setattr(RecordedSteps, "_record", record)
    first, second = (solo(loop, 0, params()[0]).stats for _ in range(2))
    assert first.compile_s >= 0.3
    assert first.ttft_s < 0.3 > first.prefill_s
    assert second.compile_s < 0.1


@pytest.mark.parametrize("in_flight", [1, 2, 3])
def test_a_structure_waits_for_the_host_and_nobody_else(models: Models, in_flight: int) -> None:
    """Its masks are made of what steps in flight say, which is asked for its own request alone."""
    loop = loop_of(models, drafter_of("3x2", models), in_flight=in_flight)
    asked: list[Request] = []
    said = loop._said
    loop._said = lambda before, requests: asked.extend(requests) or said(before, requests)  # type: ignore[method-assign, func-returns-value]
    most = 0
    structured = loop.add(prompts()[0], SamplingParams(max_tokens=30, seed=1, structure=Structure(regex="any")))
    loop.add(prompts()[1], SamplingParams(max_tokens=30, seed=2))
    while loop.requests:
        loop.step()
        most = max(most, len(loop._flying))
    assert set(asked) == {structured}
    assert most == in_flight - 1


@pytest.mark.parametrize("left_open", [False, True])
def test_steps_that_have_landed_are_forgotten(models: Models, left_open: bool) -> None:
    """A step with structures knows those before it, to ask what they say; and no longer, or each would keep all before it."""
    with steps_left_open() if left_open else nullcontext():
        loop = loop_of(models, drafter_of("2x1", models))
        loop.add(prompts()[0], SamplingParams(max_tokens=40, seed=1, ignore_eos=True, structure=Structure(regex="any")))
        steps = 0
        while loop.requests:
            loop.step()
            steps += 1
            assert sum(isinstance(each, Opened) for each in gc.get_objects()) <= loop.runner.in_flight + 1
    assert steps > 12


@pytest.mark.parametrize(("structured", "most"), [(1, 1), (2, 1), (3, 2)])
def test_few_with_a_structure_sit_out_while_their_steps_are_in_flight(
    models: Models, structured: int, most: int
) -> None:
    """So that the others wait for nobody; and all say what they say alone. Where most have one, all go together."""
    loop = loop_of(models, drafter_of("3x2", models), in_flight=2)
    wanted = [
        SamplingParams(
            max_tokens=24, seed=i, temperature=0.8, structure=Structure(regex="any") if i < structured else None
        )
        for i in range(SLOTS)
    ]
    requests, plan, flying = [loop.add(*each) for each in zip(prompts(), wanted, strict=True)], loop.scheduler.plan, []

    def planned(*given: Any) -> Any:
        found = plan(*given)
        if all(request.decoding and not request.finish_reason for request in requests):
            flying.append([request.in_flight for request in requests])
        return found

    loop.scheduler.plan = planned  # type: ignore[method-assign]
    while loop.requests:
        loop.step()
    peaks = [max(column) for column in zip(*flying[2:], strict=True)]  # steps before were planned for fewer
    assert peaks == [most] * structured + [2] * (SLOTS - structured)
    expected = [solo(loop_of(models, RootDrafter(), in_flight=0), *each) for each in enumerate(wanted)]
    assert [request.output for request in requests] == [request.output for request in expected]


def test_what_broke_off_half_way_into_a_mask_leaves_nothing_there() -> None:
    """All may follow again when the next step is on its way, which may have trees of another size."""
    masks = structures.Structures(batch=2, nodes=3, depth=1, vocab=64, device=CPU, mark=HostMark)

    class Interrupted(Sums):
        def mask(self, path: tuple[int, ...]) -> torch.Tensor:
            if path:
                raise KeyboardInterrupt
            return torch.zeros(2, dtype=torch.int32)

    drafted = structures.Drafted(Guide([Interrupted(0), None]), None, HostMark(), 1, 0, {0: [5]})
    given = masks.given(2, 2)
    with pytest.raises(KeyboardInterrupt):
        drafted.guide.fill(given.written, [[0, 5]], [[-1, 0]], [2], {0: 0}, masks._touched)
    assert given.written.tolist() == [[[0, 0], [-1, -1]], [[-1, -1], [-1, -1]]]
    masks.clear()
    for each in (masks.given(1, 3), given):
        assert bool((each.written == -1).all())
        assert bool((each.mask == -1).all())


def test_room_on_the_host_takes_what_comes() -> None:
    room = HostRoom(pinned=False)
    for shape, kind in (
        ((2, 3), torch.int64),
        ((9, 5, 2), torch.float32),
        ((2, 3), torch.int64),
        ((1, 3), torch.int64),
    ):
        tensor = torch.randn(shape).mul(9).to(kind)
        assert torch.equal(room.copy(tensor), tensor)


class Anything(Sums):
    """Allows all; notes after which drafts it was asked for a mask."""

    def __init__(self) -> None:
        super().__init__()
        self.asked = list[int]()

    def allows(self, text: Sequence[int], token: int) -> bool:
        return True

    def mask(self, path: tuple[int, ...]) -> torch.Tensor:
        self.asked.append(len(path))
        return super().mask(path)


@pytest.mark.parametrize("truncated", [False, True])
def test_what_is_allowed_anyway_needs_no_mask(models: Models, truncated: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """But what top-p leaves depends on what is allowed: there all nodes have one."""
    monkeypatch.setattr(structures, "_HIDDEN", 0)
    loop = loop_of(models, drafter_of("3x2", models), in_flight=2)
    constraint = Anything()
    loop.intake = replace(loop.intake, grammars=lambda structure: constraint)
    given = SamplingParams(
        max_tokens=20, seed=1, temperature=0.7, top_p=0.9 if truncated else 1.0, structure=Structure(regex="any")
    )
    request = loop.add(prompts()[0], given)
    while loop.requests:
        loop.step()
    free = loop_of(models, drafter_of("3x2", models), in_flight=2)
    other = free.add(prompts()[0], replace(given, structure=None))
    while free.requests:
        free.step()
    assert request.output == other.output
    assert bool(constraint.asked) == truncated


def found(forced: list[tuple[int, list[int]]], chains: dict[int, list[int]]) -> dict[int, list[int]]:
    forced += chains.items()
    return chains


@pytest.fixture
def left_open() -> Iterator[None]:
    with steps_left_open():
        yield


@pytest.mark.usefixtures("left_open")
def test_who_comes_next_has_no_rows_of_a_step_that_was_open(models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    """It ends when a step lands while another one that it has a part in is open, which keeps its tokens in the slot later. A
    prompt of one token has nothing read that would overwrite them: there a GPU's rows began before the cache, in front of
    position 0."""
    drafter = MTPDrafter(models.mtp, TreeShape.parse("3x2"), slots=SLOTS + 1)
    starts, new_rows, left = list[int](), drafter._new_rows, list[bool]()

    def noted_rows(batch: Batch) -> Any:
        rows = new_rows(batch)
        starts.extend(rows.start[batch.slots < SLOTS].tolist())
        return rows

    loop = loop_of(models, drafter, tokens=512)
    runner, leave = loop.runner, loop.memory.leave
    assert isinstance(runner, GraphRunner)
    monkeypatch.setattr(drafter, "_new_rows", noted_rows)
    monkeypatch.setattr(loop.memory, "leave", lambda slot: (left.append(runner._open is not None), leave(slot)))
    say(loop, SamplingParams(max_tokens=9, structure=Structure(regex="any")))
    text = say(loop, SamplingParams(max_tokens=9))
    assert left[0], "no step was open"
    assert min(starts) == 1
    assert text == say(loop_of(models, RootDrafter(), in_flight=0), SamplingParams(max_tokens=9))


def say(loop: DecodeLoop, params: SamplingParams) -> list[int]:
    request = loop.add([7], params)
    while loop.requests:
        loop.step()
    return request.output


@pytest.mark.usefixtures("left_open")
def test_nobody_takes_a_slot_while_a_step_is_open(models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who does may replay graphs, which share their memory, and make tables grow that the rest of the step is captured with."""
    loop = loop_of(models, drafter_of("3x2", models), in_flight=3)
    runner, plan, during, opened = loop.runner, loop.scheduler.plan, list[bool](), list[bool]()
    assert isinstance(runner, GraphRunner)
    noted_plan: Any = lambda *given: (during.append(runner._open is not None), plan(*given))[1]  # noqa: E731
    monkeypatch.setattr(loop.scheduler, "plan", noted_plan)
    for number in range(2):
        loop.add(prompts()[number], SamplingParams(max_tokens=20, seed=number, structure=Structure(regex="any")))
    while loop.requests:
        loop.step()
        opened.append(runner._open is not None)
    assert any(opened)
    assert not any(during)


def test_the_model_runs_while_the_step_before_is_handed_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU the rest of a step is launched later than here: its model once all before it have landed, what is chosen after
    their tokens are handed out."""
    schema = '{"type": "array", "items": {"type": "string", "maxLength": 9}, "minItems": 9}'
    structures = [Structure(json=schema), Structure(json=schema, within=200), Structure(regex="[a-z ]{400}")]
    wanted = [SamplingParams(max_tokens=60, seed=n, temperature=0.9, structure=s) for n, s in enumerate(structures)]
    done: list[str] = []
    monkeypatch.setattr(cuda_graph, "Captured", Uncaptured)
    for owner, name in ((Uncaptured, "draft"), (Uncaptured, "forward"), (Uncaptured, "choose"), (Scheduler, "commit")):
        monkeypatch.setattr(owner, name, noted(done, name, getattr(owner, name)))
    with Engine.load(
        "mimo-nano", EngineConfig(dtype="fp32", tree=TreeShape.parse("chain:3"), max_batch=4, max_context=128)
    ) as engine:
        runner: Any = lambda slots: partial(GraphRunner, in_flight=2, scratch=slots, device=CPU)  # noqa: E731
        backend = replace(engine.backend, runner=runner, in_flight=2, scratch_tokens=SCRATCH_TOKENS)
        config, drafter = replace(engine.config, prefix_cache=False), engine.loop.work.drafter
        loop = make_loop(engine.model, drafter, config, backend, slots=4, tokenizer=engine.tokenizer)
        prompt = engine.encode("Once upon a time")
        requests = [loop.add(prompt, each) for each in wanted]
        while max(len(request.output) for request in requests) < 24:
            loop.step()
        order = done[-12:]
        plain = [engine.plain(prompt, replace(each, max_tokens=16)) for each in wanted]
    for request, other in zip(requests, plain, strict=True):
        common = min(len(request.output), len(other.output))
        assert common > 8
        assert request.output[:common] == other.output[:common]
    assert order == ["choose", "draft", "forward", "commit"] * 3


def noted(done: list[str], name: str, call: Any) -> Any:
    def wrapped(*args: Any) -> Any:
        done.append(name)
        return call(*args)

    return wrapped


def test_a_real_model_with_a_real_grammar(monkeypatch: pytest.MonkeyPatch) -> None:
    """Answers that are closed before their limit, while steps are in flight that the grammar has not been told of."""
    schema = (
        '{"type": "object", "properties": {"a": {"type": "string"}, "b": {"type": "integer"}}, "required": ["a", "b"]}'
    )
    wanted = [
        SamplingParams(max_tokens=40, seed=1, temperature=0.9, structure=Structure(json=schema, within=40)),
        SamplingParams(
            max_tokens=24, seed=2, structure=Structure(regex="[a-z ]{9,30}"), logprobs=2, frequency_penalty=0.4
        ),
        SamplingParams(max_tokens=24, seed=3, temperature=0.8),
    ]
    with Engine.load(
        "mimo-nano", EngineConfig(dtype="fp32", tree=TreeShape.parse("chain:3"), max_batch=4, max_context=128)
    ) as engine:
        drafter = engine.loop.work.drafter
        runner: Any = lambda slots: partial(GraphRunner, in_flight=2, scratch=slots, device=CPU)  # noqa: E731
        backend = replace(engine.backend, runner=runner, in_flight=2, scratch_tokens=SCRATCH_TOKENS)
        config = replace(engine.config, prefix_cache=False)
        loop = make_loop(engine.model, drafter, config, backend, slots=4, tokenizer=engine.tokenizer)
        prompt = engine.encode("Once upon a time")
        forced, force = list[tuple[int, list[int]]](), Guide.forced
        monkeypatch.setattr(Guide, "forced", lambda *given: found(forced, force(*given)))
        requests = [loop.add(prompt, each) for each in wanted]
        while loop.requests:
            loop.step()
        plain = [engine.plain(prompt, each) for each in wanted]
    assert [r.output for r in requests] == [r.output for r in plain]
    assert requests[0].trail.constraint is not None
    assert requests[0].trail.constraint.complete
    assert max(r.stats.mean_accepted_length for r in requests) > 1
    assert forced
    assert all(set(chain) <= set(requests[row].output) for row, chain in forced if row == 0)
