"""Recursive rejection without replacement: siblings are tried in the order in which they were drawn.

A rejected sibling leaves the residual max(p - q, 0), and the next one was drawn from q without it. Yang et al.,
"Multi-candidate speculative decoding", 2401.06706; Jeon et al., "Recursive speculative decoding: accelerating LLM
inference via sampling without replacement", 2402.14160.
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
    target_distribution,
)


@final
class RRSVerifier:
    picks = False

    def verify(self, tree: DraftTree, logits: Tensor, batch: Batch) -> VerifyResult:
        """logits: [B, N, V] fp32. One pass over the nodes: parents stand before children, siblings in drawn order."""
        p, noise = target_distribution(logits, batch.sampling), Noise.of(tree, batch)
        q = draft_distribution(tree, p)
        last = torch.zeros_like(tree.size)
        left, source = (
            p[:, 0],
            q[:, 0],
        )  # [B, V]: what is left of p at node `last`, and what its next child was drawn from
        for node in range(1, tree.nodes):
            token = tree.tokens[:, node]
            drawn = candidate_distribution(source, token)
            tried = (tree.parents[:, node] == last) & tree.real[:, node]
            accepted = tried & (noise.accept[:, node] * at(drawn, token) < at(left, token))
            left = torch.where(accepted[:, None], p[:, node], torch.where(tried[:, None], residual(left, drawn), left))
            without = source.scatter(1, token[:, None], 0.0)
            source = torch.where(accepted[:, None], q[:, node], torch.where(tried[:, None], without, source))
            last = torch.where(accepted, node, last)
        return keep(tree, last, noise.draw(left))


@final
class DeviceRRSVerifier:
    """RRSVerifier, and on chains RejectionVerifier, in one launch."""

    picks = False

    def verify(self, tree: DraftTree, logits: Tensor, batch: Batch) -> VerifyResult:
        from mtp_engine.kernels.floors import floors
        from mtp_engine.kernels.reject import recursive

        given = batch.sampling
        least = floors(logits, given.temperature, given.top_k, given.top_p, given.min_p) if given.truncated else None
        return VerifyResult(*recursive(logits, batch.lengths, given.seed, given.temperature, tree, tree.draft, least))


def residual(left: Tensor, drawn: Tensor) -> Tensor:
    """What is left after a rejection, scaled to sum 1: the next sibling is compared with it. [B, V]."""
    over = rest(left, drawn)
    return over / over.sum(-1, keepdim=True)
