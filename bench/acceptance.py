"""Accepted length with intervals, by category, as lines of JSON: a grid of `mtp-engine experiment`, and what it showed.

    python bench/acceptance.py bench/grids/acceptance.toml
    python bench/acceptance.py bench/grids/rules.toml --device cuda --out rules
    python bench/acceptance.py bench/grids/curves.toml --out curves

A line per decoded case, and several per recorded one: chains, 4x2x2 and tree:3 to tree:31. --out keeps the rows, goes on
with a run that was killed, and is what `mtp-engine experiment report` takes. rows_commit is that which decoded.
"""

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import click
from common import conditions, require_commit, run
from rich.console import Console
from rich.progress import Progress

from mtp_engine.experiments.analyse import Estimate, Result, results
from mtp_engine.experiments.grid import Grid, read_grid
from mtp_engine.experiments.run import begin, run_cases
from mtp_engine.experiments.store import extras


def line(result: Result, about: dict[str, Any]) -> str:
    """What a setting showed, with all that repeats it."""
    case = result.case
    names = ("model", "mtp", "drafter", "tree", "verifier", "candidates", "temperature", "draft_vocab", "dtype", "batch",
             "max_tokens", "limit", "longest", "seed")  # fmt: skip
    record = {"bench": "acceptance", "prompts": Path(case.prompts).name, "cases": len(result.rows())}
    record |= {name: getattr(case, name) for name in names} | {"recorded": result.recorded}
    record["accepted_length"] = {each: numbers(result.accepted_length(each)) for each in result.categories}
    record["accepted_length_with_loops"] = numbers(result.accepted_length(loops=True))
    record["loop_steps"] = round(result.loop_share, 4)
    record["acceptance"] = [numbers(each) for each in result.acceptance(conditional=False)]
    return json.dumps(record | about)


def numbers(estimate: Estimate) -> list[float]:
    """The figure and the ends of its interval."""
    return [round(value, 4) for value in (estimate.value, estimate.low, estimate.high)]


@click.command()
@click.argument("grid", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), help="Keep the rows here.")
@click.option("--device", default="cpu", show_default=True)
def main(grid: Path, out: Path | None, device: str) -> None:
    commit = require_commit()
    extras()
    settings = read_grid(grid)
    cases = Grid.of(settings).cases
    shown = Progress(console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty())
    with tempfile.TemporaryDirectory() as scratch, shown as bar:
        task = bar.add_task("prompts", total=None)
        experiment = begin(out or Path(scratch) / "out", cases, settings)
        run_cases(experiment, device, tick=lambda done, total: bar.update(task, completed=done, total=total))
        about = conditions(commit, device) | {"rows_commit": experiment.manifest["runs"][-1]["commit"]}
        lines = [line(each, about) for each in results(experiment) if not each.case.plain]
    for text in lines:
        click.echo(text)


if __name__ == "__main__":
    run(main)
