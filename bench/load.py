"""The server under load: what clients wait, whether anything is lost, what is left behind.

    python bench/load.py                                    # all parts, mimo-nano
    python bench/load.py --part poisson --requests 50
    python bench/load.py --part soak --requests 300

poisson: 64 clients, requests of mixed lengths and parameters that arrive at random, streamed and not. Every answer is compared
with that of an undrafted engine alone. Time to first token and between tokens.
queue: more at once than may wait: 503 with Retry-After, and all who come again are served.
leave: clients are cut off in mid-answer; how many steps the engine ran on for them.
soak: so many requests one upon the other, a part of them cancelled; the process's memory after a fifth and at the end.
tools: 200 required calls under 10 schemas at T = 1, which must all validate.
"""

import asyncio
import json
import random
import statistics
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import click
import httpx
import jsonschema
from common import ROOT, SOME, conditions, require_commit, run

from mtp_engine import Engine, EngineConfig, SamplingParams
from mtp_engine.config import Structure
from mtp_engine.hub import hub

CLIENTS, REGEX = 64, "[a-z ]{10,40}"
WORDS = [
    "The", "old", "lighthouse", "keeper", "walked", "down", "to", "the", "sea", "where", "a", "small", "boat", "with",
    "a", "red", "sail", "was", "waiting", "for", "him",
]  # fmt: skip
KINDS: list[tuple[dict[str, Any], dict[str, Any]]] = [  # as the request has it, and as the engine has it
    ({}, {}), ({"temperature": 0.0}, {}), ({"logprobs": True}, {"logprobs": 0}), ({"speculate": False}, {}),
    ({"stop": [".", "\n"]}, {"stop": (".", "\n")}), ({"tree": "chain:2"}, {}), ({"n": 2}, {}), ({"min_tokens": 8}, {}),
    ({"structured_outputs": {"regex": REGEX}}, {"structure": Structure(regex=REGEX), "structured_outputs": None}),
    ({"frequency_penalty": 0.8, "top_p": 0.9}, {}), ({"bad_words": [" the"]}, {"bad_words": (" the",)}),
]  # fmt: skip


@final
@dataclass(frozen=True)
class Server:
    process: "subprocess.Popen[bytes]"
    url: str

    @property
    def resident_mb(self) -> float:
        status = Path(f"/proc/{self.process.pid}/status").read_text(encoding="ascii")
        return int(next(line for line in status.splitlines() if line.startswith("VmRSS")).split()[1]) / 1e3

    def metric(self, name: str) -> float:
        lines = httpx.get(f"{self.url}/metrics", timeout=30).text.splitlines()
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(f"mtp_engine:{name}{{"))


@contextmanager
def server(model: str, *options: str) -> Iterator[Server]:
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
    """What a client got. times: when pieces came, from the request on."""

    status: int
    texts: list[str]
    tokens: int
    times: list[float]


async def ask(http: httpx.AsyncClient, body: dict[str, Any]) -> Told:
    begin, times, found, tokens = time.perf_counter(), list[float](), dict[int, str](), 0
    if not body.get("stream"):
        reply = await http.post("/v1/completions", json=body)
        if reply.status_code != 200:
            return Told(reply.status_code, [reply.headers.get("retry-after", "")], 0, [])
        whole = reply.json()
        texts = [choice["text"] for choice in whole["choices"]]
        return Told(200, texts, whole["usage"]["completion_tokens"], [])
    async with http.stream("POST", "/v1/completions", json=body) as reply:
        if reply.status_code != 200:
            return Told(reply.status_code, [reply.headers.get("retry-after", "")], 0, [])
        async for line in reply.aiter_lines():
            if not line.startswith("data: {"):
                continue
            event = json.loads(line[6:])
            tokens = (event.get("usage") or {}).get("completion_tokens", tokens)
            for choice in event.get("choices", ()):
                times.append(time.perf_counter() - begin)
                found[choice["index"]] = found.get(choice["index"], "") + choice["text"]
    return Told(200, [found[index] for index in sorted(found)], tokens, times)


def cases(requests: int, rng: random.Random) -> list[tuple[dict[str, Any], SamplingParams]]:
    made = []
    for number in range(requests):
        asked, own = KINDS[number % len(KINDS)]
        prompt = " ".join(rng.choice(WORDS) for _ in range(rng.choice([3, 12, 60, 200])))
        shared = {"max_tokens": rng.choice([8, 16, 48]), "temperature": 0.9, "seed": 2 * number, **asked}
        streamed = {"stream": True, "stream_options": {"include_usage": True}} if number % 4 else {}
        sent = {**shared, "prompt": prompt, **streamed}
        if "logprobs" in sent:
            sent["logprobs"] = 0
        params = {key: value for key, value in {**shared, **own}.items() if value is not None}
        made.append((sent, SamplingParams(**params)))
    return made


def alone(model: str, made: list[tuple[dict[str, Any], SamplingParams]]) -> list[list[str]]:
    """What an engine without drafts says."""
    config = EngineConfig(drafter="root", prefix_cache=False, max_batch=8, max_waiting=10**6)
    with Engine.load(model, config) as engine:
        answers = engine.generate([sent["prompt"] for sent, _ in made], [params for _, params in made])
    return [[answer.text, *(other.text for other in answer.others)] for answer in answers]


def percentiles(values: list[float]) -> dict[str, float]:
    cut = statistics.quantiles(values, n=100) if len(values) > 1 else values * 99
    return {"p50_ms": round(1e3 * cut[49], 1), "p99_ms": round(1e3 * cut[98], 1)}


def poisson(model: str, requests: int, rate: float, rng: random.Random) -> dict[str, Any]:
    made = cases(requests, rng)
    expected = alone(model, made)

    async def everybody(url: str) -> list[Told]:
        arrivals, at = [], 0.0
        for _ in made:
            at += rng.expovariate(rate)
            arrivals.append(at)
        free = asyncio.Semaphore(CLIENTS)

        async def one(delay: float, body: dict[str, Any]) -> Told:
            await asyncio.sleep(delay)
            async with free:
                return await ask(http, body)

        limits = httpx.Limits(max_connections=CLIENTS)
        async with httpx.AsyncClient(base_url=url, timeout=600, limits=limits) as http:
            return await asyncio.gather(*(one(delay, sent) for delay, (sent, _) in zip(arrivals, made, strict=True)))

    with server(model) as target:
        begin = time.perf_counter()
        told = asyncio.run(everybody(target.url))
        seconds = time.perf_counter() - begin
        counted = target.metric("generation_tokens_total")
    between = [
        (each.times[-1] - each.times[0]) / (each.tokens - 1) for each in told if len(each.times) > 1 and each.tokens > 1
    ]
    return {
        "requests": requests, "clients": CLIENTS, "rate_per_s": rate, "seconds": round(seconds, 1),
        "failures": sum(each.status != 200 for each in told),
        "texts_unlike_alone": sum(each.texts != texts for each, texts in zip(told, expected, strict=True)),
        "tokens": sum(each.tokens for each in told), "lost_tokens": int(counted) - sum(each.tokens for each in told),
        "first_token": percentiles([each.times[0] for each in told if each.times]), "per_token": percentiles(between),
    }  # fmt: skip


def queue(model: str) -> dict[str, Any]:
    async def rush(url: str) -> tuple[list[int], int, int]:
        refusals = told_when = 0
        async with httpx.AsyncClient(base_url=url, timeout=600, limits=httpx.Limits(max_connections=CLIENTS)) as http:

            async def one(number: int) -> int:
                nonlocal refusals, told_when
                while True:
                    told = await ask(
                        http, {"prompt": "Once", "max_tokens": 16, "seed": number, "stream": number % 2 == 0}
                    )
                    if told.status != 503:
                        return told.status
                    refusals += 1
                    told_when += told.texts == ["1"]
                    await asyncio.sleep(float(told.texts[0]) * random.uniform(0.2, 1))

            return await asyncio.gather(*map(one, range(CLIENTS))), refusals, told_when

    with server(model, "--max-batch", "4", "--max-waiting", "8") as target:
        statuses, refusals, told_when = asyncio.run(rush(target.url))
    return {"served": statuses.count(200), "of": CLIENTS, "refusals": refusals, "with_retry_after": told_when}


def leave(model: str, clients: int) -> dict[str, Any]:
    """Tokens that were made for clients after they had gone: one step's at most for each, and one in flight."""

    async def all_leave(url: str) -> int:
        seen = 0
        async with httpx.AsyncClient(base_url=url, timeout=600) as http:

            async def one(number: int) -> None:
                nonlocal seen
                body = {
                    "prompt": "Once",
                    "max_tokens": 2000,
                    "ignore_eos": True,
                    "seed": number,
                    "stream": True,
                    "return_token_ids": True,
                }
                async with http.stream("POST", "/v1/completions", json=body) as reply:
                    chunks = 0
                    async for line in reply.aiter_lines():
                        if line.startswith("data: {"):
                            seen += len(json.loads(line[6:])["choices"][0]["token_ids"])
                            chunks += 1
                        if chunks == 3 + number % 5:
                            return

            await asyncio.gather(*map(one, range(clients)))
        return seen

    with server(model, "--max-batch", "8") as target:
        seen = asyncio.run(all_leave(target.url))
        time.sleep(1)
        still = target.metric("num_requests_running") + target.metric("num_requests_waiting")
        made, drafts = target.metric("generation_tokens_total"), target.metric("spec_decode_num_drafts_total")
    return {
        "clients": clients,
        "still_there": int(still),
        "tokens_unread": int(made) - seen,
        "unread_each": round((made - seen) / clients, 2),
        "steps": int(drafts),
    }


def soak(model: str, requests: int, rng: random.Random) -> dict[str, Any]:
    async def many(url: str, bodies: list[dict[str, Any]]) -> int:
        free, failures = asyncio.Semaphore(CLIENTS), 0

        @asynccontextmanager
        async def counted() -> AsyncIterator[None]:
            nonlocal failures
            try:
                yield
            except httpx.TransportError:
                failures += 1

        async with httpx.AsyncClient(base_url=url, timeout=600, limits=httpx.Limits(max_connections=CLIENTS)) as http:

            async def one(number: int, body: dict[str, Any]) -> None:
                nonlocal failures
                async with free, counted():
                    if number % 7 == 6 and body.get("stream"):
                        async with http.stream("POST", "/v1/completions", json=body) as reply:
                            async for _ in reply.aiter_lines():
                                break
                    else:
                        failures += (await ask(http, body)).status != 200

            await asyncio.gather(*(one(*each) for each in enumerate(bodies)))
        return failures

    bodies = [{**sent, "max_tokens": 8, "min_tokens": 0} for sent, _ in cases(requests, rng)]
    with server(model, "--prefix-cache-gb", "0.05") as target:
        memory, failures, part = [], 0, max(1, requests // 5)
        for start in range(0, requests, part):
            failures += asyncio.run(many(target.url, bodies[start : start + part]))
            memory.append(round(target.resident_mb, 1))
        left = target.metric("num_requests_running") + target.metric("num_requests_waiting")
    return {"requests": requests, "failures": failures, "still_there": int(left), "resident_mb": memory}


def schemas() -> list[dict[str, Any]]:
    text, whole, number, flag = {"type": "string"}, {"type": "integer"}, {"type": "number"}, {"type": "boolean"}
    node: dict[str, Any] = {
        "type": "object",
        "properties": {"v": whole, "kids": {"type": "array", "items": {"$ref": "#/$defs/node"}}},
        "required": ["v", "kids"],
    }

    def thing(required: str, **properties: Any) -> dict[str, Any]:
        return {"type": "object", "properties": properties, "required": required.split()}

    return [
        thing("city", city=text), thing("city days", city=text, days=whole), thing("x y", x=number, y=number, label=text),
        thing("tags", tags={"type": "array", "items": text, "minItems": 1, "maxItems": 4}), thing("on", on=flag, note=text),
        thing("unit", unit={"enum": ["celsius", "fahrenheit", "kelvin"]}), thing("day", day={"type": "string", "format": "date"}),
        thing("person", person=thing("name age", name=text, age={"type": "integer", "minimum": 0, "maximum": 130})),
        thing("code", code={"type": "string", "pattern": "^[A-Z]{2}-[0-9]{4}$"}, either={"anyOf": [whole, text]}),
        {**thing("root", root={"$ref": "#/$defs/node"}), "$defs": {"node": node}},
    ]  # fmt: skip


def tools(model: str, calls: int) -> dict[str, Any]:
    async def all_of_them(url: str) -> dict[str, int]:
        found = {"valid": 0, "cut_off": 0, "wrong": 0}
        free = asyncio.Semaphore(8)
        async with httpx.AsyncClient(base_url=url, timeout=600) as http:

            async def one(number: int) -> None:
                schema = schemas()[number % len(schemas())]
                tool = {"type": "function", "function": {"name": f"tool_{number % 7}", "parameters": schema}}
                body = {
                    "messages": [{"role": "user", "content": "Do something."}],
                    "tools": [tool],
                    "tool_choice": "required",
                    "temperature": 1,
                    "seed": number,
                    "max_tokens": 160,
                }
                async with free:
                    choice = (await http.post("/v1/chat/completions", json=body)).json()["choices"][0]
                try:
                    function = choice["message"]["tool_calls"][0]["function"]
                    jsonschema.validate(json.loads(function["arguments"]), schema)
                    found["valid" if function["name"] == tool["function"]["name"] else "wrong"] += 1
                except (ValueError, KeyError, jsonschema.ValidationError):
                    found["cut_off" if choice["finish_reason"] == "length" else "wrong"] += 1
                    click.echo(f"call {number}: {choice}", err=True)

            await asyncio.gather(*map(one, range(calls)))
        return found

    with server(model) as target:
        return {"calls": calls, **asyncio.run(all_of_them(target.url))}


@click.command()
@click.option("--part", "parts", multiple=True, type=click.Choice(["poisson", "queue", "leave", "soak", "tools"]))
@click.option("--model", default=hub.NANO)
@click.option("--requests", default=0, type=click.IntRange(0), help="Of poisson (500), soak (3600) and tools (200).")
@click.option("--rate", default=20.0, type=click.FloatRange(0.01), help="Arrivals per second.")
@click.option("--clients", default=64, type=SOME, help="That leave.")
@click.option("--seed", default=0)
def main(parts: tuple[str, ...], model: str, requests: int, rate: float, clients: int, seed: int) -> None:
    commit = require_commit()
    rng = random.Random(seed)
    work = {
        "poisson": lambda: poisson(model, requests or 500, rate, rng),
        "queue": lambda: queue(model),
        "leave": lambda: leave(model, clients),
        "soak": lambda: soak(model, requests or 3600, rng),
        "tools": lambda: tools(model, requests or 200),
    }
    found = {}
    for part in parts or work:
        found[part] = work[part]()
        click.echo(json.dumps({part: found[part]}))
    click.echo(json.dumps({"bench": "load", "model": model, **found, **conditions(commit)}))


if __name__ == "__main__":
    run(main)
