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
    """Where an answer stands, and after drafts, until it leaves that.

    Copies of a matcher share a lexer, which one thread uses at a time. So an answer may have several matchers that share none,
    among which the branches of a tree are spread.
    """

    def __init__(self, roots: Sequence[Any], eos: Collection[int]) -> None:
        """roots: fresh ones, which agree."""
        self._roots, self._eos, self._next = roots, eos, 0
        self._reached: dict[tuple[int, ...], Any] = {(): roots[0]}
        self._extended = set[tuple[int, ...]]()  # those of which the first child was asked for

    def at(self, path: tuple[int, ...]) -> Any:
        """The matcher after `path`; None after the end, and where the grammar forbids it."""
        if path not in self._reached:
            self._reached[path] = self._extend(path) if path[-1] not in self._eos else None
        return self._reached[path]

    def _extend(self, path: tuple[int, ...]) -> Any:
        matcher = self.at(path[:-1])
        if matcher is None:
            return None
        tokens = path[-1:]
        if path[:-1] in self._extended and len(self._roots) > 1:
            self._next = (self._next + 1) % len(self._roots)
            matcher, tokens = self._roots[self._next], path
        self._extended.add(path[:-1])
        matcher = matcher.deep_copy()
        return matcher if matcher.try_consume_tokens(list(tokens)) == len(tokens) else None

    @property
    def complete(self) -> bool:
        return bool(self._roots[0].is_accepting())

    def advance(self, token: int) -> str:
        """What is wrong with the token; empty if the answer has gone on with it."""
        self._extended = set()
        if token in self._eos:
            self._reached = {(): None}
        if self._reached[()] is None:
            return ""
        self._reached = {(): self._roots[0]}
        for matcher in self._roots:
            if not matcher.consume_token(token):
                return str(matcher.get_error()) or "it is not allowed"
        return ""
