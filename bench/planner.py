"""The planner of shapes on a GPU: tokens per second over plain decoding, by batch and temperature, with the planner and with
each of its shapes alone, in turns; whether the texts are plain decoding's; and what it chose.

    python bench/planner.py --device cuda

Batches decode together, prompts left out: a group of prompts is read, and then all go on until each has said its tokens. At
batch 1 these are all the prompts. On a CPU it runs, too, with the steps of a GPU, operation by operation, and shows nothing:

    python bench/planner.py --model mimo-nano --batch 2 --limit 8 --tokens 8
"""

import json
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import torch
from common import COUNT, ROOT, SOME, as_recorded, conditions, encode, read_prompts, require_commit, run
from rich.console import Console
from rich.table import Table

from mtp_engine import Engine, EngineConfig, SamplingParams
from mtp_engine.config import DEFAULT_MODEL, TreeShape
from mtp_engine.hub import hub
from mtp_engine.runtime.request import Request
from mtp_engine.runtime.timing import time_shapes


def decode(
    engine: Engine, prompts: Sequence[list[int]], temperature: float, tokens: int
) -> tuple[int, float, list[Request]]:
    """Tokens and seconds in which all of a group decoded, and the requests with all that they said."""
    loop = engine.loop
    requests = [
        loop.add(
            prompt, SamplingParams(max_tokens=2 * tokens + 64, temperature=temperature, seed=number, ignore_eos=True)
        )
        for number, prompt in enumerate(prompts)
    ]
    while not all(request.decoding and request.output for request in requests):
        loop.step()
    before, begin = [len(request.output) for request in requests], time.perf_counter()
    while min(len(r.output) - n for r, n in zip(requests, before, strict=True)) < tokens and not all(
        request.finish_reason for request in requests
    ):
        loop.step()
    loop.runner.settle()
    spent = time.perf_counter() - begin
    said = sum(len(r.output) - n for r, n in zip(requests, before, strict=True))
    for request in requests:
        loop.remove(request)
    return said, spent, requests


def lengthen(prompts: Sequence[list[int]], tokens: int) -> list[list[int]]:
    """Each with others in front of it, so that it has so many tokens."""
    text = [token for prompt in prompts for token in prompt]
    text *= 1 + tokens // len(text)
    begins = [97 * number % len(text) for number in range(len(prompts))]
    return [
        [*text[begin:], *text[:begin]][: tokens - len(prompt)] + prompt
        for begin, prompt in zip(begins, prompts, strict=True)
    ]


def agree(ours: Sequence[Request], theirs: Sequence[Request]) -> int:
    """How many say the same as far as both went."""
    return sum(a.output[: len(b.output)] == b.output[: len(a.output)] for a, b in zip(ours, theirs, strict=True))


def measure(
    plain: Engine, auto: Engine, groups: Sequence[Sequence[list[int]]], temperature: float, tokens: int, fixed: int
) -> dict[str, Any]:
    """All ways in turns, group by group. fixed: groups for which each shape is tried alone, too."""
    planner: Any = auto.loop.work.shapes
    size = len(groups[0])
    names = [str(plan) for plan in planner.plans(auto.backend.bucket(size))[:-1]]
    sums = {name: [0, 0.0] for name in ("undrafted", "auto", *(f"only {name}" for name in names))}
    part = {name: [0, 0.0] for name in ("undrafted", "auto")}  # of the groups that all ways decode
    equal = count = 0
    trees: Counter[str] = Counter()
    for number, group in enumerate(groups):
        ways = ["undrafted", "auto", *(f"only {name}" for name in names if number < fixed)]
        expected: list[Request] = []
        for way in ways:
            if way.startswith("only "):
                planner.forced[:] = [plan for plan in planner.plans(auto.backend.bucket(size)) if str(plan) == way[5:]]
            said, spent, requests = decode(plain if way == "undrafted" else auto, group, temperature, tokens)
            planner.forced.clear()
            for sums_of in (sums, part) if number < fixed and way in part else (sums,):
                sums_of[way][0] += said
                sums_of[way][1] += spent
            if way == "undrafted":
                expected = requests
                continue
            equal, count = equal + agree(requests, expected), count + len(requests)
            if way == "auto":
                for request in requests:
                    trees.update({f"{depth}/{nodes}": steps for (depth, nodes), steps in request.stats.trees.items()})
    rates = {way: said / spent for way, (said, spent) in sums.items() if spent}
    among = part["undrafted"][0] / part["undrafted"][1] if part["undrafted"][1] else 1.0
    steps = sum(trees.values())
    return {
        "tokens_per_s": {way: round(rate, 1) for way, rate in rates.items()},
        "auto_over_plain": round(rates["auto"] / rates["undrafted"], 3),
        "alone_over_plain": {way: round(rate / among, 3) for way, rate in rates.items() if way.startswith("only ")},
        "auto_there": round(part["auto"][0] / part["auto"][1] / among, 3) if part["auto"][1] else None,
        "equal": equal, "of": count, "trees": {tree: round(n / steps, 3) for tree, n in trees.most_common()},
    }  # fmt: skip


@click.command()
@click.option("--model", default=DEFAULT_MODEL, show_default=True)
@click.option("--batch", "batches", multiple=True, type=SOME, default=[1, 4, 16, 64], show_default=True)
@click.option("--temperature", "temperatures", multiple=True, type=float, default=[0.0, 0.8], show_default=True)
@click.option("--prompts", "path", type=click.Path(exists=True, dir_okay=False, path_type=Path),
              default=ROOT / "bench/prompts/bench_core.jsonl", help="Lines with `category` and `turns`.")  # fmt: skip
@click.option("--longest", default=400, type=SOME, show_default=True, help="Prompts of more tokens are left out.")
@click.option("--limit", default=0, type=COUNT, help="Prompts; 0: all.")
@click.option("--tokens", default=96, type=SOME, show_default=True)
@click.option("--fixed", default=24, type=COUNT, show_default=True, help="Prompts for which each shape is tried alone.")
@click.option("--context", default=0, type=COUNT, help="Tokens of each prompt, others in front of it; 0: as it is.")
@click.option("--max-context", default=1024, type=SOME, show_default=True)
@click.option("--device", default="cpu", show_default=True)
def main(**o: Any) -> None:
    commit = require_commit()
    begin = time.perf_counter()
    record = {"bench": "planner", **{name: o[name] for name in ("model", "tokens", "context", "max_context")}}
    record |= {"file": o["path"].name, **conditions(commit, o["device"])}
    config = EngineConfig(
        device=o["device"], max_batch=max(o["batches"]), max_context=o["max_context"], capture="load",
        tree=TreeShape.parse("auto"), dtype="fp32" if o["device"] == "cpu" else "auto",
    )  # fmt: skip
    auto = Engine.load(o["model"], config)
    if o["device"] == "cpu":
        as_recorded(auto, o["model"])
        time_shapes(auto.loop, auto.loop.work.shapes, [*map(auto.backend.bucket, o["batches"])], 64, hub.silent)  # type: ignore[arg-type]
    record |= {"load_s": round(time.perf_counter() - begin, 1), "captured": auto.captured}
    plain = auto.undrafted(max_batch=max(o["batches"]))
    with torch.inference_mode():
        plain.captured = plain.loop.runner.capture(max(o["batches"]), plain.loop.intake.max_context, lambda *_: None)
    click.echo(f"{record['load_s']} s to load; {auto.captured}; plain: {plain.captured}", err=True)
    prompts = [ids for _, ids in encode(auto, read_prompts(o["path"], o["limit"]), o["longest"])]
    prompts = lengthen(prompts, o["context"]) if o["context"] else prompts
    record["prompts"] = len(prompts)
    planner: Any = auto.loop.work.shapes
    record["costs_ms"] = {
        "/".join(map(str, what)): round(1000 * each, 4) for what, each in planner.costs.seconds.items()
    }
    found, table = {}, Table("batch", "T", "plain", "auto", "x", "alone", "equal", "trees")
    for batch in o["batches"]:
        usable = prompts if len(prompts) >= batch else prompts * -(-batch // len(prompts))
        groups = [usable[at : at + batch] for at in range(0, len(usable) - batch + 1, batch)]
        for temperature in o["temperatures"]:
            decode(auto, groups[0], temperature, 8)
            decode(plain, groups[0], temperature, 8)
            each = measure(plain, auto, groups, temperature, o["tokens"], -(-o["fixed"] // batch))
            found[f"{batch}/{temperature:g}"] = each
            click.echo(json.dumps({f"{batch}/{temperature:g}": each}), err=True)  # in case it is cut off
            rates = each["tokens_per_s"]
            table.add_row(
                str(batch), f"{temperature:g}", f"{rates['undrafted']:.0f}", f"{rates['auto']:.0f}",
                f"{each['auto_over_plain']:.2f}", str(each["alone_over_plain"]), f"{each['equal']}/{each['of']}",
                str(each["trees"]),
            )  # fmt: skip
    Console(stderr=True, width=200).print(table)
    runner: Any = auto.loop.runner
    record |= {
        "found": found,
        "late": runner.steps.late,
        "slow": runner.slow,
        "seconds": round(time.perf_counter() - begin, 1),
    }
    click.echo(json.dumps(record))


if __name__ == "__main__":
    run(main)
