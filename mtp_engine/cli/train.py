"""`mtp-engine train`: MTP layers for a frozen model."""

import os
import shlex
import sys
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column, Table

from mtp_engine.cli.options import settings
from mtp_engine.cli.output import console, note, show
from mtp_engine.cli.progress import Waits
from mtp_engine.cli.recipe import check_files, recipe, recipe_option
from mtp_engine.config import DRAFT_VOCAB
from mtp_engine.errors import EngineError

if TYPE_CHECKING:
    from mtp_engine.training.job import Job
    from mtp_engine.training.trainer import Report

_PATH = click.Path(path_type=Path)
_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)
_WHAT = settings(
    click.option("--layers", default=3, type=click.IntRange(1, 8), help="How many: the depth of what is drafted."),
    click.option(
        "--chained/--non-chained", default=True, help="Layer k reads layer k-1's output, or the main model's."
    ),
    click.option("--window", default=128, type=click.IntRange(0), help="Keys that a layer sees; 0 is all."),
    click.option("--width", default=0, type=click.IntRange(0), help="Of their FFN; 0 is the main model's."),
    click.option(
        "--features", default="", metavar="I,J,..", help="Layers of MODEL whose outputs the MTP layers read too."
    ),
    click.option(
        "--hidden",
        default="pre_norm",
        type=click.Choice(["pre_norm", "post_norm"]),
        help="The main model's states before or after its final norm.",
    ),
    click.option("--fp8", is_flag=True, help="Keep their FFNs in FP8: half the size on disk."),
    click.option("--init", type=_PATH, help="Begin with the MTP layers in this folder, which may be narrower."),
    click.option("--out", type=_PATH, default=None, help="Where the layers go.  [default: MODEL-mtp]"),
)
_DATA = settings(
    click.option("--data", "corpus", type=_PATH, default=None, help="Folder of the corpus.  [default: OUT/data]"),
    click.option(
        "--text", "texts", multiple=True, type=_FILE, help="Train on these texts; else the model writes its own."
    ),
    click.option("--prompts", type=_FILE, help="Prompts for its dialogues (.jsonl or .jsonl.xz with `prompt`)."),
    click.option("--shards", default=12, type=click.IntRange(1), help="Of the dialogues it writes."),
    click.option("--rows", default=4096, type=click.IntRange(1), help="Of a shard."),
    click.option(
        "--temperatures",
        default="0:0.5,0.7:0.25,1:0.25",
        metavar="T:SHARE,..",
        help="At which it writes its answers.",
        show_default=True,
    ),
    click.option("--row-length", default=768, type=click.IntRange(16), help="Tokens."),
)
_TRAINING = settings(
    click.option("--steps", default=3000, type=click.IntRange(1)),
    click.option("--batch-tokens", default=41_472, type=click.IntRange(1), help="Of a step, all devices together."),
    click.option("--lr", default=4e-3, type=click.FloatRange(0, min_open=True), help="Of Muon, for matrices."),
    click.option("--adam-lr", default=1e-3, type=click.FloatRange(0, min_open=True), help="Of AdamW, for the rest."),
    click.option(
        "--optimiser",
        default="muon",
        type=click.Choice(["muon", "adamw"]),
        help="Of matrices; AdamW's rate is --adam-lr.",
    ),
    click.option("--decay", default=0.8, type=click.FloatRange(0, 1), help="A layer's loss counts decay^depth."),
    click.option(
        "--target-temperature", default=1.0, type=click.FloatRange(0.05), help="Of the main model's distribution."
    ),
    click.option("--acceptance", default=0.5, type=click.FloatRange(0), help="Weight of -log acceptance in the loss."),
    click.option(
        "--breadth",
        default=1.0,
        type=click.FloatRange(1),
        help="Candidates a node that --acceptance is for: trees have several.",
    ),
    click.option(
        "--drafted",
        default=DRAFT_VOCAB,
        type=click.IntRange(0),
        help="Learn to draft so many of the most frequent tokens; 0 is all.",
    ),
    click.option(
        "--reach", default=0.7, type=click.FloatRange(0, 1), help="How far a row counts less if drafts before fail."
    ),
    click.option("--seed", default=0),
    click.option(
        "--eval-prompts", type=_FILE, help="Held-out prompts to measure accepted length on (`turns` or `prompt`)."
    ),
    click.option("--eval-every", default=500, type=click.IntRange(1), help="Steps."),
    click.option("--device", default="cpu", help="cpu or cuda; several GPUs by torchrun, or --tensor-parallel."),
    click.option(
        "--tensor-parallel",
        default=1,
        type=click.IntRange(1),
        metavar="N",
        help="Divide MODEL among N processes, one per GPU; each trains on a part of every step's rows.",
    ),
    click.option("--dtype", default="auto", type=click.Choice(["auto", "fp32", "bf16"])),
    recipe_option("A run's options as a TOML file: each run leaves its own in OUT. Those that are given count more."),
    click.option("--dry-run", is_flag=True, help="Say what it would take, and stop."),
    click.option("-q", "--quiet", is_flag=True, help="Show no progress."),
)


_ONCE = ("out", "recipe", "dry-run", "quiet")  # what a recipe leaves out


@click.command()
@click.argument("model")
@_WHAT
@_DATA
@_TRAINING
@click.pass_context
def train(context: click.Context, /, model: str, dry_run: bool, quiet: bool, **options: Any) -> None:
    """Train MTP layers for MODEL, which stays as it is. The same command goes on with a run that was interrupted.

    \b
    Examples:
      mtp-engine train smollm2-135m-mtp3 --device cuda --prompts prompts.jsonl --out heads
      mtp-engine train ./my-llama --layers 2 --text book.txt --steps 500
      mtp-engine train --recipe heads/recipe.toml --seed 2 --out heads-2
      torchrun --nproc-per-node 2 -m mtp_engine.cli train ./my-llama --device cuda --out heads
      mtp-engine train ./MiMo-V2-Flash --device cuda --tensor-parallel 8 --out heads
      mtp-engine generate --model ./my-llama --mtp heads "Once upon a time"
    """
    check_files(context)
    job = make_job(model, options)
    if dry_run:
        return _show_plan(job)
    job = replace(job, recipe=recipe(context, without=_ONCE))
    first = os.environ.get("RANK", "0") == "0"
    try:
        _train(job, first=first, quiet=quiet or not first)
    except KeyboardInterrupt:
        if first:
            note(_interrupted(job))
        raise
    if first:
        click.echo(str(job.out))


def _train(job: "Job", *, first: bool, quiet: bool) -> None:
    with Waits(quiet=quiet) as waits:
        waits("starting", 0, None)
        from mtp_engine.training.run import Training, finished_steps

        if (steps := finished_steps(job)) is not None:
            if first:
                note(f"nothing is left to do: {job.out} holds a finished run of {steps} steps; delete it to train anew")
            return
        training = Training(job, waits)
    if training.resumed and first:
        note(f"going on after step {training.trainer.step}")
    with closing(training.run()) as reports:
        _follow(reports, job, quiet=quiet)


def _interrupted(job: "Job") -> str:
    """What is kept of a run that was interrupted, and the line that goes on."""
    from mtp_engine.training.run import saved_step

    step = saved_step(job.out)
    kept = f"step {step} is saved in {job.out}" if step is not None else f"no step is saved yet in {job.out}"
    return f"interrupted: {kept}; to go on:\n{job.command}"


def make_job(model: str, options: dict[str, Any]) -> "Job":
    from mtp_engine.training.dialogues import DialogueSettings, shares
    from mtp_engine.training.job import Job
    from mtp_engine.training.objective import Objective
    from mtp_engine.training.optimiser import Rates
    from mtp_engine.training.trainer import TrainSettings

    o = options
    out = o["out"] or Path(f"{Path(model).name}-mtp")
    if out.exists() and not out.is_dir():
        raise EngineError(f"{out} is no folder; choose another for --out")
    objective = Objective(
        o["decay"], o["target_temperature"], o["acceptance"], o["reach"], o["breadth"], drafted=o["drafted"]
    )
    rates = Rates(o["lr"], o["adam_lr"], warmup=min(100, max(1, o["steps"] // 10)), matrices=o["optimiser"])
    training = TrainSettings(
        o["steps"], o["batch_tokens"], objective, rates, o["seed"], evaluate_every=o["eval_every"],
        log_every=min(20, max(1, o["steps"] // 10)),
    )  # fmt: skip
    dialogues = DialogueSettings(
        shards=o["shards"], rows=o["rows"], length=o["row_length"], seed=o["seed"], prompts=o["prompts"],
        temperatures=shares(o["temperatures"]),
    )  # fmt: skip
    return Job(
        model, out, o["corpus"] or out / "data", o["layers"], o["chained"], o["window"], o["width"], _layers(o["features"]),
        o["fp8"], o["hidden"], o["init"], o["texts"], dialogues, training, o["eval_prompts"], device=o["device"],
        dtype=o["dtype"], tensor_parallel=o["tensor_parallel"], command=shlex.join(["mtp-engine", *sys.argv[1:]]),
    )  # fmt: skip


def _layers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(",") if part)
    except ValueError:
        raise EngineError(f"--features {text!r} is no list of layers, as in 9,18,26") from None


def _show_plan(job: "Job") -> None:
    from mtp_engine.training.run import plan

    found = plan(job)
    table = Table.grid(padding=(0, 2))
    time = "unknown for this device" if found.seconds is None else f"about {found.seconds / 60:.1f} minutes"
    for what, value in (
        ("trained weights", f"{found.parameters:,} ({found.parameters * 2 / 1e6:.1f} MB on disk)"),
        ("tokens", f"{found.tokens:,} in {job.settings.steps:,} steps"),
        ("arithmetic", f"{found.flops / 1e9:.2f} GFLOP a token, {found.flops * found.tokens / 1e15:.1f} PFLOP in all"),
        ("memory", f"about {found.memory / 2**30:.1f} GiB a device"),
        ("time of training", time),
        ("corpus", f"{job.corpus}: {'its shards are kept' if job.corpus.is_dir() else 'will be written first'}"),
    ):
        table.add_row(what, value)
    show(table, console())


def _follow(reports: Any, job: "Job", *, quiet: bool) -> None:
    """Show each report: a bar on a terminal, lines elsewhere. On a narrow one the losses give way to the time left."""
    out = console(stderr=True)
    losses = TextColumn("{task.description}", table_column=Column(ratio=1, no_wrap=True, overflow="ellipsis"))
    columns = (losses, BarColumn(bar_width=10), TextColumn("{task.completed}/{task.total}"), TimeRemainingColumn())
    with Progress(*columns, console=out, disable=quiet or not out.is_terminal, expand=True) as bar:
        task = bar.add_task("training", total=job.settings.steps)
        for report in reports:
            line = _line(report)
            bar.update(task, completed=report.step, description=line)
            if report.measured is not None or not (quiet or out.is_terminal):
                out.print(f"step {report.step}: {line}", highlight=False, soft_wrap=True)


def _line(report: "Report") -> str:
    loss = " ".join(f"{value:.3f}" for value in report.loss)
    measured = "" if report.measured is None else f", measured {report.measured:.3f}"
    return (
        f"loss {loss}, accepted length {report.lengths[-1]:.2f}{measured}, {report.tokens_per_s / 1000:,.0f}k tokens/s"
    )
