"""A model that several processes share: does it say what one process says, and does a rank that ends end all?

    python bench/tensor_parallel.py
    python bench/tensor_parallel.py --device cuda --ranks 2 --dtype bf16 --parts equal,times

equal: of mimo-nano and of tiny random models, answers that are the same token for token: drafted and plain on the ranks, and
both against one process with the same operations (in bf16 a near tie may flip). times: seconds of a decoding step and of an
exchange of sums. killed: seconds from kill -9 of the last rank, in the midst of an answer, until its one line is out.
"""

import json
import os
import signal
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import click
import torch
from common import conditions, require_commit, run

from mtp_engine import Engine, EngineConfig, SamplingParams, TreeShape
from mtp_engine.errors import EngineError
from mtp_engine.models.make_tiny import make_tiny
from mtp_engine.runtime.lead import Leader

PROMPTS = ["Once upon a time", "The little dog", "A girl named Lily", "One day, Tom", "In the garden there was"]
WIDE = {"moe_intermediate_size": 64, "intermediate_size": 128}  # whole blocks for four ranks


def params(tokens: int) -> list[SamplingParams]:
    return [
        SamplingParams(max_tokens=tokens, ignore_eos=True, temperature=0.8 * (number % 2), seed=number)
        for number in range(len(PROMPTS))
    ]


def answers(engine: Engine, tokens: int) -> list[list[int]]:
    return [answer.token_ids for answer in engine.generate(PROMPTS, params(tokens))]


def all_equal(config: EngineConfig, tokens: int) -> dict[str, Any]:
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, model in {
            "mimo-nano": "mimo-nano",
            "tiny MiMo-V2-Flash, FP8": str(make_tiny(Path(folder) / "fp8", fp8=True, **WIDE)),
            "tiny MiMo-7B": str(make_tiny(Path(folder) / "7b", family="mimo")),
        }.items():
            found[name] = equal(model, config, tokens)
            click.echo(f"{name}: {found[name]}", err=True)
    return found


def equal(name: str, config: EngineConfig, tokens: int) -> dict[str, Any]:
    with Engine.load(name, replace(config, tensor_parallel=1, attention="torch")) as one:
        alone = answers(one, tokens)
    with Engine.load(name, config) as engine:
        drafted = answers(engine, tokens)
        with engine.undrafted() as undrafted:
            plain = answers(undrafted, tokens)
    return {
        "answers": len(PROMPTS),
        "drafted_as_plain": same(drafted, plain),
        "plain_as_one_process": same(plain, alone),
    }


def same(first: Sequence[list[int]], second: Sequence[list[int]]) -> int:
    return sum(a == b for a, b in zip(first, second, strict=True))


def times(name: str, config: EngineConfig) -> dict[str, float]:
    with Engine.load(name, config) as engine:
        [answer] = engine.generate(PROMPTS[:1], SamplingParams(max_tokens=200, ignore_eos=True))
        stats = answer.stats
        assert isinstance(engine.team, Leader)
        return {
            "step_s": stats.decode_s / stats.steps,
            "accepted_length": stats.mean_accepted_length,
            "exchange_us": exchange(engine),
        }


def exchange(engine: Engine) -> float:
    """Of one row's sums in the midst of an answer: median microseconds on rank 0, the device waited for."""
    found, inner = list[float](), engine.team.group.exchange
    assert inner is not None
    gather, device = inner.gather, torch.device(engine.config.device)

    def timed(x: torch.Tensor) -> torch.Tensor:
        wait(device)
        begin = time.perf_counter()
        y = gather(x)
        wait(device)
        found.append(time.perf_counter() - begin)
        return y

    inner.gather = timed  # type: ignore[method-assign]
    engine.generate(PROMPTS[:1], SamplingParams(max_tokens=30, ignore_eos=True))
    return median(found) * 1e6


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def killed(name: str, config: EngineConfig) -> dict[str, Any]:
    with Engine.load(name, config) as engine:
        assert isinstance(engine.team, Leader)
        victim, begun = engine.team.processes[-1], list[float]()

        def kill() -> None:
            begun.append(time.perf_counter())
            os.kill(victim, signal.SIGKILL)

        threading.Timer(1.0, kill).start()
        try:
            engine.generate(PROMPTS[:1], SamplingParams(max_tokens=8000, ignore_eos=True))
        except EngineError as error:
            return {"seconds": time.perf_counter() - begun[0], "said": str(error)}
    raise EngineError("the answer was over before the rank was killed")


@click.command()
@click.option("--device", default="cpu")
@click.option("--dtype", default="fp32", type=click.Choice(["fp32", "bf16"]))
@click.option("--ranks", default=2, type=click.IntRange(2))
@click.option("--tokens", default=60, type=click.IntRange(1))
@click.option("--parts", default="equal,times,killed")
def main(device: str, dtype: Any, ranks: int, tokens: int, parts: str) -> None:
    commit = require_commit()
    config = EngineConfig(
        device=device, dtype=dtype, tensor_parallel=ranks, tree=TreeShape.parse("2x2x1"), max_batch=4, max_context=512,
        prefix_cache_gb=0.01,
    )  # fmt: skip
    found: dict[str, Any] = {"bench": "tensor_parallel", "ranks": ranks, "dtype": dtype}
    if "equal" in parts:
        found["equal"] = all_equal(config, tokens)
    if "times" in parts:
        found["times"] = times("mimo-nano", replace(config, tree=TreeShape.parse("chain:3")))
    if "killed" in parts:
        found["killed"] = killed("mimo-nano", replace(config, max_context=0))
    click.echo(json.dumps({**found, **conditions(commit, device)}))


if __name__ == "__main__":
    run(main)
