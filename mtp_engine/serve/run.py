"""The HTTP server itself: uvicorn on a socket of ours, until a signal ends it."""

import asyncio
import logging
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import final

import uvicorn

from mtp_engine.async_engine import AsyncEngine
from mtp_engine.engine import Engine
from mtp_engine.errors import EngineError
from mtp_engine.serve.app import build_app
from mtp_engine.serve.limits import Limits

__all__ = ["Limits", "Listening", "listen", "serve"]
_GRACE = 5.0  # seconds that connections have to close after their answers were ended


@final
@dataclass(frozen=True)
class Listening:
    """A socket that nobody answers yet. address: host and port, as in a URL."""

    socket: socket.socket
    address: str


@contextmanager
def listen(host: str, port: int) -> Iterator[Listening]:
    """Take the port before the model is loaded. Raises EngineError where that cannot be."""
    try:
        family, *_, where = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        taken = socket.socket(family)
    except (OSError, UnicodeError) as error:
        raise EngineError(
            f"--host {host}: {getattr(error, 'strerror', None) or error}; give an address of this machine"
        ) from None
    with taken:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            taken.bind(where)
            taken.listen(2048)
        except OSError as error:
            raise EngineError(
                f"--port {port} on {host}: {error.strerror}; choose another with --port or --host"
            ) from None
        name = f"[{host}]" if ":" in host else host
        yield Listening(taken, f"{name}:{taken.getsockname()[1]}")


def serve(
    engine: Engine, listening: Listening, *, name: str, limits: Limits, api_keys: Sequence[str], hosts: Sequence[str]
) -> None:
    """Serve until a signal comes, which lets running answers end within limits.drain_s; a second one does not."""
    running = AsyncEngine(engine)
    app = build_app(running, name=name, limits=limits, api_keys=api_keys, hosts=hosts)
    config = uvicorn.Config(
        app, log_level="warning", access_log=False, server_header=False, lifespan="off", ws="none",
        timeout_graceful_shutdown=int(limits.drain_s + _GRACE + 1), h11_max_incomplete_event_size=65_536,
        timeout_keep_alive=75,
    )  # fmt: skip
    logging.getLogger("uvicorn.error").addFilter(_expected)
    asyncio.run(_run(uvicorn.Server(config), listening, running, limits))


async def _run(server: uvicorn.Server, listening: Listening, engine: AsyncEngine, limits: Limits) -> None:
    draining = asyncio.create_task(_drain(server, engine, limits.drain_s))
    try:
        await server.serve(sockets=[listening.socket])
    finally:
        draining.cancel()
        await engine.aclose()
    if lost := engine.engine.team.lost:
        raise EngineError(lost)


async def _drain(server: uvicorn.Server, engine: AsyncEngine, seconds: float) -> None:
    """Once a signal has come, end what still runs after so many seconds: clients are told. Without a process that the model
    is shared with nothing can go on."""
    while not server.should_exit:
        await asyncio.sleep(0.1)
        server.should_exit |= bool(engine.engine.team.lost)
    await asyncio.sleep(seconds)
    await engine.aclose()


def _expected(record: logging.LogRecord) -> bool:
    """Clients that leave, or take nothing, are no news."""
    return "returned without completing response" not in record.getMessage()
