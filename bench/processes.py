"""Several processes on one machine: how fast each decodes, against one alone.

    python bench/processes.py --dtype int8 --most 3 --threads 0 --threads 1

Each process loads the model by itself and gets warm; then all decode for --seconds at the same time, plainly or with
--tree. Wanted: two processes at 0.4 of the rate of one alone each, three at 0.25.
"""

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import click
from common import COUNT, SOME, conditions, require_commit, run

from mtp_engine import Engine, EngineConfig, SamplingParams, TreeShape
from mtp_engine.config import DEFAULT_MODEL

PROMPT = "Tell me a long story about a lighthouse keeper who finds a map."


def worker(model: str, config: EngineConfig, seconds: float) -> None:
    """One process: says when it is ready, waits for a line, and then says how many tokens a second there were."""
    with Engine.load(model, config) as engine:
        ids = engine.encode([{"role": "user", "content": PROMPT}])
        params = SamplingParams(max_tokens=256, ignore_eos=True)
        engine.generate([ids], params)
        print("ready", flush=True)
        sys.stdin.readline()
        tokens, begin = 0, time.perf_counter()
        for round_ in range(sys.maxsize):
            for chunk in engine.stream([ids], SamplingParams(max_tokens=256, ignore_eos=True, seed=round_)):
                tokens += len(chunk.token_ids)
                if (spent := time.perf_counter() - begin) >= seconds:
                    print(json.dumps(tokens / spent), flush=True)
                    return


def together(count: int, arguments: list[str], seconds: float) -> list[float]:
    """Tokens a second of each of so many processes that run at once."""
    command = [sys.executable, str(Path(__file__)), "--worker", *arguments, "--seconds", str(seconds)]
    pipe = subprocess.PIPE
    workers = [subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) for _ in range(count)]
    try:
        for each in workers:
            assert each.stdout is not None
            if each.stdout.readline() != "ready\n":
                raise click.ClickException("a process failed; what it says stands above")
        for each in workers:
            assert each.stdin is not None
            each.stdin.write("\n")
            each.stdin.flush()
        return [float(each.communicate()[0]) for each in workers]
    finally:
        for each in workers:
            each.kill()
            each.wait()


@click.command()
@click.option("--model", default=DEFAULT_MODEL, show_default=True)
@click.option("--dtype", default="int8", show_default=True)
@click.option("--tree", default="", help="A shape, or auto.  [default: plain decoding]")
@click.option(
    "--threads", "pools", multiple=True, type=COUNT, default=[0, 1], show_default=True, help="0: the default."
)
@click.option("--most", default=3, type=SOME, show_default=True, help="Processes at once.")
@click.option("--seconds", default=10.0, show_default=True)
@click.option("--worker", "is_worker", is_flag=True, hidden=True)
def main(model: str, dtype: str, tree: str, pools: tuple[int, ...], most: int, seconds: float, is_worker: bool) -> None:
    commit = require_commit()
    if is_worker:
        options: dict[str, Any] = {"drafter": "mtp" if tree else "root"}
        options["tree"] = TreeShape.parse(tree) if tree not in ("", "auto") else None
        config = EngineConfig(device="cpu", dtype=dtype, max_batch=1, max_context=1024, threads=pools[0], **options)
        worker(model, config, seconds)
        return
    for threads in pools:
        arguments = ["--model", model, "--dtype", dtype, "--threads", str(threads), *(["--tree", tree] if tree else [])]
        rates = {count: together(count, arguments, seconds) for count in range(1, most + 1)}
        record = {
            "bench": "processes", "model": model, "dtype": dtype, "tree": tree or "plain", "seconds": seconds,
            **conditions(commit), "threads": threads or "default",
            "tokens_per_s": {count: [round(rate, 1) for rate in each] for count, each in rates.items()},
            "lowest_of_alone": {count: round(min(each) / rates[1][0], 3) for count, each in rates.items()},
        }  # fmt: skip
        click.echo(json.dumps(record))


if __name__ == "__main__":
    run(main)
