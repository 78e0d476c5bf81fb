"""The requests of a step as tensors. Slots are rows of every cache; a request keeps its slot while it runs."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from mtp_engine.config import SamplingParams
from mtp_engine.sampling.masks import Guide

_MOST = 1 << 60  # more than any vocabulary holds; what is shared by all who run must fit its tensor


def to_device(values: Sequence[float], dtype: torch.dtype, device: torch.device) -> Tensor:
    """[n] tensor; to a GPU through pinned memory, as anything else would wait for all that is queued there."""
    tensor = torch.tensor(values, dtype=dtype)
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)


@final
@dataclass(frozen=True)
class SamplingBatch:
    """The sampling parameters of a batch as tensors, with host flags that say what can be skipped."""

    temperature: Tensor  # [B] fp32
    top_k: Tensor  # [B] int64, 0 = off
    top_p: Tensor  # [B] fp32, 1 = off
    min_p: Tensor  # [B] fp32, 0 = off
    seed: Tensor  # [B] int64
    greedy: bool  # every temperature is 0
    truncated: bool  # some request has top-k, top-p or min-p on
    widest_top_k: int

    @classmethod
    def build(cls, params: Sequence[SamplingParams], seeds: Sequence[int], device: torch.device) -> "SamplingBatch":
        active = [p for p in params if p.temperature > 0]  # truncation never removes the argmax
        return cls(
            temperature=to_device([p.temperature for p in params], torch.float32, device),
            top_k=to_device([min(p.top_k, _MOST) for p in params], torch.int64, device),
            top_p=to_device([p.top_p for p in params], torch.float32, device),
            min_p=to_device([p.min_p for p in params], torch.float32, device),
            seed=to_device(seeds, torch.int64, device),
            greedy=not active,
            truncated=any(p.top_k or p.top_p < 1 or p.min_p for p in active),
            widest_top_k=min(max((p.top_k for p in active), default=0), _MOST),
        )


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
    guide: Guide | None = None  # constraints on the text, where a request has one
    prompt_left: int | None = None  # None in steps that decode
