"""Work that Ctrl-C must not leave half-way."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def uninterrupted() -> Iterator[None]:
    """A signal that comes inside is handled at the end: a step that is left half-way is lost on all ranks. The second one is
    handled at once."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    came: list[tuple[int, FrameType | None]] = []

    def note(number: int, frame: FrameType | None) -> None:
        came.append((number, frame))
        handler = handlers[signal.Signals(number)]
        if len(came) > 1 and callable(handler):
            handler(number, frame)

    held = [number for number, handler in handlers.items() if callable(handler)]
    for number in held:
        signal.signal(number, note)
    try:
        yield
    finally:
        for number in held:
            signal.signal(number, handlers[number])
        for last, frame in came[:1]:
            handler = handlers[signal.Signals(last)]
            assert callable(handler)
            handler(last, frame)
