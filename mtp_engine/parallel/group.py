"""What the ranks of a group compute together. The same bits on every rank, whatever else is in the call.

`Group()` is a group of one: it exchanges nothing, and costs nothing.
"""

from dataclasses import dataclass
from typing import Protocol, final

import torch
from torch import Tensor

from mtp_engine.errors import EngineError
from mtp_engine.parallel.packed import pack, unpack
from mtp_engine.parallel.shard import Shard


@final
class RankLost(EngineError):
    """Another rank has ended, and nothing that is divided can go on."""


class Exchange(Protocol):
    """How tensors get from rank to rank. Every rank makes the same calls in the same order."""

    fast: bool  # faster than reading files

    def gather(self, x: Tensor, *, join: bool = False) -> Tensor:
        """Contiguous, of the same shape and dtype on every rank -> [size, *shape], in the order of ranks; join: side by
        side, [..., n] -> [..., size * n]."""

    def sum(self, partial: Tensor, dtype: torch.dtype, residual: Tensor | None, weights: Tensor | None) -> Tensor:
        """As `ordered_sum` of what is gathered of `weighted` partial. partial: fp32, contiguous; residual: contiguous."""


def ordered_sum(parts: Tensor, dtype: torch.dtype, residual: Tensor | None) -> Tensor:
    """The sum of parts [size, *shape] fp32 in the order of ranks, plus the residual, rounded once to dtype."""
    total = torch.zeros_like(parts[0])  # so that there is no -0
    for part in parts:
        total = total + part
    return (total if residual is None else total + residual.float()).to(dtype)


def weighted(partial: Tensor, weights: Tensor | None) -> Tensor:
    """Of k rows at a time their weighted sum, in the order in which they lie: partial [M * k, N] and weights [M, k] ->
    [M, N]. Without weights, partial."""
    if weights is None:
        return partial
    rows, total = partial.view(*weights.shape, -1), torch.zeros_like(partial[: len(weights)])
    for index in range(weights.shape[1]):
        total = total + weights[:, index, None] * rows[:, index]
    return total


def joined(parts: Tensor) -> Tensor:
    """[size, ..., n] -> [..., size * n]."""
    return parts.movedim(0, -2).flatten(-2)


@final
@dataclass(frozen=True)
class Group:
    """The ranks among which a model is divided."""

    shard: Shard = Shard()  # noqa: RUF009  frozen
    exchange: Exchange | None = None

    @property
    def size(self) -> int:
        return self.shard.size

    @property
    def fast(self) -> bool:
        """Whether ranks exchange tensors faster than they read files."""
        return self.exchange is not None and self.exchange.fast

    def sum(
        self, partial: Tensor, dtype: torch.dtype, residual: Tensor | None = None, weights: Tensor | None = None
    ) -> Tensor:
        """The sum over ranks, in fp32, in the order of ranks, plus what all have alike, rounded once to `dtype`. A kernel
        that sums in another order would change a row's bits with the number of rows. weights: see `weighted`."""
        if self.exchange is None:
            partial = weighted(partial, weights)
            return (partial if residual is None else partial + residual).to(dtype)
        return self.exchange.sum(partial.float().contiguous(), dtype, residual, weights)

    def join(self, part: Tensor) -> Tensor:
        """[..., n] of every rank, side by side: [..., size * n]."""
        return part if self.exchange is None else self.exchange.gather(part.contiguous(), join=True)

    def gather(self, part: Tensor) -> Tensor:
        """Of every rank, one behind the other: [size, *shape]."""
        return part[None] if self.exchange is None else self.exchange.gather(part.contiguous())

    def first(self, data: bytes, device: torch.device) -> bytes:
        """Rank 0's data, on every rank. device: the exchange's."""
        if self.exchange is None:
            return data
        length = int(self.exchange.gather(torch.tensor([len(data)], device=device))[0, 0])
        own = torch.frombuffer(bytearray(data[:length].ljust(length + 1)), dtype=torch.uint8).to(device)
        return self.exchange.gather(own)[0, :length].cpu().numpy().tobytes()

    def log_softmax(self, scores: Tensor) -> Tensor:
        """Of scores [..., n] whose last dimension is divided among the ranks; each gets its own part."""
        if self.exchange is None:
            return scores.log_softmax(-1)
        return scores - self.join(scores.logsumexp(-1, keepdim=True)).logsumexp(-1, keepdim=True)

    def best(self, scores: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Of every rank's candidates, fp32 scores and int64 tokens [..., k], the k best of all, best first; of equal ones the
        lower token."""
        if self.exchange is None:
            return scores, tokens
        return unpack(self.join(pack(scores, tokens)).topk(scores.shape[-1], -1).values)
