"""What a request must pass before anybody reads it: keys, hosts, and how much may come how slowly."""

import asyncio
import hmac
import time
from collections.abc import Sequence
from typing import final

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mtp_engine.serve.errors import ApiError
from mtp_engine.serve.limits import Limits

_OPEN = frozenset({"/", "/health", "/version", "/metrics", "/openapi.json"})  # paths without a key
_DRAINED = 64  # bodies of the largest size that are read and dropped, so that the refusal arrives


@final
class Gate:
    """ASGI middleware. keys: one of them must come as `Authorization: Bearer`; none: nobody is asked. hosts: names that
    the Host header may hold, against pages elsewhere that have a browser talk to this machine; none: any."""

    def __init__(self, app: ASGIApp, limits: Limits, keys: Sequence[str] = (), hosts: Sequence[str] = ()) -> None:
        self._app, self._limits = app, limits
        self._keys, self._hosts = [key.encode() for key in keys], frozenset(hosts)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
        elif refusal := self._refusal(scope):
            if refusal.status == 413 and "expect" not in Headers(scope=scope):
                await self._drain(receive)
            await refusal.response()(scope, receive, send)
        else:
            await self._app(scope, self._bounded(receive), send)

    def _refusal(self, scope: Scope) -> ApiError | None:
        headers = Headers(scope=scope)
        host = headers.get("host", "").rsplit("@")[-1]
        name = host[: host.find("]") + 1] if host.startswith("[") else host.partition(":")[0]
        if self._hosts and name.lower() not in self._hosts:
            return ApiError(
                400, "the Host header names another machine: a server without a key answers on this one only"
            )
        path = scope["path"].removeprefix(scope.get("root_path", "")) or "/"
        if self._keys and path not in _OPEN and scope["method"] != "OPTIONS":
            scheme, _, given = headers.get("authorization", "").partition(" ")
            given_key = given.strip().encode("latin-1", "replace")
            right = [hmac.compare_digest(given_key, key) for key in self._keys]  # all, to take the same time
            if scheme.lower() != "bearer" or not any(right):
                return ApiError(401, "wrong or missing API key: send Authorization: Bearer KEY", code="invalid_api_key")
        length = headers.get("content-length", "0")
        if length.isdecimal() and int(length) > self._limits.body_bytes:
            return ApiError(413, self._too_large)
        return None

    @property
    def _too_large(self) -> str:
        return f"the body is larger than {self._limits.body_bytes} bytes"

    async def _drain(self, receive: Receive) -> None:
        """Take a body that nobody wants, within bounds: a client that is still sending does not read."""
        left = _DRAINED * self._limits.body_bytes
        try:
            async with asyncio.timeout(self._limits.body_s):
                while left > 0:
                    message = await receive()
                    left -= len(message.get("body", b""))
                    if not message.get("more_body"):
                        return
        except TimeoutError:
            return

    def _bounded(self, receive: Receive) -> Receive:
        left, deadline, whole = self._limits.body_bytes, time.monotonic() + self._limits.body_s, False

        async def bounded() -> Message:
            nonlocal left, whole
            if whole:  # what comes now is the client's leaving
                return await receive()
            try:
                async with asyncio.timeout(deadline - time.monotonic()):
                    message = await receive()
            except TimeoutError:
                raise HTTPException(408, f"the body did not come within {self._limits.body_s:g} s") from None
            left -= len(message.get("body", b""))
            if left < 0:
                raise HTTPException(413, self._too_large)
            whole = not message.get("more_body", False)
            return message

        return bounded
