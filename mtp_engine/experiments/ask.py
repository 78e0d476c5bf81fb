"""What a recording answers: the accepted length of any tree, draft vocabulary and rule, in seconds.

Steps of real decoding begin where the step before them ended. A recording knows at every position how many drafts a step
that began there would have accepted, so walking it gives the very steps of real decoding. Rules that accept by noise of
their own have probabilities instead: given the text x that was said, a step accepts at least k drafts with probability
q(x_1..x_k) / p(x_1..x_k) times the trust in the drafts (1, or less where q is below p), and the expected number of steps
is the sum over all positions of the probability that a step begins there.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, final

import numpy as np
import numpy.typing as npt

from mtp_engine.config import TreeShape
from mtp_engine.errors import EngineError
from mtp_engine.experiments.store import CaseFolder, extras
from mtp_engine.experiments.wide import levels_of

Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]


@final
@dataclass(frozen=True)
class Question:
    """What to compute. vocabulary: draft tokens, 0 for those that were recorded. candidates: noise, best, or drawn."""

    tree: TreeShape
    rule: str = "match"
    candidates: str = "noise"
    vocabulary: int = 0

    def __post_init__(self) -> None:
        chain = set(self.tree.widths) == {1}
        if self.rule not in ("match", "rejection", "block"):
            raise EngineError(
                f"a recording does not answer for the {self.rule} rule, which needs the main model's distribution at nodes "
                "beside the text: decode for real (--mode run)"
            )
        if self.rule != "match" and not chain:
            raise EngineError(f"the {self.rule} rule checks chains: ask for chain:K, not {self.tree}")
        if self.tree.best and (self.candidates == "best" or self.vocabulary):
            raise EngineError(
                f"{self.tree} was recorded for one draft vocabulary and for candidates ranked by noise: record it anew with "
                "--draft-vocab, or ask for chain:K or WxW"
            )


@final
@dataclass(frozen=True)
class Recording:
    """A recorded case. Positions of all requests lie one behind the other, P in all.

    tokens [P]; loop [P] bool; entropy [P], nats; p [P] log-probability; rank, rank_best [P, D, W] and q [P, D, W] of the true
    token at the depths and within the vocabularies (`record.true_ranks`); nodes, parents, scores [P, K] of the wide tree;
    begins [R + 1]: where each request's positions begin.
    """

    requests: Any  # a pandas frame, a row per request
    temperature: float
    begins: Integers
    columns: dict[str, Any]

    @classmethod
    def load(cls, folder: CaseFolder) -> "Recording":
        """Raises EngineError for a case that was not recorded or holds nothing yet."""
        if folder.case.mode != "record":
            raise EngineError(f"{folder.path}: was decoded for real, not recorded; use --mode record")
        requests, positions = folder.frame("requests"), folder.frame("positions")
        if not len(positions):
            raise EngineError(f"{folder.path}: nothing is recorded yet; run the experiment first")
        positions = positions.sort_values(["prompt", "at"], ignore_index=True)
        begins = np.concatenate([[0], np.cumsum(requests["tokens"].to_numpy())])
        assert begins[-1] == len(positions)
        columns = {name: np.stack(positions[name].to_numpy()) if positions[name].dtype == object
                   else positions[name].to_numpy() for name in positions.columns}  # fmt: skip
        widths = len(requests["vocabularies"].iloc[0])
        for name in ("rank", "rank_best", "q"):
            columns[name] = columns[name].reshape(len(positions), -1, widths)
        return cls(requests, folder.case.temperature, begins, columns)

    @property
    def depth(self) -> int:
        """Levels of the drafter."""
        return int(self.columns["rank"].shape[1])

    @property
    def vocabularies(self) -> list[int]:
        """Those that it answers for."""
        return [int(size) for size in self.requests["vocabularies"].iloc[0]]

    @cached_property
    def left(self) -> Integers:
        """[P] how many tokens the request has from here on, this one included."""
        ends = np.repeat(self.begins[1:], np.diff(self.begins))
        return np.asarray(ends - np.arange(len(ends)))

    def ahead(self, values: Any, by: int) -> Any:
        """values [P, ...] of the position `by` later; where the request ends before, the last one's."""
        return values[np.arange(len(values)) + np.minimum(by, self.left - 1)]

    def answer(self, question: Question) -> Any:
        """A frame with a row per request: prompt, category, tokens, steps, those outside loops (`clean_`), and
        `accepted`: steps that accepted a draft at depth 1, 2, ...; expectations where the rule has noise of its own."""
        _, _, pandas = extras()
        sure = self.survival(question)
        stepped, emitted, reached = self._walk(sure)
        outside = ~self.columns["loop"]
        sums = {
            "tokens": stepped * emitted, "steps": stepped, "clean_tokens": stepped * emitted * outside,
            "clean_steps": stepped * outside,
        }  # fmt: skip
        frame = {name: np.add.reduceat(value, self.begins[:-1]) for name, value in sums.items()}
        accepted = np.add.reduceat(stepped[:, None] * reached, self.begins[:-1])
        about = {name: self.requests[name].to_numpy() for name in ("prompt", "category")}
        return pandas.DataFrame({**about, **frame, "accepted": list(accepted)})

    def survival(self, question: Question) -> Floats:
        """[P, D]: the probability, 0 or 1 for the match rule, that a step that begins here accepts d or more drafts, if
        the text goes on for long enough."""
        shape = question.tree
        depth = min(self.depth, shape.best) if shape.best else len(shape.widths)
        if depth > self.depth:
            raise EngineError(f"{shape} is deeper than the {self.depth} levels that were recorded")
        own = self._column(question.vocabulary)
        if question.rule == "match" or self.temperature == 0 or question.candidates == "best":
            return self._in_tree(shape) if shape.best else self._ranked(shape.widths, question.candidates, own)
        ratios = [
            np.exp(self.ahead(self.columns["q"][:, d, own] - self.columns["p"], d).astype(np.float64))
            for d in range(depth)
        ]
        if question.rule == "rejection":
            return np.cumprod(np.minimum(1, np.stack(ratios, 1)), axis=1)
        trust, joint, survival = np.ones(len(self.left)), np.ones(len(self.left)), []
        for ratio in ratios:
            with np.errstate(divide="ignore", invalid="ignore"):
                trust, joint = np.minimum(1, trust / ratio), joint * ratio
                survival.append(np.where(joint > 0, np.minimum(1, trust * joint), 0.0))
        return np.stack(survival, 1)

    def _column(self, vocabulary: int) -> int:
        if not vocabulary:
            return len(self.vocabularies) - 1
        if vocabulary not in self.vocabularies:
            known = ", ".join(map(str, self.vocabularies))
            raise EngineError(f"draft vocabulary {vocabulary} was not recorded; there are: {known}")
        return self.vocabularies.index(vocabulary)

    def _ranked(self, widths: Sequence[int], candidates: str, column: int) -> Floats:
        """A node has its `width` best candidates as children."""
        rank = self.columns["rank_best" if candidates == "best" else "rank"][:, :, column]
        ranks = [self.ahead(rank[:, d], d) for d in range(len(widths))]
        good = [(level >= 0) & (level < width) for level, width in zip(ranks, widths, strict=True)]
        return np.cumprod(np.stack(good, 1), axis=1).astype(np.float64)

    def _in_tree(self, shape: TreeShape) -> Floats:
        """Grow tree:N out of the wide tree as drafters.expand does, and follow the text down."""
        sizes = levels_of(shape, min(self.depth, shape.best))
        nodes, parents, scores = (self.columns[name] for name in ("nodes", "parents", "scores"))
        levels = self._levels
        rows = np.arange(len(nodes))[:, None]
        kept = np.zeros((len(nodes), nodes.shape[1] + 1), bool)
        kept[:, 0] = True  # the root; node i of the tree is column i - 1 of the arrays
        for level, (_, keep) in enumerate(sizes, 1):
            among = np.flatnonzero(levels == level)
            joint = np.where(kept[rows, parents[:, among]], scores[:, among], -np.inf)
            top = np.argsort(-joint, axis=1, kind="stable")[:, :keep]
            kept[rows, 1 + among[top]] = np.take_along_axis(joint, top, 1) > -np.inf
        joint = np.where(kept[:, 1:], scores, -np.inf)
        chosen = np.zeros_like(kept)
        top = np.argsort(-joint, axis=1, kind="stable")[:, : shape.best]
        chosen[rows, 1 + top] = np.take_along_axis(joint, top, 1) > -np.inf
        at, alive, survival = np.zeros(len(nodes), np.int64), np.ones(len(nodes), bool), []
        for d in range(len(sizes)):
            true = self.ahead(self.columns["token"], d)
            match = (parents == at[:, None]) & (nodes == true[:, None]) & chosen[:, 1:]
            alive = alive & match.any(1)
            at = np.where(alive, 1 + match.argmax(1), -1)
            survival.append(alive)
        return np.stack(survival, 1).astype(np.float64)

    @cached_property
    def _levels(self) -> Integers:
        """[K] the depth of the wide tree's nodes, the same in every row."""
        levels = np.zeros(self.columns["parents"].shape[1] + 1, np.int64)
        for node, parent in enumerate(self.columns["parents"][0], 1):
            levels[node] = levels[parent] + 1
        return levels[1:]

    def _walk(self, survival: Floats) -> tuple[Floats, Floats, Floats]:
        """The probability that a step begins at each position [P], how much it then emits on average [P], and the
        probability that it accepts and emits drafts at depth d [P, D]. A request's end cuts its last step short."""
        depths = np.arange(1, survival.shape[1] + 1)
        reached = survival * (depths < self.left[:, None])
        at_least = np.concatenate([np.ones((len(survival), 1)), reached], 1)
        exactly = at_least - np.concatenate([reached, np.zeros((len(survival), 1))], 1)
        begins = np.zeros(len(survival) + len(depths) + 2)
        begins[self.begins[:-1]] = 1
        for position in range(len(survival)):
            if begins[position]:
                ahead = min(exactly.shape[1], int(self.left[position]) - 1)
                begins[position + 1 : position + 1 + ahead] += begins[position] * exactly[position, :ahead]
        return begins[: len(survival)], 1 + reached.sum(1), reached
