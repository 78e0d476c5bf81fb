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
import time
from collections.abc import Sequence
from functools import partial
from itertools import accumulate
from typing import Any

import click
import httpx
import jsonschema
from clients import COMPLETIONS, ask, crowd, events, server
from common import SOME, conditions, require_commit, run

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
    arrivals = list(accumulate(rng.expovariate(rate) for _ in made))
    with server(model) as target:
        begin = time.perf_counter()
        told = crowd(target.url, lambda http, number: ask(http, made[number][0]), requests, CLIENTS, arrivals)
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
    refusals = list[str]()  # what Retry-After said

    async def insist(http: httpx.AsyncClient, number: int) -> int:
        body = {"prompt": "Once", "max_tokens": 16, "seed": number, "stream": number % 2 == 0}
        while (told := await ask(http, body)).status == 503:
            refusals.extend(told.texts)
            await asyncio.sleep(float(told.texts[0]) * random.uniform(0.2, 1))
        return told.status

    with server(model, "--max-batch", "4", "--max-waiting", "8") as target:
        served = crowd(target.url, insist, CLIENTS, CLIENTS).count(200)
    return {"served": served, "of": CLIENTS, "refusals": len(refusals), "with_retry_after": refusals.count("1")}


def leave(model: str, clients: int) -> dict[str, Any]:
    """Tokens that were made for clients after they had gone: one step's at most for each, and one in flight."""
    endless = {"prompt": "Once", "max_tokens": 2000, "ignore_eos": True, "stream": True, "return_token_ids": True}

    async def read_a_little(http: httpx.AsyncClient, number: int) -> int:
        seen = chunks = 0
        async with http.stream("POST", COMPLETIONS, json={**endless, "seed": number}) as reply:
            async for event in events(reply):
                seen, chunks = seen + len(event["choices"][0]["token_ids"]), chunks + 1
                if chunks == 3 + number % 5:
                    break
        return seen

    with server(model, "--max-batch", "8") as target:
        seen = sum(crowd(target.url, read_a_little, clients, 100))
        time.sleep(1)
        still = target.still_there
        made, drafts = target.metric("generation_tokens_total"), target.metric("spec_decode_num_drafts_total")
    return {
        "clients": clients, "still_there": still, "tokens_unread": int(made) - seen,
        "unread_each": round((made - seen) / clients, 2), "steps": int(drafts),
    }  # fmt: skip


def soak(model: str, requests: int, rng: random.Random) -> dict[str, Any]:
    async def fails(bodies: Sequence[dict[str, Any]], http: httpx.AsyncClient, number: int) -> bool:
        body = bodies[number]
        try:
            if number % 7 != 6 or not body.get("stream"):
                return (await ask(http, body)).status != 200
            async with http.stream("POST", COMPLETIONS, json=body) as reply:
                async for _ in reply.aiter_lines():
                    break
        except httpx.TransportError:
            return True
        return False

    bodies = [{**sent, "max_tokens": 8, "min_tokens": 0} for sent, _ in cases(requests, rng)]
    with server(model, "--prefix-cache-gb", "0.05") as target:
        memory, failures, part = [], 0, max(1, requests // 5)
        for start in range(0, requests, part):
            some = bodies[start : start + part]
            failures += sum(crowd(target.url, partial(fails, some), len(some), CLIENTS))
            memory.append(round(target.resident_mb, 1))
        left = target.still_there
    return {"requests": requests, "failures": failures, "still_there": left, "resident_mb": memory}


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
    async def verdict(http: httpx.AsyncClient, number: int) -> str:
        schema = schemas()[number % len(schemas())]
        function = {"name": f"tool_{number % 7}", "parameters": schema}
        body = {
            "messages": [{"role": "user", "content": "Do something."}],
            "tools": [{"type": "function", "function": function}], "tool_choice": "required",
            "temperature": 1, "seed": number, "max_tokens": 160,
        }  # fmt: skip
        choice = (await http.post("/v1/chat/completions", json=body)).json()["choices"][0]
        try:
            called = choice["message"]["tool_calls"][0]["function"]
            jsonschema.validate(json.loads(called["arguments"]), schema)
            return "valid" if called["name"] == function["name"] else "wrong"
        except (ValueError, KeyError, jsonschema.ValidationError):
            click.echo(f"call {number}: {choice}", err=True)
            return "cut_off" if choice["finish_reason"] == "length" else "wrong"

    with server(model) as target:
        found = crowd(target.url, verdict, calls, 8)
    return {"calls": calls, **{kind: found.count(kind) for kind in ("valid", "cut_off", "wrong")}}


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
