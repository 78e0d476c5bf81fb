"""What rank 0 tells the other ranks, see lead.py."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, final

from mtp_engine.config import SamplingParams, Structure, TreeShape
from mtp_engine.parallel.codec import Codec
from mtp_engine.runtime.request import Request
from mtp_engine.sampling.batch import Plan
from mtp_engine.sampling.stops import FinishReason


@final
@dataclass(frozen=True)
class Joined:
    """A request that was queued. params: with its seed; said: tokens that it begins with."""

    prompt: list[int]
    params: SamplingParams
    said: list[int]

    @classmethod
    def of(cls, request: Request) -> "Joined":
        return cls(request.prompt, replace(request.params, seed=request.seed, timeout=None), request.output)


@final
@dataclass(frozen=True)
class Left:
    """After these have joined loop `loop`, its request `number` is ended from outside."""

    loop: int
    joined: tuple[Joined, ...]
    number: int
    reason: FinishReason


@final
@dataclass(frozen=True)
class Step:
    """Loop `loop` makes its step `number`, after these have joined. state: of rank 0's running requests, see `digest`.
    times: that rank 0 measured since its last one, see Ranks.begin."""

    loop: int
    joined: tuple[Joined, ...]
    number: int
    state: int
    times: tuple[tuple[Any, ...], ...]


@final
@dataclass(frozen=True)
class Score:
    """Loop `loop` scores a text, see DecodeLoop.score."""

    loop: int
    tokens: tuple[int, ...]
    start: int
    most: int


@final
@dataclass(frozen=True)
class Open:
    """Another loop over the same weights, see Engine.undrafted."""

    loop: int
    changes: Mapping[str, Any]


@final
@dataclass(frozen=True)
class Shut:
    """A loop is not used any more; after loop 0 there is none."""

    loop: int


Message = Step | Left | Score | Open | Shut
CODEC = Codec(Joined, Left, Step, Score, Open, Shut, SamplingParams, Structure, TreeShape, Plan)
