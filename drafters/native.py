"""Growing trees with the CPU's library: a level in one call."""

from dataclasses import replace
from typing import final

import torch
from torch import Tensor

from mtp_engine.drafters.expand import Growth, Level, LevelRows, finish, most_nodes, narrow
from mtp_engine.drafters.portable import TorchDraftOps
from mtp_engine.kernels.cpu.calls import CGrow, Team
from mtp_engine.sampling.batch import Batch
from mtp_engine.tree import DraftTree, VerifyResult


@final
class NativeDraftOps:
    """TorchDraftOps' twin (DraftOps) for candidates that are ranked by noise. Nodes lie in tables of fixed size, of which a
    Growth shows the used part. Trees that constraints guide are grown by the twin."""

    def __init__(self, team: Team) -> None:
        self._team, self._torch = team, TorchDraftOps()
        self._nodes: Growth | None = None  # the tables of the tree that grows now

    def start(self, batch: Batch, levels: list[tuple[int, int]], ids: Tensor, vocab: int) -> Growth:
        if batch.guide is not None:
            return self._torch.start(batch, levels, ids, vocab)
        tokens, parents, depths = torch.empty(
            3, len(batch.slots), most_nodes(levels, len(ids)), dtype=torch.int64
        ).unbind(0)
        tokens[:, 0], parents[:, 0], depths[:, 0] = batch.tokens, -1, 0
        self._nodes = Growth(tokens, parents, depths, torch.zeros(tokens.shape), 1, 0)
        return self._shown(1, 1, 0)

    def grow(self, tree: Growth, batch: Batch, level: Level) -> Growth:
        if batch.guide is not None:
            return self._torch.grow(tree, batch, level)
        assert self._nodes is not None
        width, nodes, sampling = min(level.width, len(level.ids)), self._nodes, batch.sampling
        keep, count = min(level.keep, tree.frontier * width), tree.tokens.shape[1]
        logits, lengths = level.logits.contiguous(), batch.lengths.contiguous()
        self._team.grow(
            CGrow(
                logits.data_ptr(), level.ids.data_ptr(), lengths.data_ptr(), sampling.seed.data_ptr(),
                sampling.temperature.data_ptr(), nodes.tokens.data_ptr(), nodes.parents.data_ptr(), nodes.depths.data_ptr(),
                nodes.scores.data_ptr(), len(lengths), tree.frontier, len(level.ids), nodes.tokens.shape[1],
                count - tree.frontier, level.ahead, width, keep,
            )
        )  # fmt: skip
        return self._shown(count + keep, keep, tree.level + 1)

    def narrow(self, tree: Growth, keep: int) -> Growth:
        narrowed = narrow(tree, keep)
        whole = self._nodes
        if narrowed is tree or whole is None or tree.tokens.data_ptr() != whole.tokens.data_ptr():
            return narrowed
        count = narrowed.tokens.shape[1]
        for name in ("tokens", "parents", "depths", "scores"):
            getattr(whole, name)[:, :count] = getattr(narrowed, name)
        return self._shown(count, keep, tree.level)

    def finish(self, tree: Growth, batch: Batch, level: Level, best: int, ready: Tensor) -> DraftTree:
        if batch.guide is not None:
            return self._torch.finish(tree, batch, level, best, ready)
        return finish(self.grow(tree, batch, level), best, ready > 0)

    def rows(self, tree: Growth, new: int, counts: Tensor, start: Tensor, first: Tensor, shift: int) -> LevelRows:
        return self._torch.rows(tree, new, counts, start, first, shift)

    def inputs(
        self, tree: Growth, tokens: Tensor, embedding: Tensor, hidden: Tensor, above: Tensor, carry: Tensor, slots: Tensor,
        counts: Tensor, *, deeper: bool,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        return self._torch.inputs(tree, tokens, embedding, hidden, above, carry, slots, counts, deeper=deeper)

    def last(self, values: Tensor, counts: Tensor) -> Tensor:
        return self._torch.last(values, counts)

    def observe(
        self, slots: Tensor, lengths: Tensor, result: VerifyResult, hidden: Tensor, tokens_table: Tensor,
        hidden_table: Tensor, counts_table: Tensor, recent: Tensor,
    ) -> None:  # fmt: skip
        self._torch.observe(slots, lengths, result, hidden, tokens_table, hidden_table, counts_table, recent)

    def _shown(self, count: int, frontier: int, level: int) -> Growth:
        """The first `count` nodes."""
        whole = self._nodes
        assert whole is not None
        tables = (table[:, :count] for table in (whole.tokens, whole.parents, whole.depths, whole.scores))
        return replace(
            whole,
            **dict(zip(("tokens", "parents", "depths", "scores"), tables, strict=True)),
            frontier=frontier,
            level=level,
        )
