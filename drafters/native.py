"""Drafting with the CPU's library: a level of a LazyMTPDrafter in one call, and growing a tree alone in one."""

from typing import final

import torch
from torch import Tensor

from mtp_engine.attention.native import describe_cache
from mtp_engine.cache import HybridKV
from mtp_engine.drafters.candidates import biases_of
from mtp_engine.drafters.expand import Growth, Level, LevelRows, best_first, finish, most_nodes
from mtp_engine.drafters.lazy import History, LevelWork, reads_outputs, states_of
from mtp_engine.drafters.portable import TorchDraftOps
from mtp_engine.kernels.cpu.calls import CGrow, CLevel, Team
from mtp_engine.models.native import NativeMTP
from mtp_engine.sampling.batch import Batch
from mtp_engine.tree import DraftTree, VerifyResult


@final
class NativeDraftOps:
    """TorchDraftOps' twin (DraftOps) for candidates that are ranked by noise; of a level the best nodes stand first. Nodes lie
    in tables of fixed size, of which a Growth shows the used part. Trees that constraints guide are grown by the twin."""

    def __init__(self, team: Team) -> None:
        self._team, self._torch = team, TorchDraftOps()
        self._nodes: Growth | None = None  # the tables of the tree that grows now
        self._biases: Tensor | None = None  # of its requests

    def start(self, batch: Batch, levels: list[tuple[int, int]], ids: Tensor, vocab: int) -> Growth:
        if batch.guide is not None:
            return self._torch.start(batch, levels, ids, vocab)
        tokens, parents, depths = torch.zeros(
            3, len(batch.slots), most_nodes(levels, len(ids)), dtype=torch.int64
        ).unbind(0)
        tokens[:, 0], parents[:, 0] = batch.tokens, -1
        self._biases = biases_of(batch, ids)
        self._nodes = Growth(tokens, parents, depths, torch.zeros(tokens.shape), 1, 0)
        return self._shown(1, 1, 0)

    def grow(self, tree: Growth, batch: Batch, level: Level) -> Growth:
        if batch.guide is not None:
            return best_first(self._torch.grow(tree, batch, level))
        call = CGrow()
        grown = self.describe(call, tree, batch, level)
        self._team.grow(call)
        return grown

    def describe(self, call: CGrow, tree: Growth, batch: Batch, level: Level) -> Growth:
        """Fill in a call that grows a tree. Returns what is there once it has run."""
        assert self._nodes is not None
        nodes, sampling, width = self._nodes, batch.sampling, min(level.width, len(level.ids))
        keep, count = min(level.keep, tree.frontier * width), tree.tokens.shape[1]
        assert level.logits.is_contiguous()
        assert batch.lengths.is_contiguous()
        call.logits, call.ids, call.lengths = level.logits.data_ptr(), level.ids.data_ptr(), batch.lengths.data_ptr()
        call.seed, call.temperature = sampling.seed.data_ptr(), sampling.temperature.data_ptr()
        call.biases = None if self._biases is None else self._biases.data_ptr()
        call.tokens, call.parents = nodes.tokens.data_ptr(), nodes.parents.data_ptr()
        call.depths, call.scores = nodes.depths.data_ptr(), nodes.scores.data_ptr()
        call.batch, call.frontier, call.n, call.cap = (
            len(nodes.tokens),
            tree.frontier,
            len(level.ids),
            nodes.tokens.shape[1],
        )
        call.first, call.ahead, call.width, call.keep = count - tree.frontier, level.ahead, width, keep
        return self._shown(count + keep, keep, tree.level + 1)

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
        hidden_table: Tensor, counts_table: Tensor, recent: Tensor, behind: Tensor | None = None,
    ) -> None:  # fmt: skip
        self._torch.observe(slots, lengths, result, hidden, tokens_table, hidden_table, counts_table, recent, behind)

    def _shown(self, count: int, frontier: int, level: int) -> Growth:
        """The first `count` nodes."""
        whole = self._nodes
        assert whole is not None
        tokens, parents, depths = whole.tokens[:, :count], whole.parents[:, :count], whole.depths[:, :count]
        return Growth(tokens, parents, depths, whole.scores[:, :count], frontier, level)


@final
class NativeLevels:
    """TorchLevels' twin (Levels)."""

    def __init__(self, module: NativeMTP, team: Team) -> None:
        self.module, self._team, self._ops = module, team, NativeDraftOps(team)
        self._calls = [layer.describe(module.embedding) for layer in module.layers]
        self._cache: HybridKV | None = None
        self._history: History | None = None
        self._above: Tensor | None = None  # [B, Q, H], outputs of the nodes that the level before ran

    def attach(self, cache: HybridKV, history: History) -> None:
        self._cache, self._history = cache, history

    def start(self, batch: Batch, sizes: list[tuple[int, int]]) -> Growth:
        return self._ops.start(batch, sizes, self.module.draft_ids, len(self.module.embedding))

    def run(self, work: LevelWork) -> None:
        self._run(work, self._call(work))

    def grow(self, work: LevelWork, batch: Batch, width: int, keep: int) -> Growth:
        call, tree, ids = self._call(work), work.tree, self.module.draft_ids
        logits = torch.empty(len(work.slots), tree.frontier, len(ids))
        call.logits, level = logits.data_ptr(), Level(logits, ids, work.number + 1, width, keep)
        if batch.guide is not None:  # torch grows it
            self._above = self._run(work, call)
            return self._ops.grow(tree, batch, level)
        grown = self._ops.describe(call.grow, tree, batch, level)
        self._above = self._run(work, call)
        return grown

    def _call(self, work: LevelWork) -> CLevel:
        """Everything but what grows."""
        assert self._history
        module, tree, past = self.module, work.tree, self._history
        call = self._calls[0 if module.config.reused else work.number]
        states, call.lag = states_of(module.config, past, work.number)
        call.ids, call.ring = past.tokens.data_ptr(), past.tokens.shape[1]
        call.states, call.state_ring = states.data_ptr(), states.shape[1]
        written = work.number < len(past.outputs)
        call.outputs = past.outputs[work.number].data_ptr() if written else None
        call.output_ring = past.outputs[work.number].shape[1] if written else 1
        call.rows, call.tree_nodes = work.rows, tree.tokens.shape[1] - 1
        call.shift = 0 if module.config.reused else work.number
        call.logits, call.grow.width = None, 0
        call.grow.tokens, call.grow.parents = tree.tokens.data_ptr(), tree.parents.data_ptr()
        call.grow.depths, call.grow.cap = tree.depths.data_ptr(), tree.tokens.stride(0)
        call.grow.batch, call.grow.frontier, call.grow.n = len(work.slots), tree.frontier, len(module.draft_ids)
        return call

    def _run(self, work: LevelWork, call: CLevel) -> Tensor:
        """Returns the outputs of the tree's nodes, [B, Q, H]."""
        assert self._cache
        step, above, first = call.step, self._above, work.first + call.shift
        passed = torch.empty(len(work.slots), call.tree_nodes, self.module.embedding.shape[1])
        if above is not None and reads_outputs(self.module.config, work.number):
            call.above, call.above_nodes = above.data_ptr(), above.shape[1]
        else:
            call.above = None
        call.passed, call.counts = passed.data_ptr(), work.counts.data_ptr()
        step.slots, step.lengths, step.first = work.slots.data_ptr(), work.start.data_ptr(), first.data_ptr()
        step.batch = len(work.slots)
        held = describe_cache(self._cache, step)
        self._team.level(call)
        del held
        return passed
