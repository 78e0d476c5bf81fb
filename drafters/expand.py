"""Growing a tree level by level from the drafter's scores: pure tensor functions, no model.

DraftOps is what a drafter asks for: torch operations in drafters/portable.py, or kernels in drafters/device.py.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, final

import torch
from torch import Tensor

from mtp_engine.config import TreeShape
from mtp_engine.parallel.group import Group
from mtp_engine.sampling.batch import Batch
from mtp_engine.tree import DraftTree, VerifyResult

BEAM = 8  # nodes of a level that are given children where the shape is tree:N
MOST_CHILDREN = 16  # of a node, where kernels pick them (kernels/grow.py)


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


@final
@dataclass(frozen=True)
class Level:
    """What the next level is grown from."""

    logits: Tensor  # [B, F, n] fp32, a row per frontier node
    ids: Tensor  # [n] int64, the tokens scored
    ahead: int  # the tokens' position is length + ahead
    width: int  # candidates per frontier node
    keep: int  # of all of them become nodes


@final
@dataclass(frozen=True)
class LevelRows:
    """The rows of one level: R new ones, of which `counts` are real, and the drafted nodes.

    Each real new row is above the next, the last one is the root's, and the nodes hang below; -1 is the cache.
    """

    positions: Tensor  # [B, R + Q] int64
    parents: Tensor  # [B, R + Q] int64
    offsets: Tensor  # [B, R + Q] int64, position - start
    rotary: Tensor  # [B, R + Q] int64, position - 1 - shift
    first: Tensor  # [B] int64, the request's first row at this level


class DraftOps(Protocol):
    """What a drafter does besides running its layers: growing trees, and carrying rows from level to level."""

    def start(self, batch: Batch, levels: list[tuple[int, int]], ids: Tensor, vocab: int) -> Growth:
        """levels: `width` and `keep` of each; ids: [n] int64, the tokens to choose from; vocab: V of the main model."""

    def grow(self, tree: Growth, batch: Batch, level: Level) -> Growth: ...

    def finish(self, tree: Growth, batch: Batch, level: Level, best: int, ready: Tensor) -> DraftTree:
        """Grow the last level and give the tree to verify, `best` nodes of it if that is not 0.

        ready: [B] int64; requests where it is 0 get their root only.
        """

    def rows(self, tree: Growth, new: int, counts: Tensor, start: Tensor, first: Tensor, shift: int) -> LevelRows:
        """first: [B], of level 0, which lies `shift` before this level's."""

    def inputs(
        self, tree: Growth, tokens: Tensor, embedding: Tensor, hidden: Tensor, above: Tensor, carry: Tensor, slots: Tensor,
        counts: Tensor, *, deeper: bool,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """Embeddings and hidden states [B, R + Q, H] of a level's rows, whose first R are of `tokens` [B, R].

        hidden: at the first level the states themselves, deeper those of the rows of the level above. There a row gets
        its parent's; one without parent gets carry[slots[b]], which becomes the state of the last real new row.
        """

    def last(self, values: Tensor, counts: Tensor) -> Tensor:
        """values: [B, R, H] -> [B, 1, H], the last real row's (the first where there is none)."""

    def observe(
        self, slots: Tensor, lengths: Tensor, result: VerifyResult, hidden: Tensor, tokens_table: Tensor,
        hidden_table: Tensor, counts_table: Tensor, recent: Tensor, behind: Tensor | None = None,
    ) -> None:  # fmt: skip
        """Keep what a step emitted: row i of a slot becomes token i and the hidden state [B, N, H] of the node before it.

        The states go into the ring `recent` [S, R, H], too, by position: that of position p into row p % R. behind: [B]
        int64, rows that stay, and behind which the new ones go; the last slot is scratch, whose rows never stay.
        """


def level_sizes(shape: TreeShape, depth: int, beam: int) -> list[tuple[int, int]]:
    """For each level: candidates per frontier node, and how many of all candidates become nodes.

    A level of tree:N keeps `beam` nodes. Where all levels together would then have fewer than N, the first one keeps as
    many as a node may have children and the others share the rest; only a tree of one level can still fall short.
    """
    if shape.auto:
        return [(4, 4)] + [(3, 6)] * (depth - 1)  # of these few are kept
    if shape.best:
        width = min(shape.best, beam)
        if shape.best <= depth * beam:
            return [(width, width)] * depth
        first = min(MOST_CHILDREN, shape.best)
        keep = max(width, -(-(shape.best - first) // max(depth - 1, 1)))
        return [(first, first)] + [(min(MOST_CHILDREN, keep), keep)] * (depth - 1)
    sizes, nodes = [], 1
    for width in shape.widths:
        nodes *= width
        sizes.append((width, nodes))
    return sizes


def most_nodes(levels: Sequence[tuple[int, int]], vocab: int) -> int:
    """Nodes of the tree that grows by `levels`, root included, before it is pruned. vocab: tokens to choose from."""
    size, frontier = 1, 1
    for width, keep in levels:
        frontier = min(keep, frontier * min(width, vocab))
        size += frontier
    return size


def grow(tree: Growth, scores: Tensor, ids: Tensor, width: int, keep: int, group: Group = Group()) -> Growth:  # noqa: B008
    """Add a level. scores: [B, F, n] log-probabilities of each frontier node's next token; ids: [n] their tokens, or this
    rank's part of them.

    The `width` best candidates of every frontier node compete, the best `keep` by joint score become nodes.
    """
    batch, frontier, vocab = scores.shape
    width = min(width, vocab)
    keep = min(keep, frontier * width)
    best = scores.topk(width, dim=-1)
    values, tokens = group.best(best.values, ids[best.indices])
    joint, tokens = (values + tree.scores[:, -frontier:, None]).flatten(1), tokens.flatten(1)  # [B, F * width]
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


def best_first(tree: Growth) -> Growth:
    """The newest level's nodes by score."""
    before, tables = tree.tokens.shape[1] - tree.frontier, (tree.tokens, tree.parents, tree.depths, tree.scores)
    order = before + tree.scores[:, before:].sort(dim=-1, descending=True, stable=True).indices
    tokens, parents, depths, scores = (torch.cat([table[:, :before], table.gather(1, order)], 1) for table in tables)
    return Growth(tokens, parents, depths, scores, tree.frontier, tree.level)


def narrow(tree: Growth, keep: int) -> Growth:
    """Only the first `keep` nodes of the newest level."""
    if keep >= tree.frontier:
        return tree
    count, tables = tree.tokens.shape[1] - tree.frontier + keep, (tree.tokens, tree.parents, tree.depths, tree.scores)
    tokens, parents, depths, scores = (table[:, :count] for table in tables)
    return Growth(tokens, parents, depths, scores, keep, tree.level)


def prune(tree: Growth, nodes: int) -> Growth:
    """The root and the `nodes` best drafted nodes by joint score, in their order.

    A kept node's ancestors are kept: none scores less than its descendants, and the sort is stable, so that on a tie
    the ancestor, which stands first, wins.
    """
    order = tree.scores[:, 1:].sort(dim=-1, descending=True, stable=True).indices[:, :nodes] + 1
    kept = torch.cat([torch.zeros_like(order[:, :1]), order.sort(-1).values], 1)
    numbers = torch.arange(kept.shape[1], device=kept.device).expand_as(kept)
    renumbered = torch.zeros_like(tree.tokens).scatter_(1, kept, numbers)
    tokens, parents, depths, scores = (x.gather(1, kept) for x in (tree.tokens, tree.parents, tree.depths, tree.scores))
    parents = torch.where(parents < 0, parents, renumbered.gather(1, parents.clamp(min=0)))
    return Growth(tokens, parents, depths, scores, 0, tree.level)


def finish(tree: Growth, best: int, drafts: Tensor) -> DraftTree:
    """The tree to verify. drafts: [B] bool, False for requests that cannot be drafted for and get their root only."""
    tree = prune(tree, best) if 0 < best < tree.tokens.shape[1] - 1 else tree
    nodes = tree.tokens.shape[1]
    size = torch.where(drafts, nodes, 1)
    return DraftTree(tree.tokens, tree.parents, tree.depths, size, min(tree.level, nodes - 1), tree.scores)
