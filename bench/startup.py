"""Start-up: seconds until the first word of an answer stands on stdout, and the memory that it took.

    python bench/startup.py --dtype int8 --repeats 3 --stages

Runs the README's line in a process of its own, again and again: the first run makes what is kept in the cache and is left
out. Wanted on 2 cores: 2.5 s and 0.8 GB at most. --stages says where the time goes, in one more process.
"""

import json
import os
import subprocess
import sys
import time
from tempfile import TemporaryDirectory
from typing import Any

import click
from common import SOME, conditions, require_commit, run

PROMPT = "What is the capital of France?"
STAGES = """
import json, sys, time
begin, marks = time.perf_counter(), {}
def mark(stage):
    marks[stage] = round(time.perf_counter() - begin - sum(marks.values()), 3)
import torch
mark("import torch")
from mtp_engine import Engine, EngineConfig, SamplingParams
mark("import mtp_engine")
with Engine.load(sys.argv[1], EngineConfig(device=sys.argv[4], dtype=sys.argv[2], max_batch=1)) as engine:
    mark("load")
    for chunk in engine.stream([[{"role": "user", "content": sys.argv[3]}]], SamplingParams(max_tokens=16)):
        if chunk.text:
            break
    mark("first word")
    stats = chunk.stats
    marks["of that compiling and capturing"] = round(stats.compile_s, 3)
    marks["of that, engine's own time"] = round(stats.ttft_s, 3)
    print(json.dumps(marks))
"""


def start(command: list[str]) -> tuple[float, float, float]:
    """Seconds to the first byte on stdout and of processor time, and the most memory that was held, in GB."""
    begin = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE)
    assert process.stdout is not None
    first = process.stdout.read(1)
    seconds = time.perf_counter() - begin
    process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode or not first:
        raise click.ClickException("the command failed; what it says stands above")
    scale = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss
    return seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * scale / 1e9


@click.command()
@click.option("--model", default="smollm2-135m-mtp3", show_default=True)
@click.option("--dtype", default="auto", show_default=True)
@click.option("--repeats", default=3, type=SOME, show_default=True)
@click.option("--stages", is_flag=True)
@click.option("--device", default="cpu", show_default=True)
def main(model: str, dtype: str, repeats: int, stages: bool, device: str) -> None:
    commit = require_commit()
    line = [sys.executable, "-m", "mtp_engine.cli", "generate", "--model", model, "--dtype", dtype, PROMPT]
    line += ["--quiet", "--max-tokens", "16", "--device", device, "--compare", "off"]
    first, *runs = [start(line) for _ in range(repeats + 1)]
    record: dict[str, Any] = {
        "bench": "startup",
        "model": model,
        "dtype": dtype,
        "repeats": repeats,
        **conditions(commit, device),
    }
    record["first_time_s"] = round(first[0], 2)
    record["first_word_s"] = [round(seconds, 2) for seconds, _, _ in runs]
    record["processor_s"] = [round(seconds, 2) for _, seconds, _ in runs]
    record["most_memory_gb"] = round(max(memory for _, _, memory in runs), 3)
    if stages:
        command = [sys.executable, "-c", STAGES, model, dtype, PROMPT, device]
        record["stages_s"] = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
        if device.startswith("cuda"):  # and where nothing is compiled yet
            with TemporaryDirectory() as empty:
                environment = {**os.environ, "TRITON_CACHE_DIR": empty}
                done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
            record["stages_first_time_s"] = json.loads(done.stdout)
    click.echo(json.dumps(record))


if __name__ == "__main__":
    run(main)
