"""Decoding speed on one prompt at a time: transformers, our plain decoding, and drafting, all in one process.

    python bench/decode.py --prompts bench/prompts/bench_core.jsonl --limit 12 --tree chain:3 --tree tree:5
    python bench/decode.py --device cuda --dtype bf16 --max-tokens 128 --tree tree:15 --tree tree:31

Every prompt is decoded by each contender in turn, so that a noisy machine hurts all of them alike. Rates are emitted
tokens over decoding time, prefill left out on every side; the speed-up is the ratio of total times per token.
"""

import json
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import click
import torch
from common import COUNT, SOME, conditions, encode, read_prompts, require_commit, run
from rich.console import Console
from rich.progress import track
from rich.table import Table

from mtp_engine import Engine, EngineConfig, SamplingParams, TreeShape
from mtp_engine.config import DEFAULT_MODEL
from mtp_engine.hub import hub
from mtp_engine.runtime.request import Request

Decode = Callable[[list[int], int], tuple[list[int], float]]
"""(tokens, new) -> (ids, decoding seconds)."""


def transformers_decoder(model: str, dtype: str, device: str, longest: int) -> Decode:
    """transformers' generate, greedy. On a CPU with its dynamic cache. On a GPU with a static cache of `longest` tokens,
    with which it compiles decoding by itself (torch.compile, reduce-overhead); the cache is kept from prompt to prompt,
    as a new one would have the CUDA graphs recorded anew. The streamer costs it one copy of a token per step."""
    from transformers import LlamaForCausalLM, StaticCache
    from transformers.generation.streamers import BaseStreamer

    folder = hub.locate(model).folder
    reference = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32 if dtype == "fp32" else torch.bfloat16)
    reference = reference.to(device).eval()
    cache = StaticCache(config=reference.config, max_cache_len=longest) if device != "cpu" else None

    class Clock(BaseStreamer):
        def __init__(self) -> None:
            self.times: list[float] = []

        def put(self, value: torch.Tensor) -> None:
            self.times.append(time.perf_counter())

        def end(self) -> None:
            pass

    def decode(tokens: list[int], new: int) -> tuple[list[int], float]:
        clock, options = Clock(), {}
        if cache is not None:
            cache.reset()
            options = {"past_key_values": cache}
        prompt = torch.tensor([tokens], device=device)
        ids = reference.generate(prompt, max_new_tokens=new, do_sample=False, streamer=clock, **options)
        # times[0] is the prompt's echo, times[1] comes after the prefill and holds the first token
        out = ids[0, len(tokens) :].tolist()
        return out, (clock.times[-1] - clock.times[1]) * len(out) / max(len(out) - 1, 1)

    return decode


def our_decoder(engine: Engine, prompt: list[int], params: SamplingParams) -> tuple[Request, float]:
    """The finished request and its decoding seconds by the wall: the loop's own clock stops between steps, in which a GPU
    goes on."""
    request = engine.loop.add(prompt, params)
    while not request.decoding:  # its prompt is being read
        engine.loop.step()
    if engine.loop.work.device.type == "cuda":
        torch.cuda.synchronize()
    begin = time.perf_counter()
    while request.finish_reason is None:
        engine.loop.step()
    return request, time.perf_counter() - begin


@click.command()
@click.option(
    "--prompts",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    default=Path(__file__).parent / "prompts/bench_core.jsonl",
)
@click.option("--limit", default=12, type=COUNT, show_default=True)
@click.option("--longest", default=400, type=SOME, show_default=True)
@click.option("--model", default=DEFAULT_MODEL, show_default=True)
@click.option("--tree", "trees", multiple=True, default=["chain:3"], show_default=True)
@click.option("--max-tokens", default=96, type=SOME, show_default=True)
@click.option("--temperature", default=0.0, show_default=True)
@click.option("--draft-vocab", default=EngineConfig().draft_vocab, type=COUNT, show_default=True)
@click.option("--draft-int8/--no-draft-int8", default=True, show_default=True)
@click.option("--peer/--no-peer", default=True, help="Run transformers too.")
@click.option("--device", default="cpu", show_default=True)
@click.option("--dtype", default="fp32", show_default=True)
@click.option("--attention", default="exact", show_default=True)
@click.option("--in-flight", default=2, type=SOME, show_default=True, help="Steps queued ahead on a GPU.")
@click.option("--threads", default=0, type=COUNT, help="CPU threads; 0 is one per core.")
@click.option("--mtp", default=None)
def main(
    prompts: Path,
    limit: int,
    longest: int,
    model: str,
    trees: tuple[str, ...],
    max_tokens: int,
    temperature: float,
    draft_vocab: int,
    draft_int8: bool,
    peer: bool,
    device: str,
    dtype: str,
    attention: str,
    in_flight: int,
    threads: int,
    mtp: str | None,
) -> None:
    commit = require_commit()
    shared = {"device": device, "dtype": dtype, "attention": attention, "steps_in_flight": in_flight}
    shared["threads"] = threads

    def load(**options: object) -> Engine:
        return Engine.load(model, EngineConfig(max_batch=1, max_context=2048, **shared, **options), mtp=mtp)

    engines = {"plain": load(drafter="root")}
    drafting = {"draft_vocab": draft_vocab, "draft_int8": draft_int8}
    engines |= {tree: load(tree=TreeShape.parse(tree), **drafting) for tree in trees}
    reference = transformers_decoder(model, dtype, device, longest + max_tokens) if peer else None
    cases = encode(engines["plain"], read_prompts(prompts, limit), longest)
    params = SamplingParams(max_tokens=max_tokens, temperature=temperature, seed=0)
    seconds, tokens, steps, same = (defaultdict(float) for _ in range(4))
    shortest, longest_prompt = (f((prompt for _, prompt in cases), key=len) for f in (min, max))
    for engine in engines.values():
        for prompt in (shortest, longest_prompt):
            our_decoder(engine, prompt, params)  # compiles, and captures the CUDA graphs of every length
    for _ in range(3 if reference else 0):
        reference(longest_prompt, 8)
    for _, prompt in track(cases, console=Console(stderr=True)):
        if reference:
            out, spent = reference(prompt, max_tokens)
            seconds["transformers"] += spent
            tokens["transformers"] += len(out)
            theirs = out
        plain: list[int] = []
        for name, engine in engines.items():
            request, spent = our_decoder(engine, prompt, params)
            plain = request.output if name == "plain" else plain
            seconds[name] += spent
            tokens[name] += request.stats.tokens
            steps[name] += request.stats.steps
            same[name] += request.output == plain
        if reference:
            same["transformers"] += theirs == plain
    settings = {"max_tokens": max_tokens, "temperature": temperature, **shared, **drafting}
    record = {"bench": "decode", "prompts": prompts.name, "model": model, **settings, **conditions(commit, device)}
    report(seconds, tokens, steps, same, len(cases), record)


def report(seconds, tokens, steps, same, cases, record) -> None:  # type: ignore[no-untyped-def]
    rates = {name: tokens[name] / seconds[name] for name in seconds}
    table = Table("decoder", "tokens/s", "x plain", "accepted length", "same as plain")
    for name, rate in rates.items():
        length = f"{tokens[name] / steps[name]:.2f}" if steps.get(name) else ""
        table.add_row(
            name,
            f"{rate:.1f}",
            f"{rate / rates['plain']:.2f}",
            length,
            f"{same[name]:.0f}/{cases}" if name in same else "",
        )
    Console().print(table)
    record |= {
        "cases": cases,
        "tokens_per_s": {name: round(rate, 2) for name, rate in rates.items()},
        "speedup_over_plain": {name: round(rate / rates["plain"], 3) for name, rate in rates.items()},
        "accepted_length": {name: round(tokens[name] / steps[name], 3) for name in steps},
        "identical": {name: int(count) for name, count in same.items()},
    }
    if "transformers" in rates:
        record["speedup_over_transformers"] = {n: round(rate / rates["transformers"], 3) for n, rate in rates.items()}
    click.echo(json.dumps(record))


if __name__ == "__main__":
    run(main)
