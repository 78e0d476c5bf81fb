"""The wide tree of a recording: all nodes that tree:1 to tree:63 have at a position, grown in one go."""

from dataclasses import replace
from typing import final

import torch
from torch import Tensor

from mtp_engine.config import TreeShape
from mtp_engine.drafters.expand import BEAM, MOST_CHILDREN, DraftOps, Growth, Level, LevelRows, level_sizes
from mtp_engine.sampling.batch import Batch
from mtp_engine.tree import DraftTree, VerifyResult

WIDEST = TreeShape(best=63)  # the nodes of tree:1 to tree:63 are all recorded
ROOM = 40  # nodes of a level that can be


def levels_of(tree: TreeShape, depth: int) -> list[tuple[int, int]]:
    """How a tree grows: of each level how many candidates a node has, and how many nodes are kept."""
    return level_sizes(tree, depth, BEAM)


def growths(depth: int) -> list[list[int]]:
    """The different ways in which tree:1 to tree:63 grow: how many nodes each level keeps."""
    found = [tuple(keep for _, keep in levels_of(TreeShape(best=nodes), depth)) for nodes in range(1, WIDEST.best + 1)]
    return [list(sizes) for sizes in dict.fromkeys(found)]


@final
class WideOps:
    """DraftOps that grow a wide tree, note it, and have nothing but the root verified."""

    def __init__(self, depth: int, inner: DraftOps) -> None:
        """inner: ranks candidates by noise, as it does when it drafts for real."""
        self._inner = inner
        self._growths = torch.tensor(growths(depth))  # [growths, D]
        self._members = torch.empty(0)  # [B, F, growths] bool: who has the frontier's nodes
        self.tree: Growth | None = None  # the last one
        self.first = torch.empty(0)  # [B, n], the first layer's logits of that tree
        self.missing = 0  # nodes for which there was no room, over all steps

    def start(self, batch: Batch, levels: list[tuple[int, int]], ids: Tensor, vocab: int) -> Growth:
        self._growths = self._growths.to(batch.tokens.device)
        self._members = self._growths.new_ones(len(batch.slots), 1, len(self._growths), dtype=torch.bool)
        return Growth.start(batch.tokens)

    def grow(self, tree: Growth, batch: Batch, level: Level) -> Growth:
        """What some growth keeps becomes a node; requests with fewer of them than another have the best others, too."""
        if tree.level == 0:
            self.first = level.logits[:, 0]
        tokens, joint = self._children(tree, batch, level)
        frontier, width = tree.frontier, joint.shape[1] // tree.frontier
        order = joint.sort(dim=-1, descending=True, stable=True).indices
        among = self._members.repeat_interleave(width, 1).gather(1, order[..., None].expand(-1, -1, len(self._growths)))
        members = among & (among.cumsum(1) <= self._growths[:, tree.level])  # [B, F * width, growths], the best first
        needed = members.any(-1)
        counts = needed.sum(1)
        keep = min(int(counts.max()), ROOM)
        self.missing += int((counts - keep).clamp(min=0).sum())
        best = needed.sort(dim=-1, descending=True, stable=True).indices[:, :keep]  # of `order`
        kept, back = order.gather(1, best).sort(dim=-1)
        best = best.gather(1, back)
        self._members = members.gather(1, best[..., None].expand(-1, -1, len(self._growths)))
        parents = (tree.tokens.shape[1] - frontier + torch.arange(frontier, device=kept.device)).repeat_interleave(
            width
        )
        tokens = tokens.gather(1, kept)
        return Growth(
            torch.cat([tree.tokens, tokens], 1), torch.cat([tree.parents, parents[kept]], 1),
            torch.cat([tree.depths, torch.full_like(tokens, tree.level + 1)], 1),
            torch.cat([tree.scores, joint.gather(1, kept)], 1), keep, tree.level + 1,
        )  # fmt: skip

    def _children(self, tree: Growth, batch: Batch, level: Level) -> tuple[Tensor, Tensor]:
        """The best candidates of every frontier node and their joint scores, [B, F * width] each. The inner ops take each
        node for a request whose root it is."""
        frontier, width = tree.frontier, min(MOST_CHILDREN, len(level.ids))
        of_nodes = {name: getattr(batch.sampling, name).repeat_interleave(frontier, 1) for name in ("rates", "numbers")}
        sampling = replace(batch.sampling, **of_nodes)
        each = replace(
            batch, slots=batch.slots.repeat_interleave(frontier), lengths=batch.lengths.repeat_interleave(frontier),
            tokens=tree.tokens[:, -frontier:].flatten(), sampling=sampling,
        )  # fmt: skip
        roots = self._inner.start(each, [(width, width)], level.ids, 0)
        own = replace(level, logits=level.logits.flatten(0, 1)[:, None], width=width, keep=width)
        grown = self._inner.grow(replace(roots, level=tree.level), each, own)
        scores = grown.scores[:, 1:].view(-1, frontier, width) + tree.scores[:, -frontier:, None]
        return grown.tokens[:, 1:].reshape(len(scores), -1), scores.flatten(1)

    def finish(self, tree: Growth, batch: Batch, level: Level, best: int, ready: Tensor) -> DraftTree:
        self.tree = self.grow(tree, batch, level)
        return DraftTree.root(batch.tokens)

    def rows(self, tree: Growth, new: int, counts: Tensor, start: Tensor, first: Tensor, shift: int) -> LevelRows:
        return self._inner.rows(tree, new, counts, start, first, shift)

    def inputs(
        self, tree: Growth, tokens: Tensor, embedding: Tensor, hidden: Tensor, above: Tensor, carry: Tensor, slots: Tensor,
        counts: Tensor, *, deeper: bool,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        return self._inner.inputs(tree, tokens, embedding, hidden, above, carry, slots, counts, deeper=deeper)

    def last(self, values: Tensor, counts: Tensor) -> Tensor:
        return self._inner.last(values, counts)

    def observe(
        self, slots: Tensor, lengths: Tensor, result: VerifyResult, hidden: Tensor, tokens_table: Tensor,
        hidden_table: Tensor, counts_table: Tensor, recent: Tensor, behind: Tensor | None = None,
    ) -> None:  # fmt: skip
        self._inner.observe(slots, lengths, result, hidden, tokens_table, hidden_table, counts_table, recent, behind)


def in_columns(tree: Growth, depth: int) -> dict[str, Tensor]:
    """The drafted nodes, ROOM of each level, [B, depth * ROOM] each: tokens, parents (0 is the root, 1 the first column) and
    joint scores. Where a level has fewer there are nodes without token (-1) and score (-inf)."""
    batch, columns = len(tree.tokens), depth * ROOM
    nodes = tree.tokens.new_full((batch, columns), -1, dtype=torch.int32)
    parents = torch.zeros_like(nodes, dtype=torch.int16)
    scores = tree.scores.new_full((batch, columns), -float("inf"))
    number = torch.zeros_like(tree.depths[0])  # of a node, by its number in the tree
    for level in range(depth):
        own = (tree.depths[0] == level + 1).nonzero()[:, 0]
        first = level * ROOM
        number[own] = 1 + first + torch.arange(len(own), device=own.device)
        nodes[:, first : first + len(own)] = tree.tokens[:, own].int()
        parents[:, first : first + ROOM] = max(1 + first - ROOM, 0)
        parents[:, first : first + len(own)] = number[tree.parents[:, own]].to(torch.int16)
        scores[:, first : first + len(own)] = tree.scores[:, own]
    return {"nodes": nodes, "parents": parents, "scores": scores}
