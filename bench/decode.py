"""Decoding speed on one prompt at a time: plain decoding, drafting, llama.cpp and transformers, in turns.

    python bench/decode.py --dtype int8 --prompts bench/prompts/bench_core.jsonl --limit 12 --tree chain:3 --tree auto
    python bench/decode.py --device cuda --dtype bf16 --max-tokens 128 --tree tree:15 --tree tree:31 --no-peer

Every prompt is decoded by each contender in turn, forth and then back, so that a noisy machine hurts all of them alike;
of its --repeats the fastest counts, and short answers are repeated more often. Rates are emitted tokens over decoding time,
prefill left out on every side. A speed-up is the ratio of total times per token; those of single prompts are in the JSON
line as their lowest, their median and how many are below 0.98. --control decodes plainly twice: by how much single prompts
differ between two engines that do the same. The peers are greedy, and run where T = 0.
"""

import json
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any, final

import click
import torch
from common import COUNT, SOME, conditions, encode, read_prompts, require_commit, run
from peers import Decode, Run, llama_cpp_decoder, transformers_decoder
from rich.console import Console
from rich.progress import track
from rich.table import Table

from mtp_engine import Engine, EngineConfig, SamplingParams, TreeShape
from mtp_engine.config import DEFAULT_MODEL
from mtp_engine.hub.cache import cache_root
from mtp_engine.hub.wheel import SMOLLM2
from mtp_engine.runtime.threads import usable_cores

PEERS = ("llama.cpp", "transformers")
_FLOOR = 0.98  # of plain decoding, below which no prompt is to be
_PAUSE = 0.02  # in which the threads of the last contender go to sleep
_SHORT = 32  # answers of fewer tokens are repeated more often


def our_decoder(engine: Engine, temperature: float) -> Decode:
    """The decoding seconds are by the wall: the loop's own clock stops between steps, in which a GPU goes on."""

    def decode(prompt: list[int], new: int) -> Run:
        request = engine.loop.add(prompt, SamplingParams(max_tokens=new, temperature=temperature, seed=0))
        while not request.decoding:  # its prompt is being read
            engine.loop.step()
        if engine.loop.work.device.type == "cuda":
            torch.cuda.synchronize()
        begin = time.perf_counter()
        while request.finish_reason is None:
            engine.loop.step()
        spent, stats = time.perf_counter() - begin, request.stats
        return Run(stats.tokens, stats.ttft_s, spent, tuple(request.output), stats.steps)

    return decode


@final
@dataclass
class Tally:
    """What one contender did on each prompt: the fastest of its runs."""

    runs: list[Run] = field(default_factory=list)

    @property
    def rate(self) -> float:
        return sum(each.tokens for each in self.runs) / sum(each.decode_s for each in self.runs)

    @property
    def rates(self) -> list[float]:
        return [each.tokens / each.decode_s for each in self.runs]


def in_turns(
    contenders: dict[str, Decode], prompt: list[int], new: int, repeats: int, short: int = _SHORT
) -> dict[str, list[Run]]:
    """The runs of each, forth and back; more than `repeats` where an answer has fewer than `short` tokens."""
    found: dict[str, list[Run]] = defaultdict(list)
    names = list(contenders)
    turn = 0
    while turn < repeats:
        for name in names if turn % 2 == 0 else names[::-1]:
            time.sleep(_PAUSE)
            found[name].append(contenders[name](prompt, new))
        if turn == 0:
            shortest = min(each[0].tokens for each in found.values())
            repeats *= min(4, max(1, -(-short // max(shortest, 1))))
        turn += 1
    return found


def decode_all(
    contenders: dict[str, Decode], cases: Sequence[tuple[str, list[int]]], new: int, repeats: int
) -> dict[str, Tally]:
    tallies: dict[str, Tally] = defaultdict(Tally)
    for _, prompt in track(cases, console=Console(stderr=True)):
        for name, runs in in_turns(contenders, prompt, new, repeats).items():
            tallies[name].runs.append(min(runs, key=lambda each: each.decode_s / max(each.tokens, 1)))
    return dict(tallies)


def read_all(contenders: dict[str, Decode], text: list[int], sizes: Sequence[int], repeats: int) -> dict[str, Any]:
    """Tokens per second of prompts of so many tokens, up to the first token of the answer: by size, then by contender."""
    found = {}
    for size in sizes:
        prompt = (text * -(-size // len(text)))[:size]
        runs = in_turns(contenders, prompt, 2, repeats, short=0)
        found[str(size)] = {name: round(size / min(each.prompt_s for each in tried), 1) for name, tried in runs.items()}
    return found


@click.command()
@click.option(
    "--prompts",
    "files",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    multiple=True,
    default=[Path(__file__).parent / "prompts/bench_core.jsonl"],
    help="May be given several times; --limit and --category hold for each.",
)
@click.option("--category", default="", help="Only prompts whose category begins so.")
@click.option("--limit", default=12, type=COUNT, show_default=True)
@click.option("--longest", default=400, type=SOME, show_default=True)
@click.option("--prompt-tokens", "sizes", multiple=True, type=SOME, help="Measure reading prompts of so many tokens.")
@click.option("--model", default=DEFAULT_MODEL, show_default=True)
@click.option("--tree", "trees", multiple=True, default=["chain:3"], show_default=True, help="Shapes, and auto.")
@click.option("--max-tokens", default=96, type=SOME, show_default=True)
@click.option("--temperature", "temperatures", multiple=True, type=float, default=[0.0], show_default=True)
@click.option("--repeats", default=2, type=SOME, show_default=True)
@click.option("--draft-vocab", type=COUNT, help="Default: as in the engine.")
@click.option("--draft-int8/--no-draft-int8", default=True, show_default=True)
@click.option("--peer", "peers", type=click.Choice(PEERS), multiple=True, default=PEERS, show_default=True)
@click.option("--no-peer", is_flag=True, help="Run no peers.")
@click.option("--control", is_flag=True, help="A second engine that decodes plainly.")
@click.option("--gguf", type=click.Path(path_type=Path), help="For llama.cpp.  [default: the default model's own file]")
@click.option("--device", default="cpu", show_default=True)
@click.option("--dtype", default="fp32", show_default=True)
@click.option("--attention", default="exact", show_default=True)
@click.option("--in-flight", default=2, type=SOME, show_default=True, help="Steps queued ahead on a GPU.")
@click.option("--threads", default=0, type=COUNT, help="CPU threads; 0 is one per core.")
@click.option("--mtp", "layers", multiple=True, help="A folder of MTP layers; several are compared in turns.")
def main(**o: Any) -> None:
    commit = require_commit()
    shared = {name: o[name] for name in ("device", "dtype", "attention", "threads")}
    shared["steps_in_flight"] = o["in_flight"]
    drafting = {name: o[name] for name in ("draft_vocab", "draft_int8")}
    most = max([o["longest"], *o["sizes"]]) + o["max_tokens"]

    def load(mtp: str | None = None, **options: Any) -> Engine:
        config = EngineConfig(max_batch=1, max_context=most, prefix_cache=False, **shared, **options)
        return Engine.load(o["model"], config, mtp=mtp)

    engines = {name: load(drafter="root") for name in ("plain", "plain again")[: 1 + o["control"]]}
    for tree, mtp in product(o["trees"], o["layers"] or (None,)):
        name = f"{tree} of {Path(mtp).name}" if len(o["layers"]) > 1 and mtp else tree
        engines[name] = load(mtp, tree=None if tree == "auto" else TreeShape.parse(tree), **drafting)
    peers = {} if o["no_peer"] else load_peers(o, most)
    rows = [row for file in o["files"] for row in read_prompts(file, o["limit"], o["category"])]
    cases = encode(engines["plain"], rows, o["longest"])
    record = {
        "bench": "decode", "prompts": [file.name for file in o["files"]], "category": o["category"], "model": o["model"],
        "max_tokens": o["max_tokens"], "repeats": o["repeats"], **shared, **drafting,
        **conditions(commit, o["device"]), "threads": o["threads"] or usable_cores(), "cases": len(cases),
    }  # fmt: skip
    text = [token for _, prompt in cases for token in prompt]
    for number, temperature in enumerate(o["temperatures"]):
        ours = {name: our_decoder(engine, temperature) for name, engine in engines.items()}
        contenders = ours | (peers if temperature == 0 else {})
        warm_up(contenders, cases)
        reading = read_all(contenders, text, o["sizes"], o["repeats"]) if number == 0 else {}
        tallies = decode_all(contenders, cases, o["max_tokens"], o["repeats"])
        report(tallies, [category for category, _ in cases], record | {"temperature": temperature}, reading)


def load_peers(o: dict[str, Any], longest: int) -> dict[str, Decode]:
    threads, peers = o["threads"] or usable_cores(), {}
    if "llama.cpp" in o["peers"] and (o["gguf"] or o["model"] == DEFAULT_MODEL):
        gguf = o["gguf"] or cache_root() / "gguf" / Path(SMOLLM2.member).name
        peers["llama.cpp"] = llama_cpp_decoder(gguf, longest, threads)
    if "transformers" in o["peers"] and o["model"] == DEFAULT_MODEL:
        peers["transformers"] = transformers_decoder(o["model"], o["dtype"], o["device"], longest, threads)
    return peers


def warm_up(contenders: dict[str, Decode], cases: Sequence[tuple[str, list[int]]]) -> None:
    """Compiles, and captures the CUDA graphs of every length."""
    prompts = [prompt for _, prompt in cases]
    for decode in contenders.values():
        for prompt in (min(prompts, key=len), max(prompts, key=len)):
            decode(prompt, 16)


def report(
    tallies: dict[str, Tally], categories: Sequence[str], record: dict[str, Any], reading: dict[str, Any]
) -> None:
    plain = tallies["plain"]
    table = Table("decoder", "tokens/s", "x plain", "lowest", "accepted length", "same as plain")
    ratios = {name: [a / b for a, b in zip(tally.rates, plain.rates, strict=True)] for name, tally in tallies.items()}
    lengths, same = {}, {}
    for name, tally in tallies.items():
        if steps := sum(each.steps for each in tally.runs):
            lengths[name] = round(sum(each.tokens for each in tally.runs) / steps, 3)
        if all(each.ids for each in tally.runs):
            same[name] = sum(a.ids == b.ids for a, b in zip(tally.runs, plain.runs, strict=True))
        table.add_row(
            name, f"{tally.rate:.1f}", f"{tally.rate / plain.rate:.2f}", f"{min(ratios[name]):.2f}",
            f"{lengths[name]:.2f}" if name in lengths else "",
            f"{same[name]}/{len(categories)}" if name in same else "",
        )  # fmt: skip
    Console(stderr=True).print(table)
    record |= {
        "tokens_per_s": {name: round(tally.rate, 2) for name, tally in tallies.items()},
        "speedup_over_plain": {name: round(tally.rate / plain.rate, 3) for name, tally in tallies.items()},
        "per_prompt": {name: _spread(each, categories) for name, each in ratios.items() if name != "plain"},
        "accepted_length": lengths,
        "identical": same,
    }
    for peer in PEERS:
        if peer in tallies:
            record[f"speedup_over_{peer}"] = {n: round(t.rate / tallies[peer].rate, 3) for n, t in tallies.items()}
    if reading:
        record["prompt_tokens_per_s"] = reading
    click.echo(json.dumps(record))


def _spread(ratios: list[float], categories: Sequence[str]) -> dict[str, Any]:
    lowest = min(range(len(ratios)), key=ratios.__getitem__)
    return {
        "lowest": round(ratios[lowest], 3),
        "lowest_in": categories[lowest],
        "median": round(median(ratios), 3),
        f"below_{_FLOOR}": sum(ratio < _FLOOR for ratio in ratios),
    }


if __name__ == "__main__":
    run(main)
