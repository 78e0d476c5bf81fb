"""Mean accepted length by verification rule, tree and way of drafting, at several temperatures.

    python bench/rules.py --prompts bench/prompts/bench_core.jsonl --device cuda

40 prompts, T = 0, 0.7, 1.0. Mean accepted length = emitted tokens / verification steps (bonus token included), loop
steps left out (see acceptance.py). drawn: candidates are drawn and their distribution q is used; noise: ranked by probability and
the noise of the main model's own choice; best: by probability.
"""

import json
from dataclasses import replace
from pathlib import Path

import click
from common import COUNT, SOME, conditions, encode, read_prompts, require_commit, run
from rich.console import Console
from rich.table import Table

from mtp_engine import Engine, EngineConfig, SamplingParams, TreeShape
from mtp_engine.assemble import make_loop, mtp_drafter
from mtp_engine.backend import make_backend
from mtp_engine.config import DEFAULT_MODEL
from mtp_engine.training.evaluate import outside_loops

# rule, drafting, tree
RUNS = [
    *[("match", ranking, tree) for tree in ("chain:3", "4x2x2", "tree:7") for ranking in ("noise", "best")],
    *[(rule, ranking, "chain:3") for rule in ("rejection", "block") for ranking in ("drawn", "best")],
    *[(rule, ranking, "4x2x2") for rule in ("rrs", "traversal") for ranking in ("drawn", "best")],
    ("typical", "best", "4x2x2"),
]


def set_up(engine: Engine, rule: str, ranking: str, tree: str) -> None:
    """Give the engine a loop with this rule, over the weights that it has."""
    config = replace(
        engine.config, tree=TreeShape.parse(tree), verifier=rule, candidates=ranking, allow_lossy=rule == "typical"
    )
    backend = make_backend(config, engine.loop.work.device, lambda *_: None)
    unfused = replace(backend, fuse_mtp=lambda module: module)  # it is fused already
    drafter = mtp_drafter(engine.loop.work.drafter.module, config, unfused)
    engine.loop = make_loop(engine.model, drafter, config, backend, slots=config.max_batch, tokenizer=engine.tokenizer)


@click.command()
@click.option("--prompts", type=click.Path(exists=True, dir_okay=False, path_type=Path), required=True)
@click.option("--limit", default=40, type=COUNT, show_default=True)
@click.option("--longest", default=500, type=SOME, show_default=True, help="Leave out prompts of more tokens.")
@click.option("--model", default=DEFAULT_MODEL, show_default=True)
@click.option("--max-tokens", default=48, type=SOME, show_default=True)
@click.option("--batch", default=40, type=SOME, show_default=True)
@click.option("--temperature", "temperatures", multiple=True, type=float, default=[0.0, 0.7, 1.0], show_default=True)
@click.option("--only", multiple=True, help="Rules to run; all if none is named.")
@click.option("--device", default="cpu", show_default=True)
@click.option("--threads", default=0, type=COUNT, help="CPU threads; 0 is one per core.")
def main(
    prompts: Path, limit: int, longest: int, model: str, max_tokens: int, batch: int,
    temperatures: tuple[float, ...], only: tuple[str, ...], device: str, threads: int,
) -> None:  # fmt: skip
    commit = require_commit()
    config = EngineConfig(
        tree=TreeShape.parse("4x2x2"), max_batch=batch, max_context=1024, device=device, threads=threads
    )
    engine = Engine.load(model, config)
    cases = [tokens for _, tokens in encode(engine, read_prompts(prompts, limit), longest)]
    table = Table("rule", "drafting", "tree", *[f"T={t:g}" for t in temperatures])
    lengths: dict[str, dict[str, float]] = {}
    for rule, ranking, tree in RUNS:
        if only and rule not in only:
            continue
        set_up(engine, rule, ranking, tree)
        measured = {}
        for temperature in temperatures:
            params = SamplingParams(max_tokens=max_tokens, temperature=temperature, seed=0)
            measured[f"{temperature:g}"] = value = round(outside_loops(engine, cases, params)[0], 4)
            click.echo(f"{rule} {ranking} {tree} T={temperature:g}: {value}", err=True)
        lengths[f"{rule} {ranking} {tree}"] = measured
        table.add_row(rule, ranking, tree, *[f"{value:.3f}" for value in measured.values()])
    Console().print(table)
    record = {"bench": "rules", "prompts": prompts.name, "cases": len(cases), "max_tokens": max_tokens, "model": model}
    click.echo(json.dumps({**record, "batch": batch, "accepted_length": lengths, **conditions(commit, device)}))


if __name__ == "__main__":
    run(main)
