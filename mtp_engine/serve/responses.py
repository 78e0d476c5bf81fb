"""/v1/responses, stateless: OpenAI's newer form over the same answers."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, final

from fastapi import Request
from fastapi.responses import Response
from pydantic import ValidationError

from mtp_engine.serve.chat import ask_chat, reader
from mtp_engine.serve.choices import Piece, Reply, new_id
from mtp_engine.serve.errors import ApiError
from mtp_engine.serve.readers import Delta
from mtp_engine.serve.replying import Writer, respond
from mtp_engine.serve.schemas import ChatRequest, FlatNamedTool, ResponsesRequest
from mtp_engine.serve.service import Service, Step
from mtp_engine.serve.transport import sse

_SAME = (
    "model", "temperature", "top_p", "top_k", "min_p", "seed", "stop", "stop_token_ids", "ignore_eos", "min_tokens",
    "presence_penalty", "frequency_penalty", "repetition_penalty", "logit_bias", "allowed_token_ids", "bad_words",
    "structured_outputs", "priority", "speculate", "tree", "draft_metrics", "stream", "chat_template_kwargs",
)  # fmt: skip


async def responses(service: Service, request: Request, asked: ResponsesRequest) -> Response:
    """Answer an input. Raises ApiError and EngineError."""
    if asked.previous_response_id or asked.background:
        raise ApiError(
            400, "nothing is stored here: send the whole conversation as input", param="previous_response_id"
        )
    chat = as_chat(asked)
    prompt, ask = await ask_chat(service, chat)
    reply = Reply(chat, service.name, "resp", len(prompt.ids), 1, lambda: reader(prompt))
    return await respond(service, request, [ask], ResponsesWriter(reply, asked))


def as_chat(asked: ResponsesRequest) -> ChatRequest:
    """The same as a chat request. Raises ApiError for items that it has no word for."""
    given: dict[str, Any] = {name: value for name in _SAME if (value := getattr(asked, name)) is not None}
    messages = [{"role": "system", "content": asked.instructions}] if asked.instructions else []
    if isinstance(asked.input, str):
        messages.append({"role": "user", "content": asked.input})
    else:
        messages += [_message(item) for item in asked.input if item.get("type") != "reasoning"]
    if asked.text and (form := asked.text.format):
        schema = {"name": form.name or "answer", "schema": form.schema_}
        given["response_format"] = {
            "type": form.type,
            **({"json_schema": schema} if form.type == "json_schema" else {}),
        }
    if asked.tools:
        given["tools"] = [_tool(each.model_dump(exclude_none=True)) for each in asked.tools]
    if isinstance(asked.tool_choice, FlatNamedTool):
        given["tool_choice"] = {"type": "function", "function": {"name": asked.tool_choice.name}}
    elif asked.tool_choice:
        given["tool_choice"] = asked.tool_choice
    if asked.structured_outputs:
        given["structured_outputs"] = asked.structured_outputs.model_dump(by_alias=True, exclude_none=True)
    try:
        return ChatRequest.model_validate({**given, "messages": messages, "max_tokens": asked.max_output_tokens})
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise ApiError(400, f"input: {where}: {first['msg']}", param="input") from None


def _tool(given: Mapping[str, Any]) -> dict[str, Any]:
    if given["type"] != "function" or not given.get("name"):
        raise ApiError(400, f"tools: only functions with a name can be called, not {given['type']!r}", param="tools")
    return {"type": "function", "function": {key: value for key, value in given.items() if key != "type"}}


def _message(item: Mapping[str, Any]) -> dict[str, Any]:
    kind = item.get("type", "message")
    if kind == "message":
        return {"role": item.get("role", "user"), "content": item.get("content")}
    if kind == "function_call":
        function = {"name": item.get("name"), "arguments": item.get("arguments", "{}")}
        call = {"id": item.get("call_id"), "type": "function", "function": function}
        return {"role": "assistant", "content": "", "tool_calls": [call]}
    if kind == "function_call_output":
        output = item.get("output")
        return {"role": "tool", "tool_call_id": item.get("call_id"), "content": output}
    raise ApiError(400, f"input: an item of type {kind!r} cannot be read here", param="input")


@final
class ResponsesWriter(Writer):
    """A response whose items are built up as the deltas come; its events are told on the way."""

    def __init__(self, reply: Reply, asked: ResponsesRequest) -> None:
        self.reply, self._asked = reply, asked
        self._items: list[dict[str, Any]] = []
        self._number = 0  # of the next event

    def begin(self) -> Iterable[bytes]:
        for kind in ("response.created", "response.in_progress"):
            yield self._event(kind, response=self._response("in_progress"))

    def piece(self, step: Step, piece: Piece) -> Iterable[bytes]:
        for delta in piece.deltas:
            yield from self._tell(delta)
        if piece.reason:
            yield from self._close()

    def end(self) -> Iterable[bytes]:
        status = self._status()
        yield self._event(f"response.{status}", response=self._response(status))

    def whole(self) -> dict[str, Any]:
        choice = self.reply.choices[0]
        for delta in (
            Delta(thought=choice.thoughts),
            Delta(content=choice.content),
            *(each for call in choice.calls for each in (Delta(name=call.name), Delta(arguments=call.arguments))),
        ):
            list(self._tell(delta))
        list(self._close())
        return self._response(self._status())

    def _status(self) -> str:
        return "incomplete" if self.reply.choices[0].reason == "length" else "completed"

    def _tell(self, delta: Delta) -> Iterable[bytes]:
        if delta.thought:
            yield from self._say("reasoning", "reasoning_text", delta.thought)
        if delta.content:
            yield from self._say("message", "output_text", delta.content)
        if delta.name:
            yield from self._close()
            call = {"type": "function_call", "call_id": new_id("call"), "name": delta.name, "arguments": ""}
            yield from self._open(call, "fc")
        if delta.arguments:
            item = self._items[-1]
            item["arguments"] += delta.arguments
            yield self._event("response.function_call_arguments.delta", **self._at(item), delta=delta.arguments)

    def _say(self, kind: str, part_type: str, text: str) -> Iterable[bytes]:
        """More text of a message or a thought, which begins where the last item is something else."""
        if not self._items or self._items[-1]["type"] != kind:
            yield from self._close()
            role: dict[str, Any] = {"role": "assistant"} if kind == "message" else {"summary": []}
            yield from self._open({"type": kind, **role, "content": []}, "msg" if kind == "message" else "rs")
            part: dict[str, Any] = {"type": part_type, "text": ""}
            if kind == "message":
                part |= {"annotations": [], "logprobs": []}
            yield self._event(
                "response.content_part.added", **self._at(self._items[-1]), content_index=0, part=dict(part)
            )
            self._items[-1]["content"].append(part)
        item = self._items[-1]
        item["content"][0]["text"] += text
        more: dict[str, Any] = {"logprobs": []} if kind == "message" else {}
        yield self._event(f"response.{part_type}.delta", **self._at(item), content_index=0, delta=text, **more)

    def _open(self, item: dict[str, Any], kind: str) -> Iterable[bytes]:
        item |= {"id": new_id(kind), "status": "in_progress"}
        self._items.append(item)
        yield self._event("response.output_item.added", output_index=len(self._items) - 1, item=dict(item))

    def _close(self) -> Iterable[bytes]:
        """The last item is whole."""
        if not self._items or self._items[-1]["status"] != "in_progress":
            return
        item = self._items[-1]
        item["status"] = "completed"
        if item["type"] == "function_call":
            at = self._at(item)
            done = {"name": item["name"], "arguments": item["arguments"]}
            yield self._event("response.function_call_arguments.done", **at, **done)
        else:
            part, at = item["content"][0], {**self._at(item), "content_index": 0}
            more: dict[str, Any] = {"logprobs": []} if item["type"] == "message" else {}
            yield self._event(f"response.{part['type']}.done", **at, text=part["text"], **more)
            yield self._event("response.content_part.done", **at, part=part)
        yield self._event("response.output_item.done", output_index=len(self._items) - 1, item=item)

    def _at(self, item: Mapping[str, Any]) -> dict[str, Any]:
        return {"item_id": item["id"], "output_index": len(self._items) - 1}

    def _event(self, kind: str, **fields: Any) -> bytes:
        self._number += 1
        return sse({"type": kind, "sequence_number": self._number - 1, **fields}, kind)

    def _response(self, status: str) -> dict[str, Any]:
        asked, usage, items = self._asked, self.reply.usage(), self._items
        return {
            "id": self.reply.id,
            "object": "response",
            "created_at": self.reply.created,
            "status": status,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "instructions": asked.instructions,
            "max_output_tokens": asked.max_output_tokens,
            "metadata": asked.metadata or {},
            "model": self.reply.model,
            "output": _copied(items) if status != "in_progress" else [],
            "parallel_tool_calls": True if asked.parallel_tool_calls is None else asked.parallel_tool_calls,
            "previous_response_id": None,
            "reasoning": asked.reasoning,
            "store": False,
            "temperature": 1.0 if asked.temperature is None else asked.temperature,
            "text": asked.text.model_dump(by_alias=True, exclude_none=True)
            if asked.text
            else {"format": {"type": "text"}},
            "tool_choice": _choice(asked),
            "tools": [each.model_dump(exclude_none=True) for each in asked.tools or ()],
            "top_p": 1.0 if asked.top_p is None else asked.top_p,
            "truncation": "disabled",
            "usage": None if status == "in_progress" else _usage(usage),
            **(self.reply.metrics() if status != "in_progress" else {}),
        }


def _choice(asked: ResponsesRequest) -> Any:
    choice = asked.tool_choice
    return choice.model_dump() if isinstance(choice, FlatNamedTool) else choice or "auto"


def _copied(items: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    return [dict(item) for item in items]


def _usage(usage: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "input_tokens": usage["prompt_tokens"],
        "input_tokens_details": usage["prompt_tokens_details"],
        "output_tokens": usage["completion_tokens"],
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": usage["total_tokens"],
    }
