"""What a loop tells the other ranks, the processes that run the same loop over their parts of the same model."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

from mtp_engine.runtime.request import Request
from mtp_engine.sampling.stops import FinishReason


class Ranks(Protocol):
    """All ranks decide alike, since all compute the same tokens. So only what comes from outside need be told: requests that
    join between two steps, and those that are ended there."""

    def added(self, requests: Sequence[Request], cancel: Callable[[Request], None]) -> None:
        """They were queued, in this order. cancel: ends a request before the next step."""

    def ending(self, request: Request, reason: FinishReason) -> AbstractContextManager[None]:
        """Around its end, at which the ranks may compute what is kept of it."""

    def step(self) -> AbstractContextManager[None]:
        """Around a step, which must not be left half-way."""

    def begin(self, running: Sequence[Request], times: tuple[tuple[Any, ...], ...]) -> None:
        """A step begins with what was told so far. running: to find out whether all ranks are in the same state. times: of
        earlier steps, from which planners learn: all ranks go by those of rank 0. Raises EngineError if a rank is lost."""

    def check(self) -> None:
        """A step has landed. Raises EngineError if a rank was lost meanwhile, so that what it gave means nothing."""

    def scored(self, tokens: Sequence[int], start: int, most: int) -> None:
        """A text is scored, see DecodeLoop.score."""

    def failed(self, error: BaseException) -> str:
        """A step broke off here. Returns why nothing can go on, as the other ranks are in the midst of it; empty if it can."""

    def alike(self) -> AbstractContextManager[None]:
        """Around what every rank does by itself, in the same order, so that nothing need be told."""

    @property
    def lost(self) -> str: ...  # why nothing can go on since a rank has ended; empty if it can

    def close(self) -> None:
        """The loop is not used any more."""


class Alone:
    """There are no others that have to be told."""

    def added(self, requests: Sequence[Request], cancel: Callable[[Request], None]) -> None:
        pass

    def ending(self, request: Request, reason: FinishReason) -> AbstractContextManager[None]:
        return nullcontext()

    def step(self) -> AbstractContextManager[None]:
        return nullcontext()

    def begin(self, running: Sequence[Request], times: tuple[tuple[Any, ...], ...]) -> None:
        pass

    def alike(self) -> AbstractContextManager[None]:
        return nullcontext()

    def check(self) -> None:
        pass

    def scored(self, tokens: Sequence[int], start: int, most: int) -> None:
        pass

    lost = ""

    def failed(self, error: BaseException) -> str:
        return ""

    def close(self) -> None:
        pass
