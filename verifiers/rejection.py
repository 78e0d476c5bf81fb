"""Chain rejection sampling: each draft is accepted with probability min(1, p / q), in order, until one is not.

Leviathan et al., "Fast inference from transformers via speculative decoding", 2211.17192, algorithm 1; Chen et al.,
"Accelerating large language model decoding with speculative sampling", 2302.01318.
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
class RejectionVerifier:
    picks = False

    def verify(self, tree: DraftTree, logits: Tensor, batch: Batch) -> VerifyResult:
        """logits: [B, N, V] fp32. The tree is a chain."""
        assert tree.max_depth == tree.nodes - 1, "this rule needs a chain"
        p, noise = target_distribution(logits, batch.sampling), Noise.of(tree, batch)
        drafts = tree.tokens[:, 1:]
        q = candidate_distribution(draft_distribution(tree, p)[:, :-1], drafts)
        accepted = noise.accept[:, 1:] * at(q, drafts) < at(p[:, :-1], drafts)
        last = (accepted & tree.real[:, 1:]).long().cumprod(1).sum(1)
        final = row(p, last)
        if tree.nodes > 1:
            residual = rest(final, row(q, last.clamp(max=tree.nodes - 2)))
            final = torch.where((last < tree.size - 1)[:, None], residual, final)
        return keep(tree, last, noise.draw(final))
