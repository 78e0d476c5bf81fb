"""The CPU's int8 graphs of the default model: quality against fp32, whether rows keep their bits, and milliseconds by rows.

    python bench/int8.py --tokens 4000 --threads 2
    python bench/int8.py --no-calibrated --set gate_up=15 --no-quality

Quality: negative log-likelihood of the prompts' own tokens in the chat template, and how often the likeliest token is the same.
Bits: the hidden states of a prompt read one token at a time, against chunks. Times: the best of many, so that another
process's share of the machine matters less; also the best CPU time where there is one thread.
"""

import json
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import click
import torch
from common import conditions, encode, read_prompts, require_commit
from torch import Tensor

from mtp_engine import Engine, EngineConfig
from mtp_engine.attention.graph import GraphAttention
from mtp_engine.attention.rows import AttentionFactory, StepRows
from mtp_engine.attention.torch import TorchAttention
from mtp_engine.cache import HybridKV, Pages
from mtp_engine.config import DEFAULT_MODEL
from mtp_engine.hub import hub
from mtp_engine.models.onnx import load
from mtp_engine.models.onnx.blocks import Precision
from mtp_engine.protocols import TargetModel

CPU = torch.device("cpu")
CACHED = 256


def read(model: TargetModel, engine: Engine, kind: AttentionFactory, tokens: Tensor, chunk: int) -> Tensor:
    """Hidden states of a prompt in chunks. [len(tokens), H]."""
    cache, out = new_cache(engine), []
    for start in range(0, len(tokens), chunk):
        piece = tokens[start : start + chunk]
        rows = StepRows.prompt(0, start, len(piece), CPU)
        out.append(model.forward(piece[None], rows.positions, kind(cache, rows))[0])
    return torch.cat(out)


def new_cache(engine: Engine) -> HybridKV:
    layers = [layer.attention for layer in engine.model.config.layers]
    cache = HybridKV(layers, Pages(slots=1, tokens=1024, page_size=16, device=CPU), max_nodes=64, dtype=torch.float32)
    cache.pages.reserve(0, 1024)
    return cache


def quality(engine: Engine, model: TargetModel, prompts: list[list[int]]) -> dict[str, float]:
    changes, same, plain = [], [], []
    for prompt in prompts:
        tokens = torch.tensor(prompt)
        logits = [
            each.logits(read(each, engine, kind, tokens, 64))[:-1].log_softmax(-1)
            for each, kind in ((engine.model, TorchAttention), (model, GraphAttention))
        ]
        losses = [-each.gather(1, tokens[1:, None])[:, 0] for each in logits]
        changes.append(losses[1] - losses[0])
        plain.append(losses[0])
        same.append(logits[0].argmax(-1) == logits[1].argmax(-1))
    change = torch.cat(changes)
    return {
        "tokens": len(change), "nll_fp32": torch.cat(plain).mean().item(), "nll_change": change.mean().item(),
        "standard_error": (change.std() / len(change) ** 0.5).item(), "top1_same": torch.cat(same).float().mean().item(),
    }  # fmt: skip


def times(engine: Engine, model: TargetModel, seconds: float) -> dict[int, dict[str, float]]:
    """Milliseconds of a step with its logits, by its rows."""
    cache, found = new_cache(engine), {}
    tokens = torch.randint(0, model.vocab_size, (CACHED + 64,), generator=torch.Generator().manual_seed(0))
    for count in (64, 1, 4, 8, 16, 64):
        start = CACHED if count != 64 or found else 0
        best = [float("inf")] * 2
        end = time.perf_counter() + seconds
        while time.perf_counter() < end:
            rows = StepRows.prompt(0, start, count, CPU)
            begin = time.perf_counter(), time.thread_time()
            model.logits(
                model.forward(tokens[None, start : start + count], rows.positions, GraphAttention(cache, rows))
            )
            best = [min(best[0], time.perf_counter() - begin[0]), min(best[1], time.thread_time() - begin[1])]
        found[count] = {"wall_ms": best[0] * 1e3, "calling_thread_cpu_ms": best[1] * 1e3}
    return found


@click.command()
@click.option(
    "--prompts",
    type=click.Path(exists=True, path_type=Path),
    default=Path(__file__).parent / "prompts/bench_core.jsonl",
)
@click.option("--tokens", default=4000, show_default=True)
@click.option("--threads", default=2, show_default=True)
@click.option("--seconds", default=5.0, show_default=True, help="Per number of rows.")
@click.option("--calibrated/--no-calibrated", default=True)
@click.option("--quality/--no-quality", "wanted", default=True)
@click.option("--set", "changes", multiple=True, help="A field of Precision, as in gate_up=15.")
def main(
    prompts: Path, tokens: int, threads: int, seconds: float, calibrated: bool, wanted: bool, changes: tuple[str, ...]
) -> None:
    commit = require_commit()
    precision = replace(Precision(), **{name: int(value) for name, value in (each.split("=") for each in changes)})
    engine = Engine.load(config=EngineConfig(drafter="root"))
    torch.set_num_threads(threads)
    texts = [engine.tokenizer.chat(each, add_generation_prompt=False) for each in load.calibration()]
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        begin = time.perf_counter()
        model = load.load_main(
            hub.locate(DEFAULT_MODEL).folder, Path(folder), threads=threads, precision=precision, texts=texts * calibrated
        )  # fmt: skip
        result = {"bench": "int8", "precision": str(precision), "calibrated": calibrated}
        result["writing_s"] = round(time.perf_counter() - begin, 1)
        rows, chosen = read_prompts(prompts), []
        for _, prompt in encode(engine, rows[:: max(1, len(rows) * 150 // tokens)], 400):
            if sum(map(len, chosen)) < tokens:
                chosen.append(prompt)
        one = read(model, engine, GraphAttention, torch.tensor(chosen[0]), 1)
        result["bits_equal"] = all(
            torch.equal(one, read(model, engine, GraphAttention, torch.tensor(chosen[0]), n)) for n in (2, 7, 64, 400)
        )
        if wanted:
            result["quality"] = quality(engine, model, chosen)
        result["ms_by_rows"] = times(engine, model, seconds)
    print(json.dumps({**result, **conditions(commit), "threads": threads}))


if __name__ == "__main__":
    main()
