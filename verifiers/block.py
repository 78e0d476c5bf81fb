"""Block verification: the drafts of a chain are accepted or rejected jointly, which is never worse than one by one.

Sun et al., "Block verification accelerates speculative decoding", 2403.10444, algorithm 2.
"""

from typing import final

import torch
from torch import Tensor

from mtp_engine.sampling.batch import Batch
from mtp_engine.tree import DraftTree, VerifyResult
from mtp_engine.verifiers.distributions import (
    Noise,
    at,
    candidate_distribution,
    draft_distribution,
    keep,
    rest,
    row,
    target_distribution,
)


@final
class BlockVerifier:
    picks = False

    def verify(self, tree: DraftTree, logits: Tensor, batch: Batch) -> VerifyResult:
        """logits: [B, N, V] fp32. The tree is a chain."""
        assert tree.max_depth == tree.nodes - 1, "this rule needs a chain"
        p, noise = target_distribution(logits, batch.sampling), Noise.of(tree, batch)
        drafts = tree.tokens[:, 1:]
        q = candidate_distribution(draft_distribution(tree, p)[:, :-1], drafts)
        ratio = at(p[:, :-1], drafts) / at(q, drafts)
        joint = [torch.ones_like(noise.accept[:, :1])]  # p_i of the paper: how far the path so far is to be trusted
        for depth in range(tree.max_depth):
            joint.append((joint[-1] * ratio[:, depth : depth + 1]).clamp(max=1))
        trust = torch.cat(joint, 1)
        over = (trust[:, :-1, None] * p[:, :-1] - q).clamp(min=0).sum(-1)
        chance = over / (over + 1 - trust[:, :-1]).clamp(min=1e-30)
        chance = torch.cat([chance, trust[:, -1:]], 1)
        ends = torch.arange(tree.nodes, device=p.device) == (tree.size - 1)[:, None]
        accepted = (noise.accept < torch.where(ends, trust, chance)) & tree.real
        accepted[:, 0] = True
        last = torch.where(accepted, tree.depths, 0).amax(1)
        final = row(p, last)
        if tree.nodes > 1:
            residual = rest(at(trust, last)[:, None] * final, row(q, last.clamp(max=tree.nodes - 2)))
            final = torch.where((last < tree.size - 1)[:, None], residual, final)
        return keep(tree, last, noise.draw(final))
