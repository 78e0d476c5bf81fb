"""The one way from a request to its reply, whole or streamed; what the endpoints differ in is a Writer."""

from collections.abc import AsyncGenerator, Iterable, Sequence
from contextlib import aclosing
from typing import Any, Protocol

from fastapi import Request
from fastapi.responses import Response

from mtp_engine.serve.choices import Piece, Reply
from mtp_engine.serve.errors import json_response
from mtp_engine.serve.service import Ask, Service, Step
from mtp_engine.serve.transport import EventStream, unless_gone


class Writer(Protocol):
    """How an endpoint says what has come of a reply."""

    reply: Reply

    def begin(self) -> Iterable[bytes]:
        """Events before the first step."""

    def piece(self, step: Step, piece: Piece) -> Iterable[bytes]:
        """Events for one step."""

    def end(self) -> Iterable[bytes]:
        """Events after the last step."""

    def whole(self) -> dict[str, Any]:
        """The reply of a request that does not stream."""


async def respond(service: Service, request: Request, asks: Sequence[Ask], writer: Writer) -> Response:
    """Errors before the first step have a status of their own, in a stream too."""
    steps = service.follow(asks)
    if not writer.reply.asked.stream:
        return json_response(await unless_gone(request, _whole(steps, writer)))
    try:
        first = await unless_gone(request, anext(steps))
    except BaseException:
        await steps.aclose()
        raise
    return EventStream(_events(first, steps, writer), service.limits.write_s)


async def _whole(steps: AsyncGenerator[Step, None], writer: Writer) -> dict[str, Any]:
    async with aclosing(steps):
        async for step in steps:
            writer.reply.add(step)
    return writer.whole()


async def _events(first: Step, steps: AsyncGenerator[Step, None], writer: Writer) -> AsyncGenerator[bytes, None]:
    async with aclosing(steps):
        for event in writer.begin():
            yield event
        for event in writer.piece(first, writer.reply.add(first)):
            yield event
        async for step in steps:
            for event in writer.piece(step, writer.reply.add(step)):
                yield event
        for event in writer.end():
            yield event
