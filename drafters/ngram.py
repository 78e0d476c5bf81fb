"""Prompt lookup: the text is searched for its own last few tokens, and what followed them is the draft.

Needs no model; good where the answer repeats the prompt (summaries, edits, code). A. Saxena, "Prompt lookup decoding", 2023.
"""

from collections.abc import Sequence
from typing import final

import torch
from torch import Tensor

from mtp_engine.cache import Pages
from mtp_engine.sampling.batch import Batch, to_device
from mtp_engine.tree import DraftTree, VerifyResult


@final
class NgramDrafter:
    """Drafts chains of up to `length` tokens after the newest earlier match of the longest suffix (3 tokens, then 2)."""

    cache = prompts = None
    scratch_rows = history = reread = 0

    def __init__(
        self, length: int, *, slots: int, max_context: int, device: torch.device, suffixes: tuple[int, ...] = (3, 2)
    ) -> None:
        self.max_nodes = length + 1
        self._length, self._suffixes = length, suffixes
        self.depth = length
        # the last column takes what steps write that were launched before an answer was known to have ended
        self._text = torch.full((slots, max_context + self.max_nodes + 1), -1, device=device)

    def attach(self, pages: Pages, behind: int) -> None:
        pass

    def release(self, slot: int) -> None:
        self._text[slot] = -1

    def draft(self, batch: Batch) -> DraftTree:
        text = self._text[batch.slots]
        chains = text.new_zeros(len(text), self.max_nodes)
        chains[:, 0] = batch.tokens
        size = torch.ones_like(batch.lengths)
        for suffix in self._suffixes:
            starts, found = self._match(text[:, : batch.bound + 1], batch.lengths, suffix)
            offsets = torch.arange(self._length, device=text.device)
            follow = (starts + suffix)[:, None] + offsets
            drafted = text.gather(1, follow.clamp(max=text.shape[1] - 1))
            usable = (found & (size == 1))[:, None]
            known = (follow <= batch.lengths[:, None]) & usable & (drafted >= 0)  # who wants no drafts did not show all
            chains[:, 1:] = torch.where(known, drafted, chains[:, 1:])
            size = torch.where(usable[:, 0], 1 + known.sum(1), size)
        return DraftTree.chain(chains, size)

    def _match(self, text: Tensor, lengths: Tensor, suffix: int) -> tuple[Tensor, Tensor]:
        """Newest start of an earlier copy of the last `suffix` tokens, and whether there is one: [B], [B] bool."""
        if text.shape[1] <= suffix:
            return torch.zeros_like(lengths), torch.zeros_like(lengths, dtype=torch.bool)
        windows = text.unfold(1, suffix, 1)  # [B, starts, suffix]
        last = lengths[:, None] - suffix + 1 + torch.arange(suffix, device=text.device)
        last = last.clamp(min=0, max=text.shape[1] - 1)
        equal = (windows == text.gather(1, last)[:, None]).all(-1)
        starts = torch.arange(windows.shape[1], device=text.device)
        equal &= starts + suffix <= lengths[:, None]  # a token must follow, and the suffix itself is no match
        equal &= (lengths >= suffix)[:, None]
        return torch.where(equal, starts, -1).amax(-1).clamp(min=0), equal.any(-1)

    def observe(self, batch: Batch, result: VerifyResult, hidden: Tensor) -> None:
        tokens = torch.cat([batch.tokens[:, None], result.tokens], 1)
        positions = batch.lengths[:, None] + torch.arange(tokens.shape[1], device=tokens.device)
        # what lies past the new length is overwritten later
        self._text[batch.slots[:, None], positions.clamp(max=self._text.shape[1] - 1)] = tokens

    def save(self, slot: int, tokens: int, *, lean: bool) -> list[Tensor]:
        return []

    def load(self, slot: int, known: Sequence[int], saved: Sequence[Tensor], left: int) -> None:
        self._text[slot, : len(known)] = to_device(known, torch.int64, self._text.device)
