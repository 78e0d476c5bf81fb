"""Token-for-token equality with plain decoding over a prompt set, and the logit margin wherever it breaks.

    python bench/lossless.py --prompts bench/prompts/bench_core.jsonl --limit 40
    python bench/lossless.py --limit 40 --device cuda --dtype bf16 --batch 8

For every difference the report gives the prompt, the position, and by how much the main model preferred its choice
(noise included) over the other one: in float arithmetic only a near tie can differ. What all is compared with is plain
decoding of one request at a time; plain decoding in batches, too.
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import click
from common import COUNT, SOME, conditions, encode, read_prompts, require_commit, run
from loops import rescored
from rich.console import Console
from rich.table import Table
from torch import Tensor

from mtp_engine import Engine, EngineConfig, SamplingParams, TreeShape
from mtp_engine.config import DEFAULT_MODEL

CONTENDERS = {"chain:3": {}, "4x2x2": {}, "tree:16": {}, "ngram": {"drafter": "ngram"}}
ON_CPU = {"tree:7": {}, "auto": {}}
Difference = tuple[int, int, float]  # case, position in the output, margin


def differences(
    prompts: Sequence[list[int]], found: Sequence[list[int]], expected: Sequence[list[int]], params: SamplingParams,
    scores: Callable[[list[int], int, SamplingParams], Tensor],
) -> list[Difference]:  # fmt: skip
    """Where each output first leaves the expected one, and how far apart the scores of the two tokens are there."""
    report = []
    for case, (ours, plain) in enumerate(zip(found, expected, strict=True)):
        if ours != plain:
            at = next((i for i, (a, b) in enumerate(zip(ours, plain, strict=False)) if a != b), None)
            if at is None:  # one is a part of the other: no near tie, but a bug
                report.append((case, min(len(ours), len(plain)), float("inf")))
                continue
            row = scores(prompts[case], at, params)
            report.append((case, at, round(float(row[plain[at]] - row[ours[at]]), 6)))
    return report


@click.command()
@click.option("--prompts", "path", type=click.Path(exists=True, dir_okay=False, path_type=Path),
              default=Path(__file__).parent / "prompts/bench_core.jsonl")  # fmt: skip
@click.option("--limit", default=40, type=COUNT, show_default=True)
@click.option("--max-tokens", default=128, type=SOME, show_default=True)
@click.option("--model", default=DEFAULT_MODEL, show_default=True)
@click.option("--mtp", default=None)
@click.option("--device", default="cpu", show_default=True)
@click.option("--dtype", default="fp32", show_default=True)
@click.option("--attention", default="exact", show_default=True)
@click.option("--threads", default=0, type=COUNT, help="Of a CPU; 0 is one per core.")
@click.option("--batch", default=1, type=SOME, show_default=True, help="Requests at a time; plain decoding has one.")
@click.option(
    "--kv-tokens", default=0, type=COUNT, help="Room for so many tokens, so that requests are preempted; 0 is enough."
)
@click.option("--max-context", default=4096, type=SOME, show_default=True)
@click.option(
    "--other-batch",
    default=3,
    type=SOME,
    show_default=True,
    help="Requests at a time of another plain run, in reversed order.",
)
def main(path: Path, limit: int, max_tokens: int, model: str, mtp: str | None, device: str, dtype: str, attention: str,
         threads: int, batch: int, kv_tokens: int, max_context: int, other_batch: int) -> None:  # fmt: skip
    commit = require_commit()
    shared = {"device": device, "dtype": dtype, "attention": attention, "max_context": max_context, "threads": threads}
    starved = {"kv_tokens": kv_tokens} if kv_tokens else {}

    def load(slots: int, **options: object) -> Engine:
        return Engine.load(model, EngineConfig(max_batch=slots, **shared, **options), mtp=mtp)

    plain = load(1, drafter="root")
    contenders = CONTENDERS | (ON_CPU if device == "cpu" else {})
    engines = {name: load(batch, **starved, **(o or {"tree": TreeShape.parse(name)})) for name, o in contenders.items()}
    sizes = sorted({other_batch, batch} - {1})
    engines = {f"plain, {n} at a time": load(n, **starved, drafter="root") for n in sizes} | engines
    prompts = [
        tokens for _, tokens in encode(plain, read_prompts(path, limit), min(3000, max_context - max_tokens - 64))
    ]
    scores = rescored(plain)
    table = Table("temperature", "drafter", "identical", "accepted length", "differences: case, position, margin")
    results = {}
    for temperature in (0.0, 0.8):
        params = SamplingParams(max_tokens=max_tokens, temperature=temperature, seed=1)
        expected = [answer.token_ids for answer in plain.generate(prompts, params)]
        for name, engine in engines.items():
            order = -1 if name.startswith("plain") else 1
            answers = engine.generate(prompts[::order], params)[::order]
            found = differences(prompts, [a.token_ids for a in answers], expected, params, scores)
            same, length = (
                len(prompts) - len(found),
                sum(a.stats.tokens for a in answers) / sum(a.stats.steps for a in answers),
            )
            table.add_row(str(temperature), name, f"{same}/{len(prompts)}", f"{length:.3f}", str(found or ""))
            results[f"{name} T={temperature}"] = {"identical": same, "differences": found}
            if kv_tokens:
                results[f"{name} T={temperature}"]["preemptions"] = sum(a.stats.preemptions for a in answers)
    Console(width=150).print(table)
    record = {
        "bench": "lossless",
        "prompts": path.name,
        "cases": len(prompts),
        "max_tokens": max_tokens,
        "batch": batch,
        "kv_tokens": kv_tokens,
    }
    click.echo(
        json.dumps(
            record
            | {
                **shared,
                "model": model,
                "results": results,
                **conditions(commit, device),
                "threads": threads or "default",
            }
        )
    )


if __name__ == "__main__":
    run(main)
