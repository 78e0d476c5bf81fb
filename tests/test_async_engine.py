"""AsyncEngine: what a call says does not depend on the others, on who leaves, or on how the engine is closed."""

import asyncio
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, contextmanager
from dataclasses import replace
from typing import Any

import pytest
from test_engine import CONFIG, LONG, PROMPTS, TOO_LONG, WANTED, check_idle, expected, joined, same

from mtp_engine import AsyncEngine, Engine, SamplingParams
from mtp_engine import async_engine as module
from mtp_engine.engine import Prompt
from mtp_engine.errors import EngineBusy, EngineError
from mtp_engine.hub import hub
from mtp_engine.runtime.answer import Chunk, Generation

__all__ = ["expected"]  # a fixture
SHORT = SamplingParams(max_tokens=4, ignore_eos=True)


def run(work: Callable[[AsyncEngine], Awaitable[None]], **changes: Any) -> None:
    """An engine of its own, at the end of which nothing is left."""

    async def main() -> None:
        engine = AsyncEngine(Engine.load(hub.NANO, replace(CONFIG, **changes)))
        try:
            await asyncio.wait_for(work(engine), 60)
            if not engine.engine.closed:
                await idle(engine)
                check_idle(engine.engine)
        finally:
            await asyncio.wait_for(engine.aclose(), 20)
        assert not engine._live
        assert not engine._thread.is_alive()

    asyncio.run(main())


async def idle(engine: AsyncEngine) -> None:
    """Until nothing runs, which takes a few steps at most."""
    for _ in range(400):
        turn = engine.engine.turns.new()
        with turn.lock:
            turn.wait()
            if not engine.engine.loop.scheduler.busy:
                break
        await asyncio.sleep(0.005)
    else:
        raise AssertionError("something runs on for nobody")
    assert not engine._live
    assert not engine._arriving


async def collect(chunks: AsyncIterator[Chunk]) -> list[Chunk]:
    return [chunk async for chunk in chunks]


async def answer(engine: AsyncEngine, prompt: Prompt, params: SamplingParams, **options: Any) -> Generation:
    return joined(await collect(engine.stream(prompt, params, **options)))


def both(jobs: list[Callable[[], Any]]) -> list[Any]:
    with ThreadPoolExecutor(len(jobs)) as pool:
        return [future.result(timeout=60) for future in [pool.submit(job) for job in jobs]]


# ---- what is said -------------------------------------------------------------------------------------------------


def test_twenty_at_once_say_what_each_says_alone(expected: list[Generation]) -> None:
    async def work(engine: AsyncEngine) -> None:
        jobs = [answer(engine, PROMPTS[i % 8], WANTED[i % 8]) for i in range(12)]
        jobs += [engine.generate(PROMPTS[i % 8], WANTED[i % 8]) for i in range(8)]
        answers = await asyncio.gather(*jobs)
        assert all(same(found, expected[i % 8]) for i, found in enumerate(answers[:12]))
        assert all(same(found, expected[i]) for i, found in enumerate(answers[12:]))

    run(work)


def test_n_answers(expected: list[Generation]) -> None:
    async def work(engine: AsyncEngine) -> None:
        params = SamplingParams(max_tokens=12, temperature=1.0, seed=5, n=3)
        whole = await engine.generate(PROMPTS[0], params)
        chunks = await collect(engine.stream(PROMPTS[0], params))
        for sample, found in enumerate((whole, *whole.others)):
            assert same(found, joined([chunk for chunk in chunks if chunk.sample == sample]))
        [sync] = await asyncio.to_thread(engine.engine.generate, [PROMPTS[0]], params)
        assert all(map(same, (whole, *whole.others), (sync, *sync.others)))

    run(work)


def test_beside_the_engine_in_another_thread(expected: list[Generation]) -> None:
    async def work(engine: AsyncEngine) -> None:
        sync = [asyncio.to_thread(engine.engine.generate, [PROMPTS[i]], WANTED[i]) for i in range(4)]
        jobs: list[Coroutine[Any, Any, Any]] = [answer(engine, PROMPTS[i], WANTED[i]) for i in range(4, 8)]
        found = await asyncio.gather(*sync, *jobs)
        assert all(same(each[0], expected[i]) for i, each in enumerate(found[:4]))
        assert all(same(each, expected[i]) for i, each in enumerate(found[4:], 4))

    run(work)


def test_two_event_loops(expected: list[Generation]) -> None:
    engine = AsyncEngine(Engine.load(hub.NANO, CONFIG))

    def ask(first: int) -> None:
        async def main() -> None:
            found = await asyncio.gather(*(answer(engine, PROMPTS[i], WANTED[i]) for i in range(first, 8, 2)))
            assert all(same(each, expected[i]) for i, each in zip(range(first, 8, 2), found, strict=True))

        for _ in range(2):
            asyncio.run(main())

    both([lambda: ask(0), lambda: ask(1)])
    check_idle(engine.engine)
    asyncio.run(engine.aclose())


def test_a_loop_that_is_gone_is_no_failure(expected: list[Generation]) -> None:
    """An event loop that ends with a request under way: the next one is served."""
    engine = AsyncEngine(Engine.load(hub.NANO, CONFIG))

    async def leave() -> None:
        stream = engine.stream(PROMPTS[0], LONG)
        await anext(stream)
        held.append(stream)

    async def stay() -> None:
        assert same(await answer(engine, PROMPTS[1], WANTED[1]), expected[1])
        await idle(engine)

    held: list[AsyncIterator[Chunk]] = []
    asyncio.run(leave())
    asyncio.run(stay())
    asyncio.run(engine.aclose())


# ---- who leaves ---------------------------------------------------------------------------------------------------


def test_closing_an_iterator_frees_the_request(expected: list[Generation]) -> None:
    async def work(engine: AsyncEngine) -> None:
        other = asyncio.create_task(answer(engine, PROMPTS[1], WANTED[1]))
        async with aclosing(engine.stream(PROMPTS[0], replace(LONG, n=2))) as chunks:
            await anext(chunks)
        assert same(await other, expected[1])
        await idle(engine)

    run(work)


@pytest.mark.parametrize("steps", [0, 1, 3])
def test_cancelling_the_task(expected: list[Generation], steps: int) -> None:
    """Before it is queued, once it is, and while it streams; the others do not notice."""

    async def work(engine: AsyncEngine) -> None:
        seen = asyncio.Event()

        async def read() -> None:
            count = 0
            async for _ in engine.stream(PROMPTS[0], LONG):
                count += 1
                if count == steps:
                    seen.set()

        task = asyncio.create_task(read())
        other = asyncio.create_task(engine.generate(PROMPTS[1], WANTED[1]))
        await (seen.wait() if steps else asyncio.sleep(0))
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert same(await other, expected[1])

    run(work)


def test_abort_by_name(expected: list[Generation]) -> None:
    """Ends all of that name, with what they have said; the stream of each ends by itself."""

    async def work(engine: AsyncEngine) -> None:
        assert not engine.abort("mine")
        tasks = [asyncio.create_task(answer(engine, PROMPTS[i], LONG, request_id="mine")) for i in range(2)]
        other = asyncio.create_task(answer(engine, PROMPTS[3], WANTED[3], request_id="other"))
        started = engine.stream(PROMPTS[2], LONG, request_id="mine")
        chunks = [await anext(started)]
        assert await asyncio.to_thread(engine.abort, "mine")  # from any thread
        chunks += await collect(started)
        for ended in (joined(chunks), *await asyncio.gather(*tasks)):
            assert ended.finish_reason == "abort"
            assert len(ended.token_ids) < 200
        assert same(await other, expected[3])
        assert not engine.abort("mine")

    run(work)


def test_abort_before_it_is_queued(expected: list[Generation]) -> None:
    """The engine's thread is in a step, or somebody else's is, when the request comes and is aborted."""

    async def work(engine: AsyncEngine) -> None:
        turn = engine.engine.turns.new()
        with turn.lock:
            turn.wait()
            task = asyncio.create_task(answer(engine, PROMPTS[0], LONG, request_id="mine"))
            while not engine._arriving:
                await asyncio.sleep(0.001)
            assert engine.abort("mine")
            engine.engine.loop.scheduler.sweep()  # of a step that began before it was queued
        ended = await task
        assert (ended.finish_reason, ended.token_ids) == ("abort", [])

    run(work)


# ---- what cannot run ----------------------------------------------------------------------------------------------


def test_requests_that_cannot_run(expected: list[Generation]) -> None:
    async def work(engine: AsyncEngine) -> None:
        other = asyncio.create_task(engine.generate(PROMPTS[1], WANTED[1]))
        for prompt, message in ((TOO_LONG, "400 tokens"), ("", "empty"), ([1, "x"], "token 1"), (7, "a prompt is")):
            with pytest.raises(EngineError, match=message):
                await engine.generate(prompt)  # type: ignore[arg-type]
            with pytest.raises(EngineError, match=message):
                await anext(engine.stream(prompt))  # type: ignore[arg-type]
            refused = await engine.generate(prompt, on_error="return")  # type: ignore[arg-type]
            assert refused.finish_reason == "error"
            assert message in refused.error
        assert same(await other, expected[1])

    run(work)


def test_a_request_that_fails_on_its_way(expected: list[Generation]) -> None:
    async def work(engine: AsyncEngine) -> None:
        stuck = SamplingParams(allowed_token_ids=(300, 301), bad_words=((300,), (301,)), ignore_eos=True)
        other = asyncio.create_task(engine.generate(PROMPTS[1], WANTED[1]))
        with pytest.raises(EngineError, match="no token is left"):
            await engine.generate(PROMPTS[0], stuck)
        assert (await engine.generate(PROMPTS[0], stuck, on_error="return")).finish_reason == "error"
        assert (await answer(engine, PROMPTS[0], stuck)).error
        assert same(await other, expected[1])

    run(work)


def test_too_many_that_wait(expected: list[Generation]) -> None:
    async def work(engine: AsyncEngine) -> None:
        first = engine.stream(PROMPTS[0], LONG)
        chunks = [await anext(first)]  # it has the slot
        second = asyncio.create_task(engine.generate(PROMPTS[1], WANTED[1]))
        while not engine.engine.loop.scheduler.waiting:
            await asyncio.sleep(0.001)
        with pytest.raises(EngineBusy, match="try again later"):
            await engine.generate(PROMPTS[2], WANTED[2])
        refused = await engine.generate(PROMPTS[2], WANTED[2], on_error="return")
        assert "try again later" in refused.error
        chunks += await collect(first)
        assert joined(chunks).finish_reason == "length"
        assert same(await second, expected[1])
        assert same(await engine.generate(PROMPTS[2], WANTED[2]), expected[2])

    run(work, max_batch=1, max_waiting=1)


def test_a_loop_that_cannot_go_on_tells_everybody() -> None:
    """Not even queueing anew works: streams end with the error, and nobody hangs."""

    async def work(engine: AsyncEngine) -> None:
        loop = engine.engine.loop
        streams = [engine.stream(PROMPTS[i], LONG) for i in range(2)]
        for stream in streams:
            await anext(stream)
        turn = engine.engine.turns.new()
        with turn.lock:
            turn.wait()
            loop.runner.launch = loop.scheduler.restart = broken  # type: ignore[method-assign]
        for stream in streams:
            with pytest.raises(EngineError, match="the engine failed: the GPU is gone"):
                await collect(stream)
        turn = engine.engine.turns.new()
        with turn.lock:
            turn.wait()
            del loop.runner.launch, loop.scheduler.restart

    def broken(*_: Any) -> Any:
        raise RuntimeError("the GPU is gone")

    run(work)


# ---- closing ------------------------------------------------------------------------------------------------------


def test_closed_is_closed() -> None:
    """In fp32: int8 may have said all before the engine closes."""

    async def work(engine: AsyncEngine) -> None:
        tasks = [asyncio.create_task(answer(engine, PROMPTS[i], LONG)) for i in range(6)]  # more than run at once
        started = engine.stream(PROMPTS[7], replace(LONG, priority=-1))
        chunks = [await anext(started)]
        await asyncio.gather(engine.aclose(), engine.aclose())
        await engine.aclose()
        chunks += await collect(started)
        for ended in (joined(chunks), *await asyncio.gather(*tasks)):
            assert ended.finish_reason == "abort"
        with pytest.raises(EngineError, match="the engine is closed"):
            await engine.generate(PROMPTS[0])
        with pytest.raises(EngineError, match="the engine is closed"):
            await anext(engine.stream(PROMPTS[0]))
        assert not engine.abort("x")
        with pytest.raises(EngineError, match="the engine is closed"):
            engine.engine.generate([PROMPTS[0]])

    run(work, dtype="fp32")


def test_closing_at_any_moment() -> None:
    """Requests on their way in, queued, or running: each ends with an abort or is told that the engine is closed."""

    async def ask(engine: AsyncEngine, index: int, delay: float) -> str:
        await asyncio.sleep(delay)
        try:
            return str((await engine.generate(PROMPTS[index], LONG)).finish_reason)
        except EngineError as error:
            return str(error)

    async def work(engine: AsyncEngine) -> None:
        tasks = [asyncio.create_task(ask(engine, i % 8, i * 0.002)) for i in range(24)]
        await asyncio.sleep(0.03)
        await engine.aclose()
        assert {*await asyncio.gather(*tasks)} <= {"abort", "length", "the engine is closed: load another"}

    for _ in range(3):
        run(work)


def test_the_engine_below_is_closed_by_somebody_else() -> None:
    async def work(engine: AsyncEngine) -> None:
        stream = engine.stream(PROMPTS[0], LONG)
        chunks = [await anext(stream)]
        await asyncio.to_thread(engine.engine.close)
        chunks += await collect(stream)
        assert joined(chunks).finish_reason == "abort"
        with pytest.raises(EngineError, match="the engine is closed"):
            await engine.generate(PROMPTS[0])

    run(work)


def test_the_engine_below_is_closed_while_a_request_arrives() -> None:
    """Its thread waits for the lock with a request to admit; when it gets it, there is no loop any more."""

    async def work(engine: AsyncEngine) -> None:
        below = engine.engine
        turn = below.turns.new()
        with turn.lock:
            turn.wait()
            task = asyncio.create_task(engine.generate(PROMPTS[0], LONG))
            while not engine._arriving:
                await asyncio.sleep(0.001)
            await asyncio.sleep(0.02)  # its thread is at the lock now
            below.closed = True
            below.loop.close()
            del below.model, below.loop
        with pytest.raises(EngineError, match="the engine is closed"):
            await asyncio.wait_for(task, 10)

    run(work)


def test_leaving_the_block_closes() -> None:
    async def main() -> Engine:
        async with AsyncEngine.load(hub.NANO, CONFIG) as engine:
            await engine.generate(PROMPTS[0], SHORT)
        return engine.engine

    assert asyncio.run(main()).closed


# ---- waking up ----------------------------------------------------------------------------------------------------


@contextmanager
def counted(engine: AsyncEngine, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, int]]:
    """Steps that emitted something, and calls of call_soon_threadsafe that deliver what was emitted."""
    counts = {"steps": 0, "wakes": 0}
    step, call = engine.engine.loop.step, module._call

    def stepped() -> Any:
        outputs = step()
        counts["steps"] += bool(outputs)
        return outputs

    def called(loop: asyncio.AbstractEventLoop, function: Any, *values: Any) -> None:
        if function is module._deliver:
            assert threading.current_thread() is engine._thread
            counts["wakes"] += 1
        call(loop, function, *values)

    with monkeypatch.context() as patch:
        patch.setattr(engine.engine.loop, "step", stepped)
        patch.setattr(module, "_call", called)
        yield counts


def test_one_wake_up_per_step(expected: list[Generation], monkeypatch: pytest.MonkeyPatch) -> None:
    async def work(engine: AsyncEngine) -> None:
        with counted(engine, monkeypatch) as counts:
            await asyncio.gather(*(engine.generate(PROMPTS[i], replace(WANTED[i], n=2)) for i in range(4)))
        assert 0 < counts["wakes"] <= counts["steps"]

    run(work)


def test_an_idle_engine_does_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    async def work(engine: AsyncEngine) -> None:
        await engine.generate(PROMPTS[0], SHORT)
        await idle(engine)
        steps = 0
        step = engine.engine.loop.step

        def stepped() -> Any:
            nonlocal steps
            steps += 1
            return step()

        engine.engine.loop.step = stepped  # type: ignore[method-assign]
        await asyncio.sleep(0.05)
        assert steps <= 1

    run(work)
