"""From rows to figures: accepted length and acceptance by depth with intervals, speed, and what a recording adds.

Mean accepted length = emitted tokens / verification steps, bonus token included. Steps in loops (the first token that one
emits ends a 16-gram which the answer already held) are left out and their share is said. Intervals are 95% of a bootstrap
over prompts: tokens of one prompt are not independent of each other.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any, final

import numpy as np
import numpy.typing as npt

from mtp_engine.config import TreeShape
from mtp_engine.errors import EngineError
from mtp_engine.experiments.ask import Question, Recording
from mtp_engine.experiments.grid import Case
from mtp_engine.experiments.store import CaseFolder, Experiment

Floats = npt.NDArray[np.float64]
ALL = "all"
TREES = ("tree:3", "tree:5", "tree:7", "tree:11", "tree:15", "tree:23", "tree:31")
_DRAWS, _COVERED = 2000, (2.5, 97.5)
_FEWEST = 8  # prompts, below which a bootstrap's intervals are too narrow


@final
@dataclass(frozen=True)
class Estimate:
    """A figure and its 95% interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"

    @property
    def excludes_zero(self) -> bool:
        return self.low > 0 or self.high < 0


def resamples(prompts: int, draws: int = _DRAWS) -> npt.NDArray[np.int64]:
    """[draws, prompts]: how often each prompt is in a bootstrap sample; the same for the same number of prompts."""
    return np.random.default_rng(0).multinomial(prompts, np.full(prompts, 1 / prompts), size=draws)


def ratio(over: Any, under: Any) -> Estimate:
    """Of sums over prompts, each [prompts]."""
    over, under = np.asarray(over, np.float64), np.asarray(under, np.float64)
    if not len(over) or not under.sum():
        return Estimate(float("nan"), float("nan"), float("nan"))
    weights = resamples(len(over))
    below = weights @ under
    drawn = (weights @ over)[below > 0] / below[below > 0]
    low, high = np.percentile(drawn, _COVERED)
    return Estimate(float(over.sum() / under.sum()), float(low), float(high))


@final
@dataclass(frozen=True)
class Result:
    """The requests of one setting, decoded or computed from a recording, which `recorded` says."""

    case: Case
    frame: Any  # prompt, category, emitted or tokens, steps, clean_tokens, clean_steps, accepted
    recorded: bool = False

    @property
    def name(self) -> str:
        """What was drafted and how, for people."""
        return self.case.label

    def rows(self, category: str = ALL) -> Any:
        """Those of a category that have steps."""
        frame = self.frame[self.frame["steps"].notna()]
        return frame if category == ALL else frame[frame["category"] == category]

    @property
    def server(self) -> bool:
        """Whether another process decoded it."""
        return self.case.engine != "ours"

    @property
    def categories(self) -> list[str]:
        """In alphabetic order, and all of them together at the end."""
        return [*sorted(set(self.rows()["category"])), ALL]

    def accepted_length(self, category: str = ALL, *, loops: bool = False) -> Estimate:
        """loops: with the steps in loops, or where they are unknown (of servers)."""
        rows = self.rows(category)
        if loops or rows["clean_steps"].isna().any():
            return ratio(rows["emitted"], rows["steps"])
        return ratio(rows["clean_tokens"], rows["clean_steps"])

    @property
    def loop_share(self) -> float:
        """Of the steps."""
        rows = self.rows()
        return 1 - float(rows["clean_steps"].sum()) / float(rows["steps"].sum()) if len(rows) else float("nan")

    def acceptance(self, *, conditional: bool) -> list[Estimate]:
        """By depth: of all steps, or of those that accepted the depth before."""
        rows = self.rows()
        depth = max((len(each) for each in rows["accepted"]), default=0)
        counts = [np.array([each[d] if d < len(each) else 0 for each in rows["accepted"]]) for d in range(depth)]
        steps = rows["steps"].to_numpy()
        unders = [steps, *counts][:depth] if conditional else [steps] * depth
        return [ratio(over, under) for over, under in zip(counts, unders, strict=True)]


@final
@dataclass(frozen=True)
class Speed:
    """tokens_per_s: emitted tokens over the time of steps, prompts left out. step_s: of one step of a full batch.
    against_plain: measured against the plain case of the same batch; None where there is none."""

    tokens_per_s: float
    step_s: float | None
    against_plain: float | None


def results(experiment: Experiment, trees: Sequence[str] | None = None) -> list[Result]:
    """All cases that have rows; of recorded ones a result for each of `trees`, by default chains, 4x2x2 and tree:3..31.

    Raises EngineError where there is nothing yet."""
    found = [result for folder in experiment.folders for result in _of(folder, trees)]
    if not found:
        raise EngineError(f"{experiment.path}: no case has rows yet; run the experiment first")
    return found


def _of(folder: CaseFolder, trees: Sequence[str] | None) -> Iterator[Result]:
    if folder.case.mode != "record":
        frame = folder.frame("requests")
        if len(frame):
            yield Result(folder.case, frame)
    elif folder.parts("requests"):
        recording = Recording.load(folder)
        for tree in trees or questions(recording.depth):
            yield computed(folder.case, recording, Question(TreeShape.parse(tree)))


def questions(depth: int) -> list[str]:
    """The trees that a report shows."""
    chains = [f"chain:{length}" for length in range(1, depth + 1)]
    return [*chains, *(["4x2x2"] if depth >= 3 else []), *TREES]


def computed(case: Case, recording: Recording, question: Question) -> Result:
    """The answer of a recording as if it had been decoded."""
    frame = recording.answer(question)
    frame["emitted"] = frame["tokens"]
    vocabulary = question.vocabulary or case.draft_vocab
    verifier, candidates = question.rule, "auto" if question.candidates == "noise" else question.candidates
    asked = replace(
        case, mode="run", tree=str(question.tree), draft_vocab=vocabulary, verifier=verifier, candidates=candidates
    )
    return Result(asked, frame, recorded=True)


def speed(result: Result, everything: Sequence[Result]) -> Speed | None:
    """None for results that were computed, and for servers that decode several requests at a time."""
    if result.recorded:
        return None
    tokens, step = _rate(result)
    own = replace(result.case, drafter="root", tree="", verifier="match", candidates="auto", draft_vocab=0, mtp="")
    plain = [each for each in everything if each.case.plain and
             replace(each.case, draft_vocab=0, mtp="", draft_int8=own.draft_int8) == own]  # fmt: skip
    against = tokens / _rate(plain[0])[0] if plain and not result.case.plain else None
    return Speed(tokens, step, against)


def _rate(result: Result) -> tuple[float, float | None]:
    frame = result.frame
    if frame["draft_s"].isna().any():
        return float(frame["decode_tokens_per_s"].mean()), None
    seconds = float((frame["draft_s"] + frame["verify_s"]).sum())
    batch = min(result.case.batch, len(frame))
    return float(frame["tokens"].sum()) / seconds, seconds * batch / float(frame["steps"].sum())


@final
@dataclass(frozen=True)
class EntropyFit:
    """Accepted length of chain:D against the main model's mean entropy, a point per prompt, and the fit
    (D + 1) (1 - a x^b)."""

    entropy: Floats  # [prompts], nats
    lengths: Floats  # [prompts]
    categories: tuple[str, ...]  # [prompts]
    depth: int
    a: float
    b: float


def entropy_fit(folder: CaseFolder) -> EntropyFit:
    """By least squares over prompts, each as heavy as its steps; loops left out. The published fit is that of MiMo-V2-Flash,
    AL = 4 (1 - 0.58 x^0.58)."""
    recording = Recording.load(folder)
    frame = recording.answer(Question(TreeShape((1,) * recording.depth)))
    outside = ~recording.columns["loop"]
    begins = recording.begins[:-1]
    counts = np.maximum(np.add.reduceat(outside, begins), 1)
    entropy = np.add.reduceat(recording.columns["entropy"] * outside, begins) / counts
    steps = frame["clean_steps"].to_numpy()
    use = (steps > 0) & (entropy > 0)
    lengths = frame["clean_tokens"].to_numpy()[use] / steps[use]
    a, b = _fit(entropy[use], lengths, steps[use], recording.depth)
    return EntropyFit(entropy[use], lengths, tuple(frame["category"][use]), recording.depth, a, b)


def _fit(x: Floats, lengths: Floats, weights: Floats, depth: int) -> tuple[float, float]:
    """a for every b on a grid is linear; the best pair."""
    exponents = np.linspace(0.05, 2, 196)
    powers = x[None] ** exponents[:, None]  # [b, prompts]
    lost = 1 - lengths / (depth + 1)
    slopes = (weights * powers * lost).sum(1) / (weights * powers**2).sum(1)
    errors = (weights * (lost - slopes[:, None] * powers) ** 2).sum(1)
    best = int(errors.argmin())
    return float(slopes[best]), float(exponents[best])


@final
@dataclass(frozen=True)
class Difference:
    """Of two results in a category: second minus first, over the prompts that both have."""

    name: str
    category: str
    prompts: int
    first: float
    second: float
    difference: Estimate

    @property
    def verdict(self) -> str:
        """In words."""
        if self.prompts < _FEWEST:
            return "too few prompts to say"
        if not self.difference.excludes_zero:
            return "no difference shown"
        return "the second accepts more" if self.difference.value > 0 else "the second accepts less"


def compare(first: Sequence[Result], second: Sequence[Result]) -> list[Difference]:
    """Paired differences of accepted length by category, of settings that both have. What a comparison is about may
    differ: model, MTP layers, engine, dtype, device settings, and the seed if each has one only. Of a server it is not
    known what it drafts: it is compared with everything.

    Raises EngineError where no setting is in both."""
    seeds = any(len({each.case.seed for each in results}) > 1 for results in (first, second))
    pairs: dict[Any, tuple[Result, Result]] = {}
    for (number, one), other in product(enumerate(first), second):
        if _comparable(one, other, seeds):
            pairs[number, _drafted(other), other.case.engine, other.server and other.case.model] = one, other
    if not pairs:
        raise EngineError(
            "the two experiments have no setting in common: run both with the same trees, rules and prompts"
        )
    return [row for pair in pairs.values() for row in _differences(*pair)]


def _comparable(one: Result, other: Result, seeds: bool) -> bool:
    cases = one.case, other.case
    asked = [(c.temperature, c.prompts, c.limit, c.max_tokens, c.seed if seeds else 0) for c in cases]
    alike = asked[0] == asked[1] and not any(case.plain for case in cases)
    known = bool(len(one.rows()) and len(other.rows()))
    return alike and known and (one.server or other.server or _drafted(one) == _drafted(other))


def _drafted(result: Result) -> Any:
    case = result.case
    return case.drafter, case.tree, case.verifier, case.candidates


def _differences(one: Result, other: Result) -> Iterator[Difference]:
    loops = bool(one.rows()["clean_steps"].isna().any() or other.rows()["clean_steps"].isna().any())
    over, under = ("emitted", "steps") if loops else ("clean_tokens", "clean_steps")
    name = f"{one.name}, {other.name}" if one.server or other.server else one.name
    joined = one.rows().merge(other.rows(), on="prompt", suffixes=("", "_other"))
    categories = sorted(set(joined["category"]))
    for category in [*categories, ALL] if len(categories) > 1 else [ALL]:
        rows = joined if category == ALL else joined[joined["category"] == category]
        if len(rows):
            yield _difference(name, category, [rows[name].to_numpy(np.float64) for name in
                              (over, under, f"{over}_other", f"{under}_other")])  # fmt: skip


def _difference(name: str, category: str, sums: Sequence[Floats]) -> Difference:
    weights = resamples(len(sums[0]))
    over, under, other_over, other_under = (weights @ each for each in sums)
    good = (under > 0) & (other_under > 0)
    drawn = other_over[good] / other_under[good] - over[good] / under[good]
    low, high = np.percentile(drawn, _COVERED) if len(drawn) else (float("nan"), float("nan"))
    first, second = (float(sums[i].sum() / max(sums[i + 1].sum(), 1)) for i in (0, 2))
    found = Estimate(second - first, float(low), float(high))
    return Difference(name, category, len(sums[0]), first, second, found)
