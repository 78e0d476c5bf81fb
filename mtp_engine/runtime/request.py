"""Requests on their way, and those of one step together."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from typing import final

import torch
from torch import Tensor

from mtp_engine.config import SamplingParams
from mtp_engine.runtime.limits import TreeLimits
from mtp_engine.runtime.stats import GenerationStats
from mtp_engine.sampling.batch import SamplingBatch, to_device
from mtp_engine.sampling.logprobs import TokenLogprob
from mtp_engine.sampling.masks import Constraint, Guide
from mtp_engine.sampling.processors import NO_TOKEN, processes
from mtp_engine.sampling.stops import Ends, FinishReason, VisibleText

NOTHING_ALLOWED = (
    "no token is left that its parameters allow: structure, bad_words, allowed_token_ids, logit_bias and min_tokens "
    "contradict each other here"
)


@final
@dataclass(eq=False)
class Trail:
    """What follows from the tokens of an answer and is kept so that it need not be worked out anew at every step.

    Going over the same tokens again gives the same trail; that is how a request that was interrupted goes on.
    """

    ends: Ends
    visible: VisibleText | None = None  # None where nobody turns tokens into text
    constraint: Constraint | None = None

    def follow(self, tokens: Sequence[int]) -> "Followed":
        """Add a step's tokens, one by one as plain decoding would: up to the end, or to one that the constraint fails for."""
        kept: list[int] = []
        reason, error = None, ""
        for token in tokens:
            try:
                if self.constraint:
                    self.constraint.advance([token])
            except Exception as failure:
                error = str(failure) or type(failure).__name__
                break
            kept.append(token)
            if reason := self.ends.cut([token])[1]:
                break
        text = self.visible.push(kept, ended=reason is not None) if self.visible else ""
        return Followed(kept, reason, text, error)


@final
@dataclass(frozen=True)
class Followed:
    """Of a step: the tokens that belong to the answer, why it ends if it does, the text to show for them, and what went
    wrong behind them."""

    tokens: list[int]
    reason: FinishReason | None
    text: str
    error: str


@final
@dataclass(eq=False)
class Request:
    """A prompt on its way: waiting, reading its prompt, decoding, or ended.

    `prompt`, `seed` and `output` say all there is to know of its text; everything else can be made again from them, and
    is when a request is interrupted (`rewind`).
    """

    prompt: list[int]
    params: SamplingParams
    seed: int
    new_trail: Callable[[], Trail]
    stats: GenerationStats
    limit: int  # tokens it may emit
    deadline: float = float("inf")  # of the scheduler's clock
    sink: "Callable[[StepOutput], None] | None" = None  # called with everything that is emitted
    others: "tuple[Request, ...]" = ()  # the further answers to the same prompt, where n > 1
    number: int = 0  # in order of arrival
    arrived: float = 0.0  # on the loop's clock
    slot: int = -1  # its row in caches and tables while it runs
    read: int = 0  # tokens of `known` whose chunk was launched
    decoding: bool = False  # all of them are
    failures: int = 0  # steps in a row that broke off with it
    output: list[int] = field(default_factory=list)
    drafted: list[bool] = field(default_factory=list)  # per output token: an accepted draft, not the main model's own
    logprobs: list[TokenLogprob] = field(default_factory=list)  # per output token, where they were asked for
    text: str = ""  # of the answer, as it may be shown: without special tokens, cut before a stop string
    finish_reason: FinishReason | None = None
    error: str = ""  # what went wrong, where finish_reason is "error"
    _seen: int = 0  # tokens and characters that `unseen` has given
    _shown: int = 0
    _closed: bool = False

    def __post_init__(self) -> None:
        self.trail = self.new_trail()

    @property
    def length(self) -> int:
        """Tokens whose KV is cached once the prompt is read: all but the last."""
        return len(self.prompt) + len(self.output) - 1

    @property
    def known(self) -> list[int]:
        return self.prompt + self.output

    def take(self, tokens: Sequence[int], failed: Mapping[tuple[int, ...], str]) -> int:
        """Add what a step emitted, all but the last being accepted drafts. Returns how many belong to the answer.

        NO_TOKEN stands where its parameters left nothing to choose, or its structure failed (`failed` says how, by the
        tokens in front); there the request ends with an error.
        """
        said = list(tokens[: tokens.index(NO_TOKEN)] if NO_TOKEN in tokens else tokens)
        step = self.trail.follow(said)
        error = step.error
        if not error and len(said) < len(tokens):
            error = failed.get(tuple(said), NOTHING_ALLOWED)
        self.output += step.tokens
        self.drafted += [index < len(tokens) - 1 for index in range(len(step.tokens))]
        del self.logprobs[len(self.output) :]
        self.text += step.text
        if step.reason is None and error:
            self.end("error", error)
        else:
            self.finish_reason = step.reason
        return len(step.tokens)

    def end(self, reason: FinishReason, error: str = "") -> None:
        """End it between two steps, with what it has said so far."""
        if self.trail.visible:
            with suppress(Exception):  # the text failed before; the tokens are right
                self.text += self.trail.visible.push([], ended=True)
        del self.logprobs[len(self.output) :]
        self.finish_reason, self.error = reason, error

    def rewind(self) -> None:
        """Back to before it ran, with what it has said: `output` is right, whatever else was interrupted is not.

        Ends it with an error where its structure or its text cannot be made again.
        """
        self.slot, self.read, self.decoding = -1, 0, False
        self.drafted = [*self.drafted, *[False] * len(self.output)][: len(self.output)]
        del self.logprobs[len(self.output) :]
        try:
            trail = self.new_trail()
            again = trail.follow(self.output)
            error = again.error
        except Exception as failure:
            error = str(failure) or type(failure).__name__
        if error:
            self.end("error", error)
        else:
            self.trail, self.finish_reason, self.text = trail, again.reason, again.text

    def unseen(self) -> "StepOutput | None":
        """What has come since the last call, the end included."""
        tokens, drafted, text = self.output[self._seen :], self.drafted[self._seen :], self.text[self._shown :]
        if self._closed or not (tokens or self.finish_reason):
            return None
        self._seen, self._shown, self._closed = len(self.output), len(self.text), self.finish_reason is not None
        return StepOutput(self, tokens, drafted, text, self.finish_reason)


@final
@dataclass(frozen=True)
class StepOutput:
    """What one step emitted for one request. `finish_reason` comes with its last one, which may have no tokens."""

    request: Request
    tokens: list[int]
    drafted: list[bool]
    text: str
    finish_reason: FinishReason | None


@final
@dataclass(frozen=True)
class PromptChunk:
    """Tokens start..stop-1 of request.known, which is read up to its last token: that is the root of the first tree."""

    request: Request
    start: int
    stop: int

    @property
    def left(self) -> int:
        """Tokens to read behind the chunk."""
        return self.request.length - self.stop


@final
@dataclass(frozen=True)
class Members:
    """The requests that decode together, until one joins or leaves."""

    requests: tuple[Request, ...]
    trails: tuple[Trail, ...]  # theirs; a request that was queued again has another one, and another slot
    slots: Tensor  # [B] int64
    sampling: SamplingBatch
    guide: Guide | None = None
    limits: TreeLimits | None = None
    speculates: bool = True  # False: nobody wants drafts, so nothing is drafted and one row each is verified

    @classmethod
    def of(cls, requests: tuple[Request, ...], before: "Members | None", device: torch.device) -> "Members | None":
        """Of the next step, which are those of the step before it where nobody joined or left; None where there are none."""
        if before and before.requests == requests and before.trails == tuple(request.trail for request in requests):
            return before
        return cls.build(requests, device) if requests else None

    @classmethod
    def build(cls, requests: Sequence[Request], device: torch.device) -> "Members":
        params = [request.params for request in requests]
        slots = to_device([request.slot for request in requests], torch.int64, device)
        sampling = SamplingBatch.build(params, [request.seed for request in requests], device)
        guide = Guide.build([request.trail.constraint for request in requests])
        speculates = any(each.speculate for each in params)
        limits = TreeLimits.build(params, device) if speculates else None
        trails = tuple(request.trail for request in requests)
        return cls(tuple(requests), trails, slots, sampling, guide, limits, speculates)

    @property
    def failed(self) -> Mapping[tuple[int, tuple[int, ...]], str]:
        """Where structures failed in the last step, by row and the tokens in front."""
        return self.guide.failed if self.guide else {}

    @property
    def longest(self) -> int:
        return max(request.length for request in self.requests)

    @property
    def logprobs(self) -> int:
        """How many best tokens are to be named at most; -1 if nobody wants log-probabilities."""
        return max((-1 if r.params.logprobs is None else r.params.logprobs for r in self.requests), default=-1)

    @cached_property
    def plain(self) -> bool:
        return self.limits is None and plain([request.params for request in self.requests])


def plain(params: Sequence[SamplingParams]) -> bool:
    """Whether a step is the same operations on the device for any requests with such parameters, and needs nothing of the
    host: then it can be a CUDA graph, and the next one can begin before its tokens are seen. Other steps run one by one."""
    own_trees = any(p.speculate for p in params) and any(not p.speculate or p.tree for p in params)
    return not own_trees and not any(processes(p) or p.structure or p.logprobs is not None for p in params)
