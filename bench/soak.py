"""A loop that runs for long: nothing lost, nothing stuck, nothing left behind, and how long a long prompt holds others up.

    python bench/soak.py
    python bench/soak.py --part requests --requests 50 --part pause --long 600
    python bench/soak.py --device cuda --long-model smollm2-135m-mtp3

requests: mixed requests through a loop with room for four; each must say what it says alone without drafts, or the
beginning of it where it was cancelled. The process's memory after a fifth of them and after all.
operations: random arrivals, ends and refusals, after which pages, slots and tables are as they were.
pause: a long prompt arrives while others decode: the longest time they wait for a step, against a step and a chunk alone.
"""

import gc
import importlib.util
import json
import random
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any, final

import click
from common import COUNT, SOME, conditions, require_commit, run
from rich.console import Console
from rich.table import Table

from mtp_engine import Engine, EngineConfig, SamplingParams, TreeShape
from mtp_engine.config import DEFAULT_MODEL, Structure
from mtp_engine.errors import EngineBusy, EngineError
from mtp_engine.hub import hub
from mtp_engine.runtime.loop import DecodeLoop
from mtp_engine.runtime.request import Request, StepOutput

SLOTS, PATIENCE = 4, 2000  # PATIENCE: steps without a token or an end before a loop counts as stuck
PROMPTS = [
    "The sun is", "Once upon a time there was a small dog that", "Why do birds sing in the morning? Because",
    "One, two, three", "In the old house at the end of the road, behind a door that nobody had opened for years, she found",
]  # fmt: skip
KINDS: list[dict[str, Any]] = [
    {}, {"temperature": 0.8, "top_p": 0.9}, {"temperature": 1.2, "n": 2}, {"speculate": False}, {"logprobs": 2},
    {"repetition_penalty": 1.2, "frequency_penalty": 0.3, "temperature": 0.7}, {"tree": TreeShape.parse("2x1")},
    {"stop": (".", "\n"), "temperature": 0.6}, {"min_tokens": 8, "bad_words": (" the", " and"), "temperature": 0.9},
    {"allowed_token_ids": (300, 301), "bad_words": ((300,), (301,))},  # nothing may follow
]  # fmt: skip
GUIDED = {"structure": Structure(regex="[a-z ]{4,60}"), "temperature": 0.8}


def cases(tokens: int) -> list[tuple[int, SamplingParams]]:
    """(prompt, parameters) of everything that is asked for; seeds are two apart, for n = 2."""
    kinds = [*KINDS, GUIDED] if importlib.util.find_spec("llguidance") else KINDS
    pairs = [(prompt, kind) for prompt in range(len(PROMPTS)) for kind in kinds]
    return [
        (prompt, SamplingParams(max_tokens=tokens, seed=2 * index, **kind))
        for index, (prompt, kind) in enumerate(pairs)
    ]


@final
@dataclass
class Soak:
    """An engine, what each case says alone, and what went wrong so far."""

    engine: Engine
    cases: list[tuple[int, SamplingParams]]
    rng: random.Random
    open: dict[Request, tuple[int, int]] = field(default_factory=dict)  # its case and sample
    said: dict[Request, list[int]] = field(default_factory=dict)  # what was handed out
    cancelled: set[Request] = field(default_factory=set)
    ended: dict[str, int] = field(default_factory=dict)
    wrong: int = 0  # answers that are not those of the request alone
    lost: int = 0  # tokens of an answer that were not handed out, or handed out twice
    refused: int = 0
    idle: int = 0  # steps since something came
    emitted: int = 0  # tokens

    def __post_init__(self) -> None:
        self.loop: DecodeLoop = self.engine.loop
        self._plain = self.engine.undrafted().loop
        self.alone = cache(self._alone)

    def _alone(self, case: int, sample: int) -> tuple[list[int], str, str | None]:
        prompt, params = self.cases[case]
        seed = (params.seed or 0) + sample
        request = self._plain.add(self.engine.encode(PROMPTS[prompt]), replace(params, n=1, seed=seed))
        while request.finish_reason is None:
            self._plain.step()
        return request.output, request.text, request.finish_reason

    def add(self, **changes: Any) -> bool:
        case = self.rng.randrange(len(self.cases))
        prompt, params = self.cases[case]
        try:
            first = self.loop.add(self.engine.encode(PROMPTS[prompt]), replace(params, **changes))
        except EngineBusy:
            return False
        for sample, request in enumerate((first, *first.others)):
            self.open[request], self.said[request] = (case, sample), []
        return True

    def step(self) -> None:
        outputs = self.loop.step()
        self.idle = 0 if outputs else self.idle + 1
        for output in outputs:
            self.said[output.request] += output.tokens
            self.emitted += len(output.tokens)
            if output.finish_reason:
                self._end(output)

    def _end(self, output: StepOutput) -> None:
        request, reason = output.request, output.request.finish_reason
        (case, sample), said = self.open.pop(request), self.said.pop(request)
        self.lost += abs(len(request.output) - len(said)) + (said != request.output)
        tokens, text, expected = self.alone(case, sample)
        if reason in ("abort", "timeout"):
            fits = request.output == tokens[: len(request.output)]
            self.cancelled.discard(request)
        else:
            fits = (request.output, request.text, reason) == (tokens, text, expected)
        self.wrong += not fits
        self.ended[str(reason)] = self.ended.get(str(reason), 0) + 1

    def some(self) -> Request | None:
        return self.rng.choice(list(self.open)) if self.open else None

    def refuse(self) -> None:
        """Something that can never run."""
        prompt, params = self.rng.choice([
            ([1] * self.loop.intake.max_context, SamplingParams()), ([], SamplingParams()),
            ([self.loop.intake.vocab], SamplingParams()), ([1], SamplingParams(bad_words=((1 << 30,),))),
        ])  # fmt: skip
        try:
            self.loop.add(prompt, params)
        except EngineError:
            self.refused += 1

    def drain(self) -> None:
        while self.loop.requests and self.idle < PATIENCE:
            self.step()
        self.step()

    def held(self) -> dict[str, int]:
        """What a loop without requests should not hold."""
        loop, scheduler = self.loop, self.loop.scheduler
        caches = [loop.work.cache, *([loop.work.drafter.cache] if hasattr(loop.work.drafter, "cache") else [])]
        (loop.memory.prefix or loop.memory.pages).check()
        return {
            "pages": sum(len(pages) for each in caches for group in each.paged for pages in group.table[:SLOTS]),
            "slots": scheduler._slots - len(scheduler._free),
            "requests": len(scheduler.running) + len(scheduler.waiting) + len(self.open),
            "steps in flight": len(loop._flying),
            "outputs": len(scheduler.outputs) + len(scheduler._cancelled),
        }


def resident() -> float:
    """MiB of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 2**20


def measured() -> dict[str, float]:
    gc.collect()
    return {"rss_mib": round(resident(), 1), "objects": len(gc.get_objects())}


def run_requests(soak: Soak, count: int) -> dict[str, Any]:
    """`count` calls; one in ten is cancelled on its way, one in ten has little time."""
    early: dict[str, float] = {}
    for number in range(count):
        if number == count // 5:
            early = measured()
        wanted: dict[str, Any] = {"priority": soak.rng.randrange(3)}
        if soak.rng.random() < 0.1:
            wanted["timeout"] = soak.rng.random() * 0.2
        while not soak.add(**wanted) and soak.idle < PATIENCE:
            soak.step()
        for _ in range(soak.rng.randrange(12)):
            soak.step()
        if soak.rng.random() < 0.1 and (request := soak.some()):
            soak.loop.remove(request)
    soak.drain()
    late = measured()
    growth = late["rss_mib"] - early["rss_mib"]
    return {
        **report(soak), "after_a_fifth": early, "after_all": late, "growth_mib": round(growth, 1),
        "flat": growth < 0.05 * early["rss_mib"],
    }  # fmt: skip


def report(soak: Soak) -> dict[str, Any]:
    return {
        "ended": dict(sorted(soak.ended.items())), "tokens": soak.emitted, "lost_tokens": soak.lost,
        "wrong": soak.wrong, "stuck": len(soak.open), "held": soak.held(),
    }  # fmt: skip


def run_operations(soak: Soak, count: int) -> dict[str, Any]:
    before = soak.held()
    for _ in range(count):
        draw = soak.rng.random()
        if draw < 0.12:
            soak.add(priority=soak.rng.randrange(-2, 3), timeout=soak.rng.choice([None, None, 1e-9, 0.05, 10.0]))
        elif draw < 0.16 and (request := soak.some()):
            soak.loop.remove(request)
        elif draw < 0.2 and (request := soak.some()):
            soak.loop.scheduler.cancel(request)
        elif draw < 0.24:
            soak.refuse()
        else:
            soak.step()
    soak.drain()
    return {**report(soak), "refused": soak.refused, "as_before": soak.held() == before}


# ---- a long prompt ------------------------------------------------------------------------------------------------


def timed(loop: DecodeLoop, running: Callable[[], bool]) -> Iterator[tuple[float, list[StepOutput]]]:
    """Seconds from step to step, and what came, as long as `running`."""
    before = time.perf_counter()
    while running():
        outputs = loop.step()
        now = time.perf_counter()
        yield now - before, outputs
        before = now


def pause(engine: Engine, long: list[int], others: int, steps: int) -> dict[str, float]:
    """Seconds: a step of `others` that decode, the chunks of `long` alone, and the longest wait between two steps in which
    others got tokens while `long` was read beside them."""
    loop, briefly = engine.loop, SamplingParams(max_tokens=1, ignore_eos=True)
    room = min(len(long), 64 + 64 * (2 * steps + len(long) // engine.config.prefill_chunk))
    lasting = SamplingParams(max_tokens=room, ignore_eos=True, temperature=0.8)
    alone = loop.add(long, briefly)
    chunks = [spent for spent, _ in timed(loop, lambda: alone.finish_reason is None)]
    chunks = chunks[:-1] or chunks  # the last is a step, but where the prompt was one chunk
    decoding = [loop.add(long[at : at + 16 + at], replace(lasting, seed=at)) for at in range(others)]
    while not all(request.output for request in decoding):
        loop.step()
    for _ in range(steps // 2):
        loop.step()
    counted = iter(range(steps))
    plain = [spent for spent, _ in timed(loop, lambda: next(counted, None) is not None)]
    arriving, waits, waited = loop.add(long, briefly), [0.0], 0.0
    for spent, outputs in timed(loop, lambda: arriving.finish_reason is None):
        waited += spent
        if any(output.request in decoding for output in outputs):
            waits.append(waited)
            waited = 0.0
    unfinished = all(request.finish_reason is None for request in decoding)
    for request in decoding:
        loop.remove(request)
    loop.step()
    assert unfinished, "those who decode ended before the prompt was read: a longer --long, or fewer --steps"
    return {
        "step": statistics.median(plain), "longest_step": max(plain), "chunk": statistics.median(chunks),
        "longest_chunk": max(chunks), "pause": max(waits), "steps_meanwhile": len(waits) - 1,
    }  # fmt: skip


def run_pause(engine: Engine, length: int, others: int, steps: int) -> dict[str, Any]:
    sentences = engine.encode(" ".join(PROMPTS) + " ")
    long = (sentences * (length // len(sentences) + 1))[:length]
    pause(engine, long, others, steps)  # kernels are compiled and graphs captured
    found = pause(engine, long, others, steps)
    allowed = 2.5 * found["step"] + found["longest_chunk"]
    milliseconds = {name: round(1000 * value, 2) for name, value in found.items() if name != "steps_meanwhile"}
    return {
        "prompt": length, "running": others, "chunk_tokens": engine.config.prefill_chunk, "ms": milliseconds,
        "steps_meanwhile": int(found["steps_meanwhile"]), "allowed_ms": round(1000 * allowed, 2),
        "within": found["pause"] <= allowed,
    }  # fmt: skip


@click.command(help="For example: python bench/soak.py --part requests --requests 50")
@click.option("--part", "parts", multiple=True, type=click.Choice(["requests", "operations", "pause"]),
              default=["requests", "operations", "pause"], show_default=True)  # fmt: skip
@click.option("--requests", default=1000, type=SOME, show_default=True)
@click.option("--operations", default=10_000, type=COUNT, show_default=True)
@click.option(
    "--tokens", default=32, type=SOME, show_default=True, help="Of an answer, at most, in the first two parts."
)
@click.option("--model", default=hub.NANO, show_default=True, help="Of the first two parts.")
@click.option("--tree", default="3x2", show_default=True)
@click.option("--seed", default=1, type=COUNT, show_default=True)
@click.option("--long-model", default=DEFAULT_MODEL, show_default=True, help="Of the last part.")
@click.option("--long", "length", default=4000, type=SOME, show_default=True, help="Tokens of the long prompt.")
@click.option("--others", default=8, type=SOME, show_default=True, help="Requests that decode meanwhile.")
@click.option("--steps", default=20, type=SOME, show_default=True, help="Steps without the prompt that are timed.")
@click.option("--chunk", default=256, type=SOME, show_default=True, help="Tokens of a prompt that one step reads.")
@click.option("--device", default="cpu", show_default=True)
@click.option("--threads", default=0, type=COUNT, help="CPU threads; 0 is one per core.")
def main(
    parts: tuple[str, ...], requests: int, operations: int, tokens: int, model: str, tree: str, seed: int,
    long_model: str, length: int, others: int, steps: int, chunk: int, device: str, threads: int,
) -> None:  # fmt: skip
    commit = require_commit()
    shared = {"device": device, "threads": threads, "tree": TreeShape.parse(tree), "dequantize": device == "cpu"}
    # little memory and short chunks: requests wait, and prompts are read in turns with what others decode
    small = EngineConfig(max_batch=SLOTS, max_context=256, kv_tokens=320, prefill_chunk=8, max_waiting=12,
                         **shared)  # fmt: skip
    results: dict[str, Any] = {}
    for part in parts:
        if part == "pause":
            wide = EngineConfig(max_batch=others + 1, max_context=length + 64, prefill_chunk=chunk, **shared)
            with Engine.load(long_model, wide) as engine:
                results[part] = run_pause(engine, length, others, steps)
            continue
        with Engine.load(model, small) as engine:
            soak = Soak(engine, cases(tokens), random.Random(seed))
            results[part] = run_requests(soak, requests) if part == "requests" else run_operations(soak, operations)
    table = Table("part", "what", "found")
    for part, found in results.items():
        for name, value in found.items():
            table.add_row(part, name, str(value))
    Console().print(table)
    given = {"requests": requests, "operations": operations, "model": model, "long_model": long_model, "tree": tree}
    click.echo(json.dumps({"bench": "soak", **given, "results": results, **conditions(commit, device)}))
    whole = all(
        not found.get("lost_tokens") and not found.get("wrong") and not found.get("stuck") for found in results.values()
    )
    raise SystemExit(0 if whole and results.get("operations", {}).get("as_before", True) else 1)


if __name__ == "__main__":
    run(main)
