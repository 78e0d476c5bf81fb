"""What a request drafted, accepted and emitted, and how long each phase took."""

import time
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, final


@final
@dataclass(frozen=True)
class Timed:
    """Tokens, and the seconds of a loop's own clock that they took."""

    tokens: int
    seconds: float

    @property
    def rate(self) -> float:
        return self.tokens / self.seconds if self.seconds > 0 else 0.0


@final
@dataclass(frozen=True)
class Comparison:
    """Plain and drafted decoding of the same answer in turns (runtime/compare.py): per turn, a piece of each."""

    turns: tuple[tuple[Timed, Timed], ...]

    @property
    def plain(self) -> Timed:
        return _sum(plain for plain, _ in self.turns)

    @property
    def drafted(self) -> Timed:
        return _sum(drafted for _, drafted in self.turns)

    @property
    def speedup(self) -> float | None:
        """None where nothing was measured."""
        return self.drafted.rate / self.plain.rate if self.plain.rate and self.drafted.rate else None

    @property
    def plain_range(self) -> tuple[float, float]:
        """The lowest and the highest rate of a piece of plain decoding, the ends of answers left out: they are short."""
        most = max((plain.tokens for plain, _ in self.turns), default=0)
        rates = [plain.rate for plain, _ in self.turns if 2 * plain.tokens >= most > 0]
        return min(rates, default=0.0), max(rates, default=0.0)


def _sum(pieces: Iterable[Timed]) -> Timed:
    each = list(pieces)
    return Timed(sum(piece.tokens for piece in each), sum(piece.seconds for piece in each))


@final
@dataclass
class GenerationStats:
    """Counters of one request. Times are seconds of wall clock.

    One step is one verification forward of the main model. Mean accepted length = tokens / steps: the accepted drafts
    of a step plus the one token the main model itself adds (the bonus token). Only emitted tokens count: drafts that
    were accepted but cut off by a stop or by max_tokens do not. Times of a batched step are shared out evenly among
    its requests; the others are not shared. They run from the request's arrival and count the engine's time only, not
    that in which the caller handles what was streamed: first it waits for room (queued_s), then its prompt is read, in
    turns with what others decode (prefill_s), then it decodes.
    """

    seed: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0  # of the prompt, which were not read again: the prefix cache had them
    steps: int = 0
    tokens: int = 0
    nodes: int = 0  # tree nodes sent through the main model, roots included
    trees: Counter[tuple[int, int]] = field(
        default_factory=Counter
    )  # steps by their tree's depth and nodes; (0, 1) is plain
    proposed_per_depth: list[int] = field(default_factory=list)  # steps whose tree reached depth d = 1, 2, ...
    accepted_per_depth: list[int] = field(default_factory=list)  # steps that accepted a draft at depth d = 1, 2, ...
    preemptions: int = 0  # times that it had to wait again, because memory was full
    queued_s: float = 0.0
    prefill_s: float = 0.0
    draft_s: float = 0.0
    verify_s: float = 0.0
    total_s: float = 0.0
    ttft_s: float = 0.0  # time to first token
    compile_s: float = 0.0  # that kernels were compiled and CUDA graphs captured, meanwhile; in none of the other times
    comparison: Comparison | None = None  # with plain decoding, in the same process
    identical_to_plain: bool | None = None  # None where plain decoding did not run to the end

    def record_step(self, emitted: int, nodes: int, max_depth: int) -> None:
        """Count one step that emitted `emitted` >= 1 tokens from a tree of `nodes` nodes and depth `max_depth`."""
        self.steps += 1
        self.tokens += emitted
        self.nodes += nodes
        self.trees[max_depth, nodes] += 1
        for counts, reached in ((self.proposed_per_depth, max_depth), (self.accepted_per_depth, emitted - 1)):
            if len(counts) < max_depth:
                counts.extend([0] * (max_depth - len(counts)))
            for depth in range(reached):
                counts[depth] += 1

    @property
    def mean_accepted_length(self) -> float:
        return self.tokens / self.steps if self.steps else 0.0

    @property
    def nodes_per_step(self) -> float:
        return self.nodes / self.steps if self.steps else 0.0

    @property
    def other_s(self) -> float:
        return max(0.0, self.decode_s - self.draft_s - self.verify_s)

    @property
    def decode_s(self) -> float:
        """Waiting and prefill left out."""
        return self.total_s - self.queued_s - self.prefill_s if self.steps else 0.0

    @property
    def tokens_per_s(self) -> float:
        """Emitted tokens over the decoding time."""
        return self.tokens / self.decode_s if self.decode_s > 0 else 0.0

    @property
    def speedup(self) -> float | None:
        """Measured: drafted over plain decoding's rate, both warm and in turns."""
        return self.comparison.speedup if self.comparison else None

    def unconditional_acceptance(self) -> list[float]:
        """Share of all steps that accepted a draft at depth 1, 2, ...; these sum to mean accepted length - 1."""
        return [count / self.steps for count in self.accepted_per_depth]

    def conditional_acceptance(self) -> list[float]:
        """Share of the steps that accepted depth d-1 which also accepted depth d."""
        reached = [self.steps, *self.accepted_per_depth]
        return [
            after / before if before else 0.0 for before, after in zip(reached, self.accepted_per_depth, strict=False)
        ]

    def to_json(self) -> dict[str, Any]:
        """The stable `stats` object of `--json`; cli/README.md documents each key."""
        return {
            "seed": self.seed,
            "prompt_tokens": self.prompt_tokens,
            "cached_tokens": self.cached_tokens,
            "steps": self.steps,
            "tokens": self.tokens,
            "mean_accepted_length": self.mean_accepted_length,
            "accepted_per_depth": list(self.accepted_per_depth),
            "proposed_per_depth": list(self.proposed_per_depth),
            "nodes_per_step": self.nodes_per_step,
            "trees": {f"{depth}/{nodes}": steps for (depth, nodes), steps in self.trees.most_common()},
            "preemptions": self.preemptions,
            "queued_s": self.queued_s,
            "prefill_s": self.prefill_s,
            "draft_s": self.draft_s,
            "verify_s": self.verify_s,
            "total_s": self.total_s,
            "tokens_per_s": self.tokens_per_s,
            "ttft_s": self.ttft_s,
            "compile_s": self.compile_s,
            "plain_tokens_per_s": self.comparison.plain.rate if self.comparison else None,
            "drafted_tokens_per_s": self.comparison.drafted.rate if self.comparison else None,
            "plain_range": list(self.comparison.plain_range) if self.comparison else None,
            "speedup": self.speedup,
            "identical_to_plain": self.identical_to_plain,
        }


@final
@dataclass(frozen=True)
class StepTimes:
    """Seconds. now: of the loop's clock, when the step had landed; draft, verify: of its two halves. left_out: by the clock
    until then."""

    now: float
    draft: float
    verify: float
    left_out: float = 0.0


@final
class LoopClock:
    """Seconds that a decode loop has worked: it runs within steps and stands between them, while the caller works.

    skipped: seconds that it has left out."""

    def __init__(self) -> None:
        self._worked = self._begin = self.skipped = 0.0

    def start(self) -> None:
        """A step begins."""
        self._begin = time.perf_counter()

    @contextmanager
    def left_out(self) -> Iterator[None]:
        """What happens inside does not count: something is compiled or captured, which happens once."""
        begin = time.perf_counter()
        try:
            yield
        finally:
            spent = time.perf_counter() - begin
            self._begin += spent
            self.skipped += spent

    @property
    def standing(self) -> float:
        """What it shows between two steps."""
        return self._worked

    @property
    def now(self) -> float:
        """What it shows within a step."""
        return self._worked + time.perf_counter() - self._begin

    def land(self, draft: float, verify: float) -> StepTimes:
        """A step has landed whose halves took the device so many seconds. Queued steps run on while the caller handles what
        came before; such a step counts in full."""
        self._worked = max(self.now, self._worked + draft + verify)
        self._begin = time.perf_counter()
        return StepTimes(self._worked, draft, verify, self.skipped)
