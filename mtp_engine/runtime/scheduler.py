"""Who runs, who waits, and whose prompt is read next. Knows nothing of tensors."""

import itertools
import logging
import time
from bisect import insort
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Protocol, final

from mtp_engine.errors import EngineBusy
from mtp_engine.runtime.request import Landed, Mark, PromptChunk, Request, StepOutput
from mtp_engine.runtime.stats import StepTimes
from mtp_engine.sampling.stops import FinishReason

_LOG = logging.getLogger("mtp_engine")
_TOO_SMALL = "the KV cache has no room for it, though nothing else runs: raise kv_tokens"
_FEW = 4  # ended requests that may wait for what they leave to be kept, one a step; of more, more at a time
_ATTEMPTS = 2  # steps in a row that may break off with a request before it ends with the error


class Room(Protocol):
    """The memory that requests run in: caches and all that is kept by slot (memory.Memory)."""

    def enter(self, request: Request) -> bool:
        """Set up request.slot for it: what is kept of the beginning of its text need not be read (request.read), and its
        reading stops at request.marks. False, with nothing changed, where memory for it is taken at present."""

    def grow(self, request: Request) -> bool:
        """See that it has memory for its next step. False where there is none."""

    def fits(self, requests: Sequence[Request]) -> bool:
        """Whether there is memory for the whole answers of all of them."""

    def gains(self, request: Request, others: Sequence[Request]) -> bool:
        """Whether a request would have less to read once one of the others has read its prompt."""

    def keep(self, request: Request, mark: Mark | None = None, *, apart: bool = False) -> None:
        """Keep what its slot holds: at a mark, else of all it has read and said. apart: without keeping its pages from
        others."""

    def leave(self, slot: int) -> None: ...


@final
@dataclass(frozen=True)
class StepPlan:
    """One step: those who decode, and the chunks of prompts that are read behind it, one a request."""

    decoding: tuple[Request, ...]
    chunks: tuple[PromptChunk, ...]


def _rank(request: Request) -> tuple[int, int]:
    return request.params.priority, request.number


def _together(decoding: Sequence[Request]) -> tuple[Request, ...]:
    """Of those who could decode, who does in the next step. What a structure allows is worked out on the host, for which a
    step has to wait; where few have one, they sit out while a step of theirs is in flight: so nobody waits for the host."""
    bound = [request for request in decoding if request.params.structure]
    if 2 * len(bound) > len(decoding):
        return tuple(decoding)
    return tuple(request for request in decoding if not (request.params.structure and request.in_flight))


@final
class Scheduler:
    """Requests wait by priority and arrival until a slot and memory are free; nobody overtakes the first of them.

    Every step all who have read their prompts decode, and a chunk of the first unread prompts is read. What happens to
    a request, tokens or its end, is collected in `outputs` until `take_outputs`.
    """

    def __init__(
        self, room: Room, *, slots: int, chunk: int, max_waiting: int, packs: bool = True,
        clock: Callable[[], float] = time.monotonic, pace: Callable[[], int | None] = lambda: None,
        dismissing: Callable[[Request, FinishReason], AbstractContextManager[None]] = lambda *_: nullcontext(),
    ) -> None:  # fmt: skip
        """chunk: tokens of prompts read in one step; packs: of several prompts, where one does not fill it. max_waiting:
        requests that may wait beyond the free slots. pace: so many tokens and no more, where somebody decodes. dismissing:
        is told whom `dismiss` ends."""
        self.waiting: list[Request] = []
        self.running: list[Request] = []
        self.outputs: list[StepOutput] = []
        self._room, self._slots, self._chunk, self._max_waiting, self._clock = room, slots, chunk, max_waiting, clock
        self._packs, self._pace, self._dismissing = packs, pace, dismissing
        self._free = list(range(slots))[::-1]
        self._leaving: deque[Request] = deque()  # they have ended, and what they leave is not kept yet
        self._cancelled: deque[Request] = deque()
        self._arrivals = itertools.count()
        self._reading: tuple[PromptChunk, ...] = ()  # the last ones planned

    @property
    def busy(self) -> bool:
        """Whether a step would do anything."""
        return bool(self.running or self.waiting or self._cancelled)

    @property
    def has_room(self) -> bool:
        """Whether one more request may be added."""
        return len(self.waiting) < self._most_waiting

    @property
    def _most_waiting(self) -> int:
        return self._max_waiting + len(self._free) + len(self._leaving)

    def add(self, requests: Sequence[Request], now: float = 0.0) -> None:
        """Queue all of them. now: of the loop's clock. Raises EngineBusy, with nothing changed, if too many are waiting."""
        if len(self.waiting) + len(requests) > self._most_waiting:
            raise EngineBusy(
                f"{len(self.waiting)} requests are waiting and at most {self._max_waiting} may: try again later, or "
                "raise max_waiting"
            )
        for request in requests:
            request.number, request.arrived = next(self._arrivals), now
            if request.params.timeout is not None:
                request.deadline = self._clock() + request.params.timeout
            insort(self.waiting, request, key=_rank)

    def cancel(self, request: Request) -> None:
        """End a request before the next step. May be called at any time and from any thread."""
        self._cancelled.append(request)

    def sweep(self) -> None:
        """End what was cancelled and what has run out of time."""
        while self._cancelled:
            self.dismiss(self._cancelled.popleft(), "abort")
        now = self._clock()
        for request in [r for r in (*self.running, *self.waiting) if r.deadline <= now]:
            self.dismiss(request, "timeout")

    def dismiss(self, request: Request, reason: FinishReason) -> bool:
        """End a request for a reason that does not lie in it, between two steps. False if it had ended already."""
        if request.finish_reason or (request not in self.running and request not in self.waiting):
            return False
        with self._dismissing(request, reason):
            return self.end(request, reason)

    def plan(self, now: float, in_flight: int) -> StepPlan | None:
        """The next step; None where nobody wants one, or it has to wait for those in flight. Its chunks count as read from
        now on. now: of the loop's clock. in_flight: steps whose tokens are not known yet."""
        self._keep_what_was_read()
        self._let_go(1 + len(self._leaving) // _FEW)
        self._admit(now)
        decoding = _together([request for request in self.running if request.decoding])
        crowded = [request for request in decoding if not self._room.grow(request)]
        if crowded and self._leaving:
            self._let_go(len(self._leaving))
            crowded = [request for request in decoding if not self._room.grow(request)]
        if crowded:
            if not in_flight:  # what is said by then counts
                self._preempt(crowded[0])
            return None
        self._reading = chunks = self._next_chunks(min(self._chunk, (decoding and self._pace()) or self._chunk))
        for request in decoding:
            request.in_flight += 1
        return StepPlan(decoding, chunks) if decoding or chunks else None

    def _keep_what_was_read(self) -> None:
        chunks, self._reading = self._reading, ()
        for chunk in chunks:
            if chunk.mark and chunk.request in self.running:
                self._room.keep(chunk.request, chunk.mark)

    def _admit(self, now: float) -> None:
        """Let in who fits and would read next, but nobody before he can find what those before him are about to read."""
        if not self.waiting:
            return
        others = any(request.decoding for request in self.running)
        if self.waiting and not self._free:
            self._let_go(1)
        while self.waiting and self._free:
            request = self.waiting[0]
            before = [other for other in self.running if not other.decoding and _rank(other) < _rank(request)]
            full = not self._packs or sum(other.length - other.read for other in before) >= self._chunk
            if before and (full or self._room.gains(request, before)):
                break
            request.slot = self._free[-1]
            try:
                # who was preempted comes back when all can grow to their ends, or it would be preempted again and again
                calm = not request.stats.preemptions or self._room.fits([*self.running, request])
                entered = calm and self._room.enter(request)
            except Exception as error:  # its own affair: the others go on
                self.end(request, "error", str(error))
                continue
            if not entered and self.running:
                request.slot = -1
                break  # until one of them leaves
            if not entered:
                self.end(request, "error", _TOO_SMALL)
                continue
            self.running.append(request)
            self.waiting.pop(0)
            self._free.pop()
            request.decoding = request.read == request.length
            if not request.stats.steps:
                request.stats.queued_s = now - request.arrived
            if request.read and others:
                break  # to take up what is kept holds up those who decode: one of them a step

    def _preempt(self, crowded: Request) -> None:
        """Memory is full: the last of those who run waits again, to go on from what it has said."""
        if self.running == [crowded]:
            self.end(crowded, "error", _TOO_SMALL)
            return
        last = max(self.running, key=_rank)
        last.stats.preemptions += 1
        if last.decoding:
            self._room.keep(last, apart=True)
        self._requeue(last)

    def _next_chunks(self, left: int) -> tuple[PromptChunk, ...]:
        """Of the first prompts that are not read, so many tokens. Who failed before is read alone, to find out whose failure
        it is."""
        chunks = list[PromptChunk]()
        for request in sorted((each for each in self.running if not each.decoding), key=_rank):
            if chunks and (not self._packs or request.failures or chunks[0].request.failures or left <= 0):
                break
            chunks.append(self._next_chunk(request, left))
            left -= chunks[-1].stop - chunks[-1].start
        return tuple(chunks)

    def _next_chunk(self, request: Request, most: int) -> PromptChunk:
        """most: tokens."""
        start = request.read
        ahead = [mark for mark in request.marks if mark.tokens > start]
        request.read = stop = min(start + most, ahead[0].tokens)
        request.decoding = stop == request.length
        left = next(mark.tokens for mark in ahead if not mark.lean) - stop
        return PromptChunk(request, start, stop, left, ahead[0] if ahead[0].tokens == stop else None)

    def commit(self, plan: StepPlan, landed: Landed, times: StepTimes) -> None:
        """Hand out a step's tokens. Who has ended since it was launched gets nothing."""
        for request in plan.decoding:
            if not request.finish_reason:  # else its slot stays as far ahead as it was then
                request.in_flight -= 1
        for row, (request, (count, nodes, depth, *tokens)) in enumerate(zip(plan.decoding, landed.rows, strict=True)):
            if request.finish_reason:
                continue
            try:
                if request.params.logprobs is not None and landed.notes:
                    request.logprobs += landed.notes.read(row, tokens[:count], request.params.logprobs)
                failed = {path: why for (at, path), why in landed.failed.items() if at == row} if landed.failed else {}
                taken = request.take(tokens[:count], failed)
            except Exception as error:  # of its text: the others get theirs
                self.end(request, "error", str(error))
                self._emit(request)  # where it had ended already
                continue
            self._record(request, taken, nodes, depth, times, len(landed.rows))
            self._emit(request)
        for request in [r for r in self.running if r.finish_reason]:
            if request.finish_reason in ("stop", "length"):
                self._leaving.append(request)
                self.running.remove(request)
            else:
                self._drop(request)
        if not self.running:
            self._let_go(len(self._leaving))

    def _let_go(self, most: int) -> None:
        """Keep what so many of the ended leave, and free their slots. Where others run that is a step's work for one of them, or
        some that end together would hold them up."""
        for _ in range(min(most, len(self._leaving))):
            request = self._leaving[0]
            self._room.keep(request)
            self._room.leave(request.slot)
            self._free.append(request.slot)
            request.slot = -1
            self._leaving.popleft()

    def _record(self, request: Request, taken: int, nodes: int, depth: int, times: StepTimes, sharers: int) -> None:
        stats, request.failures = request.stats, 0
        stats.total_s, stats.compile_s = times.now - request.arrived, times.left_out - request.skipped
        if not taken:
            return
        if not stats.steps:
            stats.ttft_s = stats.total_s
            stats.prefill_s = max(0.0, stats.ttft_s - stats.queued_s - times.draft - times.verify)
        stats.record_step(taken, nodes, depth)
        stats.draft_s += times.draft / sharers
        stats.verify_s += times.verify / sharers

    def end(self, request: Request, reason: FinishReason, error: str = "") -> bool:
        """End a request that waits or runs, between two steps. False if it had ended already."""
        if request.finish_reason or (request not in self.running and request not in self.waiting):
            return False
        request.end(reason, error)
        self._emit(request)
        try:
            if reason in ("abort", "timeout") and request.decoding:
                self._room.keep(request)
        finally:
            self._drop(request)
        return True

    def unread(self, chunks: Sequence[PromptChunk], error: str) -> None:
        """Reading them failed. One request ends with the error; of several each waits again, to be read alone."""
        if len(chunks) == 1:
            self.end(chunks[0].request, "error", error)
            return
        self._reading = ()
        for chunk in chunks:
            chunk.request.failures += 1
            self._requeue(chunk.request)

    def restart(self, error: str | None) -> bool:
        """Queue everybody again who runs, to go on from what they have said: a step was broken off somewhere. False if
        nobody ran, and nothing has come of the step.

        error: what failed, None for an interruption from outside. Who fails so in two steps in a row ends with it.
        """
        self._reading = ()
        half_way_in = [r for r in self.waiting if r.slot >= 0 or r.finish_reason]  # or out
        ran = list(dict.fromkeys((*self.running, *self._leaving, *half_way_in)))
        self._leaving.clear()
        for request in ran:
            request.failures += error is not None
            self._requeue(request, error if request.failures >= _ATTEMPTS else None)
        self._free = list(range(self._slots))[::-1]
        return bool(ran or self.outputs)

    def abandon(self, error: str) -> bool:
        """End everybody, and touch nothing of what they ran in: it is lost. False if there was nobody, and nothing has come
        of the step."""
        ended, self._reading = [*self.running, *self.waiting], ()
        for requests in (self.running, self.waiting, self._cancelled, self._leaving):
            requests.clear()
        for request in ended:
            if not request.finish_reason:
                request.end("error", error)
            self._emit(request)
        return bool(ended or self.outputs)

    def _requeue(self, request: Request, error: str | None = None) -> None:
        """Out of its slot and back into the queue, to go on from what it has said; error: it ends with that instead."""
        self._drop(request)
        if not request.finish_reason:
            request.rewind()
        if error is not None and not request.finish_reason:
            request.end("error", error)
        if not request.finish_reason:
            insort(self.waiting, request, key=_rank)
        self._emit(request)

    def take_outputs(self) -> list[StepOutput]:
        outputs, self.outputs = self.outputs, []
        return outputs

    def _emit(self, request: Request) -> None:
        try:
            request.emit(self.outputs)
        except Exception as error:  # of who listens: it ends, and the others get theirs
            _LOG.exception("a sink failed")
            request.sink = None
            self.end(request, "error", str(error))

    def _drop(self, request: Request) -> None:
        """Out of the lists and out of its slot."""
        if request.slot >= 0:
            self._room.leave(request.slot)
            if request in self.running:
                self._free.append(request.slot)
            request.slot = -1
        for requests in (self.waiting, self.running):
            if request in requests:
                requests.remove(request)
        if not self.running:
            self._let_go(len(self._leaving))
