"""The requests of a step as tensors. Slots are rows of every cache; a request keeps its slot while it runs."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Protocol, final

import torch
from torch import Tensor

from mtp_engine.config import SamplingParams, TreeShape
from mtp_engine.sampling.masks import Guide

_MOST = 1 << 60  # more than any vocabulary holds; what is shared by all who run must fit its tensor
MOST_LOGPROBS = 64  # best tokens that are named at most, see SamplingParams
BIAS, PENALTIES, EARLY, WORDS = 1, 2, 4, 8  # what a request's logits go through (processors.py)
EVERYTHING = BIAS | PENALTIES | EARLY | WORDS


def processes(params: SamplingParams) -> int:
    """Which of BIAS, PENALTIES, EARLY and WORDS a request wants, as a sum. Its bad words are token ids."""
    biased = params.logit_bias or params.allowed_token_ids is not None or any(len(w) == 1 for w in params.bad_words)
    penalised = params.repetition_penalty != 1 or params.frequency_penalty != 0 or params.presence_penalty != 0
    wanted = (
        (BIAS, biased), (PENALTIES, penalised), (EARLY, params.min_tokens), (WORDS, any(len(w) > 1 for w in params.bad_words)),
    )  # fmt: skip
    return sum(kind for kind, on in wanted if on)


def to_device(values: Sequence[float], dtype: torch.dtype, device: torch.device) -> Tensor:
    """[n] tensor; see `upload`."""
    return upload(torch.tensor(values, dtype=dtype), device)


def upload(tensor: Tensor, device: torch.device) -> Tensor:
    """To a GPU through pinned memory, as anything else would wait for all that is queued there."""
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)


def rows_to_device(rows: Sequence[Sequence[float]], dtype: torch.dtype, device: torch.device) -> Tensor:
    """[rows, n] in one copy. Each row begins at a multiple of 16 bytes, as tensors do for which kernels are compiled."""
    count, room = len(rows[0]), [0] * (-len(rows[0]) % 4)
    return upload(torch.tensor([[*row, *room] for row in rows], dtype=dtype), device)[:, :count]


@final
@dataclass(frozen=True)
class SamplingBatch:
    """The sampling parameters of a batch as tensors, with host flags that say what can be skipped."""

    rates: Tensor  # [3, B] fp32: temperature, top_p, min_p
    numbers: Tensor  # [4, B] int64: top_k, seed, logprobs, masked
    greedy: bool  # every temperature is 0
    truncated: bool  # some request has top-k, top-p or min-p on
    widest_top_k: int
    most_logprobs: int  # -1 = nobody wants any
    processed: int  # what some request wants of `processes`
    guided: bool  # some request has a structure

    @classmethod
    def build(cls, params: Sequence[SamplingParams], seeds: Sequence[int], device: torch.device) -> "SamplingBatch":
        active = [p for p in params if p.temperature > 0]  # truncation never removes the argmax
        logprobs = [-1 if p.logprobs is None else p.logprobs for p in params]
        masked = [int(p.structure is not None) for p in params]
        processed = 0
        for p in params:
            processed |= processes(p)
        rates = [[p.temperature for p in params], [p.top_p for p in params], [p.min_p for p in params]]
        numbers = [[min(p.top_k, _MOST) for p in params], seeds, logprobs, masked]
        return cls(
            rows_to_device(rates, torch.float32, device),
            rows_to_device(numbers, torch.int64, device),
            greedy=not active,
            truncated=any(p.top_k or p.top_p < 1 or p.min_p for p in active),
            widest_top_k=min(max((p.top_k for p in active), default=0), _MOST),
            most_logprobs=max(logprobs, default=-1),
            processed=processed,
            guided=any(masked),
        )

    @cached_property
    def temperature(self) -> Tensor:
        """[B] fp32"""
        return self.rates[0]

    @cached_property
    def top_p(self) -> Tensor:
        """[B] fp32, 1 = off"""
        return self.rates[1]

    @cached_property
    def min_p(self) -> Tensor:
        """[B] fp32, 0 = off"""
        return self.rates[2]

    @cached_property
    def top_k(self) -> Tensor:
        """[B] int64, 0 = off"""
        return self.numbers[0]

    @cached_property
    def seed(self) -> Tensor:
        """[B] int64"""
        return self.numbers[1]

    @cached_property
    def logprobs(self) -> Tensor:
        """[B] int64, best tokens to name, -1 = no log-probabilities"""
        return self.numbers[2]

    @cached_property
    def masked(self) -> Tensor:
        """[B] int64, 1 = a structure says what may follow"""
        return self.numbers[3]

    @property
    def bare(self) -> bool:
        """Whether tokens are chosen by the model's logits, temperature and noise alone, and nothing else is to be told."""
        return not (self.truncated or self.processed or self.guided or self.most_logprobs >= 0)

    @classmethod
    def room(cls, batch: int, device: torch.device, *, bare: bool) -> "SamplingBatch":
        """For any `batch` requests that are bare, or any at all: what is off in a row costs that row nothing."""
        rows = cls.build([SamplingParams()] * batch, [0] * batch, device)
        if bare:
            return replace(rows, greedy=False)
        return replace(
            rows, greedy=False, truncated=True, widest_top_k=_MOST, most_logprobs=MOST_LOGPROBS, processed=EVERYTHING,
            guided=True,
        )  # fmt: skip


@final
@dataclass(frozen=True)
class Plan:
    """How a step drafts, where that may change from step to step.

    shape: None is plain decoding; the rows that the drafter's layers are to run then wait. nodes: of its tree, root
    included. late: such rows may have come together, as many as the drafter holds.
    """

    shape: TreeShape | None = None
    nodes: int = 1
    late: bool = False

    def __str__(self) -> str:
        return f"{'late ' if self.late else ''}{self.shape or 'plain'}"


class Biases(Protocol):
    """What requests add to their logits, whatever was said (processors.Tables). By slot."""

    wanted: Tensor  # [S] int64, see `processes`
    bias: Tensor  # [S, V] fp32, -inf for what may never be chosen


@final
@dataclass(frozen=True)
class Batch:
    """The requests of one step at their present lengths.

    A prompt's chunk is a batch of one request whose next tokens are known; `prompt_left` is what tells it from a step
    that decodes: how many tokens of the prompt follow behind the chunk (its last tokens to emit are the prompt's own).
    """

    slots: Tensor  # [B] int64
    tokens: Tensor  # [B] int64, last committed token of each request
    lengths: Tensor  # [B] int64, tokens whose KV is cached = position of `tokens`
    bound: int  # no request has more cached tokens than this; known on the host
    sampling: SamplingBatch
    guide: Guide | None = None  # constraints on the text, where a request has one and they are asked while drafting
    prompt_left: int | None = None  # None in steps that decode
    plan: Plan | None = None  # None: the drafter's one shape
    biases: Biases | None = None  # None where no request has one; for drafters, which may draft what they favour


@final
@dataclass(frozen=True)
class Chunk:
    """Tokens start..stop-1 of the text in a slot, which a pass over prompts reads. Known on the host."""

    slot: int
    start: int
    stop: int
    left: int  # see Batch.prompt_left
    behind: int  # the token at `stop`
    row: int  # of its first token in the pass


@final
@dataclass(frozen=True)
class Extent:
    """How large a call over rows of prompts is. padded: rows and requests of nobody may stand behind the others'."""

    rows: int
    bound: int  # no request has more tokens
    padded: bool = False
