"""Log-probabilities of emitted tokens, of the main model's own softmax before any processing.

They come from the device as numbers of 64 bits: a log-probability (fp32) in the upper half, and in the lower one what it
belongs to. So a step's notes are one table.
"""

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from mtp_engine.tree import VerifyResult


@final
@dataclass(frozen=True)
class TokenLogprob:
    """One emitted token. rank: 1 if no token was more probable. top: the most probable tokens, best first."""

    token: int
    logprob: float
    rank: int
    top: tuple[tuple[int, float], ...]


def emitted_logprobs(logits: Tensor, result: VerifyResult, most: int) -> Tensor:
    """[B, D+1, 1 + most] int64, for all of result.tokens: the token's log-probability and rank, then those of the `most`
    best tokens with their ids. logits: [B, N, V] fp32, raw. The row of tokens[b, i] is that of the node it was chosen at,
    path[b, i]. Twin: kernels.logprobs.emitted_logprobs.
    """
    rows = result.gather(logits)
    total = rows.logsumexp(-1, keepdim=True)
    chosen = rows.gather(2, result.tokens[..., None])
    rank = 1 + (rows > chosen).sum(-1, keepdim=True)
    best = rows.topk(min(most, rows.shape[-1]), -1)
    values, numbers = torch.cat([chosen, best.values], -1) - total, torch.cat([rank, best.indices], -1)
    return (values.view(torch.int32).long() << 32) | numbers


def read_logprobs(notes: Tensor, tokens: list[int], most: int) -> list[TokenLogprob]:
    """notes: rows of one request from `emitted_logprobs`, on the host. most: how many best tokens to name."""
    wanted = notes[: len(tokens), : 1 + most]
    numbers, values = (wanted & 0xFFFFFFFF).tolist(), (wanted >> 32).int().view(torch.float32).tolist()
    return [
        TokenLogprob(token, logprobs[0], ids[0], tuple(zip(ids[1:], logprobs[1:], strict=True)))
        for token, ids, logprobs in zip(tokens, numbers, values, strict=True)
    ]
