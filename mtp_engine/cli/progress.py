"""Shows what the user is waiting for, on stderr."""

from threading import Timer
from types import TracebackType
from typing import final

from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TaskProgressColumn, TextColumn, TimeElapsedColumn

from mtp_engine.cli.output import console, one_line

_PATIENCE = 2.0  # seconds of silence before a wait is mentioned where there is no terminal


@final
class Waits:
    """A Progress callback (description, done, total or None).

    On a terminal: a bar that vanishes when the wait is over. Elsewhere: a line for each wait of more than two seconds.
    `close` ends the present wait, as does all of it being done; the next call begins another. quiet: nothing at all.
    """

    def __init__(self, *, quiet: bool = False, patience: float = _PATIENCE) -> None:
        self._quiet, self._patience = quiet, patience
        self._console = console(stderr=True)
        self._what: str | None = None
        self._bar: Progress | None = None
        self._task = TaskID(0)
        self._timer: Timer | None = None

    def __call__(self, what: str, done: int, total: int | None) -> None:
        if self._quiet:
            return
        if what != self._what:
            self.close()
            self._begin(what)
        if self._bar:
            self._bar.update(self._task, completed=done, total=total)
        if total and done >= total:
            self.close()

    def close(self) -> None:
        """Nothing is being waited for any more."""
        self._what = None
        if self._timer:
            self._timer.cancel()
            self._timer = None
        if self._bar:
            bar, self._bar = self._bar, None
            bar.stop()

    def __enter__(self) -> "Waits":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def _begin(self, what: str) -> None:
        self._what = what
        if not self._console.is_terminal:
            self._timer = Timer(self._patience, self._console.print, [f"{one_line(what)} ..."])
            self._timer.daemon = True
            self._timer.start()
            return
        self._bar = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24),
            TaskProgressColumn(),
            TimeElapsedColumn(),
            console=self._console,
            transient=True,
            redirect_stdout=False,
            redirect_stderr=False,
        )
        self._task = self._bar.add_task(one_line(what), total=None)
        self._bar.start()
