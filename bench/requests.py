"""What each kind of request costs where steps are CUDA graphs, whether it says what plain decoding says, and what a changing
load meets: captures, compilations, pauses.

    python bench/requests.py --device cuda --part speed --part equality --part load

speed: tokens per second of a batch of one kind, against greedy requests over the same tree; a batch of greedy requests with
one that has a structure; and other rules. equality: prompts times batch sizes, all kinds mixed, joining and leaving, preempted,
read again from the prefix cache. load: steps while requests of all kinds come and go. On a CPU it runs, too, and shows nothing.
"""

import json
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import torch
from common import SOME, conditions, encode, read_prompts, require_commit, run
from pauses import Watch
from rich.console import Console
from rich.table import Table

from mtp_engine import Engine, EngineConfig, SamplingParams, TreeShape
from mtp_engine.config import DEFAULT_MODEL, Structure
from mtp_engine.runtime.request import Request

_SCHEMA = {
    "type": "object", "additionalProperties": False, "required": ["title", "items", "done"],
    "properties": {"title": {"type": "string"}, "done": {"type": "boolean"},
                   "items": {"type": "array", "minItems": 20, "items": {"type": "string", "maxLength": 40}}},
}  # fmt: skip
_RECORD = {
    "type": "object", "additionalProperties": False, "required": ["name", "born", "alive", "field"],
    "properties": {"name": {"type": "string", "maxLength": 16}, "born": {"type": "integer", "minimum": 0, "maximum": 2030},
                   "alive": {"type": "boolean"}, "field": {"enum": ["art", "science", "sport", "politics"]}},
}  # fmt: skip
_RECORDS = {"type": "array", "minItems": 60, "items": _RECORD}
SERVED = "as a server asks for it"  # within its limit of tokens
KINDS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "T = 0.8": {"temperature": 0.8},
    "top-p + min-p": {"temperature": 0.8, "top_p": 0.9, "min_p": 0.02},
    "penalties": {"frequency_penalty": 0.2, "presence_penalty": 0.1, "repetition_penalty": 1.05},
    "bias + bad words": {"logit_bias": {28: -1.0, 30: 0.5}, "bad_words": ((260, 411), (28, 284, 260), (198,))},
    "logprobs = 5": {"logprobs": 5},
    "stop strings": {"stop": ("no such text",)},
    "JSON schema": {"structure": Structure(json=json.dumps(_SCHEMA))},
    "JSON records": {"structure": Structure(json=json.dumps(_RECORDS))},
    f"JSON schema {SERVED}": {"structure": Structure(json=json.dumps(_SCHEMA))},
}
MORE: dict[str, dict[str, Any]] = {  # for equality and load
    "min_tokens": {"min_tokens": 20, "temperature": 0.6, "stop_token_ids": (30, 198)},
    "all": {"temperature": 0.9, "top_k": 50, "frequency_penalty": 0.3, "logprobs": 2, "stop": ("nowhere to be found",)},
    "no drafts": {"speculate": False, "temperature": 0.7},
    "small tree": {"tree": "chain:1"},
}


def params(kind: str, seed: int, tokens: int, **changes: Any) -> SamplingParams:
    given = {**KINDS, **MORE}[kind]
    tree = {"tree": TreeShape.parse(given["tree"])} if "tree" in given else {}
    least = {"min_tokens": min(given.get("min_tokens", 0), tokens)}
    if SERVED in kind:
        changes["structure"] = replace(given["structure"], within=tokens)
    return SamplingParams(max_tokens=tokens, seed=seed, **{**given, **tree, **least, **changes})


def rate(
    engine: Engine, prompts: Sequence[list[int]], kinds: Sequence[str], tokens: int,
    begun: Callable[[], object] = lambda: None,
) -> tuple[float, float, list[float]]:  # fmt: skip
    """Tokens per second and milliseconds a step once all decode, which is when `begun` is called, and tokens per second of
    each request."""
    loop = engine.loop
    requests = [
        loop.add(prompt, params(kind, number, 2 * tokens + 64, ignore_eos=True))
        for number, (prompt, kind) in enumerate(zip(prompts, kinds, strict=True))
    ]
    while not all(request.decoding and request.output for request in requests):
        loop.step()
        if errors := [request.error for request in requests if request.error]:
            raise click.ClickException(errors[0])
    for _ in range(4):
        loop.step()
    loop.runner.settle()
    begun()
    before, steps, begin = [len(request.output) for request in requests], 0, time.perf_counter()
    while (
        min(len(r.output) - n for r, n in zip(requests, before, strict=True)) < tokens and not requests[0].finish_reason
    ):
        loop.step()
        steps += 1
    loop.runner.settle()
    spent = time.perf_counter() - begin
    rates = [(len(request.output) - n) / spent for request, n in zip(requests, before, strict=True)]
    for request in requests:
        loop.remove(request)
    return sum(rates), 1000 * spent / steps, rates


def speed(
    engines: dict[str, Engine], prompts: Sequence[list[int]], tokens: int, batches: Sequence[int],
    kinds: dict[str, Sequence[str]], least: int,
) -> dict[str, Any]:  # fmt: skip
    """kinds: by engine. least: prompts that each is timed on, or one batch."""
    table, found = Table("engine", "batch", "request", "tokens/s", "x greedy", "ms a step", "x greedy's", "tokens"), {}
    for name, engine in engines.items():
        for batch in batches:
            groups = [prompts[at : at + batch] for at in range(0, max(batch, least), batch)]
            greedy: tuple[float, float] = (0.0, 0.0)
            for kind in dict.fromkeys(("greedy", *kinds[name])):
                for _ in range(2):  # the first time warms up what is compiled or read for the first time
                    tried = [rate(engine, group, [kind] * batch, tokens) for group in groups]
                measured = statistics.mean(each[0] for each in tried), statistics.mean(each[1] for each in tried)
                greedy = measured if kind == "greedy" else greedy
                ratio, cost = measured[0] / greedy[0], measured[1] / greedy[1]
                found[f"{name}/{batch}/{kind}"] = [
                    round(measured[0], 1),
                    round(ratio, 3),
                    round(measured[1], 4),
                    round(cost, 3),
                    round(each := measured[0] * measured[1] / 1000 / batch, 3),
                ]
                table.add_row(
                    name, str(batch), kind, f"{measured[0]:.0f}", f"{ratio:.2f}", f"{measured[1]:.3f}", f"{cost:.2f}",
                    f"{each:.2f}",
                )  # fmt: skip
            if batch > 1 and "JSON schema" in kinds[name]:
                mixed = rate(engine, prompts[:batch], ["JSON schema"] + ["greedy"] * (batch - 1), tokens)[2]
                alone = rate(engine, prompts[:batch], ["greedy"] * batch, tokens)[2]
                ratio = sum(mixed[1:]) / sum(alone[1:])
                found[f"{name}/{batch}/greedy beside one JSON schema"] = [round(sum(mixed[1:]), 1), round(ratio, 3)]
                table.add_row(
                    name, str(batch), "greedy beside one JSON schema", f"{sum(mixed[1:]):.0f}", f"{ratio:.2f}"
                )
    Console(stderr=True, width=120).print(table)
    return found


def ask(engine: Engine, jobs: Sequence[tuple[list[int], SamplingParams]], at_once: int) -> list[Request]:
    """All of them, at most so many at a time; when the tenth step comes the newest is preempted."""
    loop, waiting, requests = engine.loop, list(jobs), list[Request]()
    steps = 0
    while waiting or loop.requests:
        while waiting and len(loop.requests) < at_once:
            requests.append(loop.add(*waiting.pop(0)))
        loop.step()
        steps += 1
        if steps % 10 == 0 and at_once > 1 and loop.scheduler.running:
            while loop._flying:
                loop._land()
            if running := [request for request in loop.scheduler.running if request.decoding]:
                loop.memory.keep(running[-1], apart=True)
                running[-1].stats.preemptions += 1
                loop.scheduler._requeue(running[-1])
    return requests


def equality(
    plain: Engine, drafted: Engine, prompts: Sequence[list[int]], tokens: int, batches: Sequence[int]
) -> dict[str, Any]:
    names = [*KINDS, *MORE]
    jobs = [(prompt, params(names[n % len(names)], n, tokens)) for n, prompt in enumerate(prompts)]
    expected = [request.output for request in ask(plain, jobs, 1)]
    found: dict[str, Any] = {}
    for batch in batches:
        for name, engine in (("drafted", drafted), ("plain", plain)):
            requests = ask(engine, jobs, batch)
            wrong = [n for n, (r, said) in enumerate(zip(requests, expected, strict=True)) if r.output != said]
            errors = sorted({request.error for request in requests if request.error})
            found[f"{name}/{batch}"] = {
                "equal": len(jobs) - len(wrong), "of": len(jobs), "wrong": [names[n % len(names)] for n in wrong],
                "errors": errors, "preempted": sum(r.stats.preemptions for r in requests),
                "cached": sum(r.stats.cached_tokens > 0 for r in requests),
            }  # fmt: skip
    return found


def load(engine: Engine, prompts: Sequence[list[int]], steps: int, most: int) -> dict[str, Any]:
    """Requests of all kinds come and go, in waves from one to `most` of them."""
    loop, rng, names = engine.loop, random.Random(1), [*KINDS, *MORE]
    runner: Any = loop.runner
    before = counters(runner)
    compiled = compilations()
    times, plain, target, peak = list[float](), list[float](), 1, 0
    watch = Watch(loop)
    for step in range(steps):
        if step % 40 == 0:
            target = rng.choice([1, 2, 5, 9, 16, 30, most, most])
        while len(loop.requests) < target and rng.random() < 0.8:
            kind = rng.choice(names)
            loop.add(rng.choice(prompts), params(kind, step, rng.choice([8, 30, 90]), ignore_eos=True))
        if not loop.requests:
            loop.add(prompts[0], params("greedy", step, 30))
        peak, reads = max(peak, len(loop.requests)), any(not request.decoding for request in loop.requests)
        times.append(watch.step())
        if not reads:
            plain.append(times[-1])
    watch.close()
    for request in list(loop.requests):
        loop.remove(request)
    ordered, after = sorted(times), counters(runner)
    return {
        "steps": steps, "peak": peak, **{name: after[name] - before[name] for name in after}, "compilations": compiled(),
        "ms_median": round(ordered[steps // 2], 3), "ms_p99": round(ordered[steps * 99 // 100], 3),
        "ms_longest": [round(each, 3) for each in ordered[-3:]], "longest_at": times.index(ordered[-1]),
        "steps_without_a_prompt": len(plain), "ms_median_without": round(statistics.median(plain), 3),
        "ms_longest_without": [round(each, 3) for each in sorted(plain)[-5:]], "longest": watch.longest(12),
    }  # fmt: skip


def counters(runner: Any) -> dict[str, int]:
    steps = getattr(runner, "steps", None)
    of = {"recorded": steps, "late": steps, "replayed": runner, "slow": runner}
    return {name: getattr(each, name, 0) for name, each in of.items()}


def compilations() -> Any:
    """Counts the kernels that Triton makes from now on, also those that it finds on its disk."""
    try:
        from triton import knobs
    except ImportError:
        return lambda: None
    made: list[str] = []
    knobs.runtime.jit_post_compile_hook = lambda **kwargs: made.append(str(kwargs.get("repr", ""))) or False
    return lambda: [len(made), made[:5]]


@click.command()
@click.option("--part", "parts", type=click.Choice(["speed", "equality", "load"]), multiple=True, default=["speed"])
@click.option("--model", default=DEFAULT_MODEL, show_default=True)
@click.option(
    "--tree",
    "trees",
    multiple=True,
    default=["tree:7"],
    show_default=True,
    help="The first is for all parts; others, and rules, are compared at T = 0.8.",
)
@click.option("--rule", "rules", multiple=True, help="Other rules, for speed, over their usual trees.")
@click.option("--kind", "kinds", multiple=True, type=click.Choice(list(KINDS)), default=list(KINDS), help="For speed.")
@click.option("--capture", type=click.Choice(["load", "lazy"]), default="load", show_default=True)
@click.option("--batch", "batches", multiple=True, type=SOME, default=[1, 16], show_default=True)
@click.option("--most", default=64, type=SOME, show_default=True, help="Requests at a time, for equality and load.")
@click.option("--tokens", default=96, type=SOME, show_default=True)
@click.option("--timed", default=4, type=SOME, show_default=True, help="Prompts, for speed, or one batch.")
@click.option("--count", default=40, type=SOME, show_default=True, help="Prompts, for equality.")
@click.option("--steps", default=1000, type=SOME, show_default=True)
@click.option("--max-context", default=1024, type=SOME, show_default=True)
@click.option("--device", default="cpu", show_default=True)
def main(**o: Any) -> None:
    commit = require_commit()
    record = {"bench": "requests", **{name: o[name] for name in ("model", "trees", "tokens", "max_context")}}
    record |= conditions(commit, o["device"])

    def loaded(most: int, **options: Any) -> Engine:
        begin = time.perf_counter()
        config = EngineConfig(
            device=o["device"], max_batch=most, max_context=o["max_context"], **{"capture": o["capture"], **options}
        )
        engine = Engine.load(o["model"], config)
        click.echo(
            f"{options}, {most} at a time: {time.perf_counter() - begin:.1f} s to load; {engine.captured}", err=True
        )
        name = str(options.get("tree", "")) or options.get("verifier") or "plain"
        record.setdefault("captured", {})[f"{name}/{most}"] = engine.captured
        return engine

    rows = read_prompts(
        Path(__file__).parent / "prompts/bench_core.jsonl", max(o["count"], o["timed"], *o["batches"]) * 2
    )
    most = max([*o["batches"], *([] if set(o["parts"]) == {"speed"} else [o["most"]])])
    plain, drafted = loaded(most, drafter="root"), loaded(most, tree=TreeShape.parse(o["trees"][0]))
    prompts = [ids for _, ids in encode(plain, rows, 300)]
    if "speed" in o["parts"]:
        engines, short = {"plain": plain, o["trees"][0]: drafted}, [ids for ids in prompts if len(ids) <= 150]
        for tree in o["trees"][1:]:
            engines[tree] = loaded(max(o["batches"]), tree=TreeShape.parse(tree), capture="lazy")
        for rule in o["rules"]:
            engines[rule] = loaded(max(o["batches"]), verifier=rule, capture="lazy")
        kinds = {name: o["kinds"] if name in ("plain", o["trees"][0]) else ["T = 0.8"] for name in engines}
        record["speed"] = speed(engines, short, o["tokens"], o["batches"], kinds, o["timed"])
        del engines
    if "equality" in o["parts"]:
        record["equality"] = equality(plain, drafted, prompts[: o["count"]], o["tokens"], sorted({1, 8, o["most"]}))
    if "load" in o["parts"]:
        load(drafted, prompts, 200, o["most"])  # prompts of such lengths have been read
        record["load"] = load(drafted, prompts, o["steps"], o["most"])
    if o["device"].startswith("cuda"):
        record["peak_gb"] = round(torch.cuda.max_memory_allocated() / 1e9, 2)
    click.echo(json.dumps(record))


if __name__ == "__main__":
    run(main)
