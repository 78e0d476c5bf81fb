"""Masks from constraints on the text, for every node of a tree. Constraints live on the host, so this waits for the tree."""

from collections.abc import Sequence
from typing import Protocol, final

import torch
from torch import Tensor


class Constraint(Protocol):
    """What one answer must match (structure.GrammarState)."""

    def mask(self, path: tuple[int, ...]) -> Tensor:
        """Which tokens may follow the answer so far and then `path`: [W] int32 on the CPU, one bit per token."""

    def advance(self, tokens: Sequence[int]) -> None:
        """`tokens` now belong to the answer."""

    @property
    def complete(self) -> bool:
        """Whether the answer so far is all that it must be, and may end here."""


@final
class Guide:
    """The constraints of a batch; None where a request has none.

    A constraint that raises after a path leaves no token to choose there: the request ends if its answer takes that path,
    as it would without drafts. The messages of the last step stand in `failed`, by the request's row and the path.
    """

    def __init__(self, constraints: Sequence[Constraint | None]) -> None:
        self._constraints = constraints
        self.failed: dict[tuple[int, tuple[int, ...]], str] = {}

    @classmethod
    def build(cls, constraints: Sequence[Constraint | None]) -> "Guide | None":
        return cls(constraints) if any(constraints) else None

    def apply(self, tokens: Tensor, parents: Tensor, logits: Tensor, ids: Tensor | None = None) -> Tensor:
        """-inf for what may not follow. tokens, parents: [B, n] of a tree, complete or growing; logits: [B, F, V] of its
        last F nodes, or [B, F, len(ids)] of the tokens `ids`, where a drafter asks. A node after which none of them may
        follow keeps its own; so does one whose constraint raises, but for the drafter only.
        """
        self.failed = {}
        asked = [
            (row, _path(names, up, node))
            for row, (names, up) in enumerate(zip(tokens.tolist(), parents.tolist(), strict=True))
            for node in range(len(names) - logits.shape[1], len(names))
        ]
        masks = [self._mask(row, path) for row, path in asked]
        if given := [mask for mask in masks if mask is not None]:
            free = torch.full_like(given[0], -1)
            packed = torch.stack([free if mask is None else mask for mask in masks])
            bits = torch.arange(32, dtype=torch.int32, device=logits.device)
            words = packed.to(logits.device, non_blocking=True)[..., None]
            allowed = ((words >> bits) & 1).bool().view(*logits.shape[:2], -1)  # [B, F, 32 W]
            allowed = allowed[..., : logits.shape[-1]] if ids is None else allowed[..., ids]
            logits = logits.masked_fill(~allowed & allowed.any(-1, keepdim=True), -float("inf"))
        if self.failed and ids is None:
            never = torch.tensor([each in self.failed for each in asked], device=logits.device)
            logits = logits.masked_fill(never.view(*logits.shape[:2], 1), -float("inf"))
        return logits

    def _mask(self, row: int, path: tuple[int, ...]) -> Tensor | None:
        constraint = self._constraints[row]
        if constraint is None:
            return None
        try:
            return constraint.mask(path)
        except Exception as error:
            self.failed[row, path] = str(error)
            return None


def _path(tokens: Sequence[int], parents: Sequence[int], node: int) -> tuple[int, ...]:
    """The drafts from the root's child to `node`."""
    path: list[int] = []
    while parents[node] >= 0:
        path.append(tokens[node])
        node = parents[node]
    return tuple(path[::-1])
