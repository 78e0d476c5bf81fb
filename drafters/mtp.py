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

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from mtp_engine.attention import AttentionFactory, StepRows, TorchAttention
from mtp_engine.cache import HybridKV
from mtp_engine.config import TreeShape
from mtp_engine.drafters.expand import Growth, finish, grow, level_sizes
from mtp_engine.models.mtp import MTPModule
from mtp_engine.protocols import Batch
from mtp_engine.sampler import SamplingBatch, gumbel
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
    bound: int  # no request has more tokens

    def positions(self) -> Tensor:
        return self.start[:, None] + torch.arange(self.tokens.shape[1], device=self.tokens.device)

    def last(self, values: Tensor) -> Tensor:
        """values: [B, R, H] -> [B, 1, H], the last real row's (the first where there is none)."""
        index = (self.counts - 1).clamp(min=0)[:, None, None]
        return values.gather(1, index.expand(-1, 1, values.shape[2]))


@final
class MTPDrafter:
    """Grows one tree level per MTP layer. The noise of the main model's choice also ranks the candidates: at
    temperature > 0 the drafter proposes what the main model would choose if its probabilities were the drafter's."""

    def __init__(
        self,
        module: MTPModule,
        shape: TreeShape,
        *,
        slots: int,
        tokens: int,
        page_size: int,
        beam: int = 8,
        attention: AttentionFactory = TorchAttention,
        ring_page: int = 1,
        ring_rows: int = 1,
    ) -> None:
        """shape: at most as deep as the module has levels. tokens: capacity of MTP layers with full attention.
        beam: how many nodes of a level are given children when the shape is tree:N. ring_page: see HybridKV.
        ring_rows: a ring takes at least this many rows at a time."""
        self.module, self.shape, self.attention = module, shape, attention
        self.depth = min(module.config.depth, shape.best) if shape.best else len(shape.widths)
        self._levels = level_sizes(shape, self.depth, beam)
        self.max_nodes = shape.max_nodes
        layer, embedding = module.config.layer.attention, module.embedding
        rows = self.depth + 1
        self.scratch_rows = rows + sum(keep for _, keep in self._levels[:-1])  # rows a step may append to the cache
        self.cache = HybridKV(
            [layer] * len(module.layers), slots=slots, tokens=tokens, page_size=page_size,
            max_nodes=max(self.scratch_rows, ring_rows), ring_page=ring_page, dtype=embedding.dtype, device=embedding.device,
        )  # fmt: skip
        # a chained layer's rows need the whole window of the layer before, so windows add up
        reach = self.depth if module.config.chained and not module.config.reused else 1
        self.history = (layer.window or 1 << 40) * reach + self.depth
        hidden, device = embedding.shape[1], embedding.device
        self._tokens = torch.zeros(slots, rows, dtype=torch.int64, device=device)
        self._hidden = torch.zeros(slots, rows, hidden, dtype=embedding.dtype, device=device)
        self._counts = torch.zeros(slots, dtype=torch.int64, device=device)
        self._first = torch.zeros(slots, dtype=torch.int64, device=device)
        self._carry = torch.zeros(self.depth, slots, hidden, dtype=embedding.dtype, device=device)

    def reserve(self, slot: int, tokens: int) -> None:
        self.cache.reserve(slot, tokens + self.scratch_rows)

    def release(self, slot: int) -> None:
        self.cache.release(slot)

    def prefill(self, slot: int, tokens: Tensor, hidden: Tensor) -> None:
        known = len(hidden)
        start = len(tokens) - known
        self._first[slot], self._counts[slot], self._carry[:, slot] = start, min(known, 1), 0.0
        if known == 0:
            return
        hidden = self.module.main_hidden(hidden)
        self._tokens[slot, 0], self._hidden[slot, 0] = tokens[-1], hidden[-1]  # drafted from, so left for `draft`
        if known > 1:
            slots = torch.tensor([slot], device=tokens.device)
            ones = torch.ones_like(slots)
            new = tokens[None, start:-1]
            rows = _NewRows(slots, new, hidden[None, :-1], ones * (known - 1), ones * start, len(tokens))
            level = None
            for number in range(min(self.depth, len(self.module.layers))):
                level = self._run(number, rows, Growth.start(ones), level)

    def draft(self, batch: Batch) -> DraftTree:
        slots, counts = batch.slots, self._counts[batch.slots]
        start = batch.lengths - counts + 1
        rows = _NewRows(slots, self._tokens[slots], self._hidden[slots], counts, start, batch.bound + self.max_nodes)
        tree, level = Growth.start(batch.tokens), None
        for number, (width, keep) in enumerate(self._levels):
            level = self._run(number, rows, tree, level)
            scores = self._score(self.module.logits(number, level.frontier), batch.lengths + number + 1, batch.sampling)
            tree = grow(tree, scores, self.module.draft_ids, width, keep)
        return finish(tree, self.shape, counts > 0)

    def observe(self, batch: Batch, result: VerifyResult, hidden: Tensor) -> None:
        rows = result.tokens.shape[1]
        self._tokens[batch.slots, :rows] = result.tokens
        self._hidden[batch.slots, :rows] = self.module.main_hidden(hidden)
        self._counts[batch.slots] = result.counts

    def _run(self, number: int, rows: _NewRows, tree: Growth, before: "_Level | None") -> "_Level":
        """Level `number` over the new rows and the tree's nodes so far. `before`: what the level above passes on."""
        reused = self.module.config.reused
        root = rows.start + rows.counts - 1  # position of the last committed token
        if before is not None and reused:  # the new rows are in this layer's cache already
            start, counts = root + 1, torch.zeros_like(rows.counts)
            tokens, hidden, positions = rows.tokens[:, :0], rows.hidden[:, :0], rows.positions()[:, :0]
        else:
            start, counts = rows.start, rows.counts
            tokens, hidden, positions = rows.tokens, self._row_hidden(number, rows, before), rows.positions()
        new = tokens.shape[1]
        if before is not None:
            parents = tree.parents[:, 1:, None].expand(-1, -1, hidden.shape[2])
            hidden = torch.cat([hidden, before.nodes.gather(1, parents)], 1)
        tokens = torch.cat([tokens, tree.tokens[:, 1:]], 1)
        positions = torch.cat([positions, root[:, None] + tree.depths[:, 1:]], 1)
        shift = 0 if reused else number  # how far this level's rows lag behind the first level's
        depth = new + tree.level
        first = self._first[rows.slots] + shift
        step = StepRows(rows.slots, start, positions, _forest(new, counts, tree), depth, rows.bound + new, first)
        output = self.module.forward(number, tokens, hidden, positions - 1 - shift, self.attention(self.cache, step))
        passed = output if self.module.config.chained or reused else hidden
        root_passed = rows.last(passed[:, :new]) if new else before.nodes[:, :1] if before else passed
        return _Level(
            rows=passed[:, :new],
            nodes=torch.cat([root_passed, passed[:, new:]], 1),
            frontier=rows.last(output) if before is None else output[:, -tree.frontier :],
        )

    def _row_hidden(self, number: int, rows: _NewRows, before: "_Level | None") -> Tensor:
        """Hidden states of the new rows at level `number`, [B, R, H]: those of the level above, one row on."""
        if before is None:
            return rows.hidden
        carried = self._carry[number, rows.slots][:, None]
        self._carry[number, rows.slots] = rows.last(before.rows)[:, 0]
        return torch.cat([carried, before.rows[:, :-1]], 1)

    def _score(self, logits: Tensor, positions: Tensor, sampling: SamplingBatch) -> Tensor:
        """Log-probabilities of the tokens at `positions` [B]: of the draft itself at temperature 0, of the draft given
        the noise at temperature > 0. logits: [B, F, n] -> [B, F, n]."""
        if not sampling.greedy:
            temperature = sampling.temperature.view(-1, 1, 1)
            noisy = logits / temperature.clamp(min=1e-6) + gumbel(
                sampling.seed, positions[:, None], self.module.draft_ids
            )
            logits = torch.where(temperature > 0, noisy, logits)
        return logits.log_softmax(-1)


@final
@dataclass(frozen=True)
class _Level:
    """What a level hands to the next: the hidden states of its rows, and its outputs at the newest tree nodes."""

    rows: Tensor  # [B, R, H] of the new rows
    nodes: Tensor  # [B, 1 + Q, H] of the root and the tree's nodes
    frontier: Tensor  # [B, F, H] outputs that predict the next level


def _forest(new: int, counts: Tensor, tree: Growth) -> Tensor:
    """[B, new + Q] parents: each real new row is above the next, the last one is the root's, and nodes hang below."""
    index = torch.arange(new, device=counts.device)
    rows = torch.where(index < counts[:, None], index - 1, -1)
    parents = tree.parents[:, 1:]
    nodes = torch.where(parents == 0, counts[:, None] - 1, new + parents - 1)
    return torch.cat([rows, nodes], 1)
