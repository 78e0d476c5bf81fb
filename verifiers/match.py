"""The default rule: sample the main model at every node, keep what the drafter guessed.

The choices are those of plain decoding with the same seed (see `mtp_engine.sampler`), so the emitted tokens are too,
whatever the tree. A greedy tree check is the case temperature = 0.
"""

from typing import final

import torch
from torch import Tensor

from mtp_engine.protocols import Batch
from mtp_engine.sampler import choose
from mtp_engine.tree import DraftTree, VerifyResult


@final
class MatchVerifier:
    def verify(self, tree: DraftTree, logits: Tensor, batch: Batch) -> VerifyResult:
        """logits: [B, N, V] fp32. Keeps the path on which every draft equals the choice at its parent."""
        choices = choose(logits, tree.depths, tree.max_depth, batch.lengths, batch.sampling)
        return longest_match(tree, choices)


def longest_match(tree: DraftTree, choices: Tensor) -> VerifyResult:
    """Follow `choices` [B, N] down from the root. Siblings hold different tokens, so at most one child matches."""
    guessed = choices.gather(1, tree.parents.clamp(min=0)) == tree.tokens
    guessed[:, 0] = True
    guessed &= tree.real
    ancestors = tree.ancestors
    alive = (guessed[:, None, :] | ~ancestors).all(-1)  # [B, N]: the node and all its ancestors were guessed
    last = torch.where(alive, tree.depths, -1).argmax(-1, keepdim=True)  # [B, 1]
    accepted = tree.depths.gather(1, last)
    kept = ancestors.gather(1, last[..., None].expand(-1, 1, tree.nodes)).squeeze(1)
    path = last.expand(-1, tree.max_depth + 1).clone()
    nodes = torch.arange(tree.nodes, device=choices.device).expand_as(kept)
    # kept nodes have one depth each; the others write where the last kept node stands anyway
    path.scatter_(1, torch.where(kept, tree.depths, accepted), torch.where(kept, nodes, last))
    return VerifyResult(path, choices.gather(1, path), accepted.squeeze(1) + 1)
