"""A server with mimo-nano in this process, and requests of every kind for it."""

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import uvicorn

from mtp_engine import AsyncEngine, Engine, EngineConfig
from mtp_engine.hub import hub
from mtp_engine.serve import Limits, build_app

CONFIG = EngineConfig(tree="chain:3", threads=1, max_batch=4, max_waiting=64)
ASKED = [{"role": "user", "content": "Tell me a story about a fox."}]
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
            "required": ["city", "days"],
            "additionalProperties": False,
        },
    },
}
CITY = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "population": {"type": "integer"}},
    "required": ["name", "population"],
    "additionalProperties": False,
}


@contextmanager
def serving(engine: AsyncEngine, limits: Limits | None = None, **options: Any) -> Iterator[str]:
    """The address of a server over the engine, in a thread of its own."""
    app = build_app(engine, name=hub.NANO, limits=limits, **options)
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error", lifespan="off"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(10)
        assert not thread.is_alive()


@contextmanager
def engine(**changes: Any) -> Iterator[AsyncEngine]:
    from dataclasses import replace

    inner = Engine.load(hub.NANO, replace(CONFIG, **changes))
    running = AsyncEngine(inner)
    try:
        yield running
    finally:
        inner.close()


def busy(running: AsyncEngine) -> int:
    scheduler = running.engine.scheduler
    return len(scheduler.running) + len(scheduler.waiting) if scheduler else 0


def wait_idle(running: AsyncEngine, seconds: float = 10) -> None:
    deadline = time.monotonic() + seconds
    while busy(running):
        assert time.monotonic() < deadline, "a slot is still taken"
        time.sleep(0.005)


def events(response: httpx.Response) -> list[dict[str, Any]]:
    """The JSON of a stream's events; its end is checked."""
    lines = [line for line in response.iter_lines() if line.startswith("data: ")]
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


def joined_chat(chunks: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What the choices of a chat stream add up to."""
    found: dict[int, dict[str, Any]] = {}
    for chunk in chunks:
        for choice in chunk["choices"]:
            one = found.setdefault(
                choice["index"],
                {"content": "", "calls": [], "logprobs": [], "token_ids": [], "finish_reason": None, "roles": 0},
            )
            delta = choice["delta"]
            one["roles"] += "role" in delta
            one["content"] += delta.get("content") or ""
            for call in delta.get("tool_calls", ()):
                if "id" in call:
                    one["calls"].append([call["function"]["name"], ""])
                one["calls"][call["index"]][1] += call["function"]["arguments"]
            one["logprobs"] += (choice["logprobs"] or {}).get("content") or []
            one["token_ids"] += choice.get("token_ids") or []
            assert one["finish_reason"] is None, "something came behind the end"
            one["finish_reason"] = choice["finish_reason"]
    return [found[index] for index in sorted(found)]


def whole_chat(reply: dict[str, Any]) -> list[dict[str, Any]]:
    """The choices of a whole chat completion in the same form."""
    return [
        {
            "content": choice["message"]["content"] or "",
            "calls": [
                [call["function"]["name"], call["function"]["arguments"]]
                for call in choice["message"].get("tool_calls", ())
            ],
            "logprobs": (choice["logprobs"] or {}).get("content") or [],
            "token_ids": choice.get("token_ids") or [],
            "finish_reason": choice["finish_reason"],
            "roles": 1,
        }
        for choice in reply["choices"]
    ]
