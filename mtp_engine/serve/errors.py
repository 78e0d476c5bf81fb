"""Everything that goes wrong, in OpenAI's form: {"error": {message, type, param, code}}. No traceback leaves the server."""

import json
import logging
from collections.abc import Mapping
from typing import Any, final

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from starlette.exceptions import HTTPException

from mtp_engine.errors import EngineBusy, EngineError

_LOG = logging.getLogger("mtp_engine")
_TYPES = {
    401: "authentication_error", 404: "not_found_error", 408: "timeout_error", 413: "request_too_large",
    500: "server_error", 503: "overloaded_error",
}  # fmt: skip
_CONTEXT = "and the context holds"  # in the engine's message about a prompt that is too long
_LONGEST = 400  # characters of a message


def json_response(payload: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """JSON in ASCII: a text may hold half a surrogate pair, which UTF-8 cannot."""
    body = json.dumps(payload, separators=(",", ":")).encode()
    return Response(body, status, dict(headers or {}), media_type="application/json")


@final
class ApiError(Exception):
    """An error for the client. param: the field that it is about. code: a word for programs."""

    def __init__(self, status: int, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code

    @classmethod
    def of(cls, error: BaseException) -> "ApiError":
        """What a client is told of any exception. What nobody expected is logged, and not told."""
        if isinstance(error, ApiError):
            return error
        if isinstance(error, EngineBusy):
            return cls(503, str(error), code="queue_full")
        if isinstance(error, EngineError):
            message = str(error)
            if "engine is closed" in message or message.startswith("the engine failed"):
                return cls(503, "the server is shutting down, or its engine has failed", code="unavailable")
            return cls(400, message, code="context_length_exceeded" if _CONTEXT in message else None)
        if isinstance(error, HTTPException):
            return cls(error.status_code, str(error.detail))
        _LOG.error("a request failed", exc_info=error)
        return cls(500, f"internal error: {type(error).__name__}; the server's log says more")

    def body(self) -> dict[str, Any]:
        kind = _TYPES.get(self.status, "invalid_request_error")
        message = self.message if len(self.message) <= _LONGEST else self.message[:_LONGEST] + " ..."
        return {"error": {"message": message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> Response:
        headers = {503: {"Retry-After": "1"}, 401: {"WWW-Authenticate": "Bearer"}}.get(self.status)
        return json_response(self.body(), self.status, headers)


def invalid(error: RequestValidationError) -> ApiError:
    """The first thing that pydantic does not like."""
    first = error.errors()[0]
    where = [str(part) for part in first["loc"] if part != "body"]
    message = f"{'.'.join(where)}: {first['msg']}" if where else str(first["msg"])
    return ApiError(400, message, param=where[0] if where else None)


def handle_errors(app: FastAPI) -> None:
    """Have all of the app's errors take the form."""

    async def refused(request: Request, error: Exception) -> Response:
        return ApiError.of(error).response()

    async def malformed(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        return invalid(error).response()

    for kind in (ApiError, EngineError, HTTPException):
        app.add_exception_handler(kind, refused)
    app.add_exception_handler(RequestValidationError, malformed)
