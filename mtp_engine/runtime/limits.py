"""Smaller trees for single requests: no drafting, fewer children, or fewer nodes than the engine's tree has."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import final

import torch
from torch import Tensor

from mtp_engine.config import MAX_TREE_NODES, SamplingParams
from mtp_engine.tree import DraftTree


@final
@dataclass(frozen=True)
class TreeLimits:
    """What each request of a batch lets be verified of its tree."""

    widths: Tensor  # [B, MAX_TREE_NODES] int64, children per node at depth 0, 1, ...
    nodes: Tensor  # [B] int64, drafted nodes in all
    most: int  # nodes of the largest tree that any request allows, root included; known on the host

    @classmethod
    def build(cls, params: Sequence[SamplingParams], device: torch.device) -> "TreeLimits | None":
        """None where nobody asks for less than the engine's tree."""
        if all(p.speculate and p.tree is None for p in params):
            return None
        rows, nodes, most = [], [], 1
        for p in params:
            widths = p.tree.widths if p.tree and p.tree.widths else (MAX_TREE_NODES,) * MAX_TREE_NODES
            rows.append([*widths, *[0] * (MAX_TREE_NODES - len(widths))])
            nodes.append(0 if not p.speculate else p.tree.max_nodes - 1 if p.tree else MAX_TREE_NODES)
            most = max(most, min(nodes[-1] + 1, MAX_TREE_NODES))
        return cls(torch.tensor(rows, device=device), torch.tensor(nodes, device=device), most)

    def apply(self, tree: DraftTree) -> DraftTree:
        """The tree without what is over the limits, cut to as many nodes as some request may have.

        Of too many nodes those with the best joint score stay. Where candidates were drawn (tree.draft) the first ones
        stay instead, level by level, siblings in the order in which they were drawn: a rule that rejects is lossless
        only if the tree's shape does not depend on what was drawn, and a score does.
        """
        index = torch.arange(tree.nodes, device=tree.tokens.device)
        siblings = (tree.parents[:, :, None] == tree.parents[:, None, :]) & tree.real[:, None, :]
        rank = (siblings & (index < index[:, None])).sum(-1)
        narrow = rank < self.widths.gather(1, (tree.depths - 1).clamp(min=0))
        narrow[:, 0] = True
        kept = (narrow[:, None, :] | ~tree.ancestors).all(-1) & tree.real
        # a node's score is at most its parent's and the sort is stable, so a kept node's ancestors are kept
        scores = tree.scores if tree.draft is None else None
        scores = -index.float().expand_as(kept) if scores is None else scores
        order = torch.where(kept, scores, -float("inf")).index_fill(1, index[:1], float("inf"))
        standing = order.sort(dim=1, descending=True, stable=True).indices.argsort(1)
        kept &= standing <= self.nodes[:, None]
        front = kept.sort(dim=1, descending=True, stable=True).indices  # kept nodes first, in their order
        number = front.argsort(1)
        front = front[:, : self.most]  # what lies behind is padding in every request
        parents = tree.parents.gather(1, front)
        return replace(
            tree,
            tokens=tree.tokens.gather(1, front),
            parents=torch.where(parents < 0, parents, number.gather(1, parents.clamp(min=0))),
            depths=tree.depths.gather(1, front),
            size=kept.sum(1),
            max_depth=min(tree.max_depth, self.most - 1),
            scores=None if tree.scores is None else tree.scores.gather(1, front),
            draft=None
            if tree.draft is None
            else tree.draft.gather(1, front[..., None].expand(-1, -1, tree.draft.shape[2])),
        )
