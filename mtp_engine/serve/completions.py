"""/v1/completions: prompts as text or token ids, one or many."""

from collections.abc import Iterable, Sequence
from typing import Any, final

from fastapi import Request
from fastapi.responses import Response

from mtp_engine.sampling.logprobs import TokenLogprob
from mtp_engine.serve.choices import Choice, Decoders, Piece, Reply, completion_logprobs
from mtp_engine.serve.errors import ApiError
from mtp_engine.serve.params import sampling_params, structure_of
from mtp_engine.serve.readers import PlainReader
from mtp_engine.serve.replying import Writer, respond
from mtp_engine.serve.schemas import CompletionRequest
from mtp_engine.serve.scoring import score
from mtp_engine.serve.service import Ask, Service, Step
from mtp_engine.serve.transport import DONE, sse

_TOKENS = 16  # OpenAI's default for this endpoint


async def completions(service: Service, request: Request, asked: CompletionRequest) -> Response:
    """Continue prompts. Raises ApiError and EngineError."""
    service.check_model(asked.model)
    _refuse(asked)
    prompts = await _prompts(service, asked)
    structure = structure_of(asked, service.limits)
    most = _TOKENS if asked.max_tokens is None else max(1, asked.max_tokens)
    asks = [
        Ask(
            prompt,
            sampling_params(
                asked,
                service.limits,
                max_tokens=service.room(prompt, most),
                logprobs=asked.logprobs,
                structure=structure,
            ),
        )
        for prompt in prompts
    ]
    samples = asks[0].params.n
    echoes = [await _echo(service, prompt, asked) for prompt in prompts] if asked.echo else []
    count = len(asks) * samples
    reply = Reply(asked, service.name, "cmpl", sum(map(len, prompts)), count, PlainReader)
    writer = CompletionWriter(
        reply, service, [echoes[index // samples] if echoes else Echo() for index in range(count)]
    )
    return await respond(service, request, asks, writer)


def _refuse(asked: CompletionRequest) -> None:
    if asked.suffix:
        raise ApiError(400, "suffix: the model does not fill in; leave it out", param="suffix")
    if asked.best_of not in (None, asked.n or 1):
        raise ApiError(400, "best_of: answers are not ranked; use n", param="best_of")
    if asked.max_tokens == 0 and not asked.echo:
        raise ApiError(400, "max_tokens is 0; without echo it must be at least 1", param="max_tokens")


async def _prompts(service: Service, asked: CompletionRequest) -> list[list[int]]:
    given = asked.prompt
    if isinstance(given, list) and given and isinstance(given[0], int):
        given = [given]  # type: ignore[list-item]
    several = given if isinstance(given, list) else [given]
    if not several:
        raise ApiError(400, "prompt is an empty list: give at least one", param="prompt")
    if len(several) > service.limits.prompts:
        raise ApiError(
            400, f"prompt holds {len(several)} prompts, and {service.limits.prompts} are the most", param="prompt"
        )
    return [await service.encode(each) if isinstance(each, str) else list(each) for each in several]  # type: ignore[arg-type]


@final
class Echo:
    """A prompt that is said again in front of its answer: nothing, where that was not asked for."""

    def __init__(
        self, text: str = "", entries: Sequence[TokenLogprob | None] = (), token_ids: Sequence[int] = ()
    ) -> None:
        self.text, self.entries, self.token_ids = text, entries, token_ids


async def _echo(service: Service, prompt: list[int], asked: CompletionRequest) -> Echo:
    text = service.tokenizer.decode(prompt, skip_special=False)
    if asked.logprobs is None:
        return Echo(text)
    return Echo(text, await score(service.engine, prompt, asked.logprobs), prompt)


@final
class CompletionWriter(Writer):
    """Completions, whole and as chunks. With echo and max_tokens 0 the answer's own token is left out."""

    def __init__(self, reply: Reply, service: Service, echoes: Sequence[Echo]) -> None:
        self.reply, self._tokenizer, self._echoes = reply, service.tokenizer, echoes
        self._decoders = Decoders(service.tokenizer)
        self._offset = [len(echo.text) for echo in echoes]
        self._only_echo = reply.asked.max_tokens == 0  # type: ignore[attr-defined]
        options = reply.asked.stream_options
        self._usage_last = bool(options and options.include_usage)
        self._usage_always = bool(options and options.continuous_usage_stats)

    def begin(self) -> Iterable[bytes]:
        for index, echo in enumerate(self._echoes):
            if echo.text:
                yield self._chunk(index, echo.text, self._logprobs(echo, (), 0))

    def piece(self, step: Step, piece: Piece) -> Iterable[bytes]:
        index, chunk = step.choice, piece.chunk
        text = "".join(delta.content for delta in piece.deltas)
        extra = self.reply.drafts(self._decoders, step)
        if piece.reason:
            extra = {**extra, **self.reply.metrics()}
        if self._only_echo:
            yield self._chunk(index, "", None, piece.reason, extra)
        elif text or piece.reason or extra or chunk.logprobs or self.reply.asked.return_token_ids:
            logprobs = self._logprobs(Echo(), chunk.logprobs, self._offset[index])
            self._offset[index] += sum(map(len, logprobs["tokens"])) if logprobs else 0
            yield self._chunk(index, text, logprobs, piece.reason, extra, chunk.token_ids)

    def end(self) -> Iterable[bytes]:
        if self._usage_last:
            yield sse({**self.reply.head("text_completion"), "choices": [], "usage": self._usage()})
        yield DONE

    def whole(self) -> dict[str, Any]:
        choices = [self._choice(*each) for each in enumerate(zip(self.reply.choices, self._echoes, strict=True))]
        return {
            **self.reply.head("text_completion"), "choices": choices, "usage": self._usage(), **self.reply.metrics()
        }  # fmt: skip

    def _choice(self, index: int, of: tuple[Choice, Echo]) -> dict[str, Any]:
        choice, echo = of
        said, entries = ("", []) if self._only_echo else (choice.content, choice.logprobs)
        one = {
            "index": index,
            "text": echo.text + said,
            "logprobs": self._logprobs(echo, entries, 0),
            "finish_reason": choice.reason,
        }
        if self.reply.asked.return_token_ids:
            one["token_ids"] = choice.token_ids
        return one

    def _usage(self) -> dict[str, Any]:
        usage = self.reply.usage()
        if self._only_echo:
            usage |= {"completion_tokens": 0, "total_tokens": usage["prompt_tokens"]}
        return usage

    def _logprobs(self, echo: Echo, entries: Sequence[TokenLogprob], offset: int) -> dict[str, Any] | None:
        """Of the echo and of what follows it; the first token of a prompt has none."""
        if self.reply.asked.logprobs is None:  # type: ignore[attr-defined]
            return None
        found = completion_logprobs(self._tokenizer, [*echo.entries, *entries], offset)
        if echo.token_ids:
            first = self._tokenizer.decode(echo.token_ids[:1], skip_special=False)
            found["tokens"][0] = first
            found["text_offset"] = [0, *(at + len(first) for at in found["text_offset"][1:])]
        return found

    def _chunk(
        self, index: int, text: str, logprobs: Any, reason: str | None = None, extra: Any = None,
        token_ids: Sequence[int] = (),
    ) -> bytes:  # fmt: skip
        choice: dict[str, Any] = {"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason}
        if self.reply.asked.return_token_ids:
            choice["token_ids"] = list(token_ids)
        usage = {"usage": self._usage()} if self._usage_always else {}
        return sse({**self.reply.head("text_completion"), "choices": [choice], **usage, **(extra or {})})
