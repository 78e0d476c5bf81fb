"""A model that several processes share: does it say what one process says, how long does it take, and does a rank that ends
end all?

    python bench/tensor_parallel.py
    python bench/tensor_parallel.py --device cuda --ranks 2 --dtype bf16 --parts exchange,7b,flash,equal,killed

equal: of mimo-nano and of tiny random models, answers that are the same token for token: drafted and plain on the ranks, and
both against one process (in bf16, and between kernels and torch, a near tie may flip). times: of a decoding step. killed:
seconds from kill -9 of the last rank, in the midst of an answer, until its one line is out, and which ranks are left.
default: texts of the default model, whose heads only 3 ranks can share.
On GPUs: exchange: bits and times of sums and gatherings; 7b: MiMo-7B's shape on one GPU and on all of them, steps and texts;
smol: texts of the default model's shape, which 3 divides; flash: as many of MiMo-V2-Flash's layers as --layers says, layer by
layer and in whole steps (see full_size.py).
"""

import json
import os
import signal
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
from common import ROOT, conditions, encode, read_prompts, require_commit, run
from full_size import Limits, Part, measured
from full_size_rank import Job

from mtp_engine import Engine, EngineConfig, SamplingParams, TreeShape
from mtp_engine.config import DEFAULT_MODEL
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
    """mimo-nano, and tiny models."""
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
    with Engine.load(name, replace(config, tensor_parallel=1)) as one:
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


def default(config: EngineConfig, prompts: int, tokens: int) -> dict[str, Any]:
    """Texts of the default model, every other one at temperature 0.8: drafted as plain, and plain as on one GPU."""
    rows = read_prompts(ROOT / "bench/prompts/bench_core.jsonl", prompts)
    with Engine.load(DEFAULT_MODEL, replace(config, tensor_parallel=1, tree=None, drafter="root")) as one:
        asked = [ids for _, ids in encode(one, rows, config.max_context - tokens)]
        params = [
            SamplingParams(max_tokens=tokens, temperature=0.8 * (number % 2), seed=number)
            for number in range(len(asked))
        ]
        alone = [answer.token_ids for answer in one.generate(asked, params)]
    began = time.perf_counter()
    with Engine.load(DEFAULT_MODEL, config) as engine:
        loaded = time.perf_counter()
        drafted = engine.generate(asked, params)
        between = time.perf_counter()
        click.echo(f"loaded in {loaded - began:.1f} s, drafted in {between - loaded:.1f} s", err=True)
        with engine.undrafted() as undrafted:
            plain = [answer.token_ids for answer in undrafted.generate(asked, params)]
    return {
        "answers": len(asked), "tokens": sum(map(len, plain)),
        "drafted_as_plain": same([answer.token_ids for answer in drafted], plain),
        "plain_as_one_process": same(plain, alone),
        "accepted_length": sum(map(len, plain)) / sum(answer.stats.steps for answer in drafted),
        "load_s": loaded - began, "drafted_s": between - loaded, "plain_s": time.perf_counter() - between,
    }  # fmt: skip


def same(first: Sequence[list[int]], second: Sequence[list[int]]) -> int:
    return sum(a == b for a, b in zip(first, second, strict=True))


def times(name: str, config: EngineConfig) -> dict[str, float]:
    with Engine.load(name, config) as engine:
        [answer] = engine.generate(PROMPTS[:1], SamplingParams(max_tokens=200, ignore_eos=True))
        stats = answer.stats
        return {"step_s": stats.decode_s / stats.steps, "accepted_length": stats.mean_accepted_length}


def steps(batches: Sequence[int], context: int = 1024) -> list[Part]:
    """Plain ones, and chain:3 with 2.7 tokens a step."""
    return [
        {"part": "step", "batch": batch, "context": context, "tree": tree, "forced": 2.7 if tree else 0.0}
        for batch in batches
        for tree in (None, "chain:3")
    ]


def on_gpus(kind: str, ranks: int, layers: int, batches: Sequence[int], seconds: float, bandwidth: float) -> list[Part]:
    """What ranks measured of made-up models."""
    texts: Part = {"part": "texts", "prompts": 40, "tokens": 64}
    profile: Part = {"part": "profile", "batch": batches[-1], "context": 1024, "tree": "chain:3"}
    exchange: list[Part] = [{"part": "exchanges", "rounds": 300}, {"part": "kernels"}]
    plans: dict[str, list[tuple[str, int, int, list[Part]]]] = {
        "exchange": [("tiny", 0, ranks, exchange)],
        "7b": [
            ("mimo-7b", 0, 1, steps(batches)),
            ("mimo-7b", 0, ranks, [*exchange[1:], *steps(batches), profile, texts]),
        ],
        "smol": [("smol", 0, ranks, [texts])],
        "flash": [("mimo-v2-flash", layers, ranks, [*steps((1,)), {"part": "layers"}, profile])],
    }
    found, limits = list[Part](), Limits(60.0, 120.0, time.monotonic() + seconds)
    for shape, count, size, parts in plans[kind]:
        job = Job(0, size, 0, False, shape, count, "cuda", 40, bandwidth, [])
        for each in measured(job, parts, limits, 0):
            click.echo(json.dumps({"shape": shape, "ranks": size, **each}))
            found.append({"shape": shape, "ranks": size, **each})
    return found


def killed(name: str, config: EngineConfig) -> dict[str, Any]:
    """The last rank, in the midst of an answer."""
    with Engine.load(name, config) as engine:
        assert isinstance(engine.team, Leader)
        victims, begun = engine.team.processes, 0.0
        params = SamplingParams(max_tokens=8000, ignore_eos=True)
        for number, chunk in enumerate(engine.stream(PROMPTS[:1], params)):
            if number == 40:
                begun = time.perf_counter()
                os.kill(victims[-1], signal.SIGKILL)
            if chunk.finished and begun and chunk.finished.error:
                seconds = time.perf_counter() - begun
                left = [victim for victim in victims if Path(f"/proc/{victim}").exists()]
                return {"seconds": seconds, "said": chunk.finished.error, "left": left}
    raise EngineError("the answer was over before the rank was killed")


@click.command()
@click.option("--device", default="cpu")
@click.option("--dtype", default="fp32", type=click.Choice(["fp32", "bf16"]))
@click.option("--ranks", default=2, type=click.IntRange(2))
@click.option("--tokens", default=60, type=click.IntRange(1))
@click.option("--parts", default="equal,times,killed")
@click.option("--layers", default=18, type=click.IntRange(1), help="Of MiMo-V2-Flash.")
@click.option("--batch", "batches", multiple=True, default=[1, 16], type=click.IntRange(1), help="Of MiMo-7B's steps.")
@click.option("--bandwidth", default=3.06, show_default=True, help="TB/s of a GPU, for floors; 4.2 for an H200.")
@click.option("--prompts", default=40, show_default=True, type=click.IntRange(1), help="Of the part `default`.")
@click.option("--budget", default=200.0, help="Seconds of each part on GPUs, after which nothing more is begun in it.")
def main(
    device: str, dtype: Any, ranks: int, tokens: int, parts: str, layers: int, batches: tuple[int, ...], bandwidth: float,
    prompts: int, budget: float,
) -> None:  # fmt: skip
    commit = require_commit()
    kinds = parts.split(",")
    config = EngineConfig(
        device=device, dtype=dtype, tensor_parallel=ranks, tree=TreeShape.parse("2x2x1"), max_batch=4, max_context=512,
        prefix_cache_gb=0.01,
    )  # fmt: skip
    found: dict[str, Any] = {"bench": "tensor_parallel", "ranks": ranks, "dtype": dtype}
    for kind in ("exchange", "7b", "smol", "flash"):
        if kind in kinds:
            found[kind] = on_gpus(kind, ranks, layers, batches, budget, bandwidth * 1e12)
    if "default" in kinds:
        found["default"] = default(replace(config, tree=TreeShape.parse("chain:3"), max_batch=20), prompts, tokens)
    if "equal" in kinds:
        found["equal"] = all_equal(config, tokens)
    if "times" in kinds:
        found["times"] = times("mimo-nano", replace(config, tree=TreeShape.parse("chain:3")))
    if "killed" in kinds:
        found["killed"] = killed("mimo-nano", replace(config, max_context=0))
    click.echo(json.dumps({**found, **conditions(commit, device)}))


if __name__ == "__main__":
    run(main)
