"""The levels of a LazyMTPDrafter with the CPU's library: rows, layer, head and the tree's next nodes in one call."""

from dataclasses import replace
from typing import final

import torch
from torch import Tensor

from mtp_engine.attention.native import describe_cache
from mtp_engine.cache import HybridKV
from mtp_engine.drafters.expand import Growth, Level, best_first
from mtp_engine.drafters.lazy import History, LevelWork, reads_outputs, states_of
from mtp_engine.drafters.portable import TorchDraftOps
from mtp_engine.kernels.cpu.calls import CLevel, Team
from mtp_engine.models.native import NativeMTP
from mtp_engine.sampling.batch import Batch


@final
class NativeLevels:
    """TorchLevels' twin (Levels). Nodes lie in tables of fixed size, of which a Growth shows the used part. Where a constraint
    guides a tree, torch picks its nodes."""

    def __init__(self, module: NativeMTP, team: Team, nodes: int) -> None:
        """nodes: no tree grows to more, root included, before it is cut (most_nodes)."""
        self.module, self._team, self._most, self._ops = module, team, nodes, TorchDraftOps()
        self._calls = [layer.describe(module.embedding) for layer in module.layers]
        self._cache: HybridKV | None = None
        self._history: History | None = None
        self._nodes: Growth | None = None  # the tables of the tree that grows now
        self._above: Tensor | None = None  # [B, Q, H], outputs of the nodes that the level before ran

    def attach(self, cache: HybridKV, history: History) -> None:
        self._cache, self._history = cache, history

    def start(self, batch: Batch) -> Growth:
        if batch.guide is not None:
            self._nodes = None
            return self._ops.start(batch, [], self.module.draft_ids, len(self.module.embedding))
        tokens, parents, depths = torch.empty(3, len(batch.slots), self._most, dtype=torch.int64).unbind(0)
        tokens[:, 0], parents[:, 0], depths[:, 0] = batch.tokens, -1, 0
        self._nodes = Growth(tokens, parents, depths, torch.zeros(tokens.shape), 1, 0)
        return self._shown(1, 1, 0)

    def run(self, work: LevelWork) -> None:
        self._run(work, self._call(work))

    def grow(self, work: LevelWork, batch: Batch, width: int, keep: int) -> Growth:
        call, tree, ids, nodes = self._call(work), work.tree, self.module.draft_ids, self._nodes
        logits = torch.empty(len(work.slots), tree.frontier, len(ids))
        call.logits = logits.data_ptr()
        if nodes is None:
            self._run(work, call)
            return best_first(self._ops.grow(tree, batch, Level(logits, ids, work.number + 1, width, keep)))
        grow, sampling, count = call.grow, batch.sampling, tree.tokens.shape[1]
        width = min(width, len(ids))
        keep = min(keep, tree.frontier * width)
        lengths = batch.lengths.contiguous()
        grow.logits, grow.ids, grow.lengths = logits.data_ptr(), ids.data_ptr(), lengths.data_ptr()
        grow.seed, grow.temperature = sampling.seed.data_ptr(), sampling.temperature.data_ptr()
        grow.scores, grow.first, grow.ahead = nodes.scores.data_ptr(), count - tree.frontier, work.number + 1
        grow.width, grow.keep = width, keep
        self._run(work, call)
        return self._shown(count + keep, keep, tree.level + 1)

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

    def _run(self, work: LevelWork, call: CLevel) -> None:
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
        self._above = passed

    def _shown(self, count: int, frontier: int, level: int) -> Growth:
        """The first `count` nodes."""
        whole = self._nodes
        assert whole is not None
        tokens, parents, depths, scores = (
            table[:, :count] for table in (whole.tokens, whole.parents, whole.depths, whole.scores)
        )
        return replace(
            whole, tokens=tokens, parents=parents, depths=depths, scores=scores, frontier=frontier, level=level
        )
