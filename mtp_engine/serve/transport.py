"""Answers on their way to a client that may leave, or stop reading, at any moment."""

import asyncio
import json
from collections.abc import AsyncGenerator, Coroutine
from contextlib import aclosing, suppress
from typing import Any, TypeVar, final

from fastapi import Request
from fastapi.responses import Response
from starlette.types import Receive, Scope, Send

from mtp_engine.serve.errors import ApiError

_T = TypeVar("_T")
DONE = b"data: [DONE]\n\n"


def sse(payload: Any, event: str = "") -> bytes:
    """One server-sent event; `event` names it where the API has named ones."""
    name = f"event: {event}\n" if event else ""
    return f"{name}data: {json.dumps(payload, separators=(',', ':'))}\n\n".encode()


async def unless_gone(request: Request, work: Coroutine[Any, Any, _T]) -> _T:
    """What `work` returns. If the client leaves before that, work is cancelled; nobody reads the error that says so."""
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_gone(request.receive))
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ApiError(499, "the client has left")
        return working.result()
    finally:
        for task in (working, leaving):
            task.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


@final
class EventStream(Response):
    """Server-sent events. The source is closed at once when the client leaves, or takes nothing for `patience` seconds;
    an exception in it becomes a last event."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[bytes, None], patience: float) -> None:
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._events, self._patience = events, patience

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        pumping = asyncio.ensure_future(self._pump(send))
        leaving = asyncio.ensure_future(_gone(receive))
        try:
            await asyncio.wait((pumping, leaving), return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (pumping, leaving):
                task.cancel()
            await asyncio.gather(pumping, leaving, return_exceptions=True)

    async def _pump(self, send: Send) -> None:
        async def give(message: dict[str, Any]) -> None:
            async with asyncio.timeout(self._patience):
                await send(message)

        async with aclosing(self._events) as events:
            with suppress(OSError, TimeoutError):
                await give({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
                try:
                    async for event in events:
                        await give({"type": "http.response.body", "body": event, "more_body": True})
                except (OSError, TimeoutError):
                    raise
                except Exception as error:
                    failure = sse(ApiError.of(error).body()) + DONE
                    await give({"type": "http.response.body", "body": failure, "more_body": True})
                await give({"type": "http.response.body", "body": b"", "more_body": False})
