"""Files of what was measured once on a machine, for its next starts."""

from contextlib import suppress
from pathlib import Path
from typing import Protocol, Self, TypeVar


class Measured(Protocol):
    """Something that is text in a file."""

    @classmethod
    def parse(cls, text: str) -> Self:
        """What `text` gave. Raises ValueError for anything else."""

    def text(self) -> str: ...


M = TypeVar("M", bound=Measured)


def read(kind: type[M], path: Path) -> M | None:
    """What was measured on an earlier day; None where there is no such file, or it is damaged."""
    try:
        return kind.parse(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def write(measured: Measured, path: Path) -> None:
    """Where that fails it is measured again next time."""
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(measured.text(), encoding="utf-8")
