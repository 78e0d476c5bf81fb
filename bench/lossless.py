"""Token-for-token equality with plain decoding over a prompt set, and the logit margin wherever it breaks.

    python bench/lossless.py --prompts ../shared/prompts/spec-bench.jsonl --limit 40

For every difference the report gives the prompt, the position, and by how much the main model preferred its choice
(noise included) over the other one: in float arithmetic only a near tie can differ.
"""

import json
from pathlib import Path

import click
import torch
from common import conditions, encode, read_prompts
from rich.console import Console
from rich.table import Table

from mtp_engine import Engine, EngineConfig, SamplingParams, TreeShape
from mtp_engine.attention import TorchAttention
from mtp_engine.config import DEFAULT_MODEL
from mtp_engine.sampler import SamplingBatch, choose_scores

CONTENDERS = {"chain:3": {}, "4x2x2": {}, "tree:16": {}, "ngram": {"drafter": "ngram"}}


def margin(engine: Engine, context: list[int], ours: int, plain: int, params: SamplingParams) -> float:
    """How far apart the scores of two tokens lie after `context`, from one plain forward pass."""
    request = engine.loop.add(context, SamplingParams(max_tokens=1))
    with torch.inference_mode():
        batch = engine.loop._current()
        tree = engine.loop.drafter.draft(batch)
        rows = engine.loop._rows(batch, tree)
        hidden = engine.model.forward(tree.tokens, rows.positions, TorchAttention(engine.loop.cache, rows))
        sampling = SamplingBatch.build([params], [params.seed or 0], hidden.device)
        scores = choose_scores(engine.model.logits(hidden), tree.depths, 0, batch.lengths, sampling)[0, 0]
    engine.loop.remove(request)
    return float((scores[plain] - scores[ours]).abs())


@click.command()
@click.option("--prompts", type=click.Path(exists=True, path_type=Path), required=True)
@click.option("--limit", default=40, show_default=True)
@click.option("--max-tokens", default=128, show_default=True)
@click.option("--model", default=DEFAULT_MODEL, show_default=True)
@click.option("--mtp", default=None)
@click.option("--device", default="cpu", show_default=True)
@click.option("--dtype", default="fp32", show_default=True)
@click.option(
    "--batch", default=1, show_default=True, help="Requests at a time for the drafting runs (plain runs one by one)."
)
def main(
    prompts: Path, limit: int, max_tokens: int, model: str, mtp: str | None, device: str, dtype: str, batch: int
) -> None:
    def load(slots: int, **options: object) -> Engine:
        return Engine.load(
            model, EngineConfig(device=device, dtype=dtype, max_batch=slots, max_context=4096, **options), mtp=mtp
        )

    plain = load(batch, drafter="root")
    cases = encode(plain, read_prompts(prompts, limit), 3000)
    table = Table("temperature", "drafter", "identical", "accepted length", "differences: case, position, margin")
    results = {}
    for params in (
        SamplingParams(max_tokens=max_tokens),
        SamplingParams(max_tokens=max_tokens, temperature=0.8, seed=1),
    ):
        expected = [answer.token_ids for answer in plain.generate([tokens for _, tokens in cases], params)]
        for name, options in CONTENDERS.items():
            engine = load(batch, **(options or {"tree": TreeShape.parse(name)}))
            answers = engine.generate([tokens for _, tokens in cases], params)
            differences = []
            for case, (answer, wanted) in enumerate(zip(answers, expected, strict=True)):
                if answer.token_ids != wanted:
                    at = next(i for i, (a, b) in enumerate(zip(answer.token_ids, wanted, strict=False)) if a != b)
                    gap = margin(plain, cases[case][1] + wanted[:at], answer.token_ids[at], wanted[at], params)
                    differences.append((case, at, gap))
            same = len(cases) - len(differences)
            length = sum(a.stats.tokens for a in answers) / sum(a.stats.steps for a in answers)
            table.add_row(
                str(params.temperature), name, f"{same}/{len(cases)}", f"{length:.3f}", str(differences or "")
            )
            results[f"{name} T={params.temperature}"] = {"identical": same, "differences": differences}
    Console().print(table)
    record = {
        "bench": "lossless",
        "prompts": prompts.name,
        "cases": len(cases),
        "max_tokens": max_tokens,
        "dtype": dtype,
    }
    click.echo(json.dumps({**record, "batch": batch, "model": model, "results": results, **conditions(device)}))


if __name__ == "__main__":
    main()
