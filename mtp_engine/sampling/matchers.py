"""llguidance's matchers of one answer: where it stands, and where it would stand after drafts."""

from collections.abc import Collection, Sequence
from typing import Any, final


def _canonical(matcher: Any, tokens: Sequence[int]) -> int:
    """How many of these tokens, which a grammar can take one after the other, masks have: where tokens are forced, llguidance's
    have the one that writes the text in the tokenizer's own way, and others that write the same text are none of theirs."""
    for number, token in enumerate(tokens):
        if number:
            matcher = matcher.deep_copy() if number == 1 else matcher
            matcher.consume_token(tokens[number - 1])
        forced = matcher.compute_ff_bytes() and matcher.compute_ff_tokens()
        if forced and forced[0] != token:
            return number
    return len(tokens)


@final
class Matchers:
    """Where an answer stands, and after drafts, until it leaves that."""

    def __init__(self, matcher: Any, eos: Collection[int]) -> None:
        self._now, self._eos = matcher, eos
        self._reached: dict[tuple[int, ...], Any] = {(): matcher}
        self._idle = 0  # tokens since it is over

    def at(self, path: tuple[int, ...]) -> Any:
        """The matcher after `path`; None after the end, where the grammar forbids it, and behind a token below 0, with which
        a step in flight says that none was left."""
        if path not in self._reached:
            token, matcher = path[-1], None
            before = self.at(path[:-1]) if token >= 0 and token not in self._eos else None
            if before is not None and before.validate_tokens([token]):  # to ask takes a tenth of what a copy takes
                matcher = before.deep_copy()  # shares the lexer
                matcher = matcher if matcher.try_consume_tokens([token]) else None
            self._reached[path] = matcher
        return self._reached[path]

    def fits(self, path: tuple[int, ...], tokens: Sequence[int]) -> int:
        """How many of the tokens may follow `path`, one after the other; any may behind an end."""
        matcher = self.at(path)
        if matcher is None:
            return len(tokens)
        known = self._ordinary(tokens)
        fit = _canonical(matcher, tokens[: matcher.validate_tokens(tokens[:known])])
        if fit < known or known == len(tokens) or tokens[known] not in self._eos:
            return fit
        ended = self.at(
            (*path, *tokens[:known])
        )  # asked itself, as one that has stopped takes no token, not even an end
        return len(tokens) if ended is not None and ended.is_accepting() else fit

    def _ordinary(self, tokens: Sequence[int]) -> int:
        """How many come before an end of text, and before a token below 0, which says that none was left."""
        for number, token in enumerate(tokens):
            if token < 0 or token in self._eos:
                return number
        return len(tokens)

    @property
    def over(self) -> bool:
        """Whether the answer has ended."""
        return self._reached[()] is None

    def complete(self, back: int = 0) -> bool:
        """Whether it matched as it was, or had ended, so many tokens ago."""
        if back < self._idle:
            return True
        if back == self._idle:
            return bool(self._now.is_accepting())
        matcher = self._now.deep_copy()
        return bool(matcher.rollback(back - self._idle) and matcher.is_accepting())

    def take(self, tokens: Sequence[int]) -> int:
        """The answer goes on with as many of the tokens as are quickly taken. Returns how many those are."""
        known = 0 if self.over else self._ordinary(tokens)
        taken = int(self._now.try_consume_tokens(tokens[:known])) if known else 0
        if taken:
            self._reached = {(): self._now}
        return taken

    def advance(self, token: int) -> str:
        """What is wrong with the token; empty if the answer has gone on with it. It ends with an end of text."""
        over = self.over or not self._ordinary([token])
        self._reached = {(): None if over else self._now}
        self._idle += over
        if over or self._now.consume_token(token):
            return ""
        return str(self._now.get_error()) or "it is not allowed"
