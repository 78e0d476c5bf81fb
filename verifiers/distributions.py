"""What the published rules share: the main model's distribution at every node, fresh noise, and the path to a node.

Candidates. Where the drafter drew a node's children, tree.draft holds the distribution q it drew them from, one after
another without replacement. Where it chose them in another way (its best ones, or by noise of its own), the row is zero
and they count as given: each was drawn from a distribution that allows nothing else. That is lossless for any candidates
that do not depend on this step's verification noise.
"""

from dataclasses import dataclass
from typing import final

import torch
import torch.nn.functional as F
from torch import Tensor

from mtp_engine.sampling.batch import Batch, SamplingBatch
from mtp_engine.sampling.sampler import gumbel, step_seed, truncate, uniform
from mtp_engine.tree import DraftTree, VerifyResult

_ACCEPT, _DRAW = 101, 102  # purposes of step_seed


def target_distribution(logits: Tensor, sampling: SamplingBatch) -> Tensor:
    """The probabilities that plain decoding samples from; all on the best token at temperature 0. [B, N, V] fp32."""
    best = F.one_hot(logits.argmax(-1), logits.shape[-1]).float()
    if sampling.greedy:
        return best
    temperature = sampling.temperature.view(-1, 1, 1)
    probabilities = (truncate(logits, sampling) / temperature.clamp(min=1e-6)).softmax(-1)
    return torch.where(temperature > 0, probabilities, best)


def draft_distribution(tree: DraftTree, target: Tensor) -> Tensor:
    """q at every node, [B, N, V] fp32 like `target`; rows of given candidates are zero."""
    return torch.zeros_like(target) if tree.draft is None else tree.draft


def candidate_distribution(q: Tensor, tokens: Tensor) -> Tensor:
    """What a candidate was drawn from: q scaled to sum 1, or the candidate itself where q is empty.

    q: [..., V]; tokens: [...] int64.
    """
    mass = q.sum(-1, keepdim=True)
    return torch.where(mass > 0, q / mass.clamp(min=1e-30), F.one_hot(tokens, q.shape[-1]).float())


def at(values: Tensor, tokens: Tensor) -> Tensor:
    """values: [..., V]; tokens: [...] int64 -> [...]."""
    return values.gather(-1, tokens[..., None])[..., 0]


def row(values: Tensor, nodes: Tensor) -> Tensor:
    """values: [B, N, V]; nodes: [B] int64 -> [B, V]."""
    return values.gather(1, nodes[:, None, None].expand(-1, 1, values.shape[2]))[:, 0]


def rest(p: Tensor, q: Tensor) -> Tensor:
    """max(p - q, 0), or p where rounding leaves nothing; not normalised. [..., V]."""
    over = (p - q).clamp(min=0)
    return torch.where(over.sum(-1, keepdim=True) > 0, over, p)


@final
@dataclass(frozen=True)
class Noise:
    """One step's noise, used in no other step and by no drafter."""

    accept: Tensor  # [B, N] fp32 uniform, one per node
    seed: Tensor  # [B]

    @classmethod
    def of(cls, tree: DraftTree, batch: Batch) -> "Noise":
        nodes = torch.arange(tree.nodes, device=tree.tokens.device).expand_as(tree.tokens)
        accept = uniform(step_seed(batch.sampling.seed, batch.lengths, _ACCEPT), nodes)
        return cls(accept, step_seed(batch.sampling.seed, batch.lengths, _DRAW))

    def draw(self, weights: Tensor) -> Tensor:
        """A token by weights [B, V] >= 0, which need not sum to one -> [B]."""
        first = torch.zeros_like(self.seed)[:, None]
        noise = gumbel(self.seed, first, torch.arange(weights.shape[1], device=weights.device))[:, 0]
        return (weights.log() + noise).argmax(-1)


def path_to(tree: DraftTree, last: Tensor) -> Tensor:
    """The nodes from the root to `last` [B], then `last` again and again: [B, D+1]."""
    last = last[:, None]
    kept = tree.ancestors.gather(1, last[..., None].expand(-1, 1, tree.nodes)).squeeze(1)
    path = last.expand(-1, tree.max_depth + 1).clone()
    nodes = torch.arange(tree.nodes, device=last.device).expand_as(kept)
    # kept nodes have one depth each; the others write where the last kept node stands anyway
    depth = torch.where(kept, tree.depths, tree.depths.gather(1, last))
    return path.scatter_(1, depth, torch.where(kept, nodes, last))


def keep(tree: DraftTree, last: Tensor, token: Tensor) -> VerifyResult:
    """The path to node `last` [B], and after its drafts the main model's own `token` [B]."""
    path = path_to(tree, last)
    accepted = tree.depths.gather(1, last[:, None])
    drafts = tree.tokens.gather(1, torch.cat([path[:, 1:], path[:, -1:]], 1))
    return VerifyResult(path, drafts.scatter(1, accepted, token[:, None]), accepted[:, 0] + 1)


def deepest(tree: DraftTree, good: Tensor) -> Tensor:
    """The first of the deepest nodes whose whole path is `good` [B, N] bool: [B] int64."""
    good = good & tree.real
    good[:, 0] = True
    alive = (good[:, None, :] | ~tree.ancestors).all(-1)
    return torch.where(alive, tree.depths, -1).argmax(-1)
