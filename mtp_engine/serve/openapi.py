"""The OpenAPI document, made true: what FastAPI cannot know of our replies is said here."""

from typing import Any

from fastapi import FastAPI

_ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}
_REFUSED = {
    "400": "What was asked for cannot be done.", "401": "Wrong or missing key.", "404": "No such model or path.",
    "408": "The body came too slowly.", "413": "The body is too large.", "500": "Our fault.",
    "503": "Too many requests wait, or the server is going down; Retry-After says when to come again.",
}  # fmt: skip


def _object(required: str, **properties: Any) -> dict[str, Any]:
    return {"type": "object", "required": required.split(), "properties": properties}


_USAGE = _object(
    "prompt_tokens completion_tokens total_tokens",
    prompt_tokens={"type": "integer"}, completion_tokens={"type": "integer"}, total_tokens={"type": "integer"},
    prompt_tokens_details=_object("cached_tokens", cached_tokens={"type": "integer"}),
)  # fmt: skip
_TEXT, _NUMBER = {"type": "string"}, {"type": "integer"}


def _choices(field: str, about: dict[str, Any]) -> dict[str, Any]:
    reason = {"enum": ["stop", "length", "tool_calls"]}
    choice = _object(f"index {field} finish_reason", index=_NUMBER, finish_reason=reason, **{field: about})
    return {"type": "array", "items": choice}


def _answer(kind: str, choices: dict[str, Any]) -> dict[str, Any]:
    return _object(
        "id object created model choices usage",
        id=_TEXT, object={"const": kind}, created=_NUMBER, model=_TEXT, choices=choices, usage=_USAGE,
    )  # fmt: skip


_MODEL = _object("id object created owned_by", id=_TEXT, object={"const": "model"}, created=_NUMBER, owned_by=_TEXT)
_MESSAGE = _object("role content", role={"const": "assistant"}, content={"type": ["string", "null"]})
_REPLIES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": _answer("chat.completion", _choices("message", _MESSAGE)),
    "/v1/completions": _answer("text_completion", _choices("text", _TEXT)),
    "/v1/responses": _object(
        "id object status output",
        id=_TEXT, object={"const": "response"}, status={"enum": ["completed", "incomplete"]}, output={"type": "array"},
    ),
    "/tokenize": _object("count max_model_len tokens", count=_NUMBER, max_model_len=_NUMBER, tokens={"type": "array"}),
    "/detokenize": _object("prompt", prompt=_TEXT),
    "/v1/models": _object("object data", object={"const": "list"}, data={"type": "array", "items": _MODEL}),
    "/v1/models/{name}": _MODEL,
    "/version": _object("version", version=_TEXT),
}  # fmt: skip
_STREAMED = ("/v1/chat/completions", "/v1/completions", "/v1/responses")


def describe(app: FastAPI) -> dict[str, Any]:
    """The document of the app's routes so far."""
    document = app.openapi()
    refusals = {
        status: {
            "description": text,
            "content": {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}},
        }
        for status, text in _REFUSED.items()
    }
    for path, operations in document["paths"].items():
        path = path.replace(":path", "")
        for operation in operations.values():
            operation["responses"] = {"200": _reply(path), **refusals}
    schemas = document.setdefault("components", {}).setdefault("schemas", {})
    for name in ("HTTPValidationError", "ValidationError"):
        schemas.pop(name, None)
    schemas["Error"] = _ERROR
    return document


def _reply(path: str) -> dict[str, Any]:
    if path == "/health":
        return {"description": "The engine answers."}
    if path == "/metrics":
        return {"description": "Metrics.", "content": {"text/plain": {"schema": _TEXT}}}
    content: dict[str, Any] = {"application/json": {"schema": _REPLIES[path]}}
    if path in _STREAMED:
        content["text/event-stream"] = {"schema": {**_TEXT, "description": "With stream: server-sent events."}}
    return {"description": "The answer.", "content": content}
