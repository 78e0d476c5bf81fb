"""Typical acceptance, LOSSY: a draft is accepted if the main model finds it likely enough, whatever plain decoding chose.

p > min(epsilon, delta * exp(-entropy of p)). Cai et al., "Medusa", 2401.10774, section 2.3.1. Off by default; at
temperature 0 it is exact.
"""

from typing import final

from torch import Tensor

from mtp_engine.sampling.batch import Batch
from mtp_engine.tree import DraftTree, VerifyResult
from mtp_engine.verifiers.distributions import Noise, deepest, keep, row, target_distribution


@final
class TypicalVerifier:
    picks = False

    def __init__(self, epsilon: float = 0.09, delta: float = 0.3) -> None:
        """The defaults are Medusa's."""
        self.epsilon, self.delta = epsilon, delta

    def verify(self, tree: DraftTree, logits: Tensor, batch: Batch) -> VerifyResult:
        """logits: [B, N, V] fp32. Keeps the first of the longest paths whose drafts all pass."""
        p = target_distribution(logits, batch.sampling)
        entropy = -p.xlogy(p).sum(-1)
        threshold = (self.delta * (-entropy).exp()).clamp(max=self.epsilon)  # [B, N]
        parents = tree.parents.clamp(min=0)
        likely = p.gather(1, parents[..., None].expand_as(p)).gather(2, tree.tokens[..., None])[..., 0]
        last = deepest(tree, likely > threshold.gather(1, parents))
        return keep(tree, last, Noise.of(tree, batch).draw(row(p, last)))
