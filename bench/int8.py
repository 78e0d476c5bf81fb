"""The CPU's int8 kernels on the default model: quality against fp32, whether rows keep their bits, and milliseconds by rows.

    python bench/int8.py --tokens 4000 --threads 2

Quality: negative log-likelihood of the prompts' own tokens in the chat template, and how often the likeliest token is the same.
Bits: the hidden states of a prompt read one token at a time, against chunks. Times: the best and the median of many.
"""

import json
import time
from pathlib import Path

import click
import torch
from common import conditions, encode, read_prompts, require_commit
from torch import Tensor

from mtp_engine import Engine, EngineConfig
from mtp_engine.attention.native import NativeAttention
from mtp_engine.attention.rows import AttentionFactory, StepRows
from mtp_engine.attention.torch import TorchAttention
from mtp_engine.cache import HybridKV, Pages
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
            for each, kind in ((engine.model, TorchAttention), (model, NativeAttention))
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
    for count in (64, 1, 2, 4, 8, 16, 32, 64):
        start, each = CACHED if found or count != 64 else 0, []
        end = time.perf_counter() + seconds
        while time.perf_counter() < end:
            rows = StepRows.prompt(0, start, count, CPU)
            begin = time.perf_counter()
            model.logits(
                model.forward(tokens[None, start : start + count], rows.positions, NativeAttention(cache, rows))
            )
            each.append((time.perf_counter() - begin) * 1e3)
        found[count] = {"best_ms": min(each), "median_ms": sorted(each)[len(each) // 2]}
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
def main(prompts: Path, tokens: int, threads: int, seconds: float) -> None:
    commit = require_commit()
    engine, small = (
        Engine.load(config=EngineConfig(drafter="root", device="cpu", threads=threads, dtype=dtype))
        for dtype in ("fp32", "int8")
    )
    model = small.model
    with torch.inference_mode():
        rows, chosen = read_prompts(prompts), []
        for _, prompt in encode(engine, rows[:: max(1, len(rows) * 150 // tokens)], 400):
            if sum(map(len, chosen)) < tokens:
                chosen.append(prompt)
        one = read(model, engine, NativeAttention, torch.tensor(chosen[0]), 1)
        equal = all(
            torch.equal(one, read(model, engine, NativeAttention, torch.tensor(chosen[0]), n)) for n in (2, 7, 64, 400)
        )
        result = {
            "bench": "int8",
            "prompts": prompts.name,
            "bits_equal": equal,
            "ms_by_rows": times(engine, model, seconds),
        }
        torch.set_num_threads(threads)
        result["quality"] = quality(engine, model, chosen)
    print(json.dumps({**result, **conditions(commit), "threads": threads}))


if __name__ == "__main__":
    main()
