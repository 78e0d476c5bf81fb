"""One served model: prompts into the engine, what each step adds out of it, counted on the way."""

import asyncio
import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Any, final

from mtp_engine.async_engine import AsyncEngine
from mtp_engine.config import SamplingParams
from mtp_engine.engine import Engine
from mtp_engine.runtime.answer import Chunk
from mtp_engine.serve.errors import ApiError
from mtp_engine.serve.limits import Limits
from mtp_engine.serve.metrics import Metrics
from mtp_engine.text.tokenizer import Tokenizer

_CHARACTERS = 100  # per token of the context: a longer text need not be tokenised to be refused


@final
@dataclass(frozen=True)
class Ask:
    """One prompt on its way to the engine."""

    prompt: Sequence[int]
    params: SamplingParams


@final
@dataclass(frozen=True)
class Step:
    """What one step added to choice `choice` of a request: prompt by prompt, the samples of each together."""

    choice: int
    chunk: Chunk


@final
class Service:
    """A model under its name, with its limits and its counters."""

    def __init__(self, engine: AsyncEngine, name: str, limits: Limits) -> None:
        self.engine, self.name, self.limits = engine, name, limits
        self.metrics = Metrics(engine.engine, name)
        self.created = int(time.time())

    @property
    def inner(self) -> Engine:
        return self.engine.engine

    @property
    def tokenizer(self) -> Tokenizer:
        return self.inner.tokenizer

    @property
    def max_context(self) -> int:
        return self.inner.check_open().intake.max_context

    def check_model(self, asked: str | None) -> None:
        """Raises ApiError if another model is asked for."""
        if asked not in (None, "", self.name):
            raise ApiError(
                404, f"the model {asked!r} is not served here; {self.name!r} is", param="model", code="model_not_found"
            )

    @property
    def vocab(self) -> int:
        return self.inner.check_open().intake.vocab

    async def encode(self, text: str, *, special: bool = True) -> list[int]:
        """Token ids of a text. special: after BOS where the model wants it."""
        self._check_length(len(text))
        ids = await asyncio.to_thread(self.tokenizer.encode, text)
        return ids if special else ids[len(self.tokenizer.encode("")) :]

    async def chat(self, messages: Sequence[Mapping[str, Any]], **template_args: Any) -> list[int]:
        """Token ids of a conversation. Raises ApiError where the model has no chat template."""
        if not self.tokenizer.has_chat_template:
            raise ApiError(400, f"{self.name} has no chat template: use /v1/completions")
        self._check_length(sum(len(str(message.get("content") or "")) for message in messages))
        return await asyncio.to_thread(lambda: self.tokenizer.chat(messages, **template_args))

    def _check_length(self, characters: int) -> None:
        most = _CHARACTERS * self.max_context
        if characters > most:
            message = (
                f"the prompt has {characters} characters and the context holds {self.max_context} tokens: shorten it"
            )
            raise ApiError(400, message, code="context_length_exceeded")

    def room(self, prompt: Sequence[int], asked: int | None) -> int:
        """Tokens that an answer may have. At least 1: what does not fit is refused by the engine."""
        return max(1, min(asked or self.limits.default_tokens, self.max_context - len(prompt)))

    async def follow(self, asks: Sequence[Ask]) -> AsyncGenerator[Step, None]:
        """All prompts' steps as they come. Closing it frees all of them; one that fails ends all. Raises EngineError."""
        if len(asks) == 1:
            async with aclosing(self._one(asks[0])) as chunks:
                async for chunk in chunks:
                    yield Step(chunk.sample, chunk)
            return
        queue: asyncio.Queue[Step | BaseException | None] = asyncio.Queue()
        tasks = [asyncio.create_task(self._pump(index, ask, queue)) for index, ask in enumerate(asks)]
        try:
            left = len(tasks)
            while left:
                news = await queue.get()
                if isinstance(news, BaseException):
                    raise news
                left -= news is None
                if news is not None:
                    yield news
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _pump(self, index: int, ask: Ask, queue: "asyncio.Queue[Step | BaseException | None]") -> None:
        try:
            async with aclosing(self._one(ask)) as chunks:
                async for chunk in chunks:
                    queue.put_nowait(Step(index * ask.params.n + chunk.sample, chunk))
            queue.put_nowait(None)
        except Exception as error:
            queue.put_nowait(error)

    async def _one(self, ask: Ask) -> AsyncGenerator[Chunk, None]:
        params, structure = ask.params, ask.params.structure
        if structure and structure.json:  # an answer that its limit would cut off is no JSON
            params = replace(params, structure=replace(structure, within=params.max_tokens))
        with self.metrics.request(len(ask.prompt)) as watch:
            async with aclosing(self.engine.stream(ask.prompt, params)) as chunks:
                async for chunk in chunks:
                    watch.note(chunk)
                    if (ended := chunk.finished) and ended.finish_reason in ("error", "abort"):
                        raise failure(ended.error)
                    yield chunk


def failure(error: str) -> ApiError:
    """What a client is told of an answer that could not go on. No error: it was ended from outside."""
    if not error:
        return ApiError(503, "the server is shutting down", code="unavailable")
    if error.startswith("no token is left") or "structure" in error:
        return ApiError(400, error)
    return ApiError(500, f"the answer broke off: {error}")
