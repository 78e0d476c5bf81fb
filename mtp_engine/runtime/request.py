"""Requests on their way, and those of one step together."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import final

import torch
from torch import Tensor

from mtp_engine.config import SamplingParams
from mtp_engine.runtime.limits import TreeLimits
from mtp_engine.runtime.stats import GenerationStats
from mtp_engine.sampling.batch import SamplingBatch
from mtp_engine.sampling.logprobs import TokenLogprob
from mtp_engine.sampling.masks import Constraint, Guide
from mtp_engine.sampling.processors import processes
from mtp_engine.sampling.stops import Ends, FinishReason


@final
@dataclass(eq=False)
class Request:
    """A prompt on its way: its slot, what it has emitted, and its statistics."""

    prompt: list[int]
    params: SamplingParams
    seed: int
    slot: int
    ends: Ends
    stats: GenerationStats
    started: float  # on the loop's clock
    output: list[int] = field(default_factory=list)
    drafted: list[bool] = field(default_factory=list)  # per output token: an accepted draft, not the main model's own
    logprobs: list[TokenLogprob] = field(default_factory=list)  # per output token, where they were asked for
    finish_reason: FinishReason | None = None
    constraint: Constraint | None = None

    @property
    def length(self) -> int:
        """Tokens whose KV is cached: all but the last."""
        return len(self.prompt) + len(self.output) - 1


@final
@dataclass(frozen=True)
class StepOutput:
    """What one step emitted for one request: at least one token."""

    request: Request
    tokens: list[int]
    drafted: list[bool]


@final
@dataclass(frozen=True)
class Members:
    """The running requests, until one joins or leaves."""

    requests: tuple[Request, ...]
    slots: Tensor  # [B] int64
    sampling: SamplingBatch
    guide: Guide | None = None
    limits: TreeLimits | None = None

    @classmethod
    def build(cls, requests: Sequence[Request], device: torch.device) -> "Members":
        params = [request.params for request in requests]
        slots = torch.tensor([request.slot for request in requests], device=device)
        sampling = SamplingBatch.build(params, [request.seed for request in requests], device)
        guide = Guide.build([request.constraint for request in requests])
        return cls(tuple(requests), slots, sampling, guide, TreeLimits.build(params, device))

    @property
    def logprobs(self) -> int:
        """How many best tokens are to be named at most; -1 if nobody wants log-probabilities."""
        return max((-1 if r.params.logprobs is None else r.params.logprobs for r in self.requests), default=-1)

    @cached_property
    def plain(self) -> bool:
        """A step is the same operations on the device for any such requests, and needs nothing of the host: it can be a
        CUDA graph, and the next one can begin before its tokens are seen. Other steps run one by one."""
        processed = any(processes(request.params) for request in self.requests)
        return not processed and self.guide is None and self.limits is None and self.logprobs < 0
