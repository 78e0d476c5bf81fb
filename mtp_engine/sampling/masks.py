"""Masks from constraints on the text, for every node of a tree. Constraints live on the host, so this waits for the tree."""

from collections.abc import Sequence
from typing import Protocol, final

import torch
from torch import Tensor


class Constraint(Protocol):
    """What one answer must match (grammar.GrammarState)."""

    def mask(self, path: tuple[int, ...]) -> Tensor:
        """Which tokens may follow the answer so far and then `path`: [W] int32 on the CPU, one bit per token."""

    def advance(self, tokens: Sequence[int]) -> None:
        """`tokens` now belong to the answer."""


@final
class Guide:
    """The constraints of a batch; None where a request has none.

    A constraint that raises says nothing from then on, and its message stands in `failed` by the request's row: it is
    that request's failure, not the step's.
    """

    def __init__(self, constraints: Sequence[Constraint | None]) -> None:
        self._constraints = constraints
        self.failed: dict[int, str] = {}

    @classmethod
    def build(cls, constraints: Sequence[Constraint | None]) -> "Guide | None":
        return cls(constraints) if any(constraints) else None

    def apply(self, tokens: Tensor, parents: Tensor, logits: Tensor, ids: Tensor | None = None) -> Tensor:
        """-inf for what may not follow. tokens, parents: [B, n] of a tree, complete or growing; logits: [B, F, V] of its
        last F nodes, or [B, F, len(ids)] of the tokens `ids`. A node after which none of them may follow keeps its own.
        """
        masks = [
            self._mask(row, names, up, node)
            for row, (names, up) in enumerate(zip(tokens.tolist(), parents.tolist(), strict=True))
            for node in range(len(names) - logits.shape[1], len(names))
        ]
        if all(mask is None for mask in masks):
            return logits
        free = torch.full_like(next(mask for mask in masks if mask is not None), -1)
        packed = torch.stack([free if mask is None else mask for mask in masks]).to(logits.device, non_blocking=True)
        bits = torch.arange(32, dtype=torch.int32, device=logits.device)
        allowed = ((packed[..., None] >> bits) & 1).bool().view(*logits.shape[:2], -1)  # [B, F, 32 W]
        allowed = allowed[..., : logits.shape[-1]] if ids is None else allowed[..., ids]
        return logits.masked_fill(~allowed & allowed.any(-1, keepdim=True), -float("inf"))

    def _mask(self, row: int, tokens: Sequence[int], parents: Sequence[int], node: int) -> Tensor | None:
        constraint = self._constraints[row]
        if constraint is None or row in self.failed:
            return None
        try:
            return constraint.mask(_path(tokens, parents, node))
        except Exception as error:
            self.failed[row] = str(error)
            return None


def _path(tokens: Sequence[int], parents: Sequence[int], node: int) -> tuple[int, ...]:
    """The drafts from the root's child to `node`."""
    path: list[int] = []
    while parents[node] >= 0:
        path.append(tokens[node])
        node = parents[node]
    return tuple(path[::-1])
