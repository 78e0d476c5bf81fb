"""One Engine for several threads: everybody gets what they would get alone, and whoever leaves takes nothing along."""

import dis
import gc
import itertools
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from test_decode_loop import check_memory

import mtp_engine
from mtp_engine import Engine, EngineConfig, SamplingParams, TreeShape
from mtp_engine.engine import Prompt
from mtp_engine.errors import EngineBusy, EngineError
from mtp_engine.hub import hub
from mtp_engine.runtime.answer import Chunk, Generation
from mtp_engine.sampling.processors import Processors

CONFIG = EngineConfig(
    tree=TreeShape.parse("3x2"), dequantize=True, max_context=256, threads=1, max_batch=4, prefill_chunk=8
)
PROMPTS = [
    "The sun is", "Once upon a time", "A small dog ran", "She said that", "In the old house there was a door that nobody",
    "Why do birds sing in the morning? Because", "One, two, three", "My friend the spider",
]  # fmt: skip
WANTED = [
    SamplingParams(max_tokens=20 + 3 * i, temperature=0.4 * (i % 3), seed=i, ignore_eos=i % 2 == 0, priority=i % 2,
                   repetition_penalty=1.2 if i == 3 else 1.0, stop=("\n",) if i == 5 else ())
    for i in range(len(PROMPTS))
]  # fmt: skip
LONG = SamplingParams(max_tokens=200, ignore_eos=True)


@pytest.fixture(scope="module")
def expected() -> list[Generation]:
    """What each says alone, without drafts."""
    with Engine.load(hub.NANO, replace(CONFIG, drafter="root", tree=None)) as plain:
        return [plain.generate([prompt], params)[0] for prompt, params in zip(PROMPTS, WANTED, strict=True)]


def load(**changes: Any) -> Engine:
    return Engine.load(hub.NANO, replace(CONFIG, **changes))


@pytest.fixture(scope="module")
def shared() -> Iterator[Engine]:
    with load() as engine:
        yield engine


@pytest.fixture
def engine(shared: Engine) -> Iterator[Engine]:
    """Every test hands it back as it got it."""
    yield shared
    check_idle(shared)


def check_idle(engine: Engine) -> None:
    scheduler = engine.loop.scheduler
    turn = engine.turns.new()
    with turn.lock:
        turn.wait()
        engine.loop.step()  # sweeps what was cancelled
    assert not scheduler.busy
    assert sorted(scheduler._free) == list(range(scheduler._slots))
    check_memory(engine.loop)
    assert not any(engine.loop.memory.pages.table)


def same(answer: Generation, other: Generation) -> bool:
    return (answer.text, answer.token_ids, answer.finish_reason) == (other.text, other.token_ids, other.finish_reason)


def joined(chunks: Sequence[Chunk]) -> Generation:
    """The answer, whose chunks make it up."""
    answer = chunks[-1].finished
    assert answer is not None
    assert all(chunk.finished is None for chunk in chunks[:-1])
    assert "".join(chunk.text for chunk in chunks) == answer.text
    assert [token for chunk in chunks for token in chunk.token_ids] == answer.token_ids
    return answer


def in_threads(jobs: Sequence[Callable[[], Any]]) -> list[Any]:
    with ThreadPoolExecutor(len(jobs)) as pool:
        futures = [pool.submit(job) for job in jobs]
        return [future.result(timeout=60) for future in futures]


# ---- several threads, several streams -----------------------------------------------------------------------------


def test_eight_threads_get_what_each_gets_alone(engine: Engine, expected: list[Generation]) -> None:
    """Half of them stream; each asks three times, and its second stream is closed early."""

    def ask(index: int) -> None:
        for turn in range(3):
            prompt, params = [PROMPTS[index]], WANTED[index]
            if index % 2:
                assert same(engine.generate(prompt, params)[0], expected[index])
                continue
            stream = engine.stream(prompt, params)
            if turn == 1:
                first = next(stream)
                assert first.token_ids == expected[index].token_ids[: len(first.token_ids)]
                stream.close()  # type: ignore[attr-defined]
            else:
                assert same(joined(list(stream)), expected[index])

    in_threads([lambda index=index: ask(index) for index in range(8)])  # type: ignore[misc]


def test_two_streams_in_one_thread(engine: Engine, expected: list[Generation]) -> None:
    streams = [engine.stream([PROMPTS[index]], WANTED[index]) for index in (0, 5)]
    chunks: list[list[Chunk]] = [[], []]
    for turn in range(200):
        try:
            chunks[turn % 2].append(next(streams[turn % 2]))
        except StopIteration:
            chunks[1 - turn % 2] += streams[1 - turn % 2]
            break
    for index, mine in zip((0, 5), chunks, strict=True):
        assert same(joined(mine), expected[index])


def test_a_stream_that_nobody_holds_is_dropped(engine: Engine, expected: list[Generation]) -> None:
    stream = engine.stream([PROMPTS[0]], LONG)
    next(stream)
    assert engine.loop.requests
    del stream
    gc.collect()
    assert not engine.loop.requests
    assert same(engine.generate([PROMPTS[1]], WANTED[1])[0], expected[1])


def test_a_stream_collected_while_its_own_thread_steps(engine: Engine, expected: list[Generation]) -> None:
    """The collector runs wherever it likes, also in a step, under the engine's lock."""
    stream = engine.stream([PROMPTS[0]], LONG)
    next(stream)
    held = [stream]
    del stream
    step = engine.loop.scheduler.plan
    counted = 0

    def plan(*given: Any) -> Any:
        nonlocal counted
        counted += 1
        if counted == 3:
            held.clear()
        return step(*given)

    engine.loop.scheduler.plan = plan  # type: ignore[method-assign]
    try:
        assert same(engine.generate([PROMPTS[1]], WANTED[1])[0], expected[1])
    finally:
        del engine.loop.scheduler.plan
    assert not held


def test_closing_a_stream_frees_its_slots_and_nobody_elses(engine: Engine, expected: list[Generation]) -> None:
    other = engine.stream([PROMPTS[3]], WANTED[3])
    chunks = [next(other)]
    stream = engine.stream(PROMPTS[:2], LONG)
    next(stream)
    assert len(engine.loop.requests) == 3
    stream.close()  # type: ignore[attr-defined]
    assert len(engine.loop.requests) == 1
    assert same(joined([*chunks, *other]), expected[3])


def test_nobody_is_kept_out(engine: Engine) -> None:
    """Whoever wants the engine has it after the step that runs, though another thread steps without a pause."""
    steps, done, step = 0, threading.Event(), engine.loop.step

    def stepped() -> Any:
        nonlocal steps
        steps += 1
        return step()

    def stream() -> None:
        while not done.is_set():
            for _ in engine.stream([PROMPTS[0]], LONG):
                if done.is_set():
                    break

    engine.loop.step = stepped  # type: ignore[method-assign]
    with ThreadPoolExecutor(1) as pool:
        busy = pool.submit(stream)
        waited = []
        for _ in range(20):
            time.sleep(0.01)
            before = steps
            turn = engine.turns.new()
            with turn.lock:
                turn.wait()
                waited.append(steps - before)
        done.set()
        busy.result(timeout=60)
    del engine.loop.step
    assert max(waited) <= 2


def test_a_stream_that_was_never_begun_costs_nothing(engine: Engine) -> None:
    stream = engine.stream(PROMPTS, LONG)
    assert not engine.loop.requests
    del stream


def test_more_prompts_than_slots_and_room(expected: list[Generation]) -> None:
    """At most one waits beside those who run; the others are handed in as it gets its turn."""
    with load(max_batch=2, max_waiting=1, kv_tokens=400) as engine:
        answers = engine.generate(PROMPTS, WANTED)
        assert all(map(same, answers, expected))
        check_idle(engine)


def test_an_interruption_drops_what_was_asked_for(engine: Engine, expected: list[Generation]) -> None:
    """Ctrl-C in the middle of a step: generate raises, nothing of it stays behind, and others go on."""
    other = engine.stream([PROMPTS[5]], WANTED[5])
    chunks = [next(other)]
    verify = engine.loop.work.verifier.verify

    def interrupted(*_: Any) -> Any:
        engine.loop.work.verifier.verify = verify  # type: ignore[method-assign]
        raise KeyboardInterrupt

    engine.loop.work.verifier.verify = interrupted  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        engine.generate(PROMPTS[:3], LONG)
    assert len(engine.loop.requests) == 1
    assert same(joined([*chunks, *other]), expected[5])


# ---- what cannot run ----------------------------------------------------------------------------------------------

TOO_LONG = list(range(1, 5)) * 100


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (TOO_LONG, "the prompt has 400 tokens and the context holds 256"),
        ([], "prompt is empty"),
        ("", "prompt is empty"),
        ([3, "four"], "token 1 of the prompt is 'four'"),
        ([3, 4.5], "token 1 of the prompt is 4.5"),
        ([3, True], "token 1 of the prompt is True"),
        ([3, 1 << 40], "outside the vocabulary"),
        ([-1], "outside the vocabulary"),
        (7, "a prompt is a text"),
        (b"bytes", "a prompt is a text"),
    ],
)
def test_one_prompt_that_cannot_run(
    engine: Engine, expected: list[Generation], bad: Any, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts: list[Prompt] = [PROMPTS[0], bad, PROMPTS[1]]
    params = [WANTED[0], SamplingParams(n=2), WANTED[1]]
    with monkeypatch.context() as patch:
        patch.setattr(engine.loop, "step", lambda: pytest.fail("something ran"))
        for call in (engine.generate, engine.stream):
            with pytest.raises(EngineError, match=f"prompt 1: .*{message}"):
                call(prompts, params)  # type: ignore[operator]
    first, refused, last = engine.generate(prompts, params, on_error="return")
    assert same(first, expected[0])
    assert same(last, expected[1])
    assert (refused.finish_reason, refused.token_ids, refused.text) == ("error", [], "")
    assert message in refused.error


def test_calls_that_make_no_sense(engine: Engine) -> None:
    for prompts in ("one string", [{"role": "user", "content": "Hello"}]):
        with pytest.raises(EngineError, match=r"put it in a list"):
            engine.generate(prompts)  # type: ignore[arg-type]
    for count in (0, 1, 3):
        with pytest.raises(EngineError, match=f"2 prompts and {count} params"):
            engine.generate(PROMPTS[:2], [SamplingParams()] * count)
    assert engine.generate([]) == []
    assert list(engine.stream([])) == []


def test_a_request_that_fails_on_its_way_leaves_the_others_nowhere_or_whole(
    engine: Engine, expected: list[Generation]
) -> None:
    """With "raise" nothing of the call goes on, however long its error is kept; with "return" the others have theirs."""
    stuck = SamplingParams(allowed_token_ids=(300, 301), bad_words=((300,), (301,)), ignore_eos=True)
    params = [LONG, stuck, LONG]
    with pytest.raises(EngineError, match="prompt 1: no token is left") as kept:
        engine.generate(PROMPTS[:3], params)
    assert not engine.loop.requests
    assert kept.value.__traceback__ is not None
    first, failed, last = engine.generate(PROMPTS[:3], [WANTED[0], stuck, WANTED[2]], on_error="return")
    assert failed.finish_reason == "error"
    assert same(first, expected[0])
    assert same(last, expected[2])


# ---- closing ------------------------------------------------------------------------------------------------------


def test_closed_is_closed() -> None:
    engine = load()
    stream, unborn = engine.stream([PROMPTS[0]], LONG), engine.stream([PROMPTS[1]], LONG)
    next(stream)
    engine.close()
    engine.close()
    *_, last = stream
    assert last.finished is not None
    assert last.finished.finish_reason == "abort"
    for call in (
        lambda: engine.generate([PROMPTS[0]]),
        lambda: engine.stream([PROMPTS[0]]),
        lambda: next(unborn),
        engine.undrafted,
        lambda: engine.requests([3], LONG),
    ):
        with pytest.raises(EngineError, match="the engine is closed"):
            call()
    with pytest.raises(EngineError, match="the engine is closed"), engine:
        engine.generate([PROMPTS[0]])


def test_closing_while_others_stream(expected: list[Generation]) -> None:
    """Each stream ends, with an abort or, if some of its prompts had not begun, with an error."""
    engine = load(max_batch=2)
    begun = threading.Barrier(5)

    def stream(index: int) -> str:
        chunks: list[Chunk] = []
        try:
            for chunk in engine.stream([PROMPTS[index]], replace(LONG, priority=index)):
                if not chunks and index < 2:
                    begun.wait(20)
                chunks.append(chunk)
        except EngineError as error:
            assert "the engine is closed" in str(error)  # noqa: PT017
            return "closed"
        return str(joined(chunks).finish_reason)

    def generate() -> str:
        begun.wait(20)
        try:
            return str(engine.generate([PROMPTS[4]], LONG)[0].finish_reason)
        except EngineError as error:
            assert "the engine is closed" in str(error)  # noqa: PT017
            return "closed"

    def close() -> str:
        begun.wait(20)
        engine.close()
        return "abort"

    ends = in_threads([lambda: stream(0), lambda: stream(1), generate, generate, close])
    assert set(ends) <= {"abort", "closed", "length"}
    assert engine.closed


# ---- waiting, priorities, time ------------------------------------------------------------------------------------


def test_too_many_that_wait(expected: list[Generation]) -> None:
    with load(max_batch=1, max_waiting=2) as engine:
        prompt = engine.encode(PROMPTS[0])
        requests = [engine.loop.add(prompt, WANTED[0]) for _ in range(3)]
        with pytest.raises(EngineBusy, match="3 requests are waiting and at most 2 may"):
            engine.loop.add(prompt, WANTED[0])
        engine.loop.step()
        with pytest.raises(EngineBusy):
            engine.loop.add(prompt, replace(WANTED[0], n=2))
        # those who call the engine wait outside, whatever the loop has room for
        assert same(engine.generate([PROMPTS[1]], WANTED[1])[0], expected[1])
        assert all(request.output == expected[0].token_ids for request in requests)


def test_n_answers_are_those_of_n_seeds(engine: Engine) -> None:
    params = SamplingParams(max_tokens=16, temperature=1.0, seed=11, n=3, logprobs=1)
    [answer] = engine.generate([PROMPTS[2]], params)
    turn = engine.turns.new()
    with turn.lock:
        turn.wait()
        request = engine.loop.add(engine.encode(PROMPTS[2]), params)
        while engine.loop.requests:
            engine.loop.step()
    alone = [engine.generate([PROMPTS[2]], replace(params, n=1, seed=11 + i))[0] for i in range(3)]
    found = [answer, *answer.others]
    assert len({each.text for each in found}) == 3
    for one, two, three in zip(found, (request, *request.others), alone, strict=True):
        assert same(one, three)
        assert (two.output, two.text) == (three.token_ids, three.text)
        assert [each.token for each in one.logprobs] == one.token_ids
    samples = {chunk.sample: chunk for chunk in engine.stream([PROMPTS[2]], params) if chunk.finished}
    assert [samples[i].finished.text for i in range(3)] == [each.text for each in found]  # type: ignore[union-attr]


def test_the_lower_number_goes_first() -> None:
    with load(max_batch=1) as engine:
        params = [SamplingParams(max_tokens=8, ignore_eos=True, priority=priority) for priority in (5, 3, -1, 3, 0)]
        ended = [chunk.index for chunk in engine.stream(PROMPTS[:5], params) if chunk.finished]
        assert ended == [2, 4, 1, 3, 0]


def test_time_runs_out(engine: Engine, expected: list[Generation]) -> None:
    """For one that runs and for one that has not begun; beside them somebody has all the time."""
    now = time.monotonic()
    clock = iter([now] * 6)
    engine.loop.scheduler._clock = lambda: next(clock, now + 100)
    try:
        first, second, third = engine.generate(PROMPTS[:3], [replace(LONG, timeout=50.0), *WANTED[1:3]])
    finally:
        engine.loop.scheduler._clock = time.monotonic
    assert (first.finish_reason, first.error) == ("timeout", "")
    assert 0 < len(first.token_ids) < 200
    assert same(second, expected[1])
    assert same(third, expected[2])
    [never] = engine.generate([PROMPTS[0]], replace(LONG, timeout=1e-9))
    assert (never.finish_reason, never.token_ids, never.text) == ("timeout", [], "")


class Interrupting:
    """Sends this process a SIGINT at the n-th of the points of our code where Python looks for signals: where a function
    begins, after a call, before a jump back."""

    OURS = str(Path(mtp_engine.__file__).parent)
    BEFORE = frozenset(
        dis.opmap[name] for name in ("CALL", "CALL_FUNCTION_EX", "CALL_KW", "JUMP_BACKWARD") if name in dis.opmap
    )

    def __init__(self, point: int) -> None:
        self.left = point

    def __enter__(self) -> "Interrupting":
        self._before = sys.gettrace()
        sys.settrace(self._enter)
        return self

    def __exit__(self, *_: object) -> None:
        sys.settrace(self._before)

    def _enter(self, frame: FrameType, event: str, argument: object) -> Callable[..., Any] | None:
        if not frame.f_code.co_filename.startswith(self.OURS):
            return None
        frame.f_trace_opcodes = True
        self._pass()
        last = [0]

        def inside(frame: FrameType, event: str, argument: object) -> Callable[..., Any]:
            if event == "opcode":
                if last[0] in self.BEFORE:
                    self._pass()
                last[0] = frame.f_code.co_code[frame.f_lasti]
            return inside

        return inside

    def _pass(self) -> None:
        self.left -= 1
        if not self.left:
            signal.raise_signal(signal.SIGINT)


@pytest.mark.timeout(120)
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_an_interrupt_at_any_point_of_a_step_hurts_nobody(engine: Engine, expected: list[Generation]) -> None:
    """Neither another request of that step, nor who asks next."""
    raised = 0
    for point in itertools.count(1, 3):
        interrupting = Interrupting(point)
        other = engine.stream(PROMPTS[:1], WANTED[:1])
        told = [next(other)]
        try:
            with closing(engine.stream([PROMPTS[4]], LONG)) as chunks:
                next(chunks)
                with interrupting:
                    next(chunks)
        except KeyboardInterrupt:
            raised += 1
        told += other
        assert same(joined(told), expected[0]), point
        assert not engine.loop.scheduler.busy, point
        if interrupting.left > 0:
            break
    assert 3 * raised > 0.9 * point > 300  # what generators raise that are thrown away goes nowhere


@pytest.mark.parametrize("dtype", ["int8", "fp32"])
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_drafts_know_what_is_favoured(dtype: str, temperature: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where an answer must do without the usual tokens, the drafter does without them, too; the text is what it was."""
    with load(dtype=dtype, dequantize=dtype == "fp32", tree=TreeShape.parse("tree:7")) as engine:
        usual = {token for answer in engine.generate(PROMPTS, LONG) for token in answer.token_ids}
        others = tuple(sorted(set(range(engine.model_config.vocab_size)) - usual))
        params = SamplingParams(
            max_tokens=60, ignore_eos=True, temperature=temperature, seed=3, allowed_token_ids=others
        )
        knowing = engine.generate(PROMPTS, params)
        monkeypatch.setattr(Processors, "biases", lambda *_: None)
        blind = engine.generate(PROMPTS, params)
    assert [answer.token_ids for answer in knowing] == [answer.token_ids for answer in blind]
    accepted = [sum(sum(answer.drafted) for answer in answers) for answers in (knowing, blind)]
    assert accepted[0] > 1.2 * accepted[1], accepted
