"""Clients of a server of ours, for the benches that ask one: start it, ask it something, let many ask at once."""

import asyncio
import json
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, final

import httpx
from common import ROOT

T = TypeVar("T")
COMPLETIONS = "/v1/completions"


@final
@dataclass(frozen=True)
class Server:
    process: "subprocess.Popen[bytes]"
    url: str

    @property
    def resident_mb(self) -> float:
        """Megabytes (1e6 bytes) that the process has in memory."""
        status = Path(f"/proc/{self.process.pid}/status").read_text(encoding="ascii")
        return int(next(line for line in status.splitlines() if line.startswith("VmRSS")).split()[1]) / 1e3

    def metric(self, name: str) -> float:
        """What the server's page of metrics says of `name`, over all labels."""
        lines = httpx.get(f"{self.url}/metrics", timeout=30).text.splitlines()
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(f"mtp_engine:{name}{{"))

    @property
    def still_there(self) -> int:
        """Requests that run or wait."""
        return int(self.metric("num_requests_running") + self.metric("num_requests_waiting"))


@contextmanager
def server(model: str, *options: str) -> Iterator[Server]:
    """`mtp-engine serve` at a free port, as soon as it listens, until the block ends."""
    command = [sys.executable, "-m", "mtp_engine.cli", "serve", "--model", model, "--port", "0", *options]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE)
    try:
        assert process.stderr is not None
        line = next((line for line in process.stderr if b"http://" in line), b"")
        if not line:
            raise SystemExit("the server did not come up")
        yield Server(process, line.decode().split("; ")[1].split()[0])
    finally:
        process.terminate()
        process.wait(60)


@final
@dataclass
class Told:
    """What a client got. texts: one per choice, or only what Retry-After says where it was refused. tokens: of all choices.
    times: when pieces of a stream came, in seconds from the request on."""

    status: int
    texts: list[str]
    tokens: int = 0
    times: Sequence[float] = ()


async def ask(http: httpx.AsyncClient, body: dict[str, Any]) -> Told:
    """Ask for completions, streamed if the body says so, and wait for all of the answer."""
    begin, times, texts, tokens = time.perf_counter(), list[float](), dict[int, str](), 0
    async with http.stream("POST", COMPLETIONS, json=body) as reply:
        if reply.status_code != 200:
            return Told(reply.status_code, [reply.headers.get("retry-after", "")])
        if not body.get("stream"):
            whole = json.loads(await reply.aread())
            return Told(200, [choice["text"] for choice in whole["choices"]], whole["usage"]["completion_tokens"])
        async for event in events(reply):
            tokens = (event.get("usage") or {}).get("completion_tokens", tokens)
            for choice in event.get("choices", ()):
                times.append(time.perf_counter() - begin)
                texts[choice["index"]] = texts.get(choice["index"], "") + choice["text"]
    return Told(200, [texts[index] for index in sorted(texts)], tokens, times)


async def events(reply: httpx.Response) -> AsyncIterator[dict[str, Any]]:
    """What a stream's events hold, but for its last, [DONE]."""
    async for line in reply.aiter_lines():
        if line.startswith("data: {"):
            yield json.loads(line[6:])


def crowd(
    url: str, one: Callable[[httpx.AsyncClient, int], Awaitable[T]], clients: int, at_once: int,
    arrivals: Sequence[float] | None = None,
) -> list[T]:  # fmt: skip
    """What `one` returned for each of the clients 0, 1, ..., of which so many are served at once. arrivals: seconds from now
    at which they come; without them all come now."""

    async def all_of_them() -> list[T]:
        free, limits = asyncio.Semaphore(at_once), httpx.Limits(max_connections=at_once)
        async with httpx.AsyncClient(base_url=url, timeout=600, limits=limits) as http:

            async def come(number: int) -> T:
                if arrivals is not None:
                    await asyncio.sleep(arrivals[number])
                async with free:
                    return await one(http, number)

            return await asyncio.gather(*map(come, range(clients)))

    return asyncio.run(all_of_them())
