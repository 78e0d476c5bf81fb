"""The engine for asyncio: one thread advances the loop, and every event loop is woken once per step."""

import asyncio
import logging
import threading
from collections import deque
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, final

from mtp_engine.config import DEFAULT_MODEL, EngineConfig, SamplingParams
from mtp_engine.engine import Engine, Prompt
from mtp_engine.errors import EngineError
from mtp_engine.runtime.answer import Chunk, Generation
from mtp_engine.runtime.request import Request, StepOutput

_LOG = logging.getLogger("mtp_engine")


@final
@dataclass(eq=False)
class _Inbox:
    """What was emitted for one call, on its way from the engine's thread to the call's event loop."""

    loop: asyncio.AbstractEventLoop
    requests: list[Request]
    news: deque[StepOutput | EngineError] = field(default_factory=deque)
    wake: asyncio.Event = field(default_factory=asyncio.Event)
    left: bool = False  # nobody wants it any more


@final
class AsyncEngine:
    """An Engine for asyncio.

    >>> async with AsyncEngine.load() as engine:
    ...     async for chunk in engine.stream("Once upon a time", SamplingParams(max_tokens=50)):
    ...         print(chunk.text, end="")

    One thread of its own advances the engine while there is work. `engine` may be used from other threads at the same
    time. All methods are for the event loop's thread, `abort` for any.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._wake = threading.Condition()
        self._arriving: deque[tuple[_Inbox, asyncio.Future[None]]] = deque()
        self._landed: deque[tuple[_Inbox, StepOutput | EngineError]] = deque()
        self._live: dict[_Inbox, str | None] = {}  # calls that are being served, and the ids they were given
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="mtp-engine", daemon=True)
        self._thread.start()

    @classmethod
    def load(
        cls, name: str = DEFAULT_MODEL, config: EngineConfig | None = None, *, mtp: str | None = None, **options: Any
    ) -> "AsyncEngine":
        """Engine.load, with its arguments; it takes seconds, so load before the event loop has other work."""
        return cls(Engine.load(name, config, mtp=mtp, **options))

    async def __aenter__(self) -> "AsyncEngine":
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    async def stream(
        self, prompt: Prompt, params: SamplingParams | None = None, *, request_id: str | None = None,
        said: Sequence[int] = (),
    ) -> AsyncGenerator[Chunk, None]:  # fmt: skip
        """Yield what each step commits. Closing the iterator (or cancelling its task) frees the request at once.

        request_id: a name for `abort`. said: tokens that the answer begins with already, where it goes on from another
        engine that ended: with the same seed (params.seed) it goes on as it would have there. Raises EngineError for what
        cannot run, and EngineBusy if too many requests wait.
        A request that fails on its way ends with a chunk whose `finished` says so.
        """
        self._check_open()
        requests = await asyncio.to_thread(self.engine.requests, prompt, params or SamplingParams(), said)
        loop = asyncio.get_running_loop()
        inbox, samples = _Inbox(loop, requests), {request: i for i, request in enumerate(requests)}
        for request in requests:
            request.sink = lambda output: self._land(inbox, output)
        try:
            await self._submit(inbox, request_id)
            unfinished = len(requests)
            while unfinished:
                await inbox.wake.wait()
                inbox.wake.clear()
                while inbox.news:
                    news = inbox.news.popleft()
                    if isinstance(news, EngineError):
                        raise news
                    unfinished -= news.finish_reason is not None
                    yield Chunk.of(news, 0, samples[news.request])
        finally:
            self._live.pop(inbox, None)
            self._cancel(inbox)

    async def generate(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        request_id: str | None = None,
        on_error: Literal["raise", "return"] = "raise",
    ) -> Generation:
        """The whole answer. on_error: see Engine.generate."""
        answers: dict[int, Generation] = {}
        try:
            async for chunk in self.stream(prompt, params, request_id=request_id):
                if chunk.finished:
                    answers[chunk.sample] = chunk.finished
        except EngineError as error:
            if on_error == "raise":
                raise
            return Generation.refused(str(error))
        first, *others = (answers[sample] for sample in sorted(answers))
        if on_error == "raise" and (failed := [each.error for each in (first, *others) if each.error]):
            raise EngineError(failed[0])
        return replace(first, others=tuple(others))

    def abort(self, request_id: str) -> bool:
        """End the requests of that id with what they have said (finish_reason "abort"). False if there are none."""
        inboxes = [inbox for inbox, name in list(self._live.items()) if name == request_id]
        for inbox in inboxes:
            self._cancel(inbox)
        return bool(inboxes)

    async def aclose(self) -> None:
        """End everything (finish_reason "abort"), stop the thread and close the engine. Closing twice does no harm."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        await asyncio.to_thread(self._thread.join)

    def _check_open(self) -> None:
        if self._closing or self.engine.closed:
            raise EngineError("the engine is closed: load another")

    async def _submit(self, inbox: _Inbox, request_id: str | None) -> None:
        """Hand the requests to the engine's thread; returns once they are queued."""
        queued: asyncio.Future[None] = inbox.loop.create_future()
        self._live[inbox] = request_id
        with self._wake:
            self._check_open()
            self._arriving.append((inbox, queued))
            self._wake.notify()
        await queued

    def _cancel(self, inbox: _Inbox) -> None:
        inbox.left = True  # first: it may be about to be queued
        if scheduler := self.engine.scheduler:
            for request in inbox.requests:
                if request.finish_reason is None:
                    scheduler.cancel(request)
        with self._wake:
            self._wake.notify()

    def _land(self, inbox: _Inbox, output: StepOutput) -> None:
        """Called in whichever thread advanced the loop; the engine's own publishes after its step."""
        self._landed.append((inbox, output))
        if threading.current_thread() is not self._thread:
            with self._wake:
                self._wake.notify()

    # ---- the engine's thread -----------------------------------------------------------------------------------------

    def _ended(self) -> bool:
        return self._closing or self.engine.closed

    def _has_work(self) -> bool:
        scheduler = self.engine.scheduler
        return bool(self._ended() or self._arriving or self._landed or scheduler is None or scheduler.busy)

    def _run(self) -> None:
        while True:
            with self._wake:
                self._wake.wait_for(self._has_work)
            if self._ended():
                break
            turn = self.engine.turns.new()
            with turn.lock:
                turn.wait()
                if self._ended():  # somebody closed the engine meanwhile
                    break
                self._admit()
                try:
                    self.engine.loop.step()
                except Exception as error:  # not even requeueing worked: a lost GPU
                    _LOG.exception("the engine's loop failed")
                    self._fail(EngineError(f"the engine failed: {error}"))
            self._publish()
        self.engine.close()
        self._fail(EngineError("the engine is closed: load another"))
        self._publish()

    def _admit(self) -> None:
        while self._arriving:
            inbox, queued = self._arriving.popleft()
            if inbox not in self._live:
                continue  # its caller has left already
            try:
                self.engine.loop.submit(inbox.requests)
            except EngineError as error:
                _call(inbox.loop, _settle, queued, error)
            else:
                _call(inbox.loop, _settle, queued, None)
                for request in inbox.requests if inbox.left else ():
                    self.engine.loop.scheduler.cancel(request)  # once more: a step may have swept before it was there

    def _fail(self, error: EngineError) -> None:
        """Tell everybody who still waits."""
        with self._wake:  # who comes later sees that it is closed
            arriving = list(self._arriving)
            self._arriving.clear()
        for inbox, queued in arriving:
            _call(inbox.loop, _settle, queued, error)
        for inbox in list(self._live):
            if any(request.finish_reason is None for request in inbox.requests):
                self._landed.append((inbox, error))

    def _publish(self) -> None:
        """Everything that has landed, with one wake-up per event loop."""
        by_loop: dict[asyncio.AbstractEventLoop, list[tuple[_Inbox, StepOutput | EngineError]]] = {}
        while self._landed:
            inbox, news = self._landed.popleft()
            by_loop.setdefault(inbox.loop, []).append((inbox, news))
        for loop, landed in by_loop.items():
            _call(loop, _deliver, landed)


def _call(loop: asyncio.AbstractEventLoop, function: Any, *values: Any) -> None:
    try:
        loop.call_soon_threadsafe(function, *values)
    except RuntimeError:  # the event loop is closed, and nobody waits there any more
        _LOG.debug("an event loop was closed before its requests had ended")


def _settle(queued: "asyncio.Future[None]", error: EngineError | None) -> None:
    if queued.done():
        return
    if error:
        queued.set_exception(error)
    else:
        queued.set_result(None)


def _deliver(news: list[tuple[_Inbox, StepOutput | EngineError]]) -> None:
    for inbox, each in news:
        inbox.news.append(each)
        inbox.wake.set()
