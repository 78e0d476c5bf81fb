"""llguidance's matchers of one answer: where it stands, and where it would stand after drafts."""

from collections.abc import Collection, Sequence
from typing import Any, final

from torch import Tensor


@final
class Pool:
    """llguidance's threads (Workers)."""

    def __init__(self, executor: Any) -> None:
        self._executor = executor

    def write(self, states: list[tuple[Any, int]], masks: Tensor) -> None:
        """states: matchers, none of them twice."""
        assert masks.is_contiguous()
        self._executor.unsafe_compute_mask_ptr(states, masks.data_ptr(), 4 * masks.shape[1], len(masks))


@final
class Matchers:
    """Where an answer stands, and after drafts, until it leaves that."""

    def __init__(self, matcher: Any, eos: Collection[int]) -> None:
        self._now, self._eos = matcher, eos
        self._reached: dict[tuple[int, ...], Any] = {(): matcher}

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
        known = next((n for n, token in enumerate(tokens) if token < 0 or token in self._eos), len(tokens))
        fit = int(matcher.validate_tokens(list(tokens[:known])))
        if fit < known or known == len(tokens) or tokens[known] not in self._eos:
            return fit
        ended = self.at(
            (*path, *tokens[:known])
        )  # asked itself, as one that has stopped takes no token, not even an end
        return len(tokens) if ended is not None and ended.is_accepting() else fit

    @property
    def complete(self) -> bool:
        return bool(self._now.is_accepting())

    def advance(self, token: int) -> str:
        """What is wrong with the token; empty if the answer has gone on with it."""
        over = self._reached[()] is None or token in self._eos
        self._reached = {(): None if over else self._now}
        if over or self._now.consume_token(token):
            return ""
        return str(self._now.get_error()) or "it is not allowed"
