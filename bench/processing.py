"""What processing costs: a step with every parameter on against one with none, interleaved in one process.

python bench/processing.py
"""

import json
import statistics
import time

import click
from common import COUNT, SOME, conditions, require_commit, run
from rich.console import Console
from rich.table import Table

from mtp_engine import Engine, EngineConfig, SamplingParams, TreeShape
from mtp_engine.config import DEFAULT_MODEL

PROMPT = "The history of the city begins with a small harbour at the mouth of the river, where"
BASE = {"ignore_eos": True, "seed": 1, "temperature": 1.0}
TRUNCATION = {"top_k": 50, "top_p": 0.95, "min_p": 0.01}
PATH = {
    "repetition_penalty": 1.1, "frequency_penalty": 0.2, "presence_penalty": 0.1, "logit_bias": {28: -1.0, 30: 0.5},
    "bad_words": ((260, 411), (28, 284, 260), (198,)), "allowed_token_ids": tuple(range(49100)), "stop": ("no such text",),
    "stop_token_ids": (5, 6), "min_tokens": 880,
}  # fmt: skip


@click.command()
@click.option("--steps", default=40, type=SOME, show_default=True, help="Steps per contender.")
@click.option("--tree", "trees", multiple=True, default=["tree:7", "chain:3"], show_default=True)
@click.option("--device", default="cpu", show_default=True)
@click.option("--threads", default=0, type=COUNT, help="CPU threads; 0 is one per core.")
def main(steps: int, trees: tuple[str, ...], device: str, threads: int) -> None:
    commit = require_commit()
    wanted = {"none": BASE, "truncation": BASE | TRUNCATION, "all but truncation": BASE | PATH, "all": BASE | TRUNCATION | PATH,
              "all and logprobs": BASE | TRUNCATION | PATH | {"logprobs": 5}}  # fmt: skip
    table = Table("tree", *[f"{name}, ms" for name in wanted], "all / none")
    results = {}
    for tree in trees:
        config = EngineConfig(tree=TreeShape.parse(tree), max_batch=1, max_context=1024, device=device, threads=threads)
        engine = Engine.load(DEFAULT_MODEL, config)
        times: dict[str, list[float]] = {name: [] for name in wanted}
        tokens = engine.encode(PROMPT)
        for _ in range(max(1, steps // 10)):
            for name, settings in wanted.items():
                request = engine.loop.add(tokens, SamplingParams(max_tokens=900, **settings))
                while not request.output:
                    engine.loop.step()
                for _ in range(10):
                    begin = time.perf_counter()
                    engine.loop.step()
                    times[name].append(time.perf_counter() - begin)
                engine.loop.remove(request)
        median = {name: 1000 * statistics.median(values) for name, values in times.items()}
        ratio = median["all"] / median["none"]
        results[tree] = {"ms": {name: round(value, 2) for name, value in median.items()}, "ratio": round(ratio, 4)}
        table.add_row(tree, *[f"{value:.1f}" for value in median.values()], f"{ratio:.3f}")
    Console().print(table)
    click.echo(json.dumps({"bench": "processing", "steps": steps, "results": results, **conditions(commit, device)}))


if __name__ == "__main__":
    run(main)
