"""Rank 0 decides what comes in, and the other ranks follow it, step by step.

What travels: requests that join, requests that are ended from outside (cancelled, out of time), loops that are made or
closed, and how long steps took, from which planners learn. All else follows from these and from the tokens, which every rank
computes with the same bits: who runs, who is preempted, what the prefix cache keeps, which trees are drafted. Rank 0's times
and seeds count, as they travel with steps and requests.
"""

import atexit
import itertools
import logging
import os
import sys
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from typing import TYPE_CHECKING, Any, NoReturn, Protocol, final
from zlib import crc32

from mtp_engine.parallel.group import Group, RankLost
from mtp_engine.parallel.launch import Children
from mtp_engine.runtime.interrupts import uninterrupted
from mtp_engine.runtime.loop import DecodeLoop
from mtp_engine.runtime.messages import CODEC, Joined, Left, Message, Open, Score, Shut, Step
from mtp_engine.runtime.ranks import Alone, Ranks
from mtp_engine.runtime.request import Request
from mtp_engine.sampling.stops import FinishReason

if TYPE_CHECKING:
    from mtp_engine.parallel.processes import Processes

_LOG = logging.getLogger("mtp_engine")


class Team(Protocol):
    """The ranks of an engine, as one of them sees them."""

    @property
    def group(self) -> Group: ...

    @property
    def lost(self) -> str: ...  # why nothing can go on: which other rank has ended; empty if none has

    def ranks(self, **changes: Any) -> Ranks:
        """For another loop of the engine, the first one of which has no changes."""

    def close(self) -> None: ...


@final
class Solo:
    """An engine of one process."""

    group, lost = Group(), ""

    def ranks(self, **changes: Any) -> Ranks:
        return Alone()

    def close(self) -> None:
        pass


class Beside:
    """What a rank knows of the others that share the model."""

    def __init__(self, processes: "Processes", children: Children | None) -> None:
        """children: the other ranks, where this process started them."""
        self.group, self._processes, self._children, self._why = processes.group, processes, children, ""
        if children:
            children.on_lost = processes.abort

    @property
    def lost(self) -> str:
        return (self._children.said if self._children else "") or self._why

    @property
    def processes(self) -> list[int]:
        """Of ranks 1, 2, ..., where this process started them."""
        return self._children.processes if self._children else []

    def check(self) -> None:
        """Raises RankLost if another rank has ended."""
        if self.lost:
            raise RankLost(self.lost)
        self._processes.check()


@final
class Leader(Beside):
    """Rank 0's Team. One step at a time, of whichever loop and thread."""

    def __init__(self, processes: "Processes", children: Children | None) -> None:
        super().__init__(processes, children)
        self.lock, self._numbers, self.closed = threading.Lock(), itertools.count(), False
        self._at_exit = _closing(weakref.ref(self))
        atexit.register(self._at_exit)  # what the interpreter's end finds of process groups crashes it

    def fail(self, why: str) -> str:
        """Nothing can go on, and the others end. Returns why: which of them has ended, if one has."""
        self._why = self.lost or why
        self.close(tell=False)
        return self._why

    def ranks(self, **changes: Any) -> Ranks:
        number = next(self._numbers)
        if number:
            with self.lock:
                self.tell(Open(number, changes))
        return LedLoop(self, number)

    def tell(self, message: Message) -> None:
        self.check()
        self._processes.tell(CODEC.write(message))

    def close(self, *, tell: bool = True) -> None:
        """End the others. Closing twice does no harm. tell: False where they are in the midst of a step."""
        atexit.unregister(self._at_exit)
        if self.closed:
            return
        self.closed = True
        if tell:
            with suppress(RankLost):  # then there is nobody to tell
                self.tell(Shut(0))
        else:
            self._processes.abort()
        self._processes.close()
        if self._children:
            self._children.close(wait=tell)


@final
class LedLoop:
    """One loop of rank 0's (Ranks)."""

    def __init__(self, leader: Leader, number: int) -> None:
        self._leader, self._number, self._steps = leader, number, itertools.count()
        self._arrived: list[Joined] = []
        self._inside = self._closed = self._alike = False  # _inside: a step

    def added(self, requests: Sequence[Request], cancel: Callable[[Request], None]) -> None:
        if self._alike:
            return
        for request in requests:
            self._arrived.append(Joined.of(request))
            if request.sink:
                request.sink = _careful(request, request.sink, cancel)

    def _joined(self) -> tuple[Joined, ...]:
        """Those that were not told yet."""
        arrived, self._arrived = tuple(self._arrived), []
        return arrived

    @contextmanager
    def ending(self, request: Request, reason: FinishReason) -> Iterator[None]:
        with nullcontext() if self._inside else self.step():
            self._tell(Left(self._number, self._joined(), request.number, reason))
            yield

    @contextmanager
    def step(self) -> Iterator[None]:
        with self._leader.lock, uninterrupted():
            self._inside = True
            try:
                yield
            finally:
                self._inside = False

    def begin(self, running: Sequence[Request], times: tuple[tuple[Any, ...], ...]) -> None:
        self._tell(Step(self._number, self._joined(), next(self._steps), digest(running), times))

    def _tell(self, message: Message) -> None:
        if not self._alike:
            self._leader.tell(message)

    @contextmanager
    def alike(self) -> Iterator[None]:
        self._alike = True
        try:
            yield
        finally:
            self._alike = False

    def check(self) -> None:
        self._leader.check()

    def scored(self, tokens: Sequence[int], start: int, most: int) -> None:
        self._leader.tell(Score(self._number, tuple(tokens), start, most))

    @property
    def lost(self) -> str:
        return self._leader.lost

    def failed(self, error: BaseException) -> str:
        said = " ".join(str(error).split()) or type(error).__name__
        return self._leader.fail(
            said if isinstance(error, RankLost) else f"a step failed ({said}): load the engine anew"
        )

    def close(self) -> None:
        with self._leader.lock:
            if not self._number:
                self._leader.close()
            elif not self._closed:
                with suppress(RankLost):
                    self._leader.tell(Shut(self._number))
            self._closed = True


@final
class Follower:
    """The Team of another rank, which ends with its first failure: the others could not go on with it."""

    lost = ""

    def __init__(self, processes: "Processes") -> None:
        self.group, self._processes = processes.group, processes

    def ranks(self, **changes: Any) -> Ranks:
        return Following(self._processes)

    def close(self) -> None:
        self._processes.close()

    def follow(self, first: DecodeLoop, another: Callable[..., DecodeLoop]) -> None:
        """Do what rank 0 does, until it is done. another: makes a loop with some changes."""
        loops = {0: first}
        while True:
            match CODEC.read(self._processes.hear()):
                case Step(loop, joined, number, state, times):
                    _join(loops[loop], joined)
                    if digest(loops[loop].scheduler.running) != state:
                        raise RankLost(f"before step {number} of loop {loop} the ranks' requests are not the same")
                    loops[loop].work.times[:] = times  # in place of this rank's own
                    loops[loop].step()
                case Left(loop, joined, number, reason):
                    _join(loops[loop], joined)
                    request = next(each for each in loops[loop].requests if each.number == number)
                    loops[loop].scheduler.dismiss(request, reason)
                case Score(number, tokens, start, most):
                    loops[number].score(tokens, start, most)
                case Open(number, changes):
                    loops[number] = another(**changes)
                case Shut(0):
                    return
                case Shut(number):
                    del loops[number]


@final
class Following(Alone):
    """One loop of another rank's (Ranks), which tells nobody."""

    def __init__(self, processes: "Processes") -> None:
        self._processes = processes

    def check(self) -> None:
        self._processes.check()

    def failed(self, error: BaseException) -> NoReturn:
        leave(error)


def leave(error: BaseException) -> NoReturn:
    """End this process with one line, at once: nothing of it is of use to anybody."""
    print(" ".join(str(error).split()) or type(error).__name__, file=sys.stderr, flush=True)  # noqa: T201
    os._exit(1)


def _closing(leader: "weakref.ref[Leader]") -> Callable[[], None]:
    def close() -> None:
        if there := leader():
            there.close(tell=there.lock.acquire(blocking=False))

    return close


def _join(loop: DecodeLoop, joined: Sequence[Joined]) -> None:
    for each in joined:
        loop.submit(loop.intake.requests(each.prompt, each.params, said=each.said))


def digest(running: Sequence[Request]) -> int:
    """What ranks must agree on before a step: who runs, how far each has come, and its last token."""
    return crc32(repr([(each.number, each.slot, each.read, each.length, each.last) for each in running]).encode())


def _careful(request: Request, sink: Callable[[Any], None], cancel: Callable[[Request], None]) -> Callable[[Any], None]:
    """A sink whose failure ends its request before the next step, on all ranks, and not in the midst of one."""

    def take(output: Any) -> None:
        try:
            sink(output)
        except Exception:
            _LOG.exception("a sink failed")
            request.sink = None
            cancel(request)

    return take
