"""How long a prompt takes until its first token, and how many TFLOP/s that is. Random ids, nothing else in the loop.

    python bench/prefill.py --model mimo-7b --tokens 1000 --tokens 8192
    python bench/prefill.py --model mimo-7b --tokens 40 --prompts 64     # until all 64 have their first token; and --apart

`first_ms` is the first prompt of a size, compilation included; `ms` the median of those after it. Operations are counted
as bench/floors.py counts bytes: two a weight and token, the head for one token, and attention over the keys that are seen.
"""

import json
import statistics
import time
from dataclasses import replace
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


@click.command()
@click.option("--model", default="mimo-7b", show_default=True, type=click.Choice(["default", *SHAPES]))
@click.option("--tokens", "sizes", multiple=True, type=SOME, default=[1000, 8192], show_default=True)
@click.option("--tree", default=None, help="Draft with this tree, so that the MTP layers read the prompt too.")
@click.option("--chunk", type=SOME, help="Rows of a prompt that are read at once. Default: the engine's.")
@click.option("--prompts", default=1, type=SOME, show_default=True, help="That arrive at once.")
@click.option("--apart", is_flag=True, help="Read one prompt after the other.")
@click.option("--repeats", default=5, type=SOME, show_default=True)
@click.option("--path", default=DEFAULT_MODEL, show_default=True, help="Of the default model's files.")
@click.option("--device", default="cuda", show_default=True)
@click.option("--dtype", default="bf16", show_default=True)
def main(model: str, sizes: tuple[int, ...], tree: str | None, chunk: int | None, prompts: int, apart: bool, repeats: int,
         path: str, device: str, dtype: Any) -> None:  # fmt: skip
    commit = require_commit()
    config = EngineConfig(device=device, dtype=dtype, max_batch=1, max_context=1024, tree=TreeShape.parse("chain:3"))
    config = replace(config, prefill_chunk=chunk or config.prefill_chunk, prefix_cache=False)
    loaded = load(model, config, path)
    cases = []
    for tokens in sizes:
        cases.append(read(loaded, config, tokens, tree, repeats, prompts, apart))
        click.echo(json.dumps(cases[-1]))
    record = {"bench": "prefill", "model": model, "dtype": dtype, "chunk": config.prefill_chunk, "cases": cases}
    click.echo(json.dumps(record | conditions(commit, device)))


if __name__ == "__main__":
    run(main)
