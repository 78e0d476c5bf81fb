"""`python -m mtp_engine.training.nano`: train mimo-nano on the dialogues of a folder, export it in FP8, measure it.

What is kept between runs lies beside --out, in a folder with `.training` behind its name: tokenizer, corpus, log, and a
checkpoint until the model is exported.
"""

import json
import shutil
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import click
import tokenizers
import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from mtp_engine.config import DEFAULT_MODEL, EngineConfig
from mtp_engine.errors import EngineError
from mtp_engine.hub import hub
from mtp_engine.hub.files import atomically
from mtp_engine.models.checkpoint import read_json
from mtp_engine.models.export import write_json, write_model, write_tokenizer
from mtp_engine.models.mimo_v2_flash import MTP_NAMES
from mtp_engine.text.tokenizer import Tokenizer
from mtp_engine.training.checkpoint import append_log
from mtp_engine.training.nano.model import NanoModel, nano_fields
from mtp_engine.training.nano.report import evaluate, write_card
from mtp_engine.training.nano.run import LOG, STATE, Entry, NanoRun, NanoSettings
from mtp_engine.training.nano.text import TEMPLATE, NanoCorpus, build_corpus, read_dialogues, read_held_out
from mtp_engine.training.optimiser import Rates

_FACTS, _FIGURES = "facts.json", "figures.json"
_SAID_S = 10.0  # seconds between lines where there is no terminal


def corpus_in(work: Path, text: Path, writer: str) -> NanoCorpus:
    """The corpus that is kept in `work`, or one made of the dialogues in `text`, which model `writer` wrote."""
    if (corpus := NanoCorpus.load(work)) is None:
        corpus = build_corpus(read_dialogues(text, Tokenizer.load(hub.locate(writer).folder)), work)
    return corpus


def fields_for(work: Path, **changes: Any) -> dict[str, Any]:
    """config.json of a model with the tokenizer in `work`."""
    tokenizer = tokenizers.Tokenizer.from_file(str(work / "tokenizer.json"))
    ids = tokenizer.get_vocab()
    return nano_fields(len(ids), ids["<|im_end|>"], ids["<|endoftext|>"], **changes)


def train(run: NanoRun, console: Console) -> None:
    """To the end, with a bar or a line now and then; every report goes into the log, which a new run begins anew."""
    said = -_SAID_S
    if run.step == 0:
        (run.folder / LOG).unlink(missing_ok=True)
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("training", total=1.0)
        for entry in run.run():
            append_log(run.folder / LOG, asdict(entry))
            bar.update(task, completed=entry.share, description=_line(entry))
            if not console.is_terminal and (entry.seconds - said > _SAID_S or entry.share >= 1):
                console.print(_line(entry), highlight=False)
                said = entry.seconds


def _line(entry: Entry) -> str:
    loss = " ".join(f"{x:.3f}" for x in entry.loss)
    busiest = max((max(row) * len(row) for row in entry.load), default=1.0)
    speed = f"{entry.tokens_per_s / 1000:,.0f}k tokens/s"
    return f"step {entry.step}, {entry.share:.0%}: loss {loss}, {speed}, busiest expert x{busiest:.1f}"


def export(model: NanoModel, raw: Mapping[str, Any], work: Path, out: Path) -> None:
    """The model in FP8, with its tokenizer, into `out`: first beside it, then file by file, config.json last."""
    named = {name: master.cpu() for name, master in model.weights.named().items()}
    fresh = work / "export"
    write_model(fresh, raw, model.config, model.mtp, MTP_NAMES, lambda name, shape: named[name].view(shape))
    write_tokenizer(fresh, tokenizers.Tokenizer.from_file(str(work / "tokenizer.json")), TEMPLATE)
    try:
        out.mkdir(parents=True, exist_ok=True)
        for file in sorted(fresh.iterdir(), key=lambda file: file.name == "config.json"):
            file.replace(out / file.name)
    except OSError as error:
        raise EngineError(f"{out} cannot be written ({error.strerror}): the model lies in {fresh}") from error
    shutil.rmtree(fresh)


def facts_of(run: NanoRun, writer: str, out: Path) -> dict[str, str]:
    """What the card says about data and run."""
    last = json.loads((run.folder / LOG).read_text(encoding="utf-8").splitlines()[-1])
    seen = last["step"] * run.settings.rows * run.settings.length
    size = sum(file.stat().st_size for file in out.iterdir() if file.suffix in (".safetensors", ".json", ".jinja"))
    return {
        "parameters": f"{sum(master.numel() for master in run.model.weights.named().values()):,}",
        "size": f"{size:,} bytes",
        "text": f"{len(run.corpus.starts) - 1:,} dialogues, {len(run.corpus.tokens):,} tokens, written by {writer}",
        "trained on": f"{seen:,} tokens in {last['step']:,} steps, {last['seconds']:.0f} s",
        "last training loss (nats; main model, then MTP layers)": ", ".join(f"{x:.3f}" for x in last["loss"]),
    }


def make(
    text: Path, out: Path, work: Path, writer: str, settings: NanoSettings, device: torch.device, console: Console
) -> dict[str, str]:
    """Train and export; a run that was killed goes on. Returns what the card says of it."""
    begin = time.monotonic()
    corpus = corpus_in(work, text, writer)
    read_held_out(work)  # that there are some
    console.print(f"{len(corpus.tokens):,} tokens of text after {time.monotonic() - begin:.0f} s", highlight=False)
    raw = fields_for(work)
    model = NanoModel(raw, device, torch.bfloat16 if device.type == "cuda" else torch.float32, settings.seed)
    run = NanoRun(model, corpus, settings, work)
    if run.resume():
        console.print(f"going on from step {run.step}", highlight=False)
    train(run, console)
    export(model, raw, work, out)
    return facts_of(run, writer, out)


def measure(out: Path, work: Path, config: EngineConfig, reference: str) -> None:
    """Evaluate the exported model, write its card, and leave the figures in `work`."""
    figures, sample = evaluate(out, read_held_out(work), config, reference=reference)
    facts = read_json(work / _FACTS)
    write_card(out, facts.pop("command"), facts, figures, sample)
    found = {**facts, **asdict(figures)}
    _write(work / _FIGURES, found)
    click.echo(json.dumps(found, indent=1))


def _write(path: Path, value: Mapping[str, Any]) -> None:
    atomically(path, lambda fresh: write_json(fresh, value))


@click.command()
@click.option(
    "--text", type=click.Path(path_type=Path, file_okay=False), required=True, help="Dialogues that WRITER wrote."
)
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), required=True, help="Where the model goes.")
@click.option("--writer", default=DEFAULT_MODEL, show_default=True, help="Whose tokens the text is in.")
@click.option("--steps", type=click.IntRange(min=1), default=4000, show_default=True, help="How many.")
@click.option("--minutes", type=click.FloatRange(min=0), default=0.0, help="End after so much time, not after --steps.")
@click.option("--device", default="cuda", show_default=True)
@click.option("--muon", type=float, default=6e-3, show_default=True, help="Rate of the matrices.")
@click.option("--adam", type=float, default=4e-3, show_default=True, help="Rate of the rest.")
@click.option("--rows", type=click.IntRange(min=1), default=128, show_default=True, help="Of 512 tokens, in a step.")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--attention", type=click.Choice(["torch", "exact"]), default="torch", show_default=True,
              help="What measures: torch in fp32, or the engine's kernels in bf16.")  # fmt: skip
@click.option("--reference", default="", help="A model whose bits per byte on the held-out text are measured, too.")
@click.option("--measure-only", is_flag=True, help="Measure OUT again, and write its card anew.")
def main(
    text: Path, out: Path, writer: str, steps: int, minutes: float, device: str, muon: float, adam: float, rows: int,
    seed: int, attention: Literal["torch", "exact"], reference: str, measure_only: bool,
) -> None:  # fmt: skip
    """Train mimo-nano, export it in FP8 to OUT, and measure it. The same command goes on after a kill."""
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise EngineError("this torch sees no NVIDIA GPU: use --device cpu, where it takes days")
    console, work = Console(stderr=True), out.with_name(f"{out.name}.training")
    rates = Rates(muon, adam, warmup=100, decay=0.1)
    settings = NanoSettings(steps=steps, minutes=minutes, rows=rows, seed=seed, rates=rates)
    if not measure_only:
        facts = make(text, out, work, writer, settings, torch.device(device), console)
        _write(work / _FACTS, {"command": " ".join(["python -m mtp_engine.training.nano", *sys.argv[1:]]), **facts})
    dtype: Literal["fp32", "bf16"] = "fp32" if attention == "torch" else "bf16"
    config = EngineConfig(device=device, attention=attention, dtype=dtype, max_batch=32, max_context=1024)
    measure(out, work, config, reference)
    (work / STATE).unlink(missing_ok=True)


def run_command() -> None:
    """`main`, with errors as one line and the exit codes of `mtp-engine`."""
    try:
        main(standalone_mode=False)
    except click.Abort:
        click.echo("interrupted: the same command goes on from the last checkpoint", err=True)
        raise SystemExit(130) from None
    except (EngineError, click.ClickException) as error:
        click.echo(f"error: {error}", err=True)
        raise SystemExit(2) from None
