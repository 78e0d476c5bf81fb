"""Growing trees with kernels: a level in one launch, or two where candidates are drawn."""

from dataclasses import replace
from typing import final

import torch
from torch import Tensor

from mtp_engine.drafters.candidates import Ranking
from mtp_engine.drafters.expand import MOST_CHILDREN, Growth, Level, LevelRows, most_nodes
from mtp_engine.drafters.portable import TorchDraftOps
from mtp_engine.kernels import state
from mtp_engine.kernels.grow import Finish, Finished, Nodes, Roots, draft_level, own_best, shared_level
from mtp_engine.kernels.process import favour
from mtp_engine.kernels.reject import drawn_rows
from mtp_engine.parallel.group import Group
from mtp_engine.sampling.batch import Batch
from mtp_engine.tree import DraftTree, VerifyResult


@final
class DeviceDraftOps:
    """TorchDraftOps' twin (DraftOps). Nodes lie in arrays of fixed size, of which a Growth shows the used part.

    Trees that constraints guide wait for the host anyway, and are grown by the twin; so are trees that are too wide.
    """

    def __init__(
        self, max_batch: int, device: torch.device, ranking: Ranking = "noise", group: Group = Group()  # noqa: B008
    ) -> None:  # fmt: skip
        """group: of ranks that share the tokens to choose from; all logits are gathered where candidates are drawn."""
        self._ranking, self._group = ranking, group
        self._all_ids: Tensor | None = None  # of the tree that grows now, where all logits are gathered
        self._arrivals = torch.zeros(
            max_batch * 65, dtype=torch.int32, device=device
        )  # a frontier has at most 64 nodes
        self._requests = torch.arange(max_batch, device=device)
        self._nodes: Nodes | None = None  # of the tree that grows now
        self._cold = torch.zeros(max_batch, device=device)
        self._drawn_from: Tensor | None = None  # DraftTree.draft of the tree that grows now
        self._twin, self._by_twin = TorchDraftOps(ranking, group), False

    def start(self, batch: Batch, levels: list[tuple[int, int]], ids: Tensor, vocab: int) -> Growth:
        self._by_twin = batch.guide is not None or max(width for width, _ in levels) > MOST_CHILDREN
        if self._by_twin:
            return self._twin.start(batch, levels, ids, vocab)
        if self._group.size > 1 and self._ranking == "drawn":
            ids = self._all_ids = self._group.join(ids)  # in every graph, as what is made in one belongs to it
        count, most = len(batch.slots), most_nodes(levels, len(ids))
        self._nodes = Nodes.empty(count, most, batch.slots.device)
        if self._ranking == "drawn":
            self._drawn_from = torch.zeros(count, most, vocab, device=batch.slots.device)
        return _shown(self._nodes, 1, 1, 0)

    def grow(self, tree: Growth, batch: Batch, level: Level) -> Growth:
        if self._by_twin:
            return self._twin.grow(tree, batch, level)
        assert self._nodes is not None
        level = self._whole(level)
        self._run(tree, batch, level, None)
        keep = min(level.keep, tree.frontier * min(level.width, len(level.ids)))
        return _shown(self._nodes, tree.tokens.shape[1] + keep, keep, tree.level + 1)

    def finish(self, tree: Growth, batch: Batch, level: Level, best: int, ready: Tensor) -> DraftTree:
        if self._by_twin:
            return self._twin.finish(tree, batch, level, best, ready)
        done = self._run(tree, batch, self._whole(level), Finish(best, ready))
        assert done is not None
        deepest = min(tree.level + 1, done.tokens.shape[1] - 1)
        return DraftTree(done.tokens, done.parents, done.depths, done.size, deepest, done.scores, self._drawn_from)

    def _whole(self, level: Level) -> Level:
        """Of all tokens, where a distribution is asked for."""
        if self._all_ids is None:
            return level
        return replace(level, logits=self._group.join(level.logits), ids=self._all_ids)

    def _run(self, tree: Growth, batch: Batch, level: Level, finish: Finish | None) -> Finished | None:
        assert self._nodes is not None
        sampling, first = batch.sampling, tree.tokens.shape[1] - tree.frontier
        if biases := batch.biases:
            level = replace(level, logits=favour(level.logits, level.ids, batch.slots, biases.wanted, biases.bias))
        roots = Roots(self._requests[: len(batch.slots)], batch.tokens) if tree.level == 0 else None
        temperature = self._cold[: len(batch.slots)] if self._ranking == "best" else sampling.temperature
        if self._drawn_from is not None:
            drawn_rows(level.logits, level.ids, temperature, self._drawn_from, first)
        if self._group.size > 1 and self._all_ids is None:
            found = own_best(
                level.logits, batch.lengths, level.ids, sampling.seed, temperature, self._arrivals,
                min(level.width, len(level.ids)), ahead=level.ahead,
            )  # fmt: skip
            shared = self._group.gather(found)
            return shared_level(shared, self._arrivals, self._nodes, first, level.keep, roots=roots, finish=finish)
        return draft_level(
            level.logits, batch.lengths, level.ids, sampling.seed, temperature, self._arrivals, self._nodes, first,
            min(level.width, len(level.ids)), level.keep, ahead=level.ahead, roots=roots, finish=finish,
            drawn=self._ranking == "drawn",
        )  # fmt: skip

    def rows(self, tree: Growth, new: int, counts: Tensor, start: Tensor, first: Tensor, shift: int) -> LevelRows:
        nodes = tree.tokens.shape[1] - 1
        return LevelRows(*state.level_rows(counts, start, first, new, tree.parents, tree.depths, nodes, shift))

    def inputs(
        self, tree: Growth, tokens: Tensor, embedding: Tensor, hidden: Tensor, above: Tensor, carry: Tensor, slots: Tensor,
        counts: Tensor, *, deeper: bool,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        nodes = tree.tokens.shape[1] - 1
        if not deeper:
            return state.level_inputs(embedding, tokens, tree.tokens, nodes, hidden)
        return state.level_inputs(
            embedding, tokens, tree.tokens, nodes, hidden, above=above, carry=carry, slots=slots, counts=counts
        )

    def last(self, values: Tensor, counts: Tensor) -> Tensor:
        return state.last_rows(values, counts)

    def observe(
        self, slots: Tensor, lengths: Tensor, result: VerifyResult, hidden: Tensor, tokens_table: Tensor,
        hidden_table: Tensor, counts_table: Tensor, recent: Tensor, behind: Tensor | None = None,
    ) -> None:  # fmt: skip
        state.observe(
            slots, lengths, result.path, result.tokens, result.counts, hidden, tokens_table, hidden_table, counts_table,
            recent, behind,
        )  # fmt: skip


def _shown(nodes: Nodes, count: int, frontier: int, level: int) -> Growth:
    """The first `count` nodes."""
    tokens, parents, depths = (array[:, :count] for array in (nodes.tokens, nodes.parents, nodes.depths))
    return Growth(tokens, parents, depths, nodes.scores[:, :count], frontier, level)
