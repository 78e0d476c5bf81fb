"""Mean accepted length over a prompt set, by category, with loop steps left out and counted.

    python bench/acceptance.py --prompts bench/prompts/bench_core.jsonl --tree chain:3

Mean accepted length = emitted tokens / verification steps (bonus token included). A step is in a loop if the first
token it emits ends a 16-gram that the answer already held; such steps flatter a drafter. --every-position drafts anew at
every token instead (teacher forcing): then the mean is over all positions, not over those where a step begins.
"""

import json
from collections import defaultdict
from pathlib import Path

import click
import torch
from common import COUNT, SOME, conditions, encode, read_prompts, require_commit, run
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

from mtp_engine import DraftTree, Engine, EngineConfig, SamplingParams, TreeShape, VerifyResult
from mtp_engine.protocols import Verifier
from mtp_engine.sampling.batch import Batch
from mtp_engine.training.data import in_loop


class EveryPosition:
    """Notes how much each tree would have yielded, and keeps one token of it."""

    def __init__(self, verifier: Verifier) -> None:
        self.verifier = verifier
        self.yields: list[int] = []

    def verify(self, tree: DraftTree, logits: Tensor, batch: Batch) -> VerifyResult:
        result = self.verifier.verify(tree, logits, batch)
        self.yields += result.counts.tolist()
        return VerifyResult(torch.zeros_like(result.path), result.tokens, torch.ones_like(result.counts))


@click.command()
@click.option("--prompts", type=click.Path(exists=True, dir_okay=False, path_type=Path), required=True)
@click.option("--limit", default=0, type=COUNT, help="Use this many prompts, spread over the file; 0 = all.")
@click.option("--longest", default=500, type=SOME, show_default=True, help="Leave out prompts of more tokens.")
@click.option("--model", default="smollm2-135m-mtp3", show_default=True)
@click.option("--mtp", default=None, help="A folder of other MTP layers.")
@click.option("--drafter", default="mtp", show_default=True)
@click.option("--tree", default="chain:3", show_default=True)
@click.option("--draft-vocab", default=16384, type=COUNT, show_default=True)
@click.option("--temperature", default=0.0, show_default=True)
@click.option("--max-tokens", default=128, type=SOME, show_default=True)
@click.option("--batch", default=8, type=SOME, show_default=True)
@click.option("--every-position", is_flag=True, help="Draft at every token (teacher forcing).")
@click.option("--device", default="cpu", show_default=True)
def main(prompts: Path, limit: int, longest: int, model: str, mtp: str | None, tree: str, temperature: float,
         max_tokens: int, batch: int, every_position: bool, **engine_options: object) -> None:  # fmt: skip
    commit = require_commit()
    config = EngineConfig(tree=TreeShape.parse(tree), max_batch=batch, max_context=2048, **engine_options)
    engine = Engine.load(model, config, mtp=mtp)
    cases = encode(engine, read_prompts(prompts, limit), longest)
    params = SamplingParams(max_tokens=max_tokens, temperature=temperature, seed=0)
    probe = EveryPosition(engine.loop.work.verifier)
    if every_position:
        engine.loop.work.verifier = probe
    steps: dict[int, list[int]] = defaultdict(list)
    counts: dict[str, list[int]] = defaultdict(lambda: [0, 0, 0, 0])  # tokens, steps, both outside loops
    for chunk in track(
        engine.stream([tokens for _, tokens in cases], params), total=None, console=Console(stderr=True)
    ):
        steps[chunk.index].append(probe.yields.pop(0) if every_position else len(chunk.token_ids))
        if chunk.finished:
            flags, at = in_loop(chunk.finished.token_ids), 0
            for emitted in steps.pop(chunk.index):
                for row in (counts[cases[chunk.index][0]], counts["all"]):
                    row[0] += emitted
                    row[1] += 1
                    if not flags[at]:
                        row[2] += emitted
                        row[3] += 1
                at += 1 if every_position else emitted
    table = Table("category", "AL", "AL outside loops", "loop steps", title=f"{model} {tree} T={temperature}")
    for category in [*sorted(set(counts) - {"all"}), "all"]:
        tokens, number, clean_tokens, clean_steps = counts[category]
        table.add_row(
            category,
            f"{tokens / number:.3f}",
            f"{clean_tokens / max(clean_steps, 1):.3f}",
            f"{1 - clean_steps / number:.1%}",
        )
    Console().print(table)
    lengths = {c: round(n[2] / max(n[3], 1), 4) for c, n in counts.items()}
    settings = {"model": model, "mtp": mtp, "tree": tree, "temperature": temperature, "max_tokens": max_tokens}
    record = {"bench": "acceptance", "prompts": prompts.name, "cases": len(cases), "every_position": every_position}
    record |= settings | engine_options | {"accepted_length": lengths}
    record["accepted_length_with_loops"] = round(counts["all"][0] / counts["all"][1], 4)
    record["loop_steps"] = round(1 - counts["all"][3] / counts["all"][1], 4)
    record |= conditions(commit, str(engine_options["device"]))
    click.echo(json.dumps(record))


if __name__ == "__main__":
    run(main)
