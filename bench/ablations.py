"""What each choice in training MTP layers gives: short runs that differ in one thing, and paired differences of accepted length.

    python bench/ablations.py bench/grids/ablations.toml --out /tmp/ablations --device cuda
    python bench/ablations.py bench/grids/ablations.toml --out /tmp/ablations --only adamw --only window-128

The file is a recipe (`mtp-engine train --recipe`) with a table of variants, each with the options in which it differs from
the base. Variants that write other data have a corpus of their own, all others share one. Each set of layers is recorded over
the same held-out prompts (`mtp-engine experiment`), and compared with the base's, prompt by prompt. All of it goes on where
it was when the same --out is given again.
"""

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click
from common import COUNT, SOME, conditions, require_commit, run
from rich.console import Console
from rich.table import Table

from mtp_engine.experiments.analyse import ALL, compare, results
from mtp_engine.experiments.store import Experiment
from mtp_engine.hub.files import read_toml

BASE = "base"
_DATA = {"shards", "rows", "row-length", "temperatures", "prompts", "text"}  # options that change what is written


def train(recipe: Mapping[str, Any], name: str, out: Path, device: str) -> Path:
    """Train a variant unless that is done; returns the folder of its layers."""
    file, layers = out / f"{name}.toml", out / "layers" / name
    file.write_text("".join(f"{key} = {json.dumps(value)}\n" for key, value in recipe.items()), encoding="utf-8")
    _call("train", "--recipe", file, "--device", device, "--out", layers)
    return layers


def measure(model: str, layers: Path, out: Path, o: Mapping[str, Any]) -> Experiment:
    temperatures = [part for each in o["temperatures"] for part in ("--temperature", each)]
    _call(
        "experiment", "run", "--model", model, "--mtp", layers, "--mode", "record", "--prompts", o["prompts"], "--limit",
        o["limit"], "--max-tokens", o["max_tokens"], *temperatures, "--device", o["device"], "--out", out,
    )  # fmt: skip
    return Experiment.open(out)


def _call(*arguments: Any) -> None:
    subprocess.run([sys.executable, "-m", "mtp_engine.cli", *map(str, arguments)], check=True)


@click.command()
@click.argument("plan", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--out", required=True, type=click.Path(file_okay=False, path_type=Path))
@click.option("--only", multiple=True, help="These variants, and the base.")
@click.option("--prompts", default="builtin", show_default=True, help="Held-out ones, as `experiment run` takes them.")
@click.option("--limit", default=145, type=COUNT, show_default=True)
@click.option("--max-tokens", default=128, type=SOME, show_default=True)
@click.option("--temperature", "temperatures", multiple=True, type=float, default=[0.0, 1.0], show_default=True)
@click.option("--tree", "trees", multiple=True, default=["chain:3", "4x2x2"], show_default=True)
@click.option("--device", default="cpu", show_default=True)
def main(plan: Path, out: Path, only: tuple[str, ...], trees: tuple[str, ...], **o: Any) -> None:
    commit = require_commit()
    common = read_toml(plan, "a recipe with variants")
    variants = {BASE: {}, **common.pop("variants")}
    if unknown := [name for name in only if name not in variants]:
        raise click.UsageError(f"{plan} has no variant {unknown[0]!r}: {', '.join(variants)}")
    out.mkdir(parents=True, exist_ok=True)
    table = Table("variant", "setting", "base", "variant's", "difference [95% interval]", "verdict")
    base, found = None, []
    for name, changes in variants.items():
        if only and name not in {*only, BASE}:
            continue
        corpus = out / ("data" if not _DATA & changes.keys() else f"data-{name}")
        layers = train({**common, "data": str(corpus), **changes}, name, out, o["device"])
        measured = results(measure(common["model"], layers, out / "measured" / name, o), trees)
        base = base or measured
        for row in compare(base, measured) if name != BASE else []:
            if row.category == ALL:
                apart = row.difference
                table.add_row(name, row.name, f"{row.first:.3f}", f"{row.second:.3f}",
                              f"{apart.value:+.3f} [{apart.low:+.3f}, {apart.high:+.3f}]", row.verdict)  # fmt: skip
                found.append({"variant": name, "changes": changes, "setting": row.name, "prompts": row.prompts,
                              "base": row.first, "variants": row.second, "difference": apart.value,
                              "interval": [apart.low, apart.high]})  # fmt: skip
    Console(stderr=True, width=150).print(table)
    click.echo(json.dumps({"bench": "ablations", "plan": common, "found": found, **conditions(commit, o["device"])}))


if __name__ == "__main__":
    run(main)
