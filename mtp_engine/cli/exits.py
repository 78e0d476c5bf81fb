"""Exit codes, and the signals that end a command as Ctrl-C does: what is under way is tidied up first."""

import signal
import threading
from types import FrameType
from typing import Any, NoReturn, final

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


@final
class EndingSignals:
    """Inside, SIGTERM and SIGHUP raise `Terminated`, and Ctrl-C KeyboardInterrupt as ever, unless somebody has another use
    for them (as nohup has). `last` is the one that came last, or None: what we raise while a package is imported may be
    swallowed there, and come back as an ImportError."""

    def __init__(self) -> None:
        self.last: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "EndingSignals":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
                if signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):
                    self._before[number] = signal.signal(number, self._end)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _end(self, number: int, frame: FrameType | None) -> NoReturn:
        self.last = number
        raise KeyboardInterrupt if number == signal.SIGINT else Terminated(number)
