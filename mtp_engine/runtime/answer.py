"""What a caller gets: a finished answer, or what one step added to one."""

from dataclasses import dataclass
from typing import final

from mtp_engine.runtime.request import Request, StepOutput
from mtp_engine.runtime.stats import GenerationStats
from mtp_engine.sampling.logprobs import TokenLogprob
from mtp_engine.sampling.stops import FinishReason


@final
@dataclass(frozen=True)
class Generation:
    """A finished answer. drafted[i]: token i was an accepted draft, not the main model's own. The text leaves special
    tokens out and ends before a stop string; token_ids hold them, the stop included. logprobs: one per token where they
    were asked for. others: the further answers to the same prompt, where n > 1. error: what went wrong, where
    finish_reason is "error"; what was said before stands in text and token_ids. complete: False where a structure was
    asked for and the answer ended, by its limit or a stop, before it matched."""

    text: str
    token_ids: list[int]
    drafted: list[bool]
    finish_reason: FinishReason
    stats: GenerationStats
    logprobs: tuple[TokenLogprob, ...] = ()
    others: tuple["Generation", ...] = ()
    error: str = ""
    complete: bool = True

    @classmethod
    def of(cls, request: Request) -> "Generation":
        assert request.finish_reason is not None
        constraint = request.trail.constraint
        return cls(
            request.text, request.output, request.drafted, request.finish_reason, request.stats,
            tuple(request.logprobs), error=request.error, complete=constraint is None or constraint.complete,
        )  # fmt: skip

    @classmethod
    def refused(cls, error: str) -> "Generation":
        """The answer to a prompt that could not run."""
        return cls("", [], [], "error", GenerationStats(), error=error)


@final
@dataclass(frozen=True)
class Chunk:
    """What one step added to answer `sample` (of n) of prompt `index`. `finished` comes with each answer's last chunk,
    which may have no tokens; `stats` are the request's own and go on counting."""

    index: int
    text: str
    token_ids: list[int]
    drafted: list[bool]
    stats: GenerationStats
    finished: Generation | None
    sample: int = 0
    logprobs: tuple[TokenLogprob, ...] = ()  # one per token where they were asked for

    @classmethod
    def of(cls, output: StepOutput, index: int, sample: int) -> "Chunk":
        finished = Generation.of(output.request) if output.finish_reason else None
        stats = output.request.stats
        return cls(index, output.text, output.tokens, output.drafted, stats, finished, sample, output.logprobs)
