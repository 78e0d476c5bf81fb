"""Work that Ctrl-C must not leave half-way."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, final

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@contextmanager
def uninterrupted() -> Iterator[None]:
    """A signal that comes inside is handled at the end, the second one at once. Inside another one it changes nothing."""
    if threading.current_thread() is not threading.main_thread():
        yield  # Python's handlers run in the main thread alone
        return
    handlers = {number: _handler(number) for number in _SIGNALS}
    if any(isinstance(handler, _Later) for handler in handlers.values()):
        yield
        return
    later = _Later({number: handler for number, handler in handlers.items() if callable(handler)})
    try:
        for number in later.handlers:
            signal.signal(number, later)
        yield
    finally:
        later.over = True
        for number, handler in later.handlers.items():
            signal.signal(number, handler)
        for noted in later.came[:1]:
            later.handle(*noted)


@final
class _Later:
    """A handler that notes the first signal and hands on what comes after it. over: hands on all, should it still be set: a
    signal has come just when it was to be replaced."""

    def __init__(self, handlers: dict[signal.Signals, Any]) -> None:
        self.handlers, self.over = handlers, False
        self.came: list[tuple[int, FrameType | None]] = []

    def __call__(self, number: int, frame: FrameType | None) -> None:
        self.came.append((number, frame))
        if self.over or len(self.came) > 1:
            self.handle(number, frame)

    def handle(self, number: int, frame: FrameType | None) -> None:
        self.handlers[signal.Signals(number)](number, frame)


def _handler(number: signal.Signals) -> Any:
    handler = signal.getsignal(number)
    return handler.handlers[number] if isinstance(handler, _Later) and handler.over else handler
