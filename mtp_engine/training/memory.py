"""What the main model said of the corpus's rows, kept on the device as far as its memory goes.

The main model is frozen, so in a second epoch its states of a row are those of the first: 4.6 KB a token for the default model
with three features, 60 GB for 13M tokens, where computing them anew takes a third of a step.
"""

from collections.abc import Callable
from typing import final

import torch
from torch import Tensor

from mtp_engine.parallel.group import Group

_LEFT = 8 << 30  # bytes of a GPU's memory that stay free: for evaluation, and for what fragments
States = Callable[[Tensor], Tensor]
"""Tokens [B, L] int64 -> hidden states [B, L, W]."""


@final
class Memory:
    """The states of rows that have come, until it is full; those of others are computed every time."""

    def __init__(self, states: States, rows: int, most: int | None = None, group: Group = Group()) -> None:  # noqa: B008
        """rows: of the corpus. most: how many are kept; None: what a GPU has room for after the first batch, none elsewhere.
        group: the ranks that compute states together, and keep the same ones."""
        self._states, self._rows, self._most, self._group = states, rows, most, group
        self._slots = torch.full((rows,), -1)  # of rows that are kept
        self._kept: Tensor | None = None  # [K, L, W]
        self._begun = most is not None
        self.used = 0

    def states(self, rows: Tensor, tokens: Tensor) -> Tensor:
        """rows: [B] int64 on the CPU, their numbers; tokens: [B, L] -> [B, L, W]."""
        slots = self._slots[rows]
        if self._kept is None or not bool((slots >= 0).any()):
            found = self._states(tokens)
        else:
            old, new = ((slots >= 0).nonzero()[:, 0], (slots < 0).nonzero()[:, 0])
            found = self._kept.new_empty(len(rows), *self._kept.shape[1:])
            found[old.to(found.device)] = self._kept[slots[old].to(found.device)]
            if len(new):
                found[new.to(found.device)] = self._states(tokens[new.to(tokens.device)])
        self._keep(rows, slots, found)
        return found

    def _keep(self, rows: Tensor, slots: Tensor, found: Tensor) -> None:
        if not self._begun:
            self._begun = True  # the first batch shows what a step takes
            return
        if self._kept is None:
            self._kept = found.new_empty(self._room(found), *found.shape[1:])
        fresh = (slots < 0).nonzero()[:, 0][: len(self._kept) - self.used]
        if len(fresh):
            self._kept[self.used : self.used + len(fresh)] = found[fresh.to(found.device)]
            self._slots[rows[fresh]] = torch.arange(self.used, self.used + len(fresh))
            self.used += len(fresh)

    def _room(self, found: Tensor) -> int:
        """Rows that are kept."""
        if self._most is not None:
            return min(self._most, self._rows)
        if found.device.type != "cuda":
            return 0
        torch.cuda.empty_cache()  # what writing the corpus took is free, too
        free = torch.cuda.mem_get_info(found.device)[0] - _LEFT
        room = torch.tensor([free // (found[0].numel() * found.element_size())], device=found.device)
        return max(0, min(self._rows, int(self._group.gather(room).min())))
