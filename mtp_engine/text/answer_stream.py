"""Thoughts, text and tool calls told apart while an answer comes in: what `parse_answer` finds in the whole."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

from mtp_engine.text.tool_calls import CALL, END_THINK, THINK, ToolCall, read_call, schemas

_CALL_TAG = "<tool_call>"
_HEAD = re.compile(r"<tool_call>\s*<function=[^>\n]+>")
_TAIL = re.compile(r"</function>\s*</tool_call>")
_BEGUN = re.compile(r"<tool_call>\s*(?:<function=[^>\n]*)?")


@final
@dataclass(frozen=True)
class Part:
    """A piece of an answer: a thought, a text, or a whole call; the other two are empty."""

    text: str = ""
    thought: str = ""
    call: ToolCall | None = None


@final
class AnswerStream:
    """Takes an answer apart as it comes. Joined, the parts are those of `parse_answer`, however the text is cut up.

    A call is held back until it is whole, because one that is never finished is text.
    """

    def __init__(self, tools: Sequence[Mapping[str, Any]] = (), *, thinking: bool = False) -> None:
        """See parse_answer."""
        self._schemas = schemas(tools)
        self._state = "open"  # then "thought", if it begins with one, and "text"
        self._thinking = thinking
        self._held = ""  # not given out yet
        self._blank = ""  # white space that only counts if something follows
        self._begun = False  # something of the present state was given out
        self._searched = 0  # characters of _held that hold no end of the call it begins with

    def push(self, text: str) -> list[Part]:
        """What can be said of the answer now."""
        self._held += text
        return self._advance(ended=False)

    def flush(self) -> list[Part]:
        """The rest, once the answer has ended."""
        return self._advance(ended=True)

    def _advance(self, *, ended: bool) -> list[Part]:
        parts: list[Part] = []
        if self._state == "open" and not self._open(ended):
            return parts
        if self._state == "thought":
            thought, mark, rest = self._held.partition(END_THINK)
            kept = 0 if mark or ended else _overlap(thought, END_THINK)
            piece, self._held = thought[: len(thought) - kept], thought[len(thought) - kept :]
            if shown := self._strip(piece):
                parts.append(Part(thought=shown))
            if mark:
                self._state, self._held, self._blank, self._begun = "text", rest, "", False
        if self._state == "text":
            self._read_text(parts, ended)
        return parts

    def _open(self, ended: bool) -> bool:
        """Find out how the answer begins; False while that cannot be told."""
        begin = self._held.lstrip()
        if not ended and len(begin) < len(THINK) and THINK.startswith(begin):
            return False
        tagged = begin.startswith(THINK)
        if tagged:
            self._held = begin[len(THINK) :]
        self._state = "thought" if tagged or self._thinking else "text"
        return True

    def _read_text(self, parts: list[Part], ended: bool) -> None:
        while self._held:
            at = self._held.find(_CALL_TAG)
            if at < 0:
                kept = 0 if ended else _overlap(self._held, _CALL_TAG)
                self._give(parts, len(self._held) - kept)
                return
            self._give(parts, at)
            if call := CALL.match(self._held) if self._may_end() else None:
                parts.append(Part(call=read_call(call, self._schemas)))
                self._held, self._searched = self._held[call.end() :], 0
                continue
            begun = _BEGUN.match(self._held)
            waits = _HEAD.match(self._held) or (begun and begun.end() == len(self._held))
            tag = begun and "<function=".startswith(self._held[begun.end() :])
            if (waits or tag) and not ended:
                return
            self._give(parts, 1)  # this is no call

    def _may_end(self) -> bool:
        """Whether an end of a call has come since it was last looked for."""
        found = _TAIL.search(self._held, max(0, self._searched))
        tail = self._held.rfind("</function>")
        self._searched = tail if tail >= 0 else max(0, len(self._held) - len("</function>"))
        return found is not None

    def _give(self, parts: list[Part], size: int) -> None:
        piece, self._held = self._held[:size], self._held[size:]
        if size:
            self._searched = 0
        if shown := self._strip(piece):
            parts.append(Part(text=shown))

    def _strip(self, piece: str) -> str:
        """The piece without white space at either end of the whole, as far as that can be told."""
        if not self._begun:
            piece = piece.lstrip()
        text = self._blank + piece
        shown = text.rstrip()
        if not shown:
            self._blank = text
            return ""
        self._blank, self._begun = text[len(shown) :], True
        return shown


def _overlap(text: str, tag: str) -> int:
    """How many characters at the end of `text` may be the beginning of `tag`."""
    return next((size for size in range(min(len(tag) - 1, len(text)), 0, -1) if text.endswith(tag[:size])), 0)
