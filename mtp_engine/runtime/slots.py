"""What the requests of a step are: their slots, and how far each slot has come."""

from collections.abc import Callable
from typing import final

import torch
from torch import Tensor

from mtp_engine.sampling.batch import Batch, Plan, SamplingBatch
from mtp_engine.sampling.masks import Guide
from mtp_engine.tree import DraftTree, VerifyResult

SCRATCH_LENGTH = 64  # tokens the scratch slot pretends to hold


@final
class SlotState:
    """Length and last token of every slot, on the device: the steps go on from them without asking the host.

    The last slot is scratch: a runner may pad its batches with it. Its length never changes.
    """

    def __init__(self, slots: int, device: torch.device, advance: Callable[..., Tensor] | None = None) -> None:
        """advance: in one launch or call (kernels.state.advance, or a twin of it)."""
        self._advance = advance
        self.lengths = torch.zeros(slots, dtype=torch.int64, device=device)
        self.tokens = torch.zeros(slots, dtype=torch.int64, device=device)
        self.lengths[-1:].fill_(SCRATCH_LENGTH)

    def set(self, slot: int, length: int, token: int) -> None:
        self.lengths[slot], self.tokens[slot] = length, token

    def batch(
        self, slots: Tensor, sampling: SamplingBatch, bound: int, guide: Guide | None = None, plan: Plan | None = None
    ) -> Batch:
        return Batch(slots, self.tokens[slots], self.lengths[slots], bound, sampling, guide, plan=plan)

    def advance(self, batch: Batch, tree: DraftTree, result: VerifyResult) -> Tensor:
        """Move the slots on, and give the step's table, [B, 3 + D+1] int64: tokens to emit, nodes and depth of the tree,
        then the tokens."""
        if self._advance:
            tables = result.tokens, result.counts, tree.size, tree.depths, self.lengths, self.tokens
            return self._advance(batch.slots, batch.lengths, *tables)
        self.lengths[batch.slots] = batch.lengths + result.counts
        self.tokens[batch.slots] = result.tokens.gather(1, result.counts[:, None] - 1)[:, 0]
        self.lengths[-1] = SCRATCH_LENGTH
        reached = torch.where(tree.real, tree.depths, 0).amax(1)
        return torch.cat([result.counts[:, None], tree.size[:, None], reached[:, None], result.tokens], 1)
