"""Who runs, who waits, and whose prompt is read next. Knows nothing of tensors."""

import itertools
import logging
import time
from bisect import insort
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, final

from mtp_engine.errors import EngineBusy
from mtp_engine.runtime.request import PromptChunk, Request, StepOutput
from mtp_engine.sampling.stops import FinishReason

_LOG = logging.getLogger("mtp_engine")
_ATTEMPTS = 2  # steps in a row that may break off with a request before it ends with the error


class Room(Protocol):
    """The memory that requests run in: caches and all that is kept by slot (step.ModelStep)."""

    def enter(self, request: Request) -> bool:
        """Set up request.slot for it. False, with nothing changed, where memory for it is taken at present."""

    def leave(self, slot: int) -> None: ...


@final
@dataclass(frozen=True)
class StepPlan:
    """One step: those who decode, and at most one chunk of a prompt that is read behind it."""

    decoding: tuple[Request, ...]
    chunk: PromptChunk | None


@final
@dataclass(frozen=True)
class StepTimes:
    """Seconds. now: of the loop's clock, when the step had landed; draft, verify: of its two halves."""

    now: float
    draft: float
    verify: float


def _rank(request: Request) -> tuple[int, int]:
    return request.params.priority, request.number


@final
class Scheduler:
    """Requests wait by priority and arrival until a slot and memory are free; nobody overtakes the first of them.

    Every step all who have read their prompts decode, and one chunk of the first unread prompt is read. What happens to
    a request, tokens or its end, is collected in `outputs` until `take_outputs`.
    """

    def __init__(
        self, room: Room, *, slots: int, chunk: int, max_waiting: int, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """chunk: tokens of a prompt read in one step. max_waiting: requests that may wait beyond the free slots."""
        self.waiting: list[Request] = []
        self.running: list[Request] = []
        self.outputs: list[StepOutput] = []
        self._room, self._slots, self._chunk, self._max_waiting, self._clock = room, slots, chunk, max_waiting, clock
        self._free = list(range(slots))[::-1]
        self._cancelled: deque[Request] = deque()
        self._arrivals = itertools.count()

    @property
    def busy(self) -> bool:
        """Whether a step would do anything."""
        return bool(self.running or self.waiting or self._cancelled)

    @property
    def has_room(self) -> bool:
        """Whether one more request may be added."""
        return len(self.waiting) < self._max_waiting + len(self._free)

    def add(self, requests: Sequence[Request]) -> None:
        """Queue all of them. Raises EngineBusy, with nothing changed, if too many are waiting."""
        if len(self.waiting) + len(requests) > self._max_waiting + len(self._free):
            raise EngineBusy(
                f"{len(self.waiting)} requests are waiting and at most {self._max_waiting} may: try again later, or "
                "raise max_waiting"
            )
        for request in requests:
            request.number = next(self._arrivals)
            if request.params.timeout is not None:
                request.deadline = self._clock() + request.params.timeout
            insort(self.waiting, request, key=_rank)

    def cancel(self, request: Request) -> None:
        """End a request before the next step. May be called at any time and from any thread."""
        self._cancelled.append(request)

    def sweep(self) -> None:
        """End what was cancelled and what has run out of time."""
        while self._cancelled:
            self.end(self._cancelled.popleft(), "abort")
        now = self._clock()
        for request in [r for r in (*self.running, *self.waiting) if r.deadline <= now]:
            self.end(request, "timeout")

    def admit(self, now: float) -> tuple[Request, ...]:
        """Let in who fits; returns all who decode next. now: of the loop's clock."""
        while self.waiting and self._free:
            request = self.waiting[0]
            request.slot = self._free[-1]
            try:
                entered = self._room.enter(request)
            except Exception as error:  # its own affair: the others go on
                self.end(request, "error", str(error))
                continue
            if not entered and self.running:
                request.slot = -1
                break  # until one of them leaves
            if not entered:
                self.end(request, "error", "the KV cache has no room for it, though nothing else runs: raise kv_tokens")
                continue
            self.running.append(request)
            self.waiting.pop(0)
            self._free.pop()
            request.decoding = request.length == 0
            if not request.stats.steps:
                request.stats.queued_s = now - request.arrived
        return tuple(request for request in self.running if request.decoding)

    def plan(self, decoding: tuple[Request, ...]) -> StepPlan:
        """The next step, in which `decoding` decode (see `admit`). Its chunk counts as read from now on."""
        unread = [request for request in self.running if not request.decoding]
        if not unread:
            return StepPlan(decoding, None)
        request = min(unread, key=_rank)
        start, request.read = request.read, min(request.read + self._chunk, request.length)
        request.decoding = request.read == request.length
        return StepPlan(decoding, PromptChunk(request, start, request.read))

    def commit(
        self, decoding: Sequence[Request], table: Sequence[Sequence[int]],
        failed: Mapping[tuple[int, tuple[int, ...]], str], times: StepTimes,
    ) -> None:  # fmt: skip
        """Hand out a step's tokens. table: a row per request: tokens to emit, nodes and depth of its tree, then tokens.

        failed: by row and tokens in front, where a structure failed. Who has ended since the step was launched gets
        nothing.
        """
        for row, (request, (count, nodes, depth, *tokens)) in enumerate(zip(decoding, table, strict=True)):
            if request.finish_reason:
                continue
            try:
                taken = request.take(tokens[:count], {path: why for (at, path), why in failed.items() if at == row})
            except Exception as error:  # of its text: the others get theirs
                self.end(request, "error", str(error))
                self._emit(request)  # where it had ended already
                continue
            self._record(request, taken, nodes, depth, times, len(table))
            self._emit(request)
        for request in [r for r in self.running if r.finish_reason]:
            self._drop(request)

    def _record(self, request: Request, taken: int, nodes: int, depth: int, times: StepTimes, sharers: int) -> None:
        stats, request.failures = request.stats, 0
        stats.total_s = times.now - request.arrived
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
        self._drop(request)
        return True

    def restart(self, error: str | None) -> None:
        """Queue everybody again who runs, to go on from what they have said: a step was broken off somewhere.

        error: what failed, None for an interruption from outside. Who fails so in two steps in a row ends with it.
        """
        half_way_in = [r for r in self.waiting if r.slot >= 0 or r.finish_reason]  # or out
        for request in dict.fromkeys((*self.running, *half_way_in)):
            self._drop(request)
            request.failures += error is not None
            if not request.finish_reason:
                request.rewind()
            if error is not None and request.failures >= _ATTEMPTS and not request.finish_reason:
                request.end("error", error)
            if not request.finish_reason:
                insort(self.waiting, request, key=_rank)
            self._emit(request)
        self._free = list(range(self._slots))[::-1]

    def take_outputs(self) -> list[StepOutput]:
        outputs, self.outputs = self.outputs, []
        return outputs

    def _emit(self, request: Request) -> None:
        output = request.unseen()
        if output is None:
            return
        self.outputs.append(output)
        try:
            if request.sink:
                request.sink(output)
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
