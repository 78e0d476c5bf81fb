"""What the kit asks an engine, what it gets, and what it says about it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import final

from mtp_engine.config import SamplingParams
from mtp_engine.sampling.logprobs import TokenLogprob


@final
@dataclass(frozen=True)
class Case:
    """One prompt, as token ids, and how to decode it (n = 1, with a seed)."""

    prompt: tuple[int, ...]
    params: SamplingParams


@final
@dataclass(frozen=True)
class Sample:
    """An answer. steps: how many tokens each step emitted, where the engine tells; they sum to len(tokens)."""

    tokens: tuple[int, ...]
    text: str = ""
    finish_reason: str = ""
    logprobs: tuple[TokenLogprob, ...] = ()
    steps: tuple[int, ...] | None = None

    def depth(self, index: int) -> int:
        """The tree depth at which token `index` was chosen: its index within its step; 0 without `steps`."""
        start = 0
        for count in self.steps or ():
            if index < start + count:
                return index - start
            start += count
        return 0


Generate = Callable[[Sequence[Case]], list[Sample]]
"""Answers all cases, in order. Raises Unsupported for parameters that the engine refuses."""


class Unsupported(Exception):
    """The engine says openly that it cannot do what was asked: no breach, but noted."""


@final
@dataclass(frozen=True)
class Verdict:
    """The outcome of one check. passed None: open, because the engine does not support what the check needs or
    too few tokens showed it."""

    check: str
    passed: bool | None
    detail: str

    def __str__(self) -> str:
        return f"{ {True: 'ok', False: 'FAILED', None: 'open'}[self.passed] }  {self.check}: {self.detail}"


def first_difference(a: Sequence[int], b: Sequence[int]) -> int | None:
    """Where two token sequences part; the length of the shorter one if it is a prefix; None if they are equal."""
    for index, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return index
    return None if len(a) == len(b) else min(len(a), len(b))
