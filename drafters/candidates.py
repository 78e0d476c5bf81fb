"""How a drafter picks the children of a node: what its probabilities are ranked by, and the distribution of what is drawn."""

from typing import Literal, final

import torch
from torch import Tensor

from mtp_engine.drafters.expand import Growth
from mtp_engine.parallel.group import Group
from mtp_engine.sampling.batch import Batch
from mtp_engine.sampling.sampler import gumbel, step_seed

Ranking = Literal["noise", "drawn", "best"]
_CANDIDATES = 103  # purpose of step_seed
_FORBIDDEN = -1e4  # in place of -inf: where all tokens to choose from are forbidden, some are drafted all the same


def biases_of(batch: Batch, ids: Tensor) -> Tensor | None:
    """What the requests add to the scores of `ids`, [B, n] fp32. Kernel: kernels.process.favour."""
    if batch.biases is None:
        return None
    return batch.biases.bias[batch.slots[:, None], ids].clamp(min=_FORBIDDEN)


@final
class Candidates:
    """One step's ranking. The best of the scores it returns become nodes.

    noise: by probability and the noise of the main model's own choice: what it would choose if its probabilities were
    the drafter's. best: by probability. drawn: by probability and noise used for nothing else, which draws from the
    drafter's distribution without replacement (Gumbel top-k; Kool et al. 2019, "Stochastic beams and where to find
    them"); `distribution` gives those of the whole tree.
    """

    def __init__(self, ranking: Ranking, batch: Batch, ids: Tensor, vocab: int, group: Group = Group()) -> None:  # noqa: B008
        """ids: [n] int64, the tokens of the drafter's scores. vocab: V of the main model. group: among whose ranks all tokens
        are divided; `ids` are this one's."""
        self._ranking, self._sampling, self._lengths, self._ids, self._vocab = (
            ranking, batch.sampling, batch.lengths, ids, vocab,
        )  # fmt: skip
        self._guide, self._group, self._biases = batch.guide, group, biases_of(batch, ids)
        self._drawn_from: list[Tensor] = []

    def rank(self, logits: Tensor, tree: Growth) -> Tensor:
        """Scores that are log-probabilities given the noise. logits: [B, F, n] of the tree's frontier -> [B, F, n]."""
        if self._biases is not None:
            logits = logits + self._biases[:, None]
        if self._guide is not None:
            logits = self._guide.narrow(tree.tokens, tree.parents, logits, self._ids)
        if self._sampling.greedy or self._ranking == "best":
            if self._ranking == "drawn":
                self._drawn_from.append(torch.zeros_like(logits))
            return self._group.log_softmax(logits)
        temperature = self._sampling.temperature.view(-1, 1, 1)
        scaled = logits / temperature.clamp(min=1e-6)
        if self._ranking == "noise":
            noise = gumbel(self._sampling.seed, (self._lengths + tree.level + 1)[:, None], self._ids)
        else:
            self._drawn_from.append(
                scaled.softmax(-1) * (temperature > 0)
            )  # at temperature 0 candidates are given, not drawn
            seed = step_seed(self._sampling.seed, self._lengths, _CANDIDATES)
            nodes = tree.tokens.shape[1] - tree.frontier + torch.arange(logits.shape[1], device=logits.device)
            noise = gumbel(seed, nodes.expand(logits.shape[:2]), self._ids)
        return self._group.log_softmax(torch.where(temperature > 0, scaled + noise, logits))

    def distribution(self, nodes: int) -> Tensor | None:
        """q at every node of a tree whose levels were all ranked, [B, nodes, V]; None unless candidates are drawn."""
        if not self._drawn_from:
            return None
        rows = torch.cat(self._drawn_from, 1)
        whole = rows.new_zeros(rows.shape[0], nodes, self._vocab)
        whole[:, : rows.shape[1], self._ids] = rows
        return whole
