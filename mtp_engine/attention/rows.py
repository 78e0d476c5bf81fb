"""The attention of one step: what every row may see is worked out once, then each layer calls it.

Rows of a step lie behind the cached prefix at cache slots length + row index. In a tree a row's position differs from
its slot: position = length + depth. Positions decide rotation and windows, slots decide where keys lie.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
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
    counts: Tensor | None = None  # [B] int64, how many rows of packed ones a request has
    owners: Tensor | None = None  # [N] int64, which request each packed row is of
    padded: bool = False  # whether packed rows that belong to nobody may stand behind the others

    @classmethod
    def prompt(cls, slot: int, start: int, count: int, device: torch.device) -> "StepRows":
        """`count` tokens of one request behind `start` cached ones."""
        index = torch.arange(count, device=device)[None]
        slots, lengths = (torch.full((1,), value, device=device) for value in (slot, start))
        return cls(slots, lengths, start + index, index - 1, count - 1, start + count, chain=True)

    @classmethod
    def prompts(cls, requests: Tensor, count: int, bound: int, *, padded: bool = False) -> "StepRows":
        """Packed: chains of several requests, one behind the other in one row of `positions`, [1, N], all N = `count` of them.

        requests: [3, B] int64, of each its slot, its cached tokens, and how many rows it has. padded: behind all of them
        stand rows that are not counted; they have the last request's slot and position, which has no rows of its own.
        """
        slots, starts, counts = requests.unbind()
        index, ends = torch.arange(count, device=requests.device), counts.cumsum(0)
        owners = torch.searchsorted(ends, index, right=True).clamp(max=len(slots) - 1)
        steps = torch.minimum(index - (ends - counts)[owners], (counts - 1).clamp(min=0)[owners])
        return cls(
            slots, starts, (starts[owners] + steps)[None], index[None] - 1, count - 1, bound, chain=True, counts=counts,
            owners=owners, padded=padded,
        )  # fmt: skip

    def packed(self) -> "StepRows":
        """The same, where these are one request's chain."""
        if self.owners is not None:
            return self
        assert self.chain, "a tree cannot be packed"
        assert len(self.slots) == 1, "its rows would have to be put in one line"
        own = torch.zeros_like(self.positions[0])
        return replace(self, owners=own, counts=torch.full_like(self.slots, len(own)))

    def single(self) -> "StepRows":
        """The same, where these are one request's: not packed, as not every attention takes several prompts."""
        if len(self.slots) > 1 or self.padded:
            return self
        return replace(self, owners=None, counts=None)

    def apart(self) -> "list[StepRows]":
        """Packed rows, request by request. Waits for the device."""
        if self.owners is None or self.counts is None:
            return []
        spans = zip(self.slots.tolist(), self.lengths.tolist(), self.counts.tolist(), strict=True)
        parts = [StepRows.prompt(*span, self.positions.device) for span in spans]
        firsts = [None] * len(parts) if self.first is None else torch.split(self.first, 1)
        whole = zip(parts, firsts, strict=True)
        return [replace(part, first=first) for part, first in whole if part.positions.shape[1]]

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
