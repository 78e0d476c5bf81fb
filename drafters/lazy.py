"""Drafting with MTP layers on a CPU: a layer runs committed rows when it is first asked again, and a tree grows as far as pays.

Rows, positions and what repairs them are those of drafters/mtp.py. There all layers run in every step, since a GPU replays
steps of one shape. Here a layer that is left out for a while, since no draft so deep would pay, keeps its rows for later:
tokens and hidden states lie in rings by position, and each layer knows the last row that it has run.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, final

import torch
from torch import Tensor

from mtp_engine.attention.rows import AttentionFactory, StepRows
from mtp_engine.cache import NO_LIMIT, HybridKV, Pages, ring_spans, write_ring
from mtp_engine.config import MTPConfig, TreeShape
from mtp_engine.drafters.expand import BEAM, Growth, Level, best_first, finish, level_sizes, narrow
from mtp_engine.drafters.portable import TorchDraftOps
from mtp_engine.models.mtp import MTPModule
from mtp_engine.protocols import TreePlanner
from mtp_engine.sampling.batch import Batch
from mtp_engine.tree import DraftTree, VerifyResult

_PENDING = 256  # rows that a layer may have to come; then it runs them
_PIECE = 48  # rows that it runs at a time
_TOGETHER = 8  # rows of a request that run beside other requests' rows; one that has more runs them alone


@final
@dataclass(frozen=True)
class History:
    """What the levels read of committed positions, per slot. What belongs to position p lies in row p % size."""

    tokens: Tensor  # [slots, R] int64
    states: Tensor  # [slots, R, H] of the main model
    outputs: Sequence[Tensor]  # of each level whose outputs another one reads: [slots, O, H]


@final
@dataclass(frozen=True)
class LevelWork:
    """The rows that a level runs: committed ones that it has not seen, and all drafted nodes of the tree so far."""

    number: int
    slots: Tensor  # [B] int64
    start: Tensor  # [B] int64, position of the first row
    counts: Tensor  # [B] int64, rows of each request; the last one is the root's if there is a tree to grow
    rows: int  # the largest of the counts, or more
    first: Tensor  # [B] int64, the first row that the request has at level 0
    bound: int  # no request has more tokens, these rows included
    tree: Growth


class Levels(Protocol):
    """Runs MTP layers level by level."""

    def attach(self, cache: HybridKV, history: History) -> None: ...

    def start(self, batch: Batch, sizes: list[tuple[int, int]]) -> Growth:
        """A tree of roots. sizes: `width` and `keep` of the levels to come, at most."""

    def run(self, work: LevelWork) -> None:
        """Rows only: their keys and values, and the outputs that other levels read."""

    def grow(self, work: LevelWork, batch: Batch, width: int, keep: int) -> Growth:
        """And the tree's next level: `width` candidates per node of the newest one, `keep` of all of them, best first."""


LevelsFactory = Callable[[MTPModule], Levels]


@final
class LazyMTPDrafter:
    """A Drafter for one step at a time. Candidates come first by the drafter's probability and the request's noise."""

    prompts = None

    def __init__(
        self, module: MTPModule, shape: TreeShape, levels: LevelsFactory, *, slots: int, planner: TreePlanner | None = None,
        beam: int = BEAM,
    ) -> None:  # fmt: skip
        """shape, beam: as MTPDrafter has them. planner: cuts every tree to what pays."""
        self.module, self.shape, self.planner = module, shape, planner
        self.depth = min(module.config.depth, shape.best) if shape.best else len(shape.widths)
        self._sizes = level_sizes(shape, self.depth, beam)
        self.levels = levels(module)
        drafted = sum(keep for _, keep in self._sizes)
        self.max_nodes = 1 + (min(shape.best, drafted) if shape.best else drafted)
        self.scratch_rows = _PIECE + sum(keep for _, keep in self._sizes[:-1])
        reach = self.depth if module.config.chained and not module.config.reused else 1
        self.history = (module.config.layer.attention.window or NO_LIMIT) * reach + self.depth
        self.reread = 2 * self.depth - 1  # level k begins k rows later than the first one
        self.cache: HybridKV | None = None
        self._slots, self._layers = slots, 1 if module.config.reused else self.depth
        self._seen = [[number] * slots for number in range(self._layers)]  # the last row that each layer has run
        self._first = torch.ones(slots, dtype=torch.int64)
        self._past = History(torch.empty(0), torch.empty(0), [])

    def attach(self, pages: Pages, behind: int) -> None:
        config, embedding = self.module.config, self.module.embedding
        self.cache = HybridKV(
            [config.layer.attention] * len(self.module.layers), pages, max_nodes=self.scratch_rows,
            behind=behind + self.reread, dtype=embedding.dtype,
        )  # fmt: skip
        size = (self.history if self.history < NO_LIMIT else self.reread) + 1 + behind + self.depth + 1
        size = max(size, _PENDING + 4 * self.depth)
        readers = 1 if config.reused else self.depth - 1 if config.chained else 0
        outputs = [
            embedding.new_zeros(self._slots, _PENDING + _PIECE + 4 * self.depth, embedding.shape[1])
            for _ in range(readers)
        ]
        tokens = torch.zeros(self._slots, size, dtype=torch.int64)
        self._past = History(tokens, embedding.new_zeros(self._slots, size, embedding.shape[1]), outputs)
        self.levels.attach(self.cache, self._past)

    def release(self, slot: int) -> None:
        self._begin(slot, 1)
        if self.planner:
            self.planner.release(slot)

    def _begin(self, slot: int, first: int) -> None:
        """The first layer's next row is `first`, and there are none before it."""
        self._first[slot] = first
        self._go_on(slot, first)

    def _go_on(self, slot: int, start: int) -> None:
        for number, seen in enumerate(self._seen):
            seen[slot] = start + number - 1

    def save(self, slot: int, tokens: int, *, lean: bool) -> list[Tensor]:
        """The main model's states of the last `reread` + 1 positions, or of all that drafting needs: [rows, H]."""
        if not lean:
            self._advance(slot, tokens - 1)  # whoever goes on from these has all rows before them
        rows, ring = min(tokens, (self.history if lean else self.reread) + 1), self._past.states[slot]
        return [torch.cat([ring[span] for span in ring_spans(0, len(ring), tokens - rows, tokens)])]

    def load(self, slot: int, known: Sequence[int], saved: Sequence[Tensor], left: int) -> None:
        """Each layer runs again over the tokens whose states are there, a row later than the one before it."""
        [hidden], tokens = saved, len(known) - 1
        start = tokens + 1 - len(hidden)  # the first row to run: it takes the state before it
        self._write(slot, start - 1, torch.tensor(known[start:]), hidden)
        if left >= self.history:
            return  # nothing of this will be seen
        self._first[slot] = max(1, tokens + 1 - self.history)
        self._go_on(slot, start)
        self._advance(slot, tokens - 1)

    def _write(self, slot: int, start: int, tokens: Tensor, states: Tensor) -> None:
        """states [C, H] of the positions from `start` on, tokens [C] of those one later."""
        write_ring(self._past.states[slot], start, states)
        write_ring(self._past.tokens[slot], start + 1, tokens)

    def _advance(self, slot: int, stop: int) -> None:
        """Have all layers run the rows up to position `stop`."""
        behind = min(seen[slot] for seen in self._seen)
        for end in [*range(behind + _PENDING, stop, _PENDING), stop]:
            for number in range(self._layers):
                self._run_alone(number, slot, end)

    def _run_alone(self, number: int, slot: int, stop: int) -> None:
        """Have a layer run its rows up to position `stop`; the layer before it has run them."""
        seen, one = self._seen[number], torch.tensor([slot])
        while seen[slot] < stop:
            count = min(stop - seen[slot], _PIECE)
            self.levels.run(self._work(number, one, [seen[slot] + 1], [count], stop + 1, Growth.start(one)))
            seen[slot] += count

    def _work(
        self, number: int, slots: Tensor, start: list[int], counts: list[int], bound: int, tree: Growth
    ) -> LevelWork:
        rows, starts = max([1, *counts]), torch.tensor(start)
        return LevelWork(number, slots, starts, torch.tensor(counts), rows, self._first[slots], bound, tree)

    def draft(self, batch: Batch) -> DraftTree:
        slots, planner = batch.slots.tolist(), self.planner
        if planner and not planner.drafts(slots):
            return DraftTree.root(batch.tokens)
        tree = self.levels.start(batch, self._sizes)
        for number, (width, keep) in enumerate(self._sizes):
            tree = self.levels.grow(self._level(number, batch, slots, tree), batch, width, keep)
            if planner:
                tree = narrow(tree, planner.grown(tree.scores[:, -tree.frontier :].exp().tolist()))
                if number + 1 < self.depth and not planner.deeper():
                    break
        return finish(tree, planner.nodes() if planner else self.shape.best, batch.lengths > 0)

    def _level(self, number: int, batch: Batch, slots: list[int], tree: Growth) -> LevelWork:
        lengths, bound = batch.lengths.tolist(), batch.bound + self.max_nodes
        if number >= self._layers:  # a layer that is used again has run the rows
            none = torch.zeros_like(batch.slots)
            return LevelWork(number, batch.slots, batch.lengths + 1, none, 0, self._first[batch.slots], bound, tree)
        seen = self._seen[number]
        if self.planner:
            late = (length - seen[slot] - self.depth - 1 for slot, length in zip(slots, lengths, strict=True))
            self.planner.late(sum(max(0, rows) for rows in late))
        for slot, length in zip(slots, lengths, strict=True):
            if length - seen[slot] > (_TOGETHER if len(slots) > 1 else _PIECE):
                self._run_alone(number, slot, length - 1)
        counts = [max(0, length - seen[slot]) for slot, length in zip(slots, lengths, strict=True)]
        start = [length + 1 - count for length, count in zip(lengths, counts, strict=True)]
        work = self._work(number, batch.slots, start, counts, bound, tree)
        for slot, count in zip(slots, counts, strict=True):
            seen[slot] += count
        return work

    def observe(self, batch: Batch, result: VerifyResult, hidden: Tensor) -> None:
        if batch.prompt_left is not None:
            self._read(batch, result.tokens, hidden, batch.prompt_left)
            return
        slots, counts = batch.slots.tolist(), result.counts.tolist()
        if self.planner:
            self.planner.learn(slots, [count - 1 for count in counts])
        states, lengths = self.module.main_hidden(hidden), batch.lengths.tolist()
        for b, (slot, length, count) in enumerate(zip(slots, lengths, counts, strict=True)):
            kept = states[b, :1] if count == 1 else states[b, result.path[b, :count]]
            self._write(slot, length, result.tokens[b, :count], kept)
            if length + count - min(seen[slot] for seen in self._seen) > _PENDING:
                self._advance(slot, length)

    def _read(self, batch: Batch, tokens: Tensor, hidden: Tensor, left: int) -> None:
        """A prompt's chunk: tokens [1, C] behind its first one, hidden [1, C, H] of the positions before them. The newest row
        is left for `draft`, and rows too far from the prompt's end for any draft to see are left out."""
        stop, slot = batch.bound, int(batch.slots)
        start = stop - tokens.shape[1]  # position of the token in front of `tokens`
        first = max(1, stop + left + 1 - self.history)  # the first row that is needed
        begin = max(start, min(first - 1, stop - self._past.states.shape[1]))
        states = self.module.main_hidden(hidden[:, begin - start :])[0]
        if self._seen[0][slot] + 1 < first:
            self._begin(slot, first)
        for at in range(begin, stop, _PIECE):
            end = min(at + _PIECE, stop)
            self._write(slot, at, tokens[0, at - start : end - start], states[at - begin : end - begin])
            self._advance(slot, end - 1)


@final
class TorchLevels:
    """Level by level with torch operations (Levels)."""

    def __init__(self, module: MTPModule, attention: AttentionFactory) -> None:
        self.module, self._attention, self._ops = module, attention, TorchDraftOps(group=module.group)
        self._cache: HybridKV | None = None
        self._history: History | None = None
        self._above: Tensor | None = None  # [B, Q, H], outputs of the nodes that the level before ran

    def attach(self, cache: HybridKV, history: History) -> None:
        self._cache, self._history = cache, history

    def start(self, batch: Batch, sizes: list[tuple[int, int]]) -> Growth:
        return self._ops.start(batch, sizes, self.module.draft_ids, len(self.module.embedding))

    def run(self, work: LevelWork) -> None:
        self._outputs(work)

    def grow(self, work: LevelWork, batch: Batch, width: int, keep: int) -> Growth:
        output, frontier = self._outputs(work), work.tree.frontier
        self._above = output[:, work.rows :]
        last = output[:, -frontier:] if work.tree.level else self._ops.last(output, work.counts)
        logits = self.module.logits(work.number, last)
        level = Level(logits, self.module.draft_ids, work.number + 1, width, keep)
        return best_first(self._ops.grow(work.tree, batch, level))

    def _outputs(self, work: LevelWork) -> Tensor:
        """[B, rows + nodes, H]"""
        assert self._cache
        assert self._history
        module, tree, past = self.module, work.tree, self._history
        level = self._ops.rows(
            tree, work.rows, work.counts, work.start, work.first, 0 if module.config.reused else work.number
        )
        own = work.slots[:, None]
        tokens = torch.cat(
            [past.tokens[own, level.positions[:, : work.rows] % past.tokens.shape[1]], tree.tokens[:, 1:]], 1
        )
        rows = StepRows(
            work.slots, work.start, level.positions, level.parents, work.rows + tree.level, work.bound, level.first,
            offsets=level.offsets,
        )  # fmt: skip
        output = module.forward(
            work.number, module.embedding[tokens], self._states(work, level.positions), level.rotary,
            self._attention(self._cache, rows),
        )  # fmt: skip
        if work.number < len(past.outputs):  # the next level reads them
            ring = past.outputs[work.number]
            real = torch.arange(work.rows) < work.counts[:, None]
            places = level.positions[:, : work.rows] % ring.shape[1]
            ring[own.expand_as(places)[real], places[real]] = output[:, : work.rows][real]
        return output

    def _states(self, work: LevelWork, positions: Tensor) -> Tensor:
        assert self._history
        ring, lag = states_of(self.module.config, self._history, work.number)
        states = ring[work.slots[:, None], (positions - lag) % ring.shape[1]]
        parents = work.tree.parents[:, 1:]
        if not reads_outputs(self.module.config, work.number) or self._above is None:
            return states
        size = self._above.shape[1]  # nodes of the level before: the parents, but for the root
        if not size:
            return states
        above = self._above.gather(1, (parents - 1).clamp(0, size - 1)[..., None].expand(-1, -1, states.shape[2]))
        nodes = torch.where((parents > 0)[..., None], above, states[:, work.rows :])
        return torch.cat([states[:, : work.rows], nodes], 1)


def reads_outputs(config: MTPConfig, number: int) -> bool:
    """Whether level `number` reads the outputs of the level before it, and not the main model's states."""
    return number > 0 and (config.chained or config.reused)


def states_of(config: MTPConfig, past: History, number: int) -> tuple[Tensor, int]:
    """The ring from which a level's rows take their states, and how far these lie before the rows."""
    if reads_outputs(config, number):
        return past.outputs[0 if config.reused else number - 1], 1
    return past.states, 1 + number
