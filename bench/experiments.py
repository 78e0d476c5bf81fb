"""Does `mtp-engine experiment` keep its word? A line of JSON for each part.

    python bench/experiments.py recorded --out /tmp/recorded    # recordings against real decoding, step for step
    python bench/experiments.py killed --out /tmp/killed        # 24 cases x 40 prompts, killed three times (SIGKILL)
    python bench/experiments.py overhead                        # what recording costs; wants a quiet machine
    python bench/experiments.py doctor                          # seconds, and what it says of the models in the box

recorded and killed go on where they were when they are given the same --out again.
"""

import json
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
from common import ROOT, SOME, conditions, require_commit, run

from mtp_engine.config import TreeShape
from mtp_engine.experiments import record
from mtp_engine.experiments.ask import Question, Recording
from mtp_engine.experiments.doctor import examine
from mtp_engine.experiments.grid import Case, Grid
from mtp_engine.experiments.prompts import encode, read_prompts
from mtp_engine.experiments.run import Engines, begin, decode, run_cases
from mtp_engine.experiments.store import MANIFEST, CaseFolder, Experiment

MODELS = ("mimo-nano", "smollm2-135m-mtp3")
TREES = ("chain:3", "4x2x2", "tree:7", "tree:15", "tree:31")
SAME = ["id", "category", "seed", "tokens", "steps", "nodes", "clean_tokens", "clean_steps", "finish_reason"]
"""Columns of a request's row that are no times."""


@click.group()
def main() -> None:
    """See the top of this file."""


def said(part: str, **found: Any) -> None:
    """Print a result line."""
    click.echo(json.dumps({"bench": "experiments", "part": part, **found, **conditions(require_commit())}))


@main.command()
@click.option("--out", required=True, type=click.Path(file_okay=False, path_type=Path))
@click.option("--model", "models", multiple=True, default=MODELS)
@click.option("--temperature", "temperatures", multiple=True, type=float, default=(0.0, 1.0))
@click.option(
    "--limit", type=SOME, default=145, help="Built-in prompts, of which those of over 500 tokens are left out."
)
@click.option("--max-tokens", type=SOME, default=64)
def recorded(out: Path, models: Sequence[str], temperatures: Sequence[float], limit: int, max_tokens: int) -> None:
    """What recordings answer against what real decoding does, for every prompt and tree."""
    require_commit()
    base = {"model": list(models), "temperature": list(temperatures), "limit": limit, "max_tokens": max_tokens}
    cases = Grid.of({**base, "mode": "record"}).cases + Grid.of({**base, "tree": list(TREES)}).cases
    found = begin(out, cases, base)
    run_cases(found, "cpu")
    folders = {folder.case.id: folder for folder in found.folders}
    for case in cases:
        if case.mode == "record":
            kept = Recording.load(folders[case.id])
            for tree in TREES:
                compare(kept, folders[replace(case, mode="run", tree=tree).id])


def compare(kept: Recording, folder: CaseFolder) -> None:
    """Print how a tree's answer and its real decoding differ."""
    real, answer = folder.frame("requests"), kept.answer(Question(TreeShape.parse(folder.case.tree)))
    assert list(real["prompt"]) == list(answer["prompt"])
    lengths = [float(frame["tokens"].sum() / frame["steps"].sum()) for frame in (answer, real)]
    texts = [list(a) == list(b) for a, b in zip(real["token_ids"], kept.requests["token_ids"], strict=True)]
    said(
        "recorded", model=folder.case.model, tree=folder.case.tree, temperature=folder.case.temperature,
        max_tokens=folder.case.max_tokens, prompts=len(real), same_steps=int((real["steps"] == answer["steps"]).sum()),
        same_texts=sum(texts), accepted_length_recorded=round(lengths[0], 4), accepted_length_decoded=round(lengths[1], 4),
        off_by=round(lengths[0] / lengths[1] - 1, 5),
    )  # fmt: skip


@main.command()
@click.option("--out", required=True, type=click.Path(file_okay=False, path_type=Path))
@click.option("--grid", type=click.Path(path_type=Path), default=ROOT / "bench" / "grids" / "killed.toml")
@click.option("--workers", "count", type=SOME, default=2, help="Processes that the killed run spreads its cases over.")
def killed(out: Path, grid: Path, count: int) -> None:
    """The rows of a grid whose process was killed, against those of an undisturbed run."""
    require_commit()
    whole, broken = Experiment(out / "whole"), Experiment(out / "killed")
    command = [sys.executable, "-m", "mtp_engine.cli", "experiment", "run", str(grid), "--out"]
    subprocess.run([*command, str(whole.path), "--device", "cpu"], check=True)
    every = sum(len(folder.done) for folder in whole.folders)
    command += [str(broken.path), *["--device", "cpu"] * count]
    done = [kill_at(command, broken, share * every) for share in (0.15, 0.45, 0.75)]
    subprocess.run(command, check=True)
    pairs = list(zip(whole.folders, broken.folders, strict=True))
    said(
        "killed", cases=len(pairs), rows=every, kept_at_kills=done, workers=count,
        finished=sum(folder.finished for _, folder in pairs), same=sum(same(*pair) for pair in pairs),
        sessions=sum(len(folder.sessions) for _, folder in pairs),
    )  # fmt: skip


def kill_at(command: Sequence[str], experiment: Experiment, prompts: float) -> int:
    """Run it, and kill it once so many prompts are done; returns how many were kept."""
    process = subprocess.Popen(command)
    while process.poll() is None and kept(experiment) < prompts:
        time.sleep(0.2)
    process.kill()
    process.wait()
    time.sleep(2)  # its workers end, too
    return kept(experiment)


def kept(experiment: Experiment) -> int:
    """Prompts that are done."""
    there = (experiment.path / MANIFEST).is_file()
    return sum(len(folder.done) for folder in experiment.folders) if there else 0


def same(one: CaseFolder, other: CaseFolder) -> bool:
    """Whether all rows are the same but for times."""
    first, second = one.frame("requests"), other.frame("requests")
    lists = [[list(row) for row in frame[name]] for frame in (first, second) for name in ("token_ids", "accepted")]
    steps = ["prompt", "step", "at", "emitted", "nodes", "loop"]
    return (
        first[SAME].equals(second[SAME])
        and lists[:2] == lists[2:]
        and bool(one.frame("steps")[steps].equals(other.frame("steps")[steps]))
    )


@main.command()
@click.option("--model", "models", multiple=True, default=MODELS)
@click.option("--prompts", type=SOME, default=16)
@click.option("--max-tokens", type=SOME, default=32)
def overhead(models: Sequence[str], prompts: int, max_tokens: int) -> None:
    """Seconds for the same prompts: plain, drafted, recorded; and what of a recording is noting."""
    require_commit()
    for model in models:
        for temperature in (0.0, 1.0):
            base = Case(model=model, limit=60, longest=100, max_tokens=max_tokens, temperature=temperature)
            ways = {
                "plain": replace(base, drafter="root"), "chain:3": replace(base, tree="chain:3"),
                "tree:31": replace(base, tree="tree:31"), "recorded": replace(base, mode="record"),
            }  # fmt: skip
            seconds = {name: timed(case, prompts) for name, case in ways.items()}
            noting = seconds["recorded"][1] / seconds["recorded"][0]
            said("overhead", model=model, temperature=temperature, prompts=prompts, max_tokens=max_tokens, batch=base.batch,
                 seconds={name: round(best, 3) for name, (best, _) in seconds.items()}, noting=round(noting, 4),
                 against={name: round(seconds["recorded"][0] / seconds[name][0], 3) for name in ("plain", "chain:3", "tree:31")},
            )  # fmt: skip


def timed(case: Case, prompts: int) -> tuple[float, float]:
    """Seconds of the best of three runs, and what of them went into noting."""
    engines, noted = Engines("cpu"), [0.0]
    engine = engines.get(case)
    items = encode(engine.encode, read_prompts(case.prompts, case.limit), case.longest)[:prompts]
    inner = record.Recorder._note

    def note(*args: Any) -> None:
        begin = time.perf_counter()
        inner(*args)
        noted[0] += time.perf_counter() - begin

    record.Recorder._note = note  # type: ignore[method-assign,assignment]
    try:
        best = (float("inf"), 0.0)
        for _ in range(3):
            noted[0], begun = 0.0, time.perf_counter()
            for _ in (record.record if case.mode == "record" else decode)(engine, case, items):
                pass
            best = min(best, (time.perf_counter() - begun, noted[0]))
    finally:
        record.Recorder._note = inner  # type: ignore[method-assign]
        engines.close()
    return best


@main.command()
@click.option("--model", "models", multiple=True, default=MODELS)
def doctor(models: Sequence[str]) -> None:
    """Seconds of an examination."""
    require_commit()
    for model in models:
        begun, cpu = time.monotonic(), time.process_time()
        found = examine(model, None, "cpu")
        said(
            "doctor", model=model, faults=found.faults, checks=len(found.checks),
            wall_s=round(time.monotonic() - begun, 1), cpu_s=round(time.process_time() - cpu, 1),
        )  # fmt: skip


if __name__ == "__main__":
    run(main)
