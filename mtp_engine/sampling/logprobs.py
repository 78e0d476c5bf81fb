"""Log-probabilities of emitted tokens, of the main model's own softmax before any processing."""

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


def emitted_logprobs(logits: Tensor, result: VerifyResult, most: int) -> list[list[TokenLogprob]]:
    """Per request, for all of result.tokens. logits: [B, N, V] fp32, raw; most: how many best tokens to name.

    The row of tokens[b, i] is that of the node it was chosen at, path[b, i].
    """
    rows = result.gather(logits)
    total = rows.logsumexp(-1, keepdim=True)
    chosen = rows.gather(2, result.tokens[..., None])
    rank = 1 + (rows > chosen).sum(-1)
    best = rows.topk(min(most, rows.shape[-1]), -1)
    packed = torch.cat([(chosen - total), best.values - total], -1).tolist()
    return [
        [
            TokenLogprob(token, values[0], place, tuple(zip(ids, values[1:], strict=True)))
            for token, place, values, ids in zip(*columns, strict=True)
        ]
        for columns in zip(result.tokens.tolist(), rank.tolist(), packed, best.indices.tolist(), strict=True)
    ]
