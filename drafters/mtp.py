"""Drafting with MTP layers, with exact rows whatever was rejected before.

Coordinates. Row j of layer k joins token x[j+1+k] with a hidden state of position j. We number a row by its token's
position p = j+1+k instead: then one step adds the same rows p to every layer (those of the tokens just emitted), a
tree node at depth i is row n+i in every layer (n: the last committed token's position), and only the rotary position
j = p-1-k differs between layers. Layer k's first row is p = k+1.

Exact repair. Rows of committed tokens are computed once, in the step after their tokens are emitted, from the main
model's own hidden states, and kept. Rows of draft tokens are computed in the step that drafts them, lie behind the
kept rows, and are overwritten in the next step. So no row of a rejected token, nor one built from a hidden state that
the main model did not yet have, is ever read again.

Hidden states. Row p of layer k needs the hidden state of position p-1-k, which layer k-1 had in row p-1 as its input
(or, where layers are chained, computed in row p-1 as its output). So from layer to layer the states move one row on:
the row before the first new one is carried over from the last step, and a tree node takes its parent's.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import final

import torch
from torch import Tensor

from mtp_engine.attention.rows import AttentionFactory, StepRows
from mtp_engine.attention.torch import TorchAttention
from mtp_engine.cache import NO_LIMIT, HybridKV, Pages, ring_spans, write_ring
from mtp_engine.config import TreeShape
from mtp_engine.drafters.expand import BEAM, DraftOps, Growth, Level, LevelRows, level_sizes
from mtp_engine.drafters.portable import TorchDraftOps
from mtp_engine.models.mtp import MTPModule
from mtp_engine.protocols import StepPlanner
from mtp_engine.sampling.batch import Batch, Chunk, Extent, to_device
from mtp_engine.tree import DraftTree, VerifyResult


@final
@dataclass(frozen=True)
class _NewRows:
    """Rows of committed tokens that the MTP layers have not seen yet: `counts` per request, padded at the end."""

    slots: Tensor  # [B]
    tokens: Tensor  # [B, R]
    hidden: Tensor  # [B, R, H], of the position before each token
    counts: Tensor  # [B]
    start: Tensor  # [B], position of the first token
    first: Tensor  # [B], the request's first row at level 0
    bound: int  # no request has more tokens
    full: bool = False  # all rows are real, and there is no tree: a chain


@final
class MTPDrafter:
    """Grows one tree level per MTP layer, of the candidates that come first by its `ops`' ranking (see Candidates)."""

    def __init__(
        self,
        module: MTPModule,
        shape: TreeShape,
        *,
        slots: int,
        beam: int = BEAM,
        attention: AttentionFactory = TorchAttention,
        ops: DraftOps | None = None,
        ring_page: int = 1,
        ring_rows: int = 1,
        others: Sequence[TreeShape] = (),
        late: int = 0,
        planner: StepPlanner | None = None,
    ) -> None:
        """shape: at most as deep as the module has levels. others: that a step's plan may name. late: rows that may be to
        come, where steps may be planned without drafts. planner: who plans them.
        beam: how many nodes of a level are given children when the shape is tree:N, or more (see level_sizes).
        ring_page: see HybridKV. ring_rows: a ring takes at least this many rows at a time."""
        self.module, self.shape, self.attention = module, shape, attention
        self.ops = ops or TorchDraftOps(group=module.group)
        self.planner = planner
        depths = {each: min(module.config.depth, each.best) or len(each.widths) for each in (shape, *others)}
        self.depth = max(depths.values())
        self._levels = {each: level_sizes(each, depth, beam) for each, depth in depths.items()}
        self.max_nodes = max(self.nodes(each) for each in depths)
        layer, embedding = module.config.layer.attention, module.embedding
        self.usual = self.depth + 1  # rows that are to come after a step with drafts
        rows = max(self.usual, late)
        self.scratch_rows = rows + max(sum(keep for _, keep in levels[:-1]) for levels in self._levels.values())
        self.cache: HybridKV | None = None
        self._ring_page, self._ring_rows = ring_page, ring_rows
        # a chained layer's rows need the whole window of the layer before, so windows add up
        reach = self.depth if module.config.chained and not module.config.reused else 1
        self.history = (layer.window or NO_LIMIT) * reach + self.depth
        # so many rows may be still to come when a state is saved; level k makes its own again from k rows later on
        self.reread = rows - 1 + self.depth - 1
        self._slots, hidden, device = slots, embedding.shape[1], embedding.device
        self._tokens = torch.zeros(slots, rows, dtype=torch.int64, device=device)
        self._hidden = torch.zeros(slots, rows, hidden, dtype=embedding.dtype, device=device)
        self._counts = torch.zeros(slots, dtype=torch.int64, device=device)
        self._first = torch.ones(slots, dtype=torch.int64, device=device)
        self._carry = torch.zeros(self.depth, slots, hidden, dtype=embedding.dtype, device=device)
        self._recent = self._hidden[:, :0]  # [slots, R, H], the state of position p in row p % R
        # of what is loaded: slot, position of the first row to run, `_first` and the tokens from there on; and states
        self._loaded, self._loaded_hidden = self._counts[:0], self._hidden[0, :0]
        self._reload: Callable[[int, int], None] = lambda rows, bound: self.reload((rows, bound))

    def nodes(self, shape: TreeShape) -> int:
        """Of its tree, root included."""
        drafted = sum(keep for _, keep in self._levels[shape])
        return 1 + (min(shape.best, drafted) if shape.best else drafted)

    def attach(self, pages: Pages, behind: int) -> None:
        layer, embedding = self.module.config.layer.attention, self.module.embedding
        self.cache = HybridKV(
            [layer] * len(self.module.layers), pages, max_nodes=max(self.scratch_rows, self._ring_rows),
            behind=behind + self.reread, ring_page=self._ring_page, dtype=embedding.dtype,
        )  # fmt: skip
        read = self.history if self.history < NO_LIMIT else self.reread
        kept = read + 1 + behind + self.depth + 1
        self._recent = embedding.new_zeros(self._slots, kept, embedding.shape[1])
        self._loaded = torch.zeros(3 + self.loads[-1], dtype=torch.int64, device=embedding.device)
        self._loaded_hidden = embedding.new_zeros(self.loads[-1], embedding.shape[1])

    def release(self, slot: int) -> None:
        self._first[slot], self._counts[slot] = 1, 0
        self._carry[:, slot] = 0.0
        if self.planner:
            self.planner.release(slot)

    def save(self, slot: int, tokens: int, *, lean: bool) -> list[Tensor]:
        """The main model's states of the last `reread` + 1 positions, or of all that drafting needs: [rows, H]."""
        rows, ring = min(tokens, (self.history if lean else self.reread) + 1), self._recent[slot]
        return [torch.cat([ring[span] for span in ring_spans(0, len(ring), tokens - rows, tokens)])]

    def load(self, slot: int, known: Sequence[int], saved: Sequence[Tensor], left: int) -> None:
        """Each level runs over the tokens whose states are there, a row later than the level above, from which it takes a
        state; so all rows are those that were there, and the last ones leave the states that `draft` goes on from."""
        [hidden], tokens, device = saved, len(known) - 1, self._carry.device
        write_ring(self._recent[slot], tokens - len(hidden), hidden)
        if left >= self.history:
            return  # nothing of this will be seen
        start = tokens + 1 - len(hidden)  # position of the first row to run: it takes the state before it
        given = to_device([slot, start, max(1, tokens + 1 - self.history), *known[start:]], torch.int64, device)
        self._loaded[: len(given)].copy_(given)
        self._loaded_hidden[: len(hidden)].copy_(hidden)
        self._reload(len(hidden), tokens + 1)

    @property
    def loads(self) -> list[int]:
        """See PromptReader: states of entries with the layers' rows, and of lean ones."""
        return sorted({self.reread + 1, *([self.history + 1] if self.history < NO_LIMIT else [])})

    def record(self, run: Callable[[int, int], None], slot: int) -> None:
        """See PromptReader."""
        self._reload = run
        self._loaded[:3] = to_device([slot, 1, 1], torch.int64, self._loaded.device)

    def reload(self, extent: tuple[int, int]) -> None:
        """See PromptReader."""
        (count, bound), (at, given) = extent, torch.split(self._loaded, [3, len(self._loaded) - 3])
        slots, start, first = at[:, None]
        ids, states = given[None, :count], self._loaded_hidden[None, :count]
        self._first[slots], self._counts[slots] = first, torch.ones_like(slots)
        self._tokens[slots, 0], self._hidden[slots, 0] = ids[:, -1], states[:, -1]
        self._carry[:, slots] = torch.zeros_like(self._carry[:, slots])
        ids, states = ids[:, :-1], states[:, :-1]
        for number in range(min(self.depth, len(self.module.layers))):
            if not ids.shape[1]:
                break
            counts = torch.full_like(slots, ids.shape[1])
            rows = _NewRows(slots, ids, states, counts, start + number, first, bound, True)
            level = self._run(number, rows, Growth.start(slots), None)
            if number + 1 < self.depth:
                self._carry[number + 1, slots] = level.passed[:, -1]
            ids, states = ids[:, 1:], level.passed[:, :-1]

    def draft(self, batch: Batch) -> DraftTree:
        shape = (batch.plan and batch.plan.shape) or self.shape
        rows, levels = self._new_rows(batch), self._levels[shape]
        ids, last = self.module.draft_ids, len(levels) - 1
        tree, level = self.ops.start(batch, levels, ids, len(self.module.embedding)), None
        for number, (width, keep) in enumerate(levels):
            level = self._run(number, rows, tree, level)
            grown = Level(self.module.logits(number, level.frontier), ids, number + 1, width, keep)
            if number < last:
                tree = self.ops.grow(tree, batch, grown)
        finished = self.ops.finish(tree, batch, grown, shape.best, rows.counts)
        for number in range(len(levels), len(self.module.layers[: self.depth])):  # what later steps may ask of them
            level = self._run(number, rows, Growth.start(batch.tokens), level)
        return replace(finished, straight=set(shape.widths) == {1})

    def _new_rows(self, batch: Batch) -> _NewRows:
        """All that are to come; without a plan, or where nobody is late, these are few."""
        count = self._tokens.shape[1] if batch.plan and batch.plan.late else self.usual
        slots, counts = batch.slots, self._counts[batch.slots]
        start, bound = batch.lengths - counts + 1, batch.bound + self.max_nodes
        tokens, hidden = self._tokens[slots, :count], self._hidden[slots, :count]
        return _NewRows(slots, tokens, hidden, counts, start, self._first[slots], bound)

    def observe(self, batch: Batch, result: VerifyResult, hidden: Tensor) -> None:
        states = self.module.main_hidden(hidden)
        stays = self._counts[batch.slots] if batch.plan and not batch.plan.shape else None
        self.ops.observe(
            batch.slots, batch.lengths, result, states, self._tokens, self._hidden, self._counts, self._recent, stays
        )

    # ---- prompts (a PromptReader) ------------------------------------------------------------------------------------

    @property
    def prompts(self) -> "MTPDrafter":
        return self

    def keep(self, slots: Tensor, positions: Tensor, stops: Tensor, hidden: Tensor) -> Tensor:
        """The main model's states. Where a chunk has more than `recent` holds, rows that would be overwritten bring what
        would overwrite them: in which order rows are written does not matter then."""
        states, ring = self.module.main_hidden(hidden)[0], self._recent.shape[1]
        later = (stops - 1 - positions).clamp(min=0) // ring * ring
        rows = torch.arange(len(states), device=states.device)
        self._recent[slots, positions % ring] = states[rows + later]
        return states

    def outline(self, chunks: Sequence[Chunk]) -> list[tuple[int, ...]]:
        """Per chunk its slot; what makes a position a row of the pass; positions of its first token and of the first row to
        run; `_first`, 0 if that stays; the token that is drafted from; how many rows run.

        All but the newest row go through the layers; that one is drafted from, so it is left for `draft`, or for the
        next chunk. Rows too far from the prompt's end for any draft to see are left out.
        """
        found = list[tuple[int, ...]]()
        for chunk in chunks:
            first = max(1, chunk.stop + chunk.left + 1 - self.history)  # position of the first row that is needed
            if chunk.stop < first:
                continue
            begin, fresh = max(chunk.start, first), first if chunk.start < first else 0
            origin, rows = chunk.row - chunk.start, chunk.stop - begin
            found.append((chunk.slot, origin, chunk.start, begin, fresh, chunk.behind, rows))
        return found

    def nothing(self, slot: int, position: int) -> tuple[int, ...]:
        return slot, 1 - position, position, position, 0, 0, 0

    def read(self, outline: Tensor, extent: Extent, tokens: Tensor, states: Tensor) -> None:
        slots, origins, starts, begins, fresh, behind, counts = outline
        self._first[slots] = torch.where(fresh > 0, fresh, self._first[slots])
        if extent.rows:
            requests = torch.stack([slots, begins, counts])
            rows = StepRows.prompts(requests, extent.rows, extent.bound, padded=extent.padded)
            assert rows.owners is not None
            own, at = rows.owners, rows.positions[0] + origins[rows.owners]
            left = rows.positions[0] == starts[own]  # the row that the chunk before this one left
            hidden = torch.where(left[:, None], self._hidden[slots[own], 0], states[(at - 1).clamp(min=0)])
            self._read(rows, self.module.embedding[tokens[at]], hidden)
        newest = states[begins + counts - 1 + origins]
        self._tokens[slots, 0], self._hidden[slots, 0] = behind, newest
        self._counts[slots] = torch.ones_like(slots)

    def _read(self, rows: StepRows, embedded: Tensor, hidden: Tensor) -> None:
        """Packed rows through all layers: embedded, hidden [N, H]."""
        own, slots, counts = rows.owners, rows.slots, rows.counts
        assert self.cache, "the drafter is not attached to a loop"
        assert counts is not None
        assert own is not None
        lasts, some = (counts.cumsum(0) - 1).clamp(min=0), (counts > 0)[:, None]
        leads, reused = (rows.positions[0] == rows.lengths[own])[:, None], self.module.config.reused
        passed = hidden
        for number in range(min(self.depth, len(self.module.layers))):
            if number:
                carry = self._carry[number]
                hidden = torch.where(leads, carry[slots[own]], passed.roll(1, 0))
                carry[slots] = torch.where(some, passed[lasts], carry[slots])
            shift = 0 if reused else number  # see `_run`
            step = replace(rows.single(), first=self._first[slots] + shift)
            output = self.module.forward(
                number, embedded[None], hidden[None], rows.positions - 1 - shift, self.attention(self.cache, step)
            )[0]
            passed = output if self.module.config.chained or reused else hidden

    # ---- levels ------------------------------------------------------------------------------------------------------

    def _run(self, number: int, rows: _NewRows, tree: Growth, before: "_Level | None") -> "_Level":
        """Level `number` over the new rows and the tree's nodes so far. `before`: what the level above passes on."""
        if before is not None and self.module.config.reused:
            return self._again(number, rows, tree, before)
        shift = 0 if self.module.config.reused else number  # how far this level's rows lag behind the first level's
        new = rows.tokens.shape[1]
        level = self.ops.rows(tree, new, rows.counts, rows.start, rows.first, shift)
        embedded, hidden = self.ops.inputs(
            tree, rows.tokens, self.module.embedding, before.passed if before else rows.hidden, level.parents,
            self._carry[number], rows.slots, rows.counts, deeper=before is not None,
        )  # fmt: skip
        output = self._forward(number, rows, rows.start, level, new + tree.level, embedded, hidden)
        passed = output if self.module.config.chained or self.module.config.reused else hidden
        return _Level(passed, self.ops.last(output, rows.counts) if before is None else output[:, -tree.frontier :])

    def _again(self, number: int, rows: _NewRows, tree: Growth, before: "_Level") -> "_Level":
        """A deeper level of a layer that is used again: the new rows are in its cache, only the drafted nodes run."""
        none = torch.zeros_like(rows.counts)
        start = rows.start + rows.counts
        level = self.ops.rows(tree, 0, none, start, rows.first, 0)
        root = self.ops.last(before.passed, rows.counts) if number == 1 else before.passed[:, :1]
        states = torch.cat([root, before.passed[:, rows.tokens.shape[1] if number == 1 else 1 :]], 1)
        hidden = states.gather(1, tree.parents[:, 1:, None].expand(-1, -1, states.shape[2]))
        embedded = self.module.embedding[tree.tokens[:, 1:]]
        output = self._forward(number, rows, start, level, tree.level, embedded, hidden)
        return _Level(torch.cat([root, output], 1), output[:, -tree.frontier :])

    def _forward(
        self, number: int, rows: _NewRows, start: Tensor, level: LevelRows, depth: int, embedded: Tensor, hidden: Tensor
    ) -> Tensor:
        bound = rows.bound + embedded.shape[1]
        step = StepRows(
            rows.slots, start, level.positions, level.parents, depth, bound, level.first, rows.full, level.offsets
        )
        assert self.cache, "the drafter is not attached to a loop"
        return self.module.forward(number, embedded, hidden, level.rotary, self.attention(self.cache, step))


@final
@dataclass(frozen=True)
class _Level:
    """What a level hands to the next: the hidden states of its rows, and its outputs at the newest tree nodes."""

    passed: Tensor  # [B, R + Q, H]; from the second use of a layer on [B, 1 + Q, H], the root's first
    frontier: Tensor  # [B, F, H] outputs that predict the next level
