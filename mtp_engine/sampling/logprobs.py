"""Log-probabilities of emitted tokens, of the main model's own softmax before any processing.

They come from the device as numbers of 64 bits: a log-probability (fp32) in the upper half, and in the lower one what it
belongs to. So a step's notes are one table.
"""

from collections.abc import Sequence
from typing import NamedTuple, final

import torch
from torch import Tensor

from mtp_engine.tree import VerifyResult


@final
class TokenLogprob(NamedTuple):
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


@final
class Notes:
    """What `emitted_logprobs` gave for a batch, on the host."""

    def __init__(self, notes: Tensor) -> None:
        halves = notes.contiguous().numpy().view("<i4").reshape(*notes.shape, 2)
        self._numbers: list[list[list[int]]] = halves[..., 0].tolist()
        self._values: list[list[list[float]]] = halves.view("<f4")[..., 1].tolist()

    def read(self, row: int, tokens: Sequence[int], most: int) -> list[TokenLogprob]:
        """Of the first of a request's tokens. most: how many best tokens to name."""
        return [
            TokenLogprob(token, values[0], ids[0], tuple(zip(ids[1 : 1 + most], values[1 : 1 + most], strict=False)))
            for token, ids, values in zip(tokens, self._numbers[row], self._values[row], strict=False)
        ]
