"""Where the time of steps with structures goes: what the host does in them, part by part, and where it waits for the device.

    python bench/structures.py --device cuda

A batch of which all have one JSON schema (--one: the first alone) decodes, plainly and over a tree. First it is timed as it
is, beside greedy requests on the same engine; then once more with a clock in each part, which costs some microseconds a call.
Parts lie in one another, and each has only what none inside of it has, so they add up to the step. On a CPU it runs, too
(--recorded: with the steps of a GPU, in fp32); then nobody waits for a device, and launching is that device's work.
"""

import json
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, final

import click
from common import ROOT, SOME, as_recorded, conditions, encode, read_prompts, require_commit, run
from requests import KINDS, rate
from rich.console import Console
from rich.table import Table

from mtp_engine import Engine, EngineConfig, TreeShape
from mtp_engine.config import DEFAULT_MODEL
from mtp_engine.runtime.cuda_graph import GraphRunner
from mtp_engine.runtime.flight import Flight, HostRoom
from mtp_engine.runtime.loop import DecodeLoop
from mtp_engine.runtime.recorded import Captured, Prepared, Uncaptured
from mtp_engine.runtime.request import Members, Request
from mtp_engine.runtime.scheduler import Scheduler
from mtp_engine.runtime.structures import Drafted, Looked, Structures
from mtp_engine.sampling.masks import Guide
from mtp_engine.sampling.matchers import Matchers
from mtp_engine.sampling.structure import GrammarState

LOOP = "loop"
_TIMES = 2  # that each is timed, in turns, besides once to warm up
PARTS: tuple[tuple[type[Any], str, str], ...] = (
    (DecodeLoop, "_step", LOOP), (Scheduler, "plan", "plan"), (Members, "of", "plan"),
    (GraphRunner, "prepare", "plan"), (GraphRunner, "launch", "launch: the rest"), (Prepared, "load", "launch: parameters"),
    (Captured, "draft", "launch: draft"), (Captured, "forward", "launch: model"), (Captured, "peek", "launch: peek"),
    (Captured, "choose", "launch: choose"), (Uncaptured, "draft", "launch: draft"), (Uncaptured, "forward", "launch: model"),
    (Uncaptured, "peek", "launch: peek"), (Uncaptured, "choose", "launch: choose"),
    (HostRoom, "copy", "launch: copies to the host"),
    (Structures, "begin", "launch: copies to the host"), (Structures, "look", "launch: copies to the host"),
    (Structures, "_force", "forced: written"),
    (Guide, "begin", "forced: what steps in flight said"), (GrammarState, "forced", "forced: asked"),
    (Flight, "wait", "waiting: a step to land"), (Drafted, "wait", "waiting: drafts"),
    (Looked, "wait", "waiting: what would be chosen"), (Structures, "clear", "waiting: masks to be read"),
    (Structures, "allow", "masks: the rest"),
    (Guide, "unfit", "fits: the rest"), (GrammarState, "fits", "fits: the rest"), (Matchers, "fits", "fits: asked"),
    (Guide, "fill", "masks: written"), (GrammarState, "mask", "masks: looked up"), (GrammarState, "_read", "masks: made"),
    (Matchers, "at", "matcher: states behind drafts"), (GrammarState, "_look", "matcher: ways to an end"),
    (Scheduler, "commit", "commit: the rest"), (Request, "take", "commit: tokens and text"),
    (GrammarState, "advance", "matcher: the answer goes on"), (GrammarState, "expect", "matcher: the answer goes on"),
    (Scheduler, "_record", "commit: statistics"),
    (Scheduler, "_emit", "commit: outputs"),
)  # fmt: skip


@final
class Clock:
    """Seconds and calls of parts, each without the parts that ran inside of it."""

    def __init__(self) -> None:
        self.seconds, self.calls = Counter[str](), Counter[str]()
        self._inside: list[float] = []  # of the parts that run, what has run inside of them

    def start(self) -> None:
        self.seconds.clear()
        self.calls.clear()

    def timed(self, call: Callable[..., Any], part: str) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            self._inside.append(0.0)
            begin = time.perf_counter()
            try:
                return call(*args, **kwargs)
            finally:
                spent = time.perf_counter() - begin
                self.seconds[part] += spent - self._inside.pop()
                self.calls[part] += 1
                if self._inside:
                    self._inside[-1] += spent

        return timed

    @contextmanager
    def running(self) -> Iterator[None]:
        """With a clock in each of PARTS."""
        kept: list[tuple[type[Any], str, Any]] = [(owner, name, owner.__dict__[name]) for owner, name, _ in PARTS]
        for owner, name, part in PARTS:
            method = owner.__dict__[name]
            shared = isinstance(method, classmethod)
            timed = self.timed(method.__func__ if shared else method, part)
            setattr(owner, name, classmethod(timed) if shared else timed)  # type: ignore[arg-type]
        try:
            yield
        finally:
            for owner, name, method in kept:
                setattr(owner, name, method)


def profile(engine: Engine, prompts: Sequence[list[int]], kind: str, tokens: int, *, one: bool) -> dict[str, Any]:
    """Milliseconds a step, with greedy requests, with the kind, and that by part; tokens/s of the kind over greedy's, or with
    `one`, where the first request alone is of the kind, those of the others."""
    batch, first = len(prompts), 1 if one else 0
    kinds = [kind, *["greedy"] * (batch - 1)] if one else [kind] * batch
    greedy, found = list[tuple[float, float]](), list[tuple[float, float]]()
    for _ in range(1 + _TIMES):
        for known, of in ((greedy, ["greedy"] * batch), (found, kinds)):
            _, ms_a_step, rates_of_all = rate(engine, prompts, of, tokens)
            known.append((sum(rates_of_all[first:]), ms_a_step))
    clock = Clock()
    with clock.running():
        watched = rate(engine, prompts, kinds, tokens, begun=clock.start)[1]
    steps = clock.calls[LOOP]
    (rates, ms), (greedy_rates, greedy_ms) = (zip(*each[1:], strict=True) for each in (found, greedy))
    return {
        "over_greedy": round(statistics.mean(rates) / statistics.mean(greedy_rates), 3),
        "greedy_ms": round(statistics.mean(greedy_ms), 4),
        "ms": round(statistics.mean(ms), 4),
        "watched_ms": round(watched, 4),
        "tokens_a_step": round(statistics.mean(rates) * statistics.mean(ms) / 1000 / (batch - first), 3),
        "parts": {  # ms and calls a step, us a call
            part: [round(1000 * each / steps, 4), round(clock.calls[part] / steps, 2), round(1e6 * each / clock.calls[part], 1)]
            for part, each in clock.seconds.most_common()
        },
    }  # fmt: skip


def show(name: str, found: dict[str, Any]) -> None:
    about = f"{found['ms']:.2f} ms a step, greedy {found['greedy_ms']:.2f}, {found['over_greedy']:.2f} of its tokens/s"
    table = Table("ms a step", "calls", "us a call", "part", title=f"{name}: {about}")
    for part, (ms, calls, us) in found["parts"].items():
        table.add_row(f"{ms:.3f}", f"{calls:.1f}", f"{us:.1f}", part)
    groups = Counter[str]()
    for part, (ms, *_) in found["parts"].items():
        groups[part.split(":")[0]] += ms
    table.caption = ", ".join(f"{group} {ms:.2f}" for group, ms in groups.most_common())
    Console(stderr=True, width=120).print(table)


@click.command()
@click.option("--model", default=DEFAULT_MODEL, show_default=True)
@click.option(
    "--tree", "trees", multiple=True, default=["root", "tree:7"], show_default=True, help="root: plain decoding."
)
@click.option(
    "--kind", "kinds", multiple=True, type=click.Choice([k for k in KINDS if "JSON" in k]), default=["JSON schema"]
)
@click.option("--batch", "batches", multiple=True, type=SOME, default=[1, 16], show_default=True)
@click.option("--one", is_flag=True, help="One request has a structure, and what the others say is counted.")
@click.option("--tokens", default=96, type=SOME, show_default=True)
@click.option("--recorded", is_flag=True, help="On a CPU: steps as they are recorded for a GPU.")
@click.option("--device", default="cpu", show_default=True)
def main(**o: Any) -> None:
    commit = require_commit()
    record = {
        "bench": "structures",
        **{name: o[name] for name in ("model", "tokens", "one")},
        **conditions(commit, o["device"]),
    }
    rows, found = read_prompts(ROOT / "bench/prompts/bench_core.jsonl", 4 * max(o["batches"])), dict[str, Any]()
    for tree in o["trees"]:
        options: dict[str, Any] = {"drafter": "root"} if tree == "root" else {"tree": TreeShape.parse(tree)}
        options |= {"device": o["device"], "max_batch": max(o["batches"]), "max_context": 1024, "capture": "load"}
        options |= {"dtype": "fp32"} if o["recorded"] else {}
        engine = Engine.load(o["model"], EngineConfig(**options))
        if o["recorded"]:
            as_recorded(engine, o["model"])
        prompts = [ids for _, ids in encode(engine, rows, 150)]
        for batch in (each for each in o["batches"] if each > o["one"]):
            for kind in o["kinds"]:
                name = f"{tree}/{batch}/{kind}"
                found[name] = profile(engine, prompts[:batch], kind, o["tokens"], one=o["one"])
                show(name, found[name])
    click.echo(json.dumps({**record, "found": found}))


if __name__ == "__main__":
    run(main)
