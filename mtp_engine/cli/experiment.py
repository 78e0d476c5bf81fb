"""`mtp-engine experiment`: run grids, ask recordings, report, compare, and examine a drafter."""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from mtp_engine.cli.output import console, note, one_line, show
from mtp_engine.cli.progress import Waits
from mtp_engine.config import DEFAULT_MODEL
from mtp_engine.errors import EngineError

if TYPE_CHECKING:
    from mtp_engine.experiments.analyse import Result

_OUT = click.Path(file_okay=False, path_type=Path)
_MANY = {  # options that may be given several times; their help
    "model": "Registered name, folder, or a server's model.", "mtp": "Folders of other MTP layers.",
    "engine": "ours, or openai:URL of a server.", "drafter": "mtp, ngram or root (plain decoding).",
    "tree": "chain:K, WxWxW or tree:N.", "verifier": "The rules of verifiers/VERIFIERS.md.",
    "candidates": "auto, noise, drawn or best.", "prompts": "builtin, builtin:code,math, or a file.",
}  # fmt: skip
_MANY_NUMBERS: dict[str, tuple[type, str]] = {
    "temperature": (float, "0 is greedy."),
    "draft-vocab": (int, "Tokens that MTP layers may propose; 0 is all."),
    "batch": (int, "Requests at a time."),
}
_ONE: dict[str, tuple[type, str]] = {
    "mode": (str, "run decodes for real, record notes what answers for any tree."),
    "dtype": (str, "auto, fp32, bf16 or int8."),
    "limit": (int, "Prompts of a set, spread over it; 0 is all."),
    "longest": (int, "Leave out prompts of more tokens."),
    "max-tokens": (int, "Of each answer."),
    "seed": (int, "Prompt i has the seed plus i."),
    "threads": (int, "Of the CPU; 0 is one per core."),
}


def _grid_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """The settings of a case. Without a value they are those of the grid file, or of `Case`."""
    for name, text in _MANY.items():
        function = click.option(f"--{name}", multiple=True, help=f"{text} May be repeated.")(function)
    for name, (kind, text) in _MANY_NUMBERS.items():
        function = click.option(f"--{name}", multiple=True, type=kind, help=f"{text} May be repeated.")(function)
    for name, (kind, text) in _ONE.items():
        function = click.option(f"--{name}", type=kind, default=None, help=text)(function)
    return function


@click.group()
def experiment() -> None:
    """Experiments on acceptance: run or record a grid, ask, report, compare; and examine a drafter.

    \b
    Examples:
      mtp-engine experiment run --model mimo-nano --tree chain:3 --tree tree:7 --limit 40 --out first
      mtp-engine experiment run --model mimo-nano --mode record --temperature 0 --temperature 1 --out recorded
      mtp-engine experiment ask recorded --tree 4x2x2
      mtp-engine experiment report recorded
      mtp-engine experiment doctor mimo-nano
    """


@experiment.command()
@click.argument("grid", required=False, type=click.Path(path_type=Path))
@click.option("--out", required=True, type=_OUT, help="Folder of the experiment; one that is there goes on.")
@click.option(
    "--device", "devices", multiple=True, help="cpu, cuda:0, ...; with several, each has a process of its own."
)
@_grid_options
def run(grid: Path | None, out: Path, devices: tuple[str, ...], **options: Any) -> None:
    """Decode all cases of a grid that are not done yet: the product of what GRID.toml and the options say.

    A grid file has the options' names, with lists where several values are to be tried: temperature = [0, 0.8].
    """
    from mtp_engine.experiments.grid import Grid, read_grid
    from mtp_engine.experiments.run import begin, run_cases
    from mtp_engine.experiments.store import extras

    extras()
    given = {name: list(value) if isinstance(value, tuple) else value for name, value in options.items()}
    settings = {**(read_grid(grid) if grid else {}), **{n: v for n, v in given.items() if v not in (None, [])}}
    planned = Grid.of(settings)
    for reason in planned.left_out:
        note(f"left out: {one_line(reason)}")
    found = begin(out, planned.cases, settings)
    with _Bar() as bar:
        if len(devices) > 1:
            from mtp_engine.experiments.workers import run_workers

            run_workers(found, devices, bar.tick)
        else:
            run_cases(found, devices[0] if devices else "auto", bar.waits, bar.tick)
    if busy := sum(found.runs(each) and not each.finished for each in found.folders):
        note(f"{busy} cases are still being decoded by another process")
    note(f"{len(found.folders)} cases in {out}; next: mtp-engine experiment report {out}")


@experiment.command()
@click.argument("folder", type=_OUT)
@click.option("--tree", "trees", multiple=True, help="chain:K, WxWxW or tree:N; may be repeated.")
@click.option("--verifier", "rule", default="match", help="match, rejection or block.")
@click.option("--candidates", type=click.Choice(["noise", "best", "drawn"]), default=None)
@click.option("--draft-vocab", default=0, help="One that was recorded; 0 is the largest.")
def ask(folder: Path, trees: tuple[str, ...], rule: str, candidates: str | None, draft_vocab: int) -> None:
    """The accepted length of any tree, rule and draft vocabulary, computed from what was recorded."""
    from mtp_engine.config import TreeShape
    from mtp_engine.experiments.analyse import computed, questions
    from mtp_engine.experiments.ask import Question, Recording
    from mtp_engine.experiments.store import Experiment, extras

    extras()
    folders = Experiment.open(folder).folders
    recorded = [each for each in folders if each.case.mode == "record" and each.parts("requests")]
    if not recorded:
        raise EngineError(f"{folder}: nothing was recorded here; run it with --mode record")
    found = []
    for each in recorded:
        recording = Recording.load(each)
        suits = candidates or ("noise" if rule == "match" else "drawn")
        asked = [
            Question(TreeShape.parse(tree), rule, suits, draft_vocab) for tree in trees or questions(recording.depth)
        ]
        found += [computed(each.case, recording, question) for question in asked]
    show(_lengths(found), console())


@experiment.command()
@click.argument("folder", type=_OUT)
@click.option("--out", type=_OUT, default=None, help="Where it goes.  [default: FOLDER/report]")
def report(folder: Path, out: Path | None) -> None:
    """One HTML file that needs nothing else, and its pictures and tables as PNG, Markdown and LaTeX."""
    from mtp_engine.experiments.report import write_report
    from mtp_engine.experiments.store import Experiment, extras

    extras()
    click.echo(write_report(Experiment.open(folder), out or folder / "report"))


@experiment.command()
@click.argument("first", type=_OUT)
@click.argument("second", type=_OUT)
def compare(first: Path, second: Path) -> None:
    """Paired differences of accepted length per prompt, by category, with 95% intervals: SECOND minus FIRST."""
    from mtp_engine.experiments.analyse import compare as differences
    from mtp_engine.experiments.analyse import results
    from mtp_engine.experiments.store import Experiment, extras

    extras()
    found = differences(results(Experiment.open(first)), results(Experiment.open(second)))
    table = Table("setting", "category", "prompts", "first", "second", "difference [95% interval]", "verdict")
    for row in found:
        numbers = (
            f"{row.first:.3f}",
            f"{row.second:.3f}",
            f"{row.difference.value:+.3f} [{row.difference.low:+.3f}, {row.difference.high:+.3f}]",
        )
        table.add_row(row.name, row.category, str(row.prompts), *numbers, row.verdict)
    show(table, console())


@experiment.command()
@click.argument("folder", type=_OUT)
@click.option("--tree", "trees", multiple=True, help="May be repeated.  [default: chain:3, tree:7, tree:15, tree:31]")
@click.option(
    "--batch", "batches", multiple=True, type=click.IntRange(1, 1024), help="May be repeated.  [default: 1 to 128]"
)
@click.option("--device", default="auto")
def costs(folder: Path, trees: tuple[str, ...], batches: tuple[int, ...], device: str) -> None:
    """Time steps of each tree at several batch sizes, for the report's predicted speed-up; minutes on a CPU."""
    from mtp_engine.experiments.costs import Costs, measure
    from mtp_engine.experiments.store import Experiment

    found = Experiment.open(folder)
    cases = {folder.case.model: folder.case for folder in found.folders if folder.case.engine == "ours"}
    known = Costs.load(folder)
    with Waits() as waits:
        for model, case in cases.items():
            shapes = trees or ("chain:3", "tree:7", "tree:15", "tree:31")
            measured = measure(case, shapes, batches or (1, 2, 4, 8, 16, 32, 64, 128), device, waits)
            known = known.with_measured(model, measured.seconds[model])
            known.save(folder)


@experiment.command()
@click.argument("model", default=DEFAULT_MODEL)
@click.option("--mtp", default=None, help="A folder of other MTP layers.")
@click.option("--device", default="auto")
def doctor(model: str, mtp: str | None, device: str) -> None:
    """Is this drafter healthy? Tries what could be wired wrongly and names what looks wrong; exit code 1 if something does."""
    from mtp_engine.experiments.doctor import examine

    begin = time.monotonic()
    with Waits() as waits:
        diagnosis = examine(model, mtp, device, waits)
    for line in diagnosis.lines:
        click.echo(one_line(line))
    note(f"{time.monotonic() - begin:.0f} s")
    if diagnosis.faults:
        raise click.exceptions.Exit(1)


def _lengths(results: "Sequence[Result]") -> Table:
    table = Table("setting", "prompts", "accepted length [95% interval]", "with loops", "loop steps")
    for each in results:
        length, whole = each.accepted_length(), each.accepted_length(loops=True)
        table.add_row(each.name, str(len(each.rows())), str(length), f"{whole.value:.3f}", f"{each.loop_share:.1%}")
    return table


class _Bar:
    """Prompts done of all cases, with the time left; on a terminal only."""

    def __init__(self) -> None:
        columns = BarColumn(bar_width=24), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn()
        out = console(stderr=True)
        self._bar = Progress(
            TextColumn("{task.description}"), *columns, console=out, transient=True, disable=not out.is_terminal
        )
        self._task = self._bar.add_task("prompts", total=None)
        self.waits = Waits()

    def __enter__(self) -> "_Bar":
        return self

    def __exit__(self, *_: object) -> None:
        self.waits.close()
        self._bar.stop()

    def tick(self, done: int, total: int) -> None:
        """Called after every prompt."""
        self.waits.close()
        self._bar.start()
        self._bar.update(self._task, completed=done, total=total)
