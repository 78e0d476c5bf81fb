"""One choice of an answer as it grows, in OpenAI's words. The whole is what the pieces add up to."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, final
from uuid import uuid4

from mtp_engine.runtime.answer import Chunk, Generation
from mtp_engine.runtime.stats import GenerationStats
from mtp_engine.sampling.logprobs import TokenLogprob
from mtp_engine.serve.readers import Delta, Reader
from mtp_engine.serve.schemas import Sampling
from mtp_engine.serve.service import Step
from mtp_engine.text.tokenizer import Tokenizer

_LEAST = -9999.0  # stands for no probability at all: JSON has no infinity


def new_id(kind: str) -> str:
    return f"{kind}-{uuid4().hex}"


@final
@dataclass
class Call:
    """A tool call as far as it has come."""

    name: str
    arguments: str = ""
    id: str = field(default_factory=lambda: new_id("call"))


@final
@dataclass(frozen=True)
class Piece:
    """What a step added to a choice. reason: why it ends with it, in OpenAI's words; None where it goes on."""

    deltas: tuple[Delta, ...]
    chunk: Chunk
    reason: str | None


@final
class Choice:
    """What has come of one answer."""

    def __init__(self, reader: Reader) -> None:
        self._reader = reader
        self.content, self.thoughts, self.reason = "", "", ""
        self.calls: list[Call] = []
        self.token_ids: list[int] = []
        self.logprobs: list[TokenLogprob] = []
        self.finished: Generation | None = None

    def add(self, chunk: Chunk) -> Piece:
        deltas = self._reader.push(chunk.text)
        if chunk.finished:
            deltas += self._reader.flush()
        for delta in deltas:
            self._note(delta)
        self.token_ids += chunk.token_ids
        self.logprobs += chunk.logprobs
        if chunk.finished:
            self.finished, self.reason = chunk.finished, self._reason(chunk.finished)
        return Piece(tuple(deltas), chunk, self.reason or None)

    def _note(self, delta: Delta) -> None:
        self.content += delta.content
        self.thoughts += delta.thought
        if delta.name:
            self.calls.append(Call(delta.name))
        if delta.arguments:
            self.calls[-1].arguments += delta.arguments

    def _reason(self, answer: Generation) -> str:
        """OpenAI has no word for an answer that took too long: to it, a limit is a limit."""
        if answer.finish_reason != "stop" or not answer.complete:
            return "length"
        return "tool_calls" if self.calls else "stop"


@final
class Reply:
    """The choices of one request, and what is said about them all: id, model, usage, metrics."""

    def __init__(
        self, asked: Sampling, model: str, kind: str, prompt_tokens: int, choices: int, reader: Callable[[], Reader]
    ) -> None:
        """kind: of the id. prompt_tokens: of all prompts. reader: makes one for a choice."""
        self.asked, self.model, self.id = asked, model, new_id(kind)
        self.created = int(time.time())
        self.choices = [Choice(reader()) for _ in range(choices)]
        self._prompt_tokens = prompt_tokens
        self._stats: dict[int, GenerationStats] = {}

    def add(self, step: Step) -> Piece:
        self._stats[step.choice] = step.chunk.stats
        return self.choices[step.choice].add(step.chunk)

    def head(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}

    def usage(self) -> dict[str, Any]:
        """Tokens so far. A prompt's tokens count once, however many answers it has; so do those found in the cache."""
        said = sum(len(choice.token_ids) for choice in self.choices)
        samples = self.asked.n or 1
        cached = sum(stats.cached_tokens for choice, stats in self._stats.items() if choice % samples == 0)
        return {
            "prompt_tokens": self._prompt_tokens,
            "completion_tokens": said,
            "total_tokens": self._prompt_tokens + said,
            "prompt_tokens_details": {"cached_tokens": cached},
        }

    def metrics(self) -> dict[str, Any]:
        """{"metrics": ...} where the client asked for it: as in vLLM null where there are several answers."""
        if not self.asked.draft_metrics:
            return {}
        one = next(iter(self._stats.values())) if len(self.choices) == 1 and self._stats else None
        return {"metrics": {"speculative_decoding": one and draft_metrics(one)}}

    def drafts(self, decoders: "Decoders", step: Step) -> dict[str, Any]:
        """{"drafts": ...} where the client asked for it: each token's text, and its depth if it was drafted."""
        if not self.asked.return_drafts:
            return {}
        stats, chunk = step.chunk.stats, step.chunk
        pieces = [
            [text, depth + 1 if drafted else 0]
            for depth, (text, drafted) in enumerate(zip(decoders.texts(step), chunk.drafted, strict=True))
        ]
        return {
            "drafts": {
                "pieces": pieces,
                "steps": stats.steps,
                "tokens": stats.tokens,
                "mean_accepted_length": round(stats.mean_accepted_length, 3),
                "tokens_per_s": round(stats.tokens_per_s, 2),
                "ttft_s": round(stats.ttft_s, 4),
                "seed": stats.seed,
            }
        }


@final
class Decoders:
    """Texts of single tokens, choice by choice."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._streams: dict[int, Any] = {}

    def texts(self, step: Step) -> list[str]:
        stream = self._streams.setdefault(step.choice, self._tokenizer.stream())
        texts = [stream.push([token]) for token in step.chunk.token_ids]
        if step.chunk.finished and texts:
            texts[-1] += stream.flush()
        return texts


def draft_metrics(stats: GenerationStats) -> dict[str, Any]:
    """vLLM's `metrics.speculative_decoding` of one answer. The histogram counts steps by accepted drafts."""
    accepted, drafted = sum(stats.accepted_per_depth), stats.nodes - stats.steps
    reached = [stats.steps, *stats.accepted_per_depth, 0]
    histogram = {
        str(depth): count for depth in range(len(reached) - 1) if (count := reached[depth] - reached[depth + 1])
    }
    return {
        "num_spec_tokens": len(stats.proposed_per_depth),
        "num_spec_steps": stats.steps,
        "num_draft_tokens": drafted,
        "num_accepted_draft_tokens": accepted,
        "mean_acceptance_length": stats.mean_accepted_length,
        "draft_acceptance_rate": accepted / drafted if drafted else 0.0,
        "acceptance_histogram": histogram,
    }


def token_text(tokenizer: Tokenizer, token: int) -> str:
    return tokenizer.decode([token], skip_special=False)


def chat_logprobs(tokenizer: Tokenizer, entries: Sequence[TokenLogprob]) -> list[dict[str, Any]]:
    """The `content` of a chat choice's logprobs."""

    def one(token: int, logprob: float) -> dict[str, Any]:
        text = token_text(tokenizer, token)
        return {"token": text, "logprob": max(logprob, _LEAST), "bytes": list(text.encode("utf-8", "replace"))}

    return [
        {**one(each.token, each.logprob), "top_logprobs": [one(token, value) for token, value in each.top]}
        for each in entries
    ]


def completion_logprobs(tokenizer: Tokenizer, entries: Sequence[TokenLogprob | None], offset: int) -> dict[str, Any]:
    """A completion's logprobs. None: a first token, which nothing goes before. offset: characters in front."""
    tokens: list[str] = []
    offsets: list[int] = []
    for each in entries:
        text = "" if each is None else token_text(tokenizer, each.token)
        tokens.append(text)
        offsets.append(offset)
        offset += len(text)
    return {
        "tokens": tokens,
        "token_logprobs": [None if each is None else max(each.logprob, _LEAST) for each in entries],
        "top_logprobs": [each and top(tokenizer, each) for each in entries],
        "text_offset": offsets,
    }


def top(tokenizer: Tokenizer, entry: TokenLogprob) -> Mapping[str, float]:
    return {token_text(tokenizer, token): max(value, _LEAST) for token, value in entry.top}
