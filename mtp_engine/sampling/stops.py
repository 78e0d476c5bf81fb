"""Where an answer ends: limits, stop tokens, and stop strings over the text as it grows; what follows from its tokens."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, Protocol, final

from mtp_engine.sampling.masks import Constraint

FinishReason = Literal["stop", "length", "error", "timeout", "abort"]
"""stop: end of text, a stop token or a stop string. length: max_tokens or the context. error: it cannot go on (see its
message). timeout: its own time was up. abort: somebody cancelled it."""


class TextDecoder(Protocol):
    """Turns tokens into text as they come (text.stream.StreamDecoder)."""

    def push(self, ids: Iterable[int]) -> str: ...
    def flush(self) -> str: ...


NewDecoder = Callable[[], TextDecoder]


@final
@dataclass
class StopStrings:
    """The text of one answer, searched for its stop strings token by token.

    A stop may span the tokens of one step or of several: the text is searched from where a stop that ends in the new
    part could begin. A character that is unfinished is not text yet.
    """

    strings: Sequence[str]
    decoder: TextDecoder
    not_before: int = 0  # tokens (min_tokens) that must be there first; a stop that begins in them does not count
    text: str = ""  # so far; cut before the stop once there is one
    tokens: int = 0
    found: bool = False
    _first: int = 0  # where the part of the text begins in which stops count

    def __post_init__(self) -> None:
        self._longest, self._begins = max(map(len, self.strings)), frozenset(string[0] for string in self.strings)

    def push(self, token: int) -> bool:
        """Whether the answer ends with this token."""
        new = self.decoder.push([token])
        self.tokens += 1
        before, self.text = len(self.text), self.text + new
        if self.tokens <= self.not_before:
            self._first = len(self.text)
            return False
        start = max(self._first, before - self._longest + 1)
        found = [at for string in self.strings if (at := self.text.find(string, start)) >= 0]
        if found:
            self.text, self.found = self.text[: min(found)], True
        return self.found

    def finish(self) -> str:
        """The whole text once the answer has ended."""
        if not self.found:
            self.text += self.decoder.flush()
        return self.text

    def safe(self) -> int:
        """How many characters of `text` can no longer become part of a stop."""
        start = max(0, len(self.text) - self._longest + 1)
        for at, character in enumerate(self.text[start:], start):
            if character in self._begins and any(string.startswith(self.text[at:]) for string in self.strings):
                return at
        return len(self.text)


@final
@dataclass
class Ends:
    """All that ends one request."""

    limit: int
    tokens: frozenset[int]
    strings: StopStrings | None = None
    seen: int = field(default=0, init=False)

    def cut(self, tokens: Sequence[int]) -> tuple[int, FinishReason | None]:
        """How many of a step's tokens belong to the answer, and why it ends there if it does."""
        if self.strings is None and self.seen + len(tokens) < self.limit and self.tokens.isdisjoint(tokens):
            self.seen += len(tokens)  # as for most steps
            return len(tokens), None
        for index, token in enumerate(tokens):
            self.seen += 1
            if (self.strings is not None and self.strings.push(token)) or token in self.tokens:
                return index + 1, "stop"
            if self.seen == self.limit:
                return index + 1, "length"
        return len(tokens), None


@final
class VisibleText:
    """The text of one answer as it may be shown: what could still turn into a stop string is held back."""

    def __init__(self, decoder: TextDecoder, strings: StopStrings | None) -> None:
        self._decoder, self._strings, self._shown = decoder, strings, 0

    def push(self, tokens: Sequence[int], *, ended: bool) -> str:
        """What to show after a step's tokens, which `strings` has seen already."""
        if self._strings is None:
            return self._decoder.push(tokens) + (self._decoder.flush() if ended else "")
        text = self._strings.finish() if ended else self._strings.text[: self._strings.safe()]
        new, self._shown = text[self._shown :], max(self._shown, len(text))
        return new


@final
@dataclass(eq=False)
class Trail:
    """What follows from the tokens of an answer and is kept so that it need not be worked out anew at every step.

    Going over the same tokens again gives the same trail; that is how a request that was interrupted goes on.
    """

    ends: Ends
    visible: VisibleText | None = None  # None where nobody turns tokens into text
    constraint: Constraint | None = None

    def follow(self, tokens: list[int]) -> "Followed":
        """Add a step's tokens, one by one as plain decoding would: up to the end, or to one that the constraint fails for."""
        kept, reason, error = self._kept(tokens)
        text = self.visible.push(kept, ended=reason is not None) if self.visible else ""
        return Followed(kept, reason, text, error)

    def _kept(self, tokens: list[int]) -> tuple[list[int], FinishReason | None, str]:
        """What belongs to the answer, why it ends if it does, and what went wrong behind that."""
        if self.constraint is None:
            count, reason = self.ends.cut(tokens)
            return tokens[:count], reason, ""
        kept: list[int] = []
        for token in tokens:
            try:
                self.constraint.advance([token])
            except Exception as failure:
                return kept, None, str(failure) or type(failure).__name__
            kept.append(token)
            if reason := self.ends.cut([token])[1]:
                return kept, reason, ""
        return kept, None, ""


@final
class Followed(NamedTuple):
    """Of a step: the tokens that belong to the answer, why it ends if it does, the text to show for them, and what went
    wrong behind them."""

    tokens: list[int]
    reason: FinishReason | None
    text: str
    error: str
