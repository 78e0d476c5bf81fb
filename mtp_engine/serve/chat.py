"""/v1/chat/completions."""

from collections.abc import Iterable
from typing import Any, final

from fastapi import Request
from fastapi.responses import Response

from mtp_engine.serve.choices import Choice, Decoders, Piece, Reply, chat_logprobs
from mtp_engine.serve.errors import ApiError
from mtp_engine.serve.params import sampling_params, structure_of
from mtp_engine.serve.prompts import ChatPrompt, chat_prompt
from mtp_engine.serve.readers import CallReader, Delta, PlainReader, Reader, TaggedReader
from mtp_engine.serve.replying import Writer, respond
from mtp_engine.serve.schemas import ChatRequest
from mtp_engine.serve.service import Ask, Service, Step
from mtp_engine.serve.transport import DONE, sse


async def chat(service: Service, request: Request, asked: ChatRequest) -> Response:
    """Answer a conversation. Raises ApiError and EngineError."""
    prompt, ask = await ask_chat(service, asked)
    reply = Reply(asked, service.name, "chatcmpl", len(prompt.ids), ask.params.n, lambda: reader(prompt))
    return await respond(service, request, [ask], ChatWriter(reply, service))


async def ask_chat(service: Service, asked: ChatRequest) -> tuple[ChatPrompt, Ask]:
    """The prompt, and what the engine is asked for. A call is written out whatever else the client would end it by."""
    service.check_model(asked.model)
    _refuse(asked)
    limits, wanted = service.limits, asked.response_format
    free = structure_of(asked, limits, wanted)
    prompt = await chat_prompt(service, asked, structured=free is not None)
    structure = free
    if prompt.schema is not None:
        if asked.structured_outputs is not None:
            raise ApiError(
                400, "structured_outputs cannot go with a tool call that is required", param="structured_outputs"
            )
        asked = asked.model_copy(update={"stop": None, "stop_token_ids": None, "min_tokens": None, "ignore_eos": None})
        structure = structure_of(asked, limits, schema=prompt.schema)
    logprobs = (asked.top_logprobs or 0) if asked.logprobs else None
    room = service.room(prompt.ids, asked.max_completion_tokens or asked.max_tokens)
    params = sampling_params(asked, limits, max_tokens=room, logprobs=logprobs, structure=structure)
    return prompt, Ask(prompt.ids, params)


def _refuse(asked: ChatRequest) -> None:
    """What no answer can be given to."""
    if asked.functions or asked.function_call:
        raise ApiError(400, "functions and function_call are gone: use tools and tool_choice", param="functions")
    if asked.audio or "audio" in (asked.modalities or ()):
        raise ApiError(400, "the model writes text only", param="modalities")
    if asked.top_logprobs and not asked.logprobs:
        raise ApiError(400, "top_logprobs needs logprobs", param="top_logprobs")


def reader(prompt: ChatPrompt) -> Reader:
    if prompt.mode == "call":
        return CallReader()
    if prompt.mode == "tagged":
        return TaggedReader(prompt.tools, thinking=prompt.thinking)
    return PlainReader()


@final
class ChatWriter(Writer):
    """Chat completions, whole and as chunks. Thoughts go under both names that are in use."""

    def __init__(self, reply: Reply, service: Service) -> None:
        self.reply, self._tokenizer = reply, service.tokenizer
        self._decoders = Decoders(service.tokenizer)
        self._calls = [0] * len(reply.choices)  # that have begun
        options = reply.asked.stream_options
        self._usage_last = bool(options and options.include_usage)
        self._usage_always = bool(options and options.continuous_usage_stats)

    def begin(self) -> Iterable[bytes]:
        for index in range(len(self.reply.choices)):
            yield self._chunk(index, {"role": "assistant", "content": ""})

    def piece(self, step: Step, piece: Piece) -> Iterable[bytes]:
        chunk, index = piece.chunk, step.choice
        extra = self.reply.drafts(self._decoders, step)
        deltas = [self._delta(index, delta) for delta in piece.deltas]
        if not deltas and (extra or chunk.logprobs or self.reply.asked.return_token_ids):
            deltas = [{}]
        for number, delta in enumerate(deltas):
            about: dict[str, Any] = {"logprobs": None}
            if number == 0:  # a step's tokens go with the first thing that it says
                about = {"logprobs": self._logprobs(chunk.logprobs)}
                if self.reply.asked.return_token_ids:
                    about["token_ids"] = chunk.token_ids
            yield self._chunk(index, delta, about, extra if number == 0 else {})
        if piece.reason:
            yield self._chunk(index, {}, {"finish_reason": piece.reason}, self.reply.metrics())

    def end(self) -> Iterable[bytes]:
        if self._usage_last:
            yield sse({**self.reply.head("chat.completion.chunk"), "choices": [], "usage": self.reply.usage()})
        yield DONE

    def whole(self) -> dict[str, Any]:
        choices = []
        for index, choice in enumerate(self.reply.choices):
            one = {
                "index": index,
                "message": _message(choice),
                "logprobs": self._logprobs(choice.logprobs),
                "finish_reason": choice.reason,
            }
            if self.reply.asked.return_token_ids:
                one["token_ids"] = choice.token_ids
            choices.append(one)
        head, usage = self.reply.head("chat.completion"), self.reply.usage()
        return {**head, "choices": choices, "usage": usage, **self.reply.metrics()}

    def _chunk(self, index: int, delta: dict[str, Any], about: Any = None, extra: Any = None) -> bytes:
        choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": None, **(about or {})}
        usage = {"usage": self.reply.usage()} if self._usage_always else {}
        return sse({**self.reply.head("chat.completion.chunk"), "choices": [choice], **usage, **(extra or {})})

    def _delta(self, index: int, delta: Delta) -> dict[str, Any]:
        if delta.name:
            call = self.reply.choices[index].calls[self._calls[index]]
            self._calls[index] += 1
            function = {"name": call.name, "arguments": ""}
            begun = {"index": self._calls[index] - 1, "id": call.id, "type": "function", "function": function}
            return {"tool_calls": [begun]}
        if delta.arguments:
            more = {"index": self._calls[index] - 1, "function": {"arguments": delta.arguments}}
            return {"tool_calls": [more]}
        if delta.thought:
            return {"reasoning_content": delta.thought, "reasoning": delta.thought}
        return {"content": delta.content}

    def _logprobs(self, entries: Any) -> dict[str, Any] | None:
        if not self.reply.asked.logprobs:  # type: ignore[attr-defined]
            return None
        return {"content": chat_logprobs(self._tokenizer, entries), "refusal": None}


def _message(choice: Choice) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": choice.content, "refusal": None}
    if choice.thoughts:
        message |= {"reasoning_content": choice.thoughts, "reasoning": choice.thoughts}
    if choice.calls:
        message["content"] = choice.content or None
        message["tool_calls"] = [
            {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
            for call in choice.calls
        ]
    return message
