"""What each choice in training MTP layers gives: variants that differ in one thing from a base, and paired differences.

    python bench/ablations.py train bench/grids/ablations.toml --out /tmp/ablations --device cuda --seconds 200
    python bench/ablations.py table bench/grids/ablations.toml --out /tmp/ablations

The plan is a recipe (`mtp-engine train --recipe`) with a table of variants, each with the options in which it differs from the
base. All variants of one corpus are trained side by side on the same batches: what the main model says of a batch is computed
once for all. Then one pass over the main model's answers to held-out prompts says what each set of layers would have drafted
(training/held_out.py), and `table`, which needs the extra `experiments`, compares prompt by prompt. What is done is kept in
--out, and not done again; --seconds shortens the training of a corpus's variants, all alike, to what fits.
"""

import json
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from common import COUNT, SOME, Commit, conditions, require_commit, run
from rich.console import Console
from rich.table import Table

from mtp_engine import Engine, EngineError, TreeShape
from mtp_engine.cli.train import make_job
from mtp_engine.cli.train import train as command
from mtp_engine.experiments.analyse import ALL, Result, compare, computed
from mtp_engine.experiments.ask import Question, Recording
from mtp_engine.experiments.grid import Case
from mtp_engine.experiments.prompts import encode, read_prompts
from mtp_engine.experiments.store import extras
from mtp_engine.hub.files import read_toml
from mtp_engine.training import data
from mtp_engine.training.data import Corpus, by_frequency, in_loop
from mtp_engine.training.heads import save_heads
from mtp_engine.training.held_out import Answers, rank, write_answers
from mtp_engine.training.job import Job
from mtp_engine.training.objective import teach
from mtp_engine.training.processes import Process
from mtp_engine.training.run import load_main, make_trainer, write_corpus
from mtp_engine.training.trainer import Trainer

BASE = "base"
SIZES = (8192, 16384)  # draft vocabularies that are asked about
_DATA = {"shards", "rows", "row-length", "temperatures", "prompts", "text"}  # options that change what is written
_COMPILING, _TIMED = 2, 12  # steps that are not timed, and those that say how long the others take
_SHOWN = 50

Variants = dict[str, dict[str, Any]]


def read_plan(plan: Path, only: tuple[str, ...]) -> tuple[dict[str, Any], Variants]:
    """The base's options, and the variants to be tried, the base first."""
    common = read_toml(plan, "a recipe with variants")
    variants = {BASE: {}, **common.pop("variants")}
    if unknown := [name for name in only if name not in variants]:
        raise click.UsageError(f"{plan} has no variant {unknown[0]!r}: {', '.join(variants)}")
    return common, {name: changes for name, changes in variants.items() if not only or name in {*only, BASE}}


def job_of(recipe: Mapping[str, Any], out: Path, device: str) -> Job:
    """As `mtp-engine train` understands the options."""
    arguments = [str(recipe["model"]), "--out", str(out), "--device", device]
    for name, value in recipe.items():
        if name == "chained":
            arguments.append("--chained" if value else "--non-chained")
        elif value is True:
            arguments.append(f"--{name}")
        elif name != "model" and value is not False:
            arguments += [
                part for each in (value if isinstance(value, list) else [value]) for part in (f"--{name}", str(each))
            ]
    options = command.make_context("train", arguments).params
    return make_job(options.pop("model"), options)


def groups(common: Mapping[str, Any], variants: Variants) -> dict[str, Variants]:
    """Variants by the name of their corpus, which is that of the first that asks for such data."""
    names: dict[str, str] = {}
    found: dict[str, Variants] = {}
    for name, changes in variants.items():
        asked = {option: value for option, value in changes.items() if option in _DATA}
        corpus = names.setdefault(json.dumps(asked, sort_keys=True), f"data-{name}" if asked else "data")
        found.setdefault(corpus, {})[name] = changes
    return found


def learn(trainers: Mapping[str, Trainer], seconds: float, log: Path) -> None:
    """All of them on the same batches, in as many steps as the first has, or as fit into `seconds` (if that is not 0)."""
    first, begin = next(iter(trainers.values())), time.monotonic()
    steps, kept = first.settings.steps, {name: [] for name in trainers}
    features = tuple(sorted({each for trainer in trainers.values() for each in trainer.config.features}))
    head = next((each.head for each in trainers.values() if each.settings.objective.drafted), first.head)
    step, compiled = 0, 0.0
    while step < steps:
        lesson = teach(first.main, *first.batch(step), head, features, keep=len(trainers) > 1)
        for name, trainer in trainers.items():
            kept[name].append(trainer.learn(step, lesson))
        step += 1
        if step == _COMPILING:
            compiled = _elapsed(begin, first)
        if step == _TIMED and seconds:  # the warm-up of the rates is not over: they fall to zero at the new end
            each = (_elapsed(begin, first) - compiled) / (step - _COMPILING)
            steps = min(steps, max(step, int((seconds - compiled) / each)))
            for trainer in trainers.values():
                trainer.settings = replace(trainer.settings, steps=steps)
        if step % _SHOWN == 0 or step == steps:
            taken, lengths = _elapsed(begin, first), {}
            for name, measures in kept.items():
                sums = sum(each.sums for each in measures)
                lengths[name] = round(1 + float((sums[:, 3] / sums[:, 1].clamp(min=1)).sum()), 4)
                measures.clear()
            entry = {"step": step, "steps": steps, "seconds": round(taken, 1), "trained": lengths}
            click.echo(json.dumps(entry), err=True)
            with log.open("a") as file:
                file.write(json.dumps(entry) + "\n")


def _elapsed(begin: float, trainer: Trainer) -> float:
    if trainer.main.embedding.is_cuda:
        torch.cuda.synchronize()
    return time.monotonic() - begin


def held_out(engine: Engine, out: Path, o: Mapping[str, Any]) -> dict[float, Answers]:
    """The answers by temperature, written once. What they are of is kept beside them."""
    items = encode(engine.encode, read_prompts(o["prompts"], o["limit"]), o["longest"])
    about = [{"prompt": each.index, "id": each.item.id, "category": each.item.category} for each in items]
    (out / "prompts.json").write_text(json.dumps(about))
    found = {}
    for temperature in o["temperatures"]:
        path = out / f"answers-{temperature}.npz"
        if not path.is_file():
            answers = write_answers(
                engine.model, engine.tokenizer, [each.tokens for each in items], temperature,
                max_tokens=o["max_tokens"], progress=lambda *_: None,
            )  # fmt: skip
            np.savez_compressed(path, **{name: value.numpy() for name, value in vars(answers).items()})
        found[temperature] = _answers(path)
    return found


def _answers(path: Path) -> Answers:
    with np.load(path) as kept:
        return Answers(**{name: torch.from_numpy(kept[name]) for name in kept.files})


@torch.no_grad()
def keep(
    trainers: Mapping[str, Trainer], jobs: Mapping[str, Job], answers: Mapping[float, Answers], main: Any, out: Path
) -> None:
    """The layers, and how they rank the answers' tokens."""
    frequent = by_frequency(next(iter(trainers.values())).corpus, main.vocab_size)
    modules = [trainer.module for trainer in trainers.values()]
    ranks = {temperature: rank(main, modules, each, frequent, SIZES) for temperature, each in answers.items()}
    for index, (name, trainer) in enumerate(trainers.items()):
        about = {"name": name, "base_model": jobs[name].model, "steps": trainer.settings.steps}
        named = trainer.weights.named()
        save_heads(out / "layers" / name, trainer.config, named, frequent[: SIZES[-1]].int(), about, fp8=jobs[name].fp8)
        arrays = {}
        for temperature, found in ranks.items():
            for kind in ("noise", "best"):
                arrays[f"{kind}-{temperature}"] = getattr(found[index], kind).numpy().astype(np.int16)
        np.savez_compressed(out / "ranks" / f"{name}.npz", **arrays)


@click.group()
@click.pass_context
def main(context: click.Context) -> None:
    commit = require_commit()
    context.obj = commit


_PLAN = click.argument("plan", type=click.Path(exists=True, dir_okay=False, path_type=Path))
_OUT = click.option("--out", required=True, type=click.Path(file_okay=False, path_type=Path))
_ONLY = click.option("--only", multiple=True, help="These variants, and the base.")


@main.command()
@_PLAN
@_OUT
@_ONLY
@click.option("--prompts", default="builtin", show_default=True, help="Held-out ones, as `experiment run` takes them.")
@click.option("--begin-with", type=click.Path(exists=True, dir_okay=False), help="Prompts that dialogues begin with.")
@click.option("--limit", default=0, type=COUNT, show_default=True)
@click.option("--longest", default=1024, type=SOME, show_default=True, help="Tokens of a prompt.")
@click.option("--max-tokens", default=128, type=SOME, show_default=True)
@click.option("--temperature", "temperatures", multiple=True, type=float, default=[0.0, 1.0], show_default=True)
@click.option(
    "--seconds", default=0.0, show_default=True, help="Of training for the variants of a corpus; 0: all steps."
)
@click.option("--device", default="cpu", show_default=True)
@click.pass_obj
def train(commit: Commit, plan: Path, out: Path, only: tuple[str, ...], seconds: float, device: str, **o: Any) -> None:
    """Train the variants, and note how they rank the tokens of held-out answers."""
    begin = time.monotonic()

    def say(what: str) -> None:
        click.echo(f"{time.monotonic() - begin:7.1f} s  {what}", err=True)

    common, variants = read_plan(plan, only)
    common |= {"prompts": o["begin_with"]} if o["begin_with"] else {}
    for folder in ("layers", "ranks"):
        (out / folder).mkdir(parents=True, exist_ok=True)
    left = {name: each for name, each in variants.items() if not (out / "ranks" / f"{name}.npz").is_file()}
    folder, engine = load_main(job_of(common, out / "layers" / BASE, device), device)
    say("loaded")
    answers = held_out(engine, out, o)
    say(f"{sum(len(each.tokens) for each in answers.values())} held-out answers")
    (out / "conditions.json").write_text(json.dumps({"plan": common, **o, **conditions(commit, device)}))
    for corpus_name, group in groups(common, variants).items():
        group = {name: each for name, each in group.items() if name in left}
        if not group:
            continue
        jobs = {
            name: job_of({**common, "data": out / corpus_name, **changes}, out / "layers" / name, device)
            for name, changes in group.items()
        }
        job = next(iter(jobs.values()))
        write_corpus(job, folder, engine, Process(), lambda *_: None)
        corpus = Corpus.load(job.corpus, tokenizer_sha=data.tokenizer_sha(folder))
        say(f"{corpus_name}: {corpus.tokens.numel():,} tokens")
        trainers = {name: make_trainer(each, folder, engine.model, corpus, Process()) for name, each in jobs.items()}
        learn(trainers, seconds, out / f"{corpus_name}.jsonl")
        say(f"{corpus_name}: trained {', '.join(group)}")
        keep(trainers, jobs, answers, engine.model, out)
        say(f"{corpus_name}: ranked")
        trainers.clear()  # the next corpus needs the memory


def results_of(out: Path, name: str, trees: tuple[str, ...], vocabulary: int) -> Iterator[Result]:
    """What a variant's ranks say, per temperature and tree."""
    _, _, pandas = extras()
    about = pandas.DataFrame(json.loads((out / "prompts.json").read_text()))
    about["vocabularies"] = [list(SIZES)] * len(about)
    with np.load(out / "ranks" / f"{name}.npz") as ranks:
        for path in sorted(out.glob("answers-*.npz")):
            answers, temperature = _answers(path), path.stem.removeprefix("answers-")
            texts = [row[b:e].tolist() for row, b, e in zip(answers.tokens, answers.begins, answers.ends, strict=True)]
            columns = {
                "rank": ranks[f"noise-{temperature}"], "rank_best": ranks[f"best-{temperature}"],
                "loop": np.concatenate([in_loop(text) for text in texts]),
            }  # fmt: skip
            begins = np.concatenate([[0], answers.lengths.numpy().cumsum()])
            if len(columns["rank"]) != begins[-1]:
                raise EngineError(f"{out / 'ranks' / name}.npz is of other answers: delete it and train again")
            requests = about.assign(tokens=answers.lengths.numpy())
            recording = Recording(requests, float(temperature), begins, columns)
            case = Case(mode="record", temperature=float(temperature), mtp=name)
            for tree in trees:
                yield computed(case, recording, Question(TreeShape.parse(tree), vocabulary=vocabulary))


@main.command()
@_PLAN
@_OUT
@_ONLY
@click.option("--tree", "trees", multiple=True, default=["chain:3", "4x2x2"], show_default=True)
@click.option("--vocabulary", default=SIZES[-1], type=click.Choice(SIZES), show_default=True)
@click.option("--category", default=ALL, show_default=True, help="Of prompts.")
@click.option("--against", default=BASE, show_default=True, help="The variant that others are compared with.")
def table(
    plan: Path, out: Path, only: tuple[str, ...], trees: tuple[str, ...], vocabulary: int, category: str, against: str
) -> None:
    """Compare what `train` has noted with the base, or with another variant, prompt by prompt."""
    _, variants = read_plan(plan, only)
    shown = Table("variant", "setting", "base", "variant's", "difference [95% interval]", "verdict")
    base, found = list(results_of(out, against, trees, vocabulary)), []
    for name, changes in variants.items():
        if name == against or not (out / "ranks" / f"{name}.npz").is_file():
            continue
        for row in compare(base, list(results_of(out, name, trees, vocabulary))):
            if row.category == category:
                apart = row.difference
                shown.add_row(name, row.name, f"{row.first:.3f}", f"{row.second:.3f}",
                              f"{apart.value:+.3f} [{apart.low:+.3f}, {apart.high:+.3f}]", row.verdict)  # fmt: skip
                found.append({"variant": name, "against": against, "changes": changes, "setting": row.name,
                              "category": category, "prompts": row.prompts, "base": row.first, "variants": row.second,
                              "difference": apart.value, "interval": [apart.low, apart.high]})  # fmt: skip
    Console(stderr=True, width=150).print(shown)
    about = json.loads((out / "conditions.json").read_text())
    click.echo(json.dumps({"bench": "ablations", "vocabulary": vocabulary, "found": found, **about}))


if __name__ == "__main__":
    run(main)
