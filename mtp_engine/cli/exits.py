"""Exit codes, and the signals that end a command as Ctrl-C does: what is under way is tidied up first."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn, final

INTERNAL = 1  # a fault of this program, a failed check, or nobody reads our output any more
USER = 2  # something the user can mend
INCOMPLETE = 3  # the answer was cut off before it matched its structure
DIFFERENT = 4  # the tokens are not those that they must be


@final
class Terminated(KeyboardInterrupt):
    """A signal asked us to end; `number` says which."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number


def interrupt_code(error: BaseException | None) -> int:
    """The exit code after Ctrl-C or a signal: 128 and its number, as a shell has it."""
    return 128 + (error.number if isinstance(error, Terminated) else signal.SIGINT)


@contextmanager
def ending_signals() -> Iterator[None]:
    """Inside, SIGTERM and SIGHUP raise `Terminated`, unless somebody has another use for them (as nohup has)."""
    numbers = [signal.SIGTERM, signal.SIGHUP] if threading.current_thread() is threading.main_thread() else []
    ours = [number for number in numbers if signal.getsignal(number) is signal.SIG_DFL]
    for number in ours:
        signal.signal(number, _end)
    try:
        yield
    finally:
        for number in ours:
            signal.signal(number, signal.SIG_DFL)


def _end(number: int, frame: FrameType | None) -> NoReturn:
    raise Terminated(number)
