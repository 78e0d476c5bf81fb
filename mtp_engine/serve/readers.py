"""What an answer's text is to its client, as it comes: text, thoughts, tool calls."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, final

from mtp_engine.text.answer_stream import AnswerStream, Part

_NAME, _ARGUMENTS = '{"name": ', ', "arguments": '


@final
@dataclass(frozen=True)
class Delta:
    """A piece of an answer. name: a call begins; arguments: more of the JSON of the call that began last."""

    content: str = ""
    thought: str = ""
    name: str = ""
    arguments: str = ""


class Reader(Protocol):
    """Takes the text of one answer apart. What the pieces say, joined, does not depend on how the text was cut up."""

    def push(self, text: str) -> list[Delta]: ...
    def flush(self) -> list[Delta]: ...


@final
class PlainReader:
    """The text as it is."""

    def push(self, text: str) -> list[Delta]:
        return [Delta(content=text)] if text else []

    def flush(self) -> list[Delta]:
        return []


@final
class TaggedReader:
    """Thoughts and calls in the model's own tags."""

    def __init__(self, tools: Sequence[Mapping[str, Any]], *, thinking: bool) -> None:
        """See text.tool_calls.parse_answer."""
        self._stream = AnswerStream(tools, thinking=thinking)

    def push(self, text: str) -> list[Delta]:
        return [delta for part in self._stream.push(text) for delta in _deltas(part)]

    def flush(self) -> list[Delta]:
        return [delta for part in self._stream.flush() for delta in _deltas(part)]


def _deltas(part: Part) -> list[Delta]:
    if part.call is None:
        return [Delta(content=part.text, thought=part.thought)]
    return [Delta(name=part.call.name), Delta(arguments=json.dumps(part.call.arguments, ensure_ascii=False))]


@final
class CallReader:
    """An answer that is one call {"name": ..., "arguments": {...}}, written under its schema."""

    def __init__(self) -> None:
        self._held, self._named = "", False

    def push(self, text: str) -> list[Delta]:
        self._held += text
        deltas = [] if self._named else self._name()
        if self._named and len(self._held) > 1:  # the last character may be the brace of the call itself
            deltas.append(Delta(arguments=self._held[:-1]))
            self._held = self._held[-1:]
        return deltas

    def flush(self) -> list[Delta]:
        """What is left: nothing but that brace, unless the answer was cut off."""
        if not self._named or self._held == "}":
            return []
        return [Delta(arguments=self._held)]

    def _name(self) -> list[Delta]:
        head, found, rest = self._held.partition(_ARGUMENTS)
        if not found:
            return []
        self._named, self._held = True, rest
        return [Delta(name=json.loads(head.removeprefix(_NAME)))]
