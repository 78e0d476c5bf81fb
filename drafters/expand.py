"""Growing a tree level by level from the drafter's scores: pure tensor functions, no model."""

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from mtp_engine.config import TreeShape
from mtp_engine.tree import DraftTree


@final
@dataclass(frozen=True)
class Growth:
    """A tree under construction; level d's nodes all have depth d, and node 0 is the root.

    `frontier` is how many nodes the newest level has: they are the last ones and are the next to get children.
    """

    tokens: Tensor  # [B, n] int64
    parents: Tensor  # [B, n] int64
    depths: Tensor  # [B, n] int64
    scores: Tensor  # [B, n] fp32, log of the joint draft probability
    frontier: int
    level: int

    @classmethod
    def start(cls, roots: Tensor) -> "Growth":
        """roots: [B] int64, the last committed tokens."""
        zeros = torch.zeros_like(roots)[:, None]
        return cls(roots[:, None], zeros - 1, zeros, zeros.float(), 1, 0)


def level_sizes(shape: TreeShape, depth: int, beam: int) -> list[tuple[int, int]]:
    """For each level: candidates per frontier node, and how many of all candidates become nodes."""
    if shape.best:
        width = min(shape.best, beam)
        return [(width, width)] * depth
    sizes, nodes = [], 1
    for width in shape.widths:
        nodes *= width
        sizes.append((width, nodes))
    return sizes


def grow(tree: Growth, scores: Tensor, ids: Tensor, width: int, keep: int) -> Growth:
    """Add a level. scores: [B, F, n] log-probabilities of each frontier node's next token; ids: [n] their tokens.

    The `width` best candidates of every frontier node compete, the best `keep` by joint score become nodes.
    """
    batch, frontier, vocab = scores.shape
    width = min(width, vocab)
    keep = min(keep, frontier * width)
    best = scores.topk(width, dim=-1)
    joint = (best.values + tree.scores[:, -frontier:, None]).flatten(1)  # [B, F * width]
    tokens = ids[best.indices].flatten(1)
    first = tree.tokens.shape[1] - frontier
    parents = (first + torch.arange(frontier, device=scores.device)).repeat_interleave(width).expand(batch, -1)
    if keep < frontier * width:
        kept = joint.topk(keep, dim=-1).indices.sort(-1).values
        joint, tokens, parents = (value.gather(1, kept) for value in (joint, tokens, parents))
    return Growth(
        tokens=torch.cat([tree.tokens, tokens], 1),
        parents=torch.cat([tree.parents, parents], 1),
        depths=torch.cat([tree.depths, torch.full_like(tokens, tree.level + 1)], 1),
        scores=torch.cat([tree.scores, joint], 1),
        frontier=keep,
        level=tree.level + 1,
    )


def prune(tree: Growth, nodes: int) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, parents and depths, each [B, nodes + 1], of the root and the `nodes` best drafted nodes by joint score.

    A kept node's ancestors are kept: none scores less than its descendants, and the sort is stable, so that on a tie
    the ancestor, which stands first, wins.
    """
    order = tree.scores[:, 1:].sort(dim=-1, descending=True, stable=True).indices[:, :nodes] + 1
    kept = torch.cat([torch.zeros_like(order[:, :1]), order.sort(-1).values], 1)
    numbers = torch.arange(kept.shape[1], device=kept.device).expand_as(kept)
    renumbered = torch.zeros_like(tree.tokens).scatter_(1, kept, numbers)
    parents = tree.parents.gather(1, kept)
    parents = torch.where(parents < 0, parents, renumbered.gather(1, parents.clamp(min=0)))
    return tree.tokens.gather(1, kept), parents, tree.depths.gather(1, kept)


def finish(tree: Growth, shape: TreeShape, drafts: Tensor) -> DraftTree:
    """The tree to verify. drafts: [B] bool, False for requests that cannot be drafted for and get their root only."""
    tokens, parents, depths = prune(tree, shape.best) if shape.best else (tree.tokens, tree.parents, tree.depths)
    deepest = min(tree.level, tokens.shape[1] - 1)
    return DraftTree(tokens, parents, depths, torch.where(drafts, tokens.shape[1], 1), deepest)
