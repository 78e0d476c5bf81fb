"""The attention of one step: what every row may see is worked out once, then each layer calls it.

Rows of a step lie behind the cached prefix at cache slots length + row index. In a tree a row's position differs from
its slot: position = length + depth. Positions decide rotation and windows, slots decide where keys lie.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import final

import torch
from torch import Tensor

from mtp_engine.cache import HybridKV
from mtp_engine.protocols import Attention
from mtp_engine.tree import ancestor_mask


@final
@dataclass(frozen=True)
class StepRows:
    """The rows of a step and which of them see which.

    The rows form a forest. A row sees the cached keys and the rows above it, itself included; of these only those at
    position `first` or later, and in a windowed layer only those less than `window` positions away. Cached keys before
    `first` hold nothing. From a row up, positions fall one by one down to `lengths`.
    """

    slots: Tensor  # [B] int64
    lengths: Tensor  # [B] int64, cached tokens
    positions: Tensor  # [B, N] int64
    parents: Tensor  # [B, N] int64, smaller than the row's own index; -1 = the prefix is above it
    depth: int  # no row has more rows above it than this
    bound: int  # no request has more than this many tokens, these rows included; known on the host
    first: Tensor | None = None  # [B] int64; None = 0
    chain: bool = False  # each row's parent is the row before it
    offsets: Tensor | None = None  # [B, N] int64, positions - lengths, where that is at hand
    straight: bool = False  # a chain but for padding at the end
    spans: tuple[tuple[int, int, int], ...] = ()  # of packed rows, see `prompts`
    counts: Tensor | None = None  # [B] int64, how many rows of packed ones a request has
    owners: Tensor | None = None  # [N] int64, which request each packed row is of

    @classmethod
    def prompt(cls, slot: int, start: int, count: int, device: torch.device) -> "StepRows":
        """`count` tokens of one request behind `start` cached ones."""
        index = torch.arange(count, device=device)[None]
        slots, lengths = (torch.full((1,), value, device=device) for value in (slot, start))
        return cls(slots, lengths, start + index, index - 1, count - 1, start + count, chain=True)

    @classmethod
    def prompts(cls, requests: Tensor, rows: Tensor, spans: tuple[tuple[int, int, int], ...]) -> "StepRows":
        """Packed: chains of several requests, one behind the other in one row of `positions`, [1, N].

        spans: of each request its slot, its cached tokens, and how many rows it has; requests: [3, B] int64, the same on
        the device. rows: [2, N] int64, the request's number and the position of each row.
        """
        (slots, starts, counts), (owners, positions) = requests.unbind(), rows.unbind()
        longest, bound = max(count for _, _, count in spans), max(start + count for _, start, count in spans)
        parents = torch.where(positions == starts[owners], -1, torch.arange(len(owners), device=owners.device) - 1)
        return cls(
            slots, starts, positions[None], parents[None], longest - 1, bound, chain=True, spans=spans, counts=counts,
            owners=owners,
        )  # fmt: skip

    def apart(self) -> "list[StepRows]":
        """Packed rows, request by request."""
        return [StepRows.prompt(*span, self.positions.device) for span in self.spans]

    @cached_property
    def seen(self) -> Tensor:
        """[B, N, N] bool: the rows that a row sees, windows aside."""
        nodes = self.positions.shape[1]
        if self.chain:
            mask = self.positions[:, :, None] >= self.positions[:, None, :]
        else:
            size = torch.full_like(self.lengths, nodes)
            mask = ancestor_mask(self.parents, size, self.depth)
        if self.first is None:
            return mask
        exists = (self.positions >= self.first[:, None])[:, None, :]
        return mask & (exists | torch.eye(nodes, dtype=torch.bool, device=mask.device))

    def window_seen(self, window: int, prefix: Tensor) -> Tensor:
        """prefix: [B, S] positions of cached keys -> [B, N, S + N] bool."""
        first = 0 if self.first is None else self.first[:, None]
        near = self.positions[..., None] - prefix[:, None, :] < window
        near_rows = self.positions[..., None] - self.positions[:, None, :] < window
        return torch.cat([near & (prefix >= first)[:, None, :], near_rows & self.seen], -1)

    def paged_seen(self, b: int, length: int) -> Tensor:
        """[1, N, length + N] bool for request b, which has `length` cached tokens."""
        prefix = torch.ones(length, dtype=torch.bool, device=self.positions.device)
        if self.first is not None:
            prefix = torch.arange(length, device=self.positions.device) >= self.first[b]
        return torch.cat([prefix.expand(1, self.positions.shape[1], -1), self.seen[b : b + 1]], -1)


AttentionFactory = Callable[[HybridKV, StepRows], Attention]
"""Makes the attention of one step: with torch (attention/torch.py) or CUDA kernels (exact.py, flashinfer.py)."""
