"""Where results go: text to stdout as it comes, JSON to a file or to stdout, people's notes to stderr."""

import json
import os
import re
import stat
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import click
from rich.console import Console, RenderableType

from mtp_engine.cli.thoughts import ThoughtSplitter
from mtp_engine.errors import EngineError

_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # C0 without tab and newline, delete, C1


def visible(text: str) -> str:
    """`text` with control characters spelled out: a model must not be able to steer the user's terminal."""
    return _CONTROL.sub(lambda match: f"\\x{ord(match[0]):02x}", text)


def one_line(text: str) -> str:
    """A message as one line that is safe to show."""
    return visible(" ".join(text.split()))


def console(*, stderr: bool = False) -> Console:
    """A console that shows strings as they are: no markup, no emoji codes, no highlighting.

    Results that go to a file or a pipe keep to COLUMNS if that is set, and else are not wrapped, so that a path stays one
    word.
    """
    width = None if stderr or sys.stdout.isatty() or os.environ.get("COLUMNS") else 4096
    return Console(stderr=stderr, markup=False, emoji=False, highlight=False, width=width)


def show(what: RenderableType, out: Console) -> None:
    """Print a table; where that is no terminal as plain lines, without the spaces that fill its columns."""
    if out.is_terminal:
        out.print(what)
        return
    with out.capture() as captured:
        out.print(what)
    out.file.write("".join(f"{line.rstrip()}\n" for line in captured.get().splitlines()))
    out.file.flush()


def note(text: str) -> None:
    """A line for people, on stderr."""
    console(stderr=True).print(text, soft_wrap=not sys.stderr.isatty(), style="dim" if sys.stderr.isatty() else None)


@final
class TextWriter:
    """Writes generated text to stdout at once, as bytes: exactly the text, unless stdout is a terminal.

    On a terminal control characters are spelled out, drafted pieces are coloured if `colour` is set, and thoughts are
    dimmed. A character that stdout's encoding lacks becomes `?`.
    """

    def __init__(self, *, colour: bool = False, thinking: bool = False) -> None:
        """thinking: the prompt ended in `<think>`, so the text begins with thoughts."""
        self._stream = sys.stdout.buffer
        self._encoding = sys.stdout.encoding
        self._terminal = sys.stdout.isatty()
        self._colour = colour and self._terminal
        self._thoughts = ThoughtSplitter(inside=thinking)

    def write(self, text: str, *, drafted: bool = False) -> None:
        """Raises OSError when stdout cannot take it."""
        if self._terminal:
            self._style(self._thoughts.push(text), drafted)
        else:
            self._send(text)

    def end(self) -> None:
        """The text is complete: what was held back goes out, and a newline."""
        if self._terminal:
            self._style(self._thoughts.flush(), False)
        self._send("\n")

    def _style(self, pieces: list[tuple[str, bool]], drafted: bool) -> None:
        for text, thought in pieces:
            colour = "green" if self._colour and drafted else None
            shown = visible(text)
            self._send(click.style(shown, fg=colour, dim=thought or None) if colour or thought else shown)

    def _send(self, text: str) -> None:
        self._stream.write(text.encode(self._encoding, "replace"))
        self._stream.flush()


@final
@dataclass(frozen=True)
class JsonTarget:
    """Where a JSON document goes; made by `check`. path None is stdout."""

    path: Path | None

    @classmethod
    def check(cls, text: str) -> "JsonTarget":
        """The target that a user named, `-` for stdout. Raises EngineError if it cannot be written."""
        if text == "-":
            return cls(None)
        path = Path(text).expanduser()
        try:
            if path.is_dir():
                raise EngineError(f"{text}: is a folder; --json needs the name of a file")
            if path.exists() and not os.access(path, os.W_OK):
                raise EngineError(f"{text}: may not be written; choose another file for --json")
            target = cls(path)
            if not target._is_device():
                target._beside().open("xb").close()
                target._beside().unlink()
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise EngineError(f"{text}: cannot be written: {reason}; choose another file for --json") from None
        return target

    def write(self, value: Any) -> None:
        """Write whole or not at all. ASCII only, so every reader and terminal gets it right. Raises OSError."""
        data = (json.dumps(value, indent=2) + "\n").encode("ascii")
        if self.path is None:
            sys.stdout.buffer.write(data)
            sys.stdout.buffer.flush()
        elif self._is_device():
            self.path.write_bytes(data)
        else:
            self._replace(data)

    def _replace(self, data: bytes) -> None:
        assert self.path is not None
        fresh, real = self._beside(), Path(os.path.realpath(self.path))
        try:
            fresh.write_bytes(data)
            if real.exists():
                fresh.chmod(stat.S_IMODE(real.stat().st_mode))
            os.replace(fresh, real)
        finally:
            fresh.unlink(missing_ok=True)

    def _beside(self) -> Path:
        """A temporary name in the folder of the real file, so that a link stays one."""
        return Path(os.path.realpath(self.path or "")).parent / f".mtp-engine-{os.getpid()}.tmp"

    def _is_device(self) -> bool:
        """Whether it is there and no regular file (/dev/null, a pipe): such a thing is written to, never replaced."""
        return self.path is not None and self.path.exists() and not self.path.is_file()
