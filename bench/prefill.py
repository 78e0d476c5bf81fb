"""How long a prompt takes until its first token, and how many TFLOP/s that is. Random ids, nothing else in the loop.

    python bench/prefill.py --model mimo-7b --tokens 1000 --tokens 8192
    python bench/prefill.py --model mimo-7b --tokens 40 --prompts 64     # until all 64 have their first token; and --apart

    python bench/prefill.py --model mimo-7b --passes                     # the GPU's time of single passes, kernel by kernel

`first_ms` is the first prompt of a size, compilation included; `ms` the median of those after it. Operations are counted
as bench/floors.py counts bytes: two a weight and token, the head for one token, and attention over the keys that are seen.
"""

import json
import random
import statistics
import time
from dataclasses import replace
from itertools import pairwise
from typing import Any

import click
import torch
from common import SOME, conditions, require_commit, run
from floors import flops
from loops import build
from shapes import SHAPES, Model, load

from mtp_engine import EngineConfig, SamplingParams, TreeShape
from mtp_engine.config import DEFAULT_MODEL


def read(
    model: Model, config: EngineConfig, tokens: int, tree: str | None, repeats: int, count: int, apart: bool
) -> dict[str, Any]:
    """Milliseconds from the arrival of `count` prompts to the first tokens of all. apart: a step reads of one prompt."""
    bench = build(model, tree, count, tokens, config, packs=not apart)
    loop, vocab, times = bench.loop, model.config.vocab_size, []
    for number in range(repeats + 1):
        generator = torch.Generator().manual_seed(number)
        prompts = torch.randint(10, vocab - 10, (count, tokens), generator=generator).tolist()
        loop.runner.settle()  # of the prompts before
        begin = time.perf_counter()
        requests = [loop.add(prompt, SamplingParams(max_tokens=2, ignore_eos=True)) for prompt in prompts]
        while not all(request.output for request in requests):
            loop.step()
        times.append((time.perf_counter() - begin) * 1e3)
        while loop.requests:
            loop.step()
    median = statistics.median(times[1:])
    rate = count * flops(model.config, tokens) / median / 1e9
    return {
        "tokens": tokens, "prompts": count, "apart": apart, "tree": tree, "first_ms": round(times[0], 1),
        "ms": round(median, 2), "tflop_s": round(rate, 1),
    }  # fmt: skip


@torch.inference_mode()
def passes(model: Model, config: EngineConfig, tree: str | None) -> list[dict[str, Any]]:
    """Milliseconds of a pass of each recorded size, as a graph and operation by operation (which is mostly the host's)."""
    bench, found = build(model, tree, 64, 1024, config), []
    prompts: Any = bench.recorder._inner
    prompts = prompts.prompts
    begin, free = time.perf_counter(), torch.cuda.mem_get_info()[0]
    graphs = prompts.capture((), lambda *_: None)
    took, room = time.perf_counter() - begin, (free - torch.cuda.mem_get_info()[0]) / 1e9
    print(json.dumps({"graphs": graphs, "capture_s": round(took, 2), "gb": round(room, 3)}))

    def fill(size: int) -> None:
        """Eight requests of `size` rows together."""
        rows = [(slot, 0, size // 8) for slot in range(8)]
        entries = [(slot, slot * (size // 8), 0, 1, 1, 9, size // 8 - 1) for slot in range(8)]
        for slot in range(8):
            bench.loop.memory.pages.reserve(slot, size)
        tokens = random.Random(size).choices(range(10, model.config.vocab_size), k=size)  # alike ones are faster
        prompts._load(tokens, rows, entries if prompts._nothing else [])

    for (half, size), graph in sorted(prompts._graphs.items(), key=lambda item: (item[0][0].__name__, item[0][1])):
        fill(size)
        case = {"half": half.__name__.strip("_"), "rows": size}
        for name, work in (("graph_ms", graph.replay), ("eager_ms", lambda half=half, size=size: half(size))):
            marks = [torch.cuda.Event(enable_timing=True) for _ in range(6)]
            work()
            for mark in marks:
                work()
                mark.record()
            torch.cuda.synchronize()
            case[name] = round(statistics.median(a.elapsed_time(b) for a, b in pairwise(marks)), 3)
        found.append(case)
        print(json.dumps(case))
    for size in (64, 1024, 2048):
        fill(size)
        kernels = profiled(prompts._graphs[prompts._main, size].replay)
        print(f"kernels of a pass of {size} rows, us and calls: {json.dumps(kernels)}")
    return found


def profiled(work: Any) -> dict[str, tuple[float, int]]:
    """The longest kernels of one call."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as seen:
        work()
        torch.cuda.synchronize()
    events = sorted(seen.key_averages(), key=lambda event: -event.self_device_time_total)[:14]
    return {event.key[:60]: (round(event.self_device_time_total, 1), event.count) for event in events}


@click.command()
@click.option("--model", default="mimo-7b", show_default=True, type=click.Choice(["default", *SHAPES]))
@click.option("--tokens", "sizes", multiple=True, type=SOME, default=[1000, 8192], show_default=True)
@click.option("--tree", default=None, help="Draft with this tree, so that the MTP layers read the prompt too.")
@click.option("--chunk", type=SOME, help="Rows of a prompt that are read at once. Default: the engine's.")
@click.option("--prompts", default=1, type=SOME, show_default=True, help="That arrive at once.")
@click.option("--apart", is_flag=True, help="Read one prompt after the other.")
@click.option("--passes", "alone", is_flag=True, help="Single passes of all recorded sizes instead.")
@click.option("--repeats", default=5, type=SOME, show_default=True)
@click.option("--path", default=DEFAULT_MODEL, show_default=True, help="Of the default model's files.")
@click.option("--device", default="cuda", show_default=True)
@click.option("--dtype", default="bf16", show_default=True)
def main(model: str, sizes: tuple[int, ...], tree: str | None, chunk: int | None, prompts: int, apart: bool, alone: bool,
         repeats: int, path: str, device: str, dtype: Any) -> None:  # fmt: skip
    commit = require_commit()
    config = EngineConfig(device=device, dtype=dtype, max_batch=1, max_context=1024, tree=TreeShape.parse("chain:3"))
    config = replace(config, prefill_chunk=chunk or config.prefill_chunk, prefix_cache=False)
    loaded = load(model, config, path)
    cases = passes(loaded, config, tree) if alone else []
    for tokens in () if alone else sizes:
        cases.append(read(loaded, config, tokens, tree, repeats, prompts, apart))
        click.echo(json.dumps(cases[-1]))
    record = {"bench": "prefill", "model": model, "dtype": dtype, "chunk": config.prefill_chunk, "cases": cases}
    click.echo(json.dumps(record | conditions(commit, device)))


if __name__ == "__main__":
    run(main)
