"""Growing trees with torch operations, of candidates picked in any way (see Candidates)."""

from dataclasses import replace
from typing import final

import torch
from torch import Tensor

from mtp_engine.drafters.candidates import Candidates, Ranking
from mtp_engine.drafters.expand import Growth, Level, LevelRows, finish, grow
from mtp_engine.parallel.group import Group
from mtp_engine.sampling.batch import Batch
from mtp_engine.tree import DraftTree, VerifyResult


@final
class TorchDraftOps:
    """Any device, operation by operation (DraftOps). Ranks that share the tokens to choose from exchange their best ones; all
    logits only where a distribution or a constraint asks for them."""

    def __init__(self, ranking: Ranking = "noise", group: Group = Group()) -> None:  # noqa: B008  frozen
        self._ranking: Ranking = ranking
        self._group = group
        self._candidates: Candidates | None = None  # of the tree that grows now

    def start(self, batch: Batch, levels: list[tuple[int, int]], ids: Tensor, vocab: int) -> Growth:
        group = self._group
        if self._all(batch):
            ids, group = group.join(ids), Group()
        self._candidates = Candidates(self._ranking, batch, ids, vocab, group)
        return Growth.start(batch.tokens)

    def _all(self, batch: Batch) -> bool:
        return self._group.size > 1 and (self._ranking == "drawn" or batch.guide is not None)

    def grow(self, tree: Growth, batch: Batch, level: Level) -> Growth:
        assert self._candidates is not None
        logits, ids, group = level.logits, level.ids, self._group
        if self._all(batch):
            logits, ids, group = group.join(logits), group.join(ids), Group()
        return grow(tree, self._candidates.rank(logits, tree), ids, level.width, level.keep, group)

    def finish(self, tree: Growth, batch: Batch, level: Level, best: int, ready: Tensor) -> DraftTree:
        finished = finish(self.grow(tree, batch, level), best, ready > 0)
        assert self._candidates is not None
        return replace(finished, draft=self._candidates.distribution(finished.nodes))

    def rows(self, tree: Growth, new: int, counts: Tensor, start: Tensor, first: Tensor, shift: int) -> LevelRows:
        index = torch.arange(new, device=counts.device).expand(len(counts), -1)
        above = torch.where(index < counts[:, None], index - 1, -1)
        parents = tree.parents[:, 1:]
        nodes = torch.where(parents == 0, counts[:, None] * min(new, 1) - 1, new + parents - 1)
        offsets = torch.cat([index, counts[:, None] - 1 + tree.depths[:, 1:]], 1)
        positions = start[:, None] + offsets
        return LevelRows(positions, torch.cat([above, nodes], 1), offsets, positions - 1 - shift, first + shift)

    def inputs(
        self, tree: Growth, tokens: Tensor, embedding: Tensor, hidden: Tensor, above: Tensor, carry: Tensor, slots: Tensor,
        counts: Tensor, *, deeper: bool,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        embedded = embedding[torch.cat([tokens, tree.tokens[:, 1:]], 1)]
        if not deeper:
            return embedded, hidden
        carried = carry[slots][:, None]
        carry[slots] = self.last(hidden, counts)[:, 0]
        source = above.clamp(min=0)[..., None].expand(-1, -1, hidden.shape[2])
        return embedded, torch.where((above >= 0)[..., None], hidden.gather(1, source), carried)

    def last(self, values: Tensor, counts: Tensor) -> Tensor:
        index = (counts - 1).clamp(min=0)[:, None, None]
        return values.gather(1, index.expand(-1, 1, values.shape[2]))

    def observe(
        self, slots: Tensor, lengths: Tensor, result: VerifyResult, hidden: Tensor, tokens_table: Tensor,
        hidden_table: Tensor, counts_table: Tensor, recent: Tensor, behind: Tensor | None = None,
    ) -> None:  # fmt: skip
        rows, states = result.tokens.shape[1], result.gather(hidden)
        stay = torch.zeros_like(slots) if behind is None else torch.where(slots < len(counts_table) - 1, behind, 0)
        index = torch.arange(rows, device=lengths.device)
        at = slots[:, None], (stay[:, None] + index).clamp(max=tokens_table.shape[1] - 1)
        tokens_table[at], hidden_table[at] = result.tokens, states
        recent[slots[:, None], (lengths[:, None] + index) % recent.shape[1]] = states
        counts_table[slots] = (stay + result.counts).clamp(max=tokens_table.shape[1])
