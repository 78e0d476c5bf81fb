"""From chat messages and tools to a prompt, for templates that know tools and for those that do not."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, final

from mtp_engine.serve.errors import ApiError
from mtp_engine.serve.schemas import ChatMessage, ChatRequest, NamedTool
from mtp_engine.serve.service import Service
from mtp_engine.text.tool_calls import THINK, call_schema

_OURS = {"messages", "tools", "documents", "add_generation_prompt", "self"}
_MANUAL = (
    "You can call these functions, of which each line is one:\n{tools}\n"
    'To call one, write JSON and nothing else: {{"name": "...", "arguments": {{...}}}}'
)


@final
@dataclass(frozen=True)
class ChatPrompt:
    """mode: what the answer is read as. schema: of the call that it must be. thinking: the template opened the thoughts."""

    ids: list[int]
    mode: Literal["plain", "tagged", "call"]
    tools: Sequence[Mapping[str, Any]] = ()
    schema: Mapping[str, Any] | None = None
    thinking: bool = False


async def chat_prompt(service: Service, asked: ChatRequest, *, structured: bool) -> ChatPrompt:
    """structured: the answer must match something, so that a model that could think first does not.

    A required or named call is written under its schema. So is one under `auto` where the template knows no tools, so
    that the model has no way of its own to call one: there it answers a user's message with a call, and whatever else
    comes last, such as a tool's result, in words.
    """
    tools = _tools(asked)
    given = template_args(asked.chat_template_kwargs)
    knows, choice = service.tokenizer.template_knows("tools"), asked.tool_choice or ("auto" if tools else "none")
    if isinstance(choice, NamedTool):
        tools = [tool for tool in tools if tool["function"]["name"] == choice.function.name]
        if not tools:
            raise ApiError(
                400, f"tool_choice names {choice.function.name!r}, which is not in tools", param="tool_choice"
            )
    if choice == "required" and not tools:
        raise ApiError(400, "tool_choice is required, and there are no tools", param="tools")
    called = bool(tools) and (
        choice == "required"
        or isinstance(choice, NamedTool)
        or (choice == "auto" and not knows and asked.messages[-1].role == "user")
    )
    shown = tools if choice != "none" else []
    messages = [_message(each, knows) for each in asked.messages]
    if shown and not knows:
        messages = _with_manual(messages, shown)
    arguments = {"enable_thinking": False} if structured or called else {}
    ids = await service.chat(messages, **({"tools": shown} if shown and knows else {}), **{**arguments, **given})
    if called:
        return ChatPrompt(ids, "call", tools, _schema(tools))
    thinks = service.tokenizer.template_knows(THINK) and not structured
    if not thinks and not (shown and knows):
        return ChatPrompt(ids, "plain")
    opened = thinks and service.tokenizer.decode(ids[-8:], skip_special=False).rstrip().endswith(THINK)
    return ChatPrompt(ids, "tagged", shown, thinking=opened)


def plain_messages(service: Service, messages: Sequence[ChatMessage]) -> list[dict[str, Any]]:
    """Messages without tools, as the template wants them."""
    knows = service.tokenizer.template_knows("tools")
    return [_message(each, knows) for each in messages]


def template_args(given: Mapping[str, Any] | None) -> dict[str, Any]:
    """What a client may set for the template. Raises ApiError for what is not its to set."""
    if wrong := _OURS & (given or {}).keys():
        raise ApiError(400, f"chat_template_kwargs cannot set {sorted(wrong)[0]}", param="chat_template_kwargs")
    return dict(given or {})


def _tools(asked: ChatRequest) -> list[dict[str, Any]]:
    return [tool.model_dump(exclude_none=True) for tool in asked.tools or ()]


def _schema(tools: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    try:
        return call_schema(tools)
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"tools: {error}", param="tools") from None


def _with_manual(messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    manual = _MANUAL.format(tools="\n".join(json.dumps(tool["function"]) for tool in tools))
    first, *rest = messages
    if first["role"] == "system":
        return [{**first, "content": f"{first['content']}\n\n{manual}"}, *map(dict, rest)]
    return [{"role": "system", "content": manual}, *map(dict, messages)]


def _message(message: ChatMessage, knows: bool) -> dict[str, Any]:
    """As a template wants it. knows: whether it knows calls and results; else they are told in words."""
    role = {"developer": "system", "function": "tool"}.get(message.role, message.role)
    content = _content(message)
    calls = [
        {"name": call.function.name, "arguments": _arguments(call.function.arguments)}
        for call in message.tool_calls or ()
    ]
    if not knows:
        if role == "tool":
            return {"role": "user", "content": f"The function's result: {content}"}
        told = "\n".join(json.dumps(call) for call in calls)
        return {"role": role, "content": f"{content}\n{told}".strip() if told else content}
    given: dict[str, Any] = {"role": role, "content": content}
    if calls:
        ids = [call.id for call in message.tool_calls or ()]
        given["tool_calls"] = [
            {"id": number, "type": "function", "function": call} for number, call in zip(ids, calls, strict=True)
        ]
    thoughts = message.reasoning_content or (message.reasoning if isinstance(message.reasoning, str) else None)
    extra = {"name": message.name, "tool_call_id": message.tool_call_id, "reasoning_content": thoughts}
    return {**given, **{key: value for key, value in extra.items() if value is not None}}


def _content(message: ChatMessage) -> str:
    if not isinstance(message.content, list):
        return message.content or ""
    for part in message.content:
        if part.type not in ("text", "input_text", "output_text", "refusal"):
            raise ApiError(400, f"messages: the model reads text only, not {part.type!r}", param="messages")
    return "".join(part.text or part.refusal or "" for part in message.content)


def _arguments(text: str) -> Any:
    """Templates write arguments out one by one; what is no JSON object stays text."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text
