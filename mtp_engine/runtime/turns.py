"""A lock that its waiters get in the order in which they came, and that Ctrl-C cannot leave taken."""

import threading
from collections.abc import Callable
from typing import TypeVar, final

T = TypeVar("T")


@final
class Turns:
    """A mutex that is handed on: a threading.Lock is taken again by who has just released it, before a waiter is awake, and
    a thread that steps without a pause keeps all others out for dozens of steps.

        turn = turns.new()
        with turn.lock:
            turn.wait()
            ...

    Were this a context manager of its own, Ctrl-C could raise on its way in or out, between any two calls, and leave it taken
    for ever; in `with` a threading.Lock it cannot. So each turn has such a lock, from its beginning to its end, and waits for
    that of the turn before it (Craig, "Building FIFO and priority-queuing spin locks from atomic swap", 1993).
    """

    def __init__(self) -> None:
        self.swapping = threading.Lock()  # held for moments
        self.last = Turn(self)

    def new(self) -> "Turn":
        return Turn(self)

    def run(self, call: Callable[[], T]) -> T:
        """`call` in a turn of its own."""
        turn = self.new()
        with turn.lock:
            turn.wait()
            return call()


@final
class Turn:
    """before: whose end it waits for. None: it is, or was, this one's turn."""

    def __init__(self, turns: Turns) -> None:
        self._turns, self.lock = turns, threading.Lock()
        self.before: Turn | None = None

    def wait(self, *, blocking: bool = True) -> bool:
        """Until all before it have ended. Whoever leaves earlier stays in the row, and those behind wait for those before.
        Not blocking: False rather than wait, also where the caller interrupts this very lock (garbage collection)."""
        with self._turns.swapping:
            self.before = self._turns.last  # first, as Ctrl-C may end this here
            self._turns.last = self
        while before := self.before:
            if not blocking and before.lock.locked():
                return False
            with before.lock:
                self.before = before.before
        return True
