"""A lock that its waiters get in the order in which they came."""

import threading
from collections import deque
from contextlib import ExitStack
from typing import final

from mtp_engine.runtime.interrupts import uninterrupted


@final
class Turns:
    """A mutex that is handed on. A threading.Lock is taken again by who has just released it, before a waiter is awake:
    a thread that steps without a pause keeps all others out for dozens of steps.

    `with` takes it `uninterrupted`: what Ctrl-C raises on the way in or out would leave it taken for ever.
    """

    def __init__(self) -> None:
        self._inner = threading.Lock()  # held for moments
        self._held = False
        self._waiting: deque[threading.Lock] = deque()
        self._leave = ExitStack()  # of who has it by `with`

    def acquire(self, *, blocking: bool = True) -> bool:
        """Not blocking: False rather than wait, also where the caller interrupts this very lock (garbage collection)."""
        if not self._inner.acquire(blocking=blocking):
            return False
        try:
            if not self._held:
                self._held = True
                return True
            if not blocking:
                return False
            turn = threading.Lock()
            turn.acquire()
            self._waiting.append(turn)
        finally:
            self._inner.release()
        try:
            turn.acquire()
        except BaseException:  # Ctrl-C while it waits
            with self._inner:
                handed = turn not in self._waiting
                if not handed:
                    self._waiting.remove(turn)
            if handed:
                self.release()
            raise
        return True

    def release(self) -> None:
        with self._inner:
            if self._waiting:
                self._waiting.popleft().release()
            else:
                self._held = False

    def __enter__(self) -> None:
        with ExitStack() as stack:
            stack.enter_context(uninterrupted())
            self.acquire()
            stack.callback(self.release)
            self._leave = stack.pop_all()

    def __exit__(self, *_: object) -> None:
        self._leave.close()
