"""Does `mtp-engine experiment` keep its word? A line of JSON for each part.

    python bench/experiments.py recorded --out /tmp/recorded    # recordings against real decoding, step for step
    python bench/experiments.py rules --out /tmp/rules          # the same for rules with noise of their own, on average
    python bench/experiments.py killed --out /tmp/killed        # 24 cases x 40 prompts, killed three times (SIGKILL)
    python bench/experiments.py overhead                        # what recording costs; wants a quiet machine
    python bench/experiments.py page /tmp/r/report.html --out /tmp/pictures    # a report in Chromium, with pictures to look at
    python bench/experiments.py doctor                          # seconds, and what it says of the models in the box

recorded and rules go on where they were when they are given the same --out again.
"""

import asyncio
import base64
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import click
import page as browser
import websockets
from common import ROOT, SOME, conditions, require_commit, run

from mtp_engine.config import TreeShape
from mtp_engine.experiments import record
from mtp_engine.experiments.analyse import Result, computed
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
MEASURED = """
JSON.stringify({
  overflow: document.documentElement.scrollWidth - window.innerWidth,
  height: document.documentElement.scrollHeight,
  fetched: performance.getEntriesByType("resource").length,
  pictures: document.querySelectorAll("figure svg").length,
  tables: document.querySelectorAll("table").length,
})
"""


@click.group()
@click.pass_context
def main(context: click.Context) -> None:
    commit = require_commit()
    context.obj = commit


def said(part: str, **found: Any) -> None:
    """Print a result line."""
    commit = click.get_current_context().obj
    click.echo(json.dumps({"bench": "experiments", "part": part, **found, **conditions(commit)}))


@main.command()
@click.option("--out", required=True, type=click.Path(file_okay=False, path_type=Path))
@click.option("--model", "models", multiple=True, default=MODELS)
@click.option("--temperature", "temperatures", multiple=True, type=float, default=(0.0, 1.0))
@click.option(
    "--limit", type=SOME, default=145, help="Built-in prompts, of which those of over 500 tokens are left out."
)
@click.option("--max-tokens", type=SOME, default=64)
@click.option("--draft-vocab", type=SOME, default=16384, help="That is recorded.")
@click.option("--ask-vocab", "smaller", type=SOME, multiple=True, help="Asked of chain:3 and 4x2x2 besides it.")
def recorded(out: Path, models: Sequence[str], smaller: Sequence[int], **settings: Any) -> None:
    """What recordings answer against what real decoding does, for every prompt and tree."""
    settings |= {"model": list(models), "temperature": list(settings.pop("temperatures"))}
    asked = [Question(TreeShape.parse(tree)) for tree in TREES]
    asked += [Question(TreeShape.parse(tree), vocabulary=size) for size in smaller for tree in ("chain:3", "4x2x2")]
    recordings = Grid.of({**settings, "mode": "record"}).cases
    pairs = [(case, computed_case(case, each), each) for case in recordings for each in asked]
    found = begin(out, [*recordings, *(real for _, real, _ in pairs)], settings)
    run_cases(found, "cpu")
    folders = {folder.case.id: folder for folder in found.folders}
    for case, real, question in pairs:
        compare(Recording.load(folders[case.id]), question, folders[real.id])


def compare(kept: Recording, question: Question, folder: CaseFolder) -> None:
    """Print how an answer and real decoding differ."""
    real, answer = folder.frame("requests"), kept.answer(question)
    assert list(real["prompt"]) == list(answer["prompt"])
    lengths = [float(frame["tokens"].sum() / frame["steps"].sum()) for frame in (answer, real)]
    texts = [list(a) == list(b) for a, b in zip(real["token_ids"], kept.requests["token_ids"], strict=True)]
    said(
        "recorded", model=folder.case.model, tree=folder.case.tree, temperature=folder.case.temperature,
        draft_vocab=folder.case.draft_vocab, max_tokens=folder.case.max_tokens, prompts=len(real),
        same_steps=int((real["steps"] == answer["steps"]).sum()), same_texts=sum(texts),
        accepted_length_recorded=round(lengths[0], 4),
        accepted_length_decoded=round(lengths[1], 4), off_by=round(lengths[0] / lengths[1] - 1, 5),
    )  # fmt: skip


@main.command()
@click.option("--out", required=True, type=click.Path(file_okay=False, path_type=Path))
@click.option(
    "--limit", type=SOME, default=120, help="Built-in prompts, of which those of over 500 tokens are left out."
)
@click.option("--max-tokens", type=SOME, default=48)
def rules(out: Path, limit: int, max_tokens: int) -> None:
    """What a recording expects of rules and candidates, and what decoding with them accepts. The texts are others."""
    base = Case(limit=limit, max_tokens=max_tokens, temperature=1.0)
    asked = [
        Question(TreeShape.parse(tree), *way)
        for tree, way in product(
            ("chain:2", "chain:3"), (("match", "best"), ("rejection", "drawn"), ("block", "drawn"))
        )
    ]
    asked += [
        Question(TreeShape.parse("4x2x2"), "match", "best"),
        Question(TreeShape.parse("chain:3"), vocabulary=2048),
    ]
    kept = replace(base, mode="record")
    found = begin(out, [kept, *(computed_case(base, each) for each in asked)], {"limit": limit})
    run_cases(found, "cpu")
    folders = {folder.case.id: folder for folder in found.folders}
    recording = Recording.load(folders[kept.id])
    for each in asked:
        case = computed_case(base, each)
        results = computed(kept, recording, each), Result(case, folders[case.id].frame("requests"))
        lengths = [result.accepted_length(loops=True) for result in results]
        said(
            "rules", model=case.model, tree=case.tree, rule=each.rule, candidates=each.candidates,
            draft_vocab=case.draft_vocab, temperature=1.0, prompts=len(results[1].rows()), max_tokens=max_tokens,
            **{name: [round(x, 4) for x in (length.value, length.low, length.high)]
               for name, length in zip(("expected", "decoded"), lengths, strict=True)},
        )  # fmt: skip


def computed_case(base: Case, question: Question) -> Case:
    """The case that decodes what is asked."""
    candidates = "auto" if question.candidates != "best" else "best"
    vocabulary = question.vocabulary or base.draft_vocab
    return replace(
        base, mode="run", tree=str(question.tree), verifier=question.rule, candidates=candidates, draft_vocab=vocabulary
    )


@main.command()
@click.option("--out", required=True, type=click.Path(file_okay=False, path_type=Path))
@click.option("--grid", type=click.Path(path_type=Path), default=ROOT / "bench" / "grids" / "killed.toml")
@click.option("--workers", "count", type=SOME, default=2, help="Processes that the killed run spreads its cases over.")
def killed(out: Path, grid: Path, count: int) -> None:
    """The rows of a grid whose process was killed, against those of an undisturbed run."""
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
    """Seconds of the best of three runs, prompts left out, and what of them went into noting."""
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
            noted[0] = 0.0
            rows = [row for row, _ in (record.record if case.mode == "record" else decode)(engine, case, items)]
            best = min(best, (sum(row["draft_s"] + row["verify_s"] for row in rows), noted[0]))
    finally:
        record.Recorder._note = inner  # type: ignore[method-assign]
        engines.close()
    return best


@main.command()
@click.argument("report", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--out", required=True, type=click.Path(file_okay=False, path_type=Path), help="Where the pictures go.")
def page(report: Path, out: Path) -> None:
    """At a desktop's and a phone's width: what is wider than the window, and what is fetched."""
    out.mkdir(parents=True, exist_ok=True)
    seen = {}
    with tempfile.TemporaryDirectory() as scratch:
        port = browser.free_port()
        flags = ["--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={scratch}/profile"]
        with browser.process(["chromium", *flags, f"--remote-debugging-port={port}", "about:blank"]):
            for name, size in browser.SIZES.items():
                tabs = browser.get(f"http://127.0.0.1:{port}/json")
                devtools = next(tab["webSocketDebuggerUrl"] for tab in tabs if tab["type"] == "page")
                seen[name] = asyncio.run(look(devtools, report, size, out / f"{name}.png"))
    said("page", bytes=report.stat().st_size, seen=seen)


async def look(devtools: str, report: Path, size: tuple[int, int], picture: Path) -> dict[str, int]:
    """Open a report without network, measure it, and take a picture of its whole length."""
    async with websockets.connect(devtools, max_size=None) as channel:
        tab = browser.Browser(channel)
        await tab.call("Network.enable")
        await tab.call(
            "Network.emulateNetworkConditions", offline=True, latency=0, downloadThroughput=0, uploadThroughput=0
        )
        width, height = size
        phone = width < 600
        view = {"deviceScaleFactor": 1, "mobile": phone}
        await tab.call("Emulation.setDeviceMetricsOverride", width=width, height=height, **view)
        await tab.call("Page.navigate", url=report.resolve().as_uri())
        await asyncio.sleep(1)
        found: dict[str, int] = json.loads(await tab.evaluate(MEASURED))
        await tab.call("Emulation.setDeviceMetricsOverride", width=width, height=found["height"], **view)
        shot = await tab.call("Page.captureScreenshot", format="png")
        picture.write_bytes(base64.b64decode(shot["data"]))
        return found


@main.command()
@click.option("--model", "models", multiple=True, default=MODELS)
def doctor(models: Sequence[str]) -> None:
    """Seconds of an examination."""
    for model in models:
        begun, cpu = time.monotonic(), time.process_time()
        found = examine(model, None, "cpu")
        said(
            "doctor", model=model, faults=found.faults, checks=len(found.checks),
            wall_s=round(time.monotonic() - begun, 1), cpu_s=round(time.process_time() - cpu, 1),
        )  # fmt: skip


if __name__ == "__main__":
    run(main)
