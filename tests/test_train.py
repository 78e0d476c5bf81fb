"""`mtp-engine train` from end to end, on a language that a tiny Llama learns in seconds."""

import errno
import gc
import io
import json
import math
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
import torch.nn.functional as F
from click.testing import CliRunner, Result
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tiny import LLAMA, write_llama, write_mtp
from tokenizers import decoders, models, pre_tokenizers
from torch import Tensor

from mtp_engine import Engine, EngineConfig, SamplingParams
from mtp_engine.cli.main import main
from mtp_engine.config import TreeShape
from mtp_engine.errors import EngineError
from mtp_engine.models import build, llama, loader
from mtp_engine.models.checkpoint import Checkpoint
from mtp_engine.models.decoder import Decoder
from mtp_engine.models.export import add_marks, write_tokenizer
from mtp_engine.models.fields import Fields
from mtp_engine.models.mtp import MTPModule
from mtp_engine.parallel.group import RankLost
from mtp_engine.training import checkpoint, heads, trainer
from mtp_engine.training.attention import SequenceAttention
from mtp_engine.training.data import begin_corpus, by_frequency, tokenizer_sha, write_shard
from mtp_engine.training.evaluate import accepted_length, held_out
from mtp_engine.training.heads import FirstValues, build_heads, plan_heads
from mtp_engine.training.job import Job
from mtp_engine.training.objective import Measures, Objective
from mtp_engine.training.optimiser import Optimiser, Rates
from mtp_engine.training.processes import Process
from mtp_engine.training.ranks import Alike
from mtp_engine.training.report import read_log
from mtp_engine.training.run import Training
from mtp_engine.training.trainable import TrainableWeights
from mtp_engine.training.trainer import Trainer, TrainSettings

CPU = torch.device("cpu")
NAMES = ("Anna", "Boris", "Clara", "Dmitri", "Emilia", "Fridolin", "Gustav", "Helena")
SLOTS = (  # a letter decides the word, so most of a sentence follows from what stands before it
    NAMES, ("bought", "caught", "painted", "followed"), ("a brown", "the clever", "one sleepy"),
    ("elephant", "crocodile", "butterfly", "squirrel", "hedgehog", "nightingale"),
    ("yesterday", "before lunch", "in the garden", "at the station"),
)  # fmt: skip
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SHAPE = {**LLAMA, "vocab_size": 264, "hidden_size": 64, "intermediate_size": 96, "head_dim": 16, "eos_token_id": 258}
ROW = 64  # tokens of a row of text


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """The engine takes all cores, which makes tiny tensors slow."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "cpu_count", lambda: 1)
        torch.set_num_threads(1)
        yield


# ---- the language, and a model that speaks it -----------------------------------------------------------------------


def sentences(rng: random.Random, count: int) -> str:
    return " ".join(" ".join(map(rng.choice, SLOTS)) + "." for _ in range(count))


def byte_tokenizer() -> tokenizers.Tokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = tokenizers.Tokenizer(models.BPE({symbol: index for index, symbol in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    add_marks(tokenizer)
    return tokenizer


def chats(rng: random.Random, count: int) -> str:
    turn = "<|im_start|>{}\n{}<|im_end|>\n"
    return "".join(
        turn.format("user", f"Tell me about {rng.choice(NAMES)}.") + turn.format("assistant", sentences(rng, 3))
        for _ in range(count)
    )


def teach(rows: Tensor, steps: int) -> dict[str, Tensor]:
    """The weights of a Llama after plain next-token training on rows [R, L]."""
    generator = torch.Generator().manual_seed(0)

    def draw(name: str, shape: tuple[int, ...]) -> Tensor:
        return torch.ones(shape) if "norm" in name else torch.randn(shape, generator=generator) * shape[-1] ** -0.5

    weights = TrainableWeights(draw, torch.float32, CPU)
    model = build.decoder(weights, llama.parse(Fields(SHAPE)), lambda *_: None)
    optimiser = Optimiser(weights, Rates(muon=2e-2, adam=1e-2, warmup=10))
    attention, positions = SequenceAttention([None] * len(model.blocks)), torch.arange(rows.shape[1]).expand(16, -1)
    for step in range(steps):
        tokens = rows[torch.randint(len(rows), (16,), generator=generator)]
        logits = F.linear(model.norm(model.forward(tokens, positions, attention)), model.head_weight)
        F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).backward()
        optimiser.step(step, steps)
    return {name: master.clone() for name, master in weights.named().items()}


@dataclass(frozen=True)
class World:
    """What every run needs."""

    model: Path
    text: Path
    prompts: Path  # .jsonl

    def train(self, out: Path, *options: Any, ok: bool = True) -> Result:
        result = invoke("train", self.model, "--out", out, *options)
        assert not ok or result.exit_code == 0, result.output
        return result

    def job(self, out: Path, **settings: Any) -> Job:
        """Twelve steps of 4 rows, in epochs of 10 steps, of a corpus that is shared by all of them."""
        given = {"steps": 12, "tokens": 4 * ROW, "log_every": 3, "evaluate_every": 100, "checkpoint_s": 1e9}
        return Job(
            str(self.model), out, self.text.parent / "corpus", layers=2,
            settings=TrainSettings(**{**given, "rates": Rates(2e-2, 1e-2, warmup=2), **settings}),
        )  # fmt: skip


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, _one_thread: None) -> World:
    root, rng, tokenizer = tmp_path_factory.mktemp("world"), random.Random(0), byte_tokenizer()
    made = World(root / "model", root / "text.txt", root / "prompts.jsonl")
    rows = [tokenizer.encode(chats(rng, 2)).ids[:192] for _ in range(600)]
    save_model(made.model, teach(torch.tensor(rows), steps=140), tokenizer)
    made.text.write_text(sentences(rng, 1200))
    made.prompts.write_text("".join(json.dumps({"prompt": f"Tell me about {name}."}) + "\n" for name in NAMES))
    small = torch.tensor(tokenizer.encode(sentences(rng, 80)).ids[: 40 * ROW], dtype=torch.int32).view(40, ROW)
    about = {"model": "m", "tokenizer": tokenizer_sha(made.model), "row_length": ROW, "vocab_size": 264}
    begin_corpus(root / "corpus", about)
    write_shard(root / "corpus", 0, small, torch.full((40, ROW), 2, dtype=torch.uint8))
    for index in range(1, 12):  # what a job asks for by default
        write_shard(root / "corpus", index, small[:0], torch.zeros(0, ROW, dtype=torch.uint8))
    return made


def save_model(folder: Path, weights: dict[str, Tensor], tokenizer: tokenizers.Tokenizer) -> None:
    write_tokenizer(folder, tokenizer, TEMPLATE)
    save_file(weights, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(SHAPE))


def invoke(*args: Any) -> Result:
    return CliRunner().invoke(main, [str(arg) for arg in args])


def assert_refused(result: Result, *words: str) -> None:
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    assert result.stderr.splitlines()[-1].startswith("error: ")
    assert result.stderr.count("error: ") == 1
    assert "Traceback" not in result.stderr
    for word in words:
        assert word in result.stderr


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def trained_weights(training: Training) -> dict[str, Tensor]:
    return {name: master.clone() for name, master in training.trainer.weights.named().items()}


# ---- learning ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def learnt(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("learnt") / "heads"
    options = ["--layers", 3, "--text", world.text, "--row-length", ROW, "--steps", 200, "--batch-tokens", 512]
    options += ["--lr", 4e-2, "--adam-lr", 2e-2, "--eval-prompts", world.prompts, "--eval-every", 100]
    result = world.train(out, *options)
    assert result.stdout == f"{out}\n"
    assert "step 200: loss " in result.stderr
    return out


def test_accepted_length_rises(world: World, learnt: Path) -> None:
    """By real speculative decoding: 1 is no draft accepted, 4 is all of a chain of 3."""
    engine = Engine.load(str(world.model), EngineConfig(drafter="root", attention="torch", dtype="fp32", max_batch=8))
    config = plan_heads(engine.model_config, 3, chained=True, window=128)
    generator = torch.Generator().manual_seed(1)
    weights = TrainableWeights(lambda _, shape: torch.randn(shape, generator=generator) * 0.1, torch.float32, CPU)
    prompts = held_out(engine, [json.loads(line)["prompt"] for line in world.prompts.open()])
    assert len(prompts) == len(NAMES)
    before = accepted_length(engine, build_heads(config, engine.model, weights), prompts, tree="chain:3", max_tokens=48)
    after = [row["measured"] for row in read_log(learnt) if row["measured"] is not None]
    assert 1 <= before < 1.1
    assert len(after) == 2
    assert after[-1] > 2


def test_what_is_measured_proposes_what_is_learnt(world: World, tmp_path: Path) -> None:
    """As in an engine: the scores of other tokens are not trained."""
    training = Training(world.job(tmp_path / "out", objective=Objective(drafted=30)))
    measured: list[MTPModule] = []

    def measure(module: MTPModule) -> float:
        measured.append(module)
        return 1.0

    list(training.trainer.run(measure))
    [module], ids = measured, by_frequency(training.corpus, 264)[:30]
    assert module.draft_ids.tolist() == ids.tolist()
    output = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
    for level in range(2):
        wanted = training.trainer.module.logits(level, output)[:, ids]
        torch.testing.assert_close(module.logits(level, output), wanted)


def test_trained_layers_are_lossless_and_of_use(world: World, learnt: Path) -> None:
    config = EngineConfig(tree=TreeShape.parse("chain:3"), max_batch=4)
    engine = Engine.load(str(world.model), config, mtp=str(learnt))
    chats = [[{"role": "user", "content": f"Tell me about {name}."}] for name in NAMES[:4]]
    for params in (SamplingParams(max_tokens=64), SamplingParams(max_tokens=64, temperature=1.0, seed=3)):
        answers = engine.generate(chats, params)
        for chat, answer in zip(chats, answers, strict=True):
            assert answer.token_ids == engine.plain(chat, params).output
        lengths = [answer.stats.mean_accepted_length or 0 for answer in answers]
        assert sum(lengths) / len(lengths) > 1.7


def test_a_dry_run_counts_the_weights_that_are_trained(world: World, learnt: Path) -> None:
    result = invoke("train", world.model, "--dry-run", "--layers", 3)
    card = (learnt / "README.md").read_text()
    count = next(line for line in card.splitlines() if line.startswith("| parameters")).split("|")[2].strip()
    assert f"{count} (" in result.stdout


def test_report_and_card_tell_what_the_log_does(world: World, learnt: Path) -> None:
    rows = read_log(learnt)
    page, card = ((learnt / name).read_text() for name in ("report.html", "README.md"))
    assert [row["step"] for row in rows][-1] == 200
    for key in ("loss", "lengths"):
        values = [value for row in rows for value in row[key]]
        assert f">{max(values):.3g}<" in page
        assert f">{min(values):.3g}<" in page
    curves = page.split("<polyline")[1:]
    assert [curve.split('"')[1].count(",") for curve in curves] == [len(rows)] * 6 + [2, len(rows)]
    for row in rows:
        line = f"| {row['step']} | {sum(row['loss']):.3f} | {row['lengths'][-1]:.2f} | {row['measured'] or 0:.2f} |"
        assert (line in card) == (row["measured"] is not None)
    assert "mtp-engine" in card
    about = json.loads((learnt / "config.json").read_text())
    assert (about["steps"], about["base_model"]) == (200, str(world.model))
    ids = load_file(learnt / "mtp.safetensors")["draft_token_ids"]
    counts = torch.bincount(torch.tensor(byte_tokenizer().encode(world.text.read_text()).ids), minlength=264)
    assert len(ids.unique()) == len(ids) == 264
    assert (counts[ids[:-1].long()] >= counts[ids[1:].long()]).all()


def test_layers_learn_from_the_model_s_own_dialogues(world: World, tmp_path: Path) -> None:
    out = tmp_path / "heads"
    options = ["--layers", 2, "--shards", 1, "--rows", 64, "--row-length", 192, "--steps", 60, "--batch-tokens", 1536]
    options += ["--lr", 2e-2, "--adam-lr", 1e-2, "--eval-prompts", world.prompts, "--prompts", world.prompts]
    world.train(out, "-q", *options)
    about = json.loads((out / "data" / "corpus.json").read_text())
    assert about["counts"]["answer"] > 2000
    assert read_log(out)[-1]["measured"] > 1.5


# ---- stopping and going on --------------------------------------------------------------------------------------------


def finish(job: Job) -> dict[str, Tensor]:
    training = Training(job)
    list(training.run())
    return trained_weights(training)


@pytest.fixture(scope="module")
def uninterrupted(world: World, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    return finish(world.job(tmp_path_factory.mktemp("whole") / "out"))


def stopped_after(job: Job, reports: int) -> Training:
    training = Training(job)
    run = training.run()
    for _ in range(reports):
        next(run)
    run.close()  # type: ignore[attr-defined]
    gc.collect()
    return training


def test_a_run_that_was_closed_goes_on_as_if_it_had_not_been(
    world: World, uninterrupted: dict[str, Tensor], tmp_path: Path
) -> None:
    job = world.job(tmp_path / "out")
    stopped_after(job, 2)
    stopped_after(job, 1)  # and once more
    training = Training(job)
    assert (training.resumed, training.trainer.step) == (True, 9)
    assert not same(trained_weights(training), uninterrupted)
    assert [report.step for report in training.run()] == [12]
    assert same(trained_weights(training), uninterrupted)
    assert not (job.out / "checkpoint").exists(), "a finished run needs none"
    assert [row["step"] for row in read_log(job.out)] == [3, 6, 9, 12]
    assert not Training(job).resumed, "a finished run begins anew"


def test_a_run_that_was_killed_goes_on_from_its_last_checkpoint(
    world: World, uninterrupted: dict[str, Tensor], tmp_path: Path
) -> None:
    job = world.job(tmp_path / "out", checkpoint_s=0)
    run = Training(job).run()
    for _ in range(3):
        next(run)
    copy = world.job(tmp_path / "copy", checkpoint_s=0)
    shutil.copytree(job.out, copy.out)  # what a kill leaves, since nothing is done at the end
    training = Training(copy)
    assert (training.resumed, training.trainer.step) == (True, 6)
    list(training.run())
    assert same(trained_weights(training), uninterrupted)
    assert [row["step"] for row in read_log(copy.out)] == [3, 6, 9, 12], "step 9 was run twice and counts once"


def test_the_command_says_that_it_goes_on(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = ["--layers", 2, "--data", world.text.parent / "corpus", "--steps", 20, "--batch-tokens", 4 * ROW]
    options += ["--eval-every", 5]
    real = trainer.distill_step

    def interrupted(*args: Any, **more: Any) -> Measures:
        monkeypatch.setattr(trainer, "distill_step", real)
        raise KeyboardInterrupt

    stopped_at = iter([None] * 9)
    monkeypatch.setattr(
        trainer, "distill_step", lambda *args: real(*args) if next(stopped_at, 1) is None else interrupted()
    )
    assert world.train(tmp_path / "out", *options, ok=False).exit_code == 130
    assert "going on after step 9\n" in world.train(tmp_path / "out", *options).stderr


@pytest.mark.parametrize(
    ("changes", "setting"),
    [({"steps": 13}, "steps"), ({"seed": 1}, "seed"), ({"rates": Rates(muon=1e-3)}, "rates")],
)
def test_another_run_s_checkpoint_is_refused(
    world: World, tmp_path: Path, changes: dict[str, Any], setting: str
) -> None:
    job = world.job(tmp_path / "out")
    stopped_after(job, 1)
    before = contents(job.out)
    with pytest.raises(EngineError, match=rf"another setting of {setting}: choose another --out"):
        Training(world.job(job.out, **changes))
    with pytest.raises(EngineError, match="another setting of layers"):
        Training(replace(job, layers=3))
    assert contents(job.out) == before


def test_another_model_s_checkpoint_is_refused(world: World, tmp_path: Path) -> None:
    job = world.job(tmp_path / "out")
    stopped_after(job, 1)
    weights = load_file(world.model / "model.safetensors")
    save_model(tmp_path / "other", {name: 1.1 * value for name, value in weights.items()}, byte_tokenizer())
    with pytest.raises(EngineError, match="choose another --out"):
        Training(replace(job, model=str(tmp_path / "other")))


def test_only_the_first_process_deletes_the_checkpoint(world: World, tmp_path: Path) -> None:
    """The others may be done before it has written its last one."""
    training = stopped_after(world.job(tmp_path / "out"), 1)
    mine = training.trainer
    first = FirstValues(Checkpoint(world.model), 1, 1.0)
    other = Trainer(
        mine.main, mine.config, first, mine.corpus, replace(mine.settings, tokens=2 * ROW * 4), mine.out, Process(1, 2)
    )
    other.forget()
    assert (tmp_path / "out" / "checkpoint" / "state.safetensors").is_file()


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


# ---- what goes wrong --------------------------------------------------------------------------------------------------


def poisoned(at: int, *, loss: bool) -> Callable[..., Measures]:
    """distill_step, whose call number `at` has gradients that are no numbers, and perhaps a loss that is none."""
    real, calls = trainer.distill_step, iter(range(1, 1000))

    def step(module: Any, *rest: Any) -> Measures:
        measures = real(module, *rest)
        if next(calls) != at:
            return measures
        module.layers[0].block.attention_norm.weight.grad.fill_(math.nan)
        return Measures(measures.sums * math.nan, measures.weight) if loss else measures

    return step


def test_a_loss_that_is_no_number_stops_the_run(
    world: World, uninterrupted: dict[str, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = world.job(tmp_path / "out", checkpoint_s=0, evaluate_every=6)
    training = Training(job)
    monkeypatch.setattr(trainer, "distill_step", poisoned(8, loss=True))
    with pytest.raises(EngineError, match=r"not a number at step 9; .*checkpoint keeps the last good state.*--lr"):
        list(training.run())
    monkeypatch.undo()
    gc.collect()
    again = Training(job)
    assert again.trainer.step == 6
    assert all(master.isfinite().all() for master in trained_weights(again).values())
    assert [row["step"] for row in read_log(job.out)] == [3, 6]
    list(again.run())
    assert same(trained_weights(again), uninterrupted)


def test_a_model_of_no_numbers_is_never_written(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The loss of a step is that of the weights before it: these may be lost while it is still a number."""
    job = world.job(tmp_path / "out", checkpoint_s=0)
    training = Training(job)
    monkeypatch.setattr(trainer, "distill_step", poisoned(6, loss=False))
    with pytest.raises(EngineError, match="not a number at step"):
        list(training.run())
    monkeypatch.undo()
    assert Training(job).trainer.step == 3


def test_ctrl_c_after_the_loss_was_lost_keeps_the_last_good_checkpoint(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = world.job(tmp_path / "out", checkpoint_s=0)
    training = Training(job)
    step = poisoned(4, loss=True)

    def interrupted(*args: Any) -> Measures:
        if training.trainer.step == 5:
            raise KeyboardInterrupt
        return step(*args)

    monkeypatch.setattr(trainer, "distill_step", interrupted)
    with pytest.raises((KeyboardInterrupt, EngineError)):
        list(training.run())
    monkeypatch.undo()
    assert Training(job).trainer.step == 3


FULL = [
    OSError(errno.ENOSPC, "No space left on device"),
    SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
]


def no_room(error: Exception) -> Callable[..., None]:
    """save_file on a disk that becomes full in the middle."""

    def save(tensors: dict[str, Tensor], path: Path, **metadata: object) -> None:
        Path(path).write_bytes(b"half")
        raise error

    return save


@pytest.mark.parametrize("error", FULL, ids=["os", "safetensors"])
@pytest.mark.parametrize("part", ["checkpoint", "layers"])
def test_a_full_disk(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, part: str
) -> None:
    job = world.job(tmp_path / "out", checkpoint_s=0)
    training = Training(job)
    run = training.run()
    for _ in range(3):
        report = next(run)
    training.write(report)
    kept = {
        **contents(job.out / "checkpoint"),
        str(job.out / "mtp.safetensors"): (job.out / "mtp.safetensors").read_bytes(),
    }
    monkeypatch.setattr(checkpoint if part == "checkpoint" else heads, "save_file", no_room(error))
    file = "state" if part == "checkpoint" else "mtp"
    with pytest.raises(
        EngineError, match=rf"{file}.safetensors cannot be written \(.*No space left.*free space"
    ) as found:
        list(run)
    assert "\n" not in str(found.value)
    monkeypatch.undo()
    if part == "checkpoint":
        assert {path: Path(path).read_bytes() for path in kept} == kept
    else:
        assert (job.out / "mtp.safetensors").read_bytes() == kept[str(job.out / "mtp.safetensors")]
    assert not list(job.out.rglob("*.tmp"))
    assert Training(job).resumed, "and the run goes on"


def test_a_full_disk_is_one_line(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not a second error when the run is cleared away."""
    lost: list[Any] = []
    monkeypatch.setattr(sys, "unraisablehook", lost.append)
    for module in (checkpoint, heads):
        monkeypatch.setattr(module, "save_file", no_room(FULL[0]))
    options = ["--layers", 1, "--data", world.text.parent / "corpus", "--steps", 4, "--batch-tokens", 4 * ROW, "-q"]
    result = world.train(tmp_path / "out", *options, ok=False)
    assert_refused(result, "cannot be written (No space left on device): free space and run again")
    del result
    gc.collect()
    assert not lost


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("family", ("QwenForCausalLM",)),
        ("tokenizer", ("tokenizer",)),
        ("init depth", ("1 chained layers", "--layers")),
        ("init missing", ("nowhere",)),
        ("init width", ("has shape",)),
        ("out is a file", ("is no folder", "--out")),
        ("no prompts", ("none.jsonl",)),
        ("prompts that are none", ("line 1",)),
        ("small corpus", ("--batch-tokens",)),
        ("features", ("--features",)),
        ("deep features", ("features",)),
        ("temperatures", ("--temperatures",)),
        ("no model", ("nothing-here",)),
        ("text that is none", ("UTF-8",)),
    ],
)
def test_what_a_user_can_mend_is_one_line(world: World, tmp_path: Path, case: str, words: tuple[str, ...]) -> None:
    model, options = world.model, ["--data", world.text.parent / "corpus", "--batch-tokens", 4 * ROW]
    out = tmp_path / "out"
    bad = tmp_path / "bad"
    bad.write_bytes(b"\xff\xfe\n")
    if case == "family":
        model = shutil.copytree(world.model, tmp_path / "model")
        (model / "config.json").write_text(json.dumps({**SHAPE, "architectures": ["QwenForCausalLM"]}))
    elif case == "tokenizer":
        begin_corpus(tmp_path / "data", {"model": "m", "tokenizer": "x", "row_length": ROW, "vocab_size": 264})
        write_shard(tmp_path / "data", 0, torch.zeros(9, ROW), torch.full((9, ROW), 2, dtype=torch.uint8))
        options = ["--data", tmp_path / "data", "--shards", 1]
    elif case.startswith("init"):
        options += ["--init", tmp_path / "nowhere", "--layers", 2]
        if case != "init missing":
            wide = {"intermediate_size": 200} if case == "init width" else {}
            attention = {
                "heads": 4,
                "kv_heads": 2,
                "qk_dim": 16,
                "v_dim": 16,
                "rope_dim": 16,
                "rope_theta": 1e4,
                "window": 7,
            }
            depth = 2 if case == "init width" else 1
            write_mtp(tmp_path / "nowhere", width=64, depth=depth, attention=attention, **wide)
    elif case == "out is a file":
        out = bad
    elif case == "no prompts":
        options = ["--prompts", tmp_path / "none.jsonl"]
    elif case == "prompts that are none":
        bad.write_text("{}\n")
        options = ["--prompts", bad, "--row-length", 256]
    elif case == "small corpus":
        options[-1] = 50 * ROW
    elif case == "features":
        options += ["--features", "one"]
    elif case == "deep features":
        options += ["--features", "7"]
    elif case == "temperatures":
        options += ["--temperatures", "0.5"]
    elif case == "no model":
        model = tmp_path / "nothing-here"
    else:
        options = ["--text", bad]
    assert_refused(invoke("train", model, "--out", out, "-q", *options), *words)
    assert not list(tmp_path.rglob("*.tmp"))


def test_other_texts_are_not_taken_for_those_of_before(world: World, tmp_path: Path) -> None:
    options = ["--steps", 1, "--layers", 1, "--batch-tokens", ROW, "--row-length", ROW, "-q"]
    world.train(tmp_path / "out", *options, "--text", world.text)
    (tmp_path / "other.txt").write_text(sentences(random.Random(7), 20))
    result = world.train(tmp_path / "out", *options, "--text", tmp_path / "other.txt", ok=False)
    assert_refused(result, "another")


# ---- several processes ------------------------------------------------------------------------------------------------


def on_one_core(rank: int) -> None:
    """This process has a core of its own, as far as there are so many: threads of two that meet only wait for each other."""
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[rank % len(cores)]})


def test_two_processes_learn_what_one_does(world: World, uninterrupted: dict[str, Tensor], tmp_path: Path) -> None:
    """The command itself, as torchrun starts it; gradients are added in another order, so the weights differ a little."""
    options = ["train", world.model, "--layers", 2, "--data", world.text.parent / "corpus", "--batch-tokens", 4 * ROW]
    options += ["--steps", 12, "--lr", 2e-2, "--adam-lr", 1e-2, "--out"]
    assert invoke(*options, tmp_path / "one", "-q").exit_code == 0
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "mtp_engine.cli", *map(str, options), str(tmp_path / "two")]
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            command, env={**os.environ, **shared, "RANK": rank, "LOCAL_RANK": rank},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=partial(on_one_core, int(rank)),
        )
        for rank in "01"
    ]  # fmt: skip
    done = [(*process.communicate(timeout=100), process.returncode) for process in processes]
    assert [code for *_, code in done] == [0, 0], done
    assert [out for out, *_ in done] == [f"{tmp_path / 'two'}\n", ""], "the first process speaks for all"
    one, two = (load_file(tmp_path / name / "mtp.safetensors") for name in ("one", "two"))
    first = FirstValues(Checkpoint(world.model), 1, 1.0)
    for name, value in one.items():
        if value.is_floating_point() and "norm" not in name:
            moved = (value.float() - first(name, tuple(value.shape))).norm()
            assert (two[name].float() - value.float()).norm() < 0.05 * moved, name
    assert [row["step"] for row in read_log(tmp_path / "two")] == list(range(1, 13))


def nearly(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """Equal but for sums in another order."""
    return all((a[name] - b[name]).norm() < 1e-4 * b[name].norm() for name in b)


def test_a_divided_model_s_layers_are_those_of_one_process(
    world: World, uninterrupted: dict[str, Tensor], tmp_path: Path
) -> None:
    """The run loses its other process on the way, says so, and goes on from its checkpoint."""
    job = world.job(tmp_path / "out", checkpoint_s=0.0)
    shared = replace(job, tensor_parallel=2)
    training = Training(shared)
    team = training.engine.team
    assert isinstance(team, Alike)
    [other] = team.processes
    run = training.run()
    begun = [next(run).step]
    os.kill(other, signal.SIGKILL)
    with pytest.raises(RankLost, match=rf"rank 1 \(process {other}\) was ended by SIGKILL; run the same command again"):
        list(run)
    again = Training(shared)
    assert again.resumed
    assert [*begun, *(report.step for report in again.run())] == [3, 6, 9, 12]
    assert nearly(trained_weights(again), uninterrupted)
    list(Training(replace(job, out=tmp_path / "one")).run())
    for row, alone in zip(read_log(job.out), read_log(tmp_path / "one"), strict=True):
        for key in ("loss", "lengths", "sampled"):
            assert row[key] == pytest.approx(alone[key], rel=1e-4), key


def test_a_divided_model_writes_and_measures_as_one_process_does(world: World, tmp_path: Path) -> None:
    """The command itself: the model's own dialogues, drafts of held-out prompts, and what is written down."""
    (tmp_path / "few.jsonl").write_text("".join(world.prompts.read_text().splitlines(keepends=True)[0]))
    options = ["--layers", 2, "--shards", 2, "--rows", 4, "--row-length", 64, "--steps", 4, "--batch-tokens", 256, "-q"]
    options += ["--eval-prompts", tmp_path / "few.jsonl", "--lr", 2e-2, "--adam-lr", 1e-2]
    for name, ranks in (("one", 1), ("two", 2)):
        world.train(tmp_path / name, *options, "--tensor-parallel", ranks)
    one, two = (tmp_path / name for name in ("one", "two"))
    for shard in sorted((one / "data").iterdir()):
        assert (two / "data" / shard.name).read_bytes() == shard.read_bytes(), shard.name
    [row], [alone] = (read_log(out)[-1:] for out in (two, one))
    assert row["measured"] == alone["measured"]
    assert row["loss"] == pytest.approx(alone["loss"], rel=1e-4)
    assert "tensor-parallel = 2\n" in (two / "recipe.toml").read_text()
    assert "divided among 2 processes" in (two / "README.md").read_text()


@pytest.mark.parametrize(
    ("options", "environment", "words"),
    [
        (["--tensor-parallel", 3], {}, ("tensor_parallel is 3", "does not divide", "4 attention heads")),
        (["--tensor-parallel", 3, "--dry-run"], {}, ("tensor_parallel is 3", "does not divide")),
        (["--tensor-parallel", 2], {"WORLD_SIZE": "2"}, ("unset WORLD_SIZE",)),
        (
            ["--tensor-parallel", 2], {"WORLD_SIZE": "4", "LOCAL_RANK": "0", "TORCHELASTIC_RUN_ID": "x"},
            ("torchrun started 4 processes", "tensor_parallel is 2"),
        ),
    ],
)  # fmt: skip
def test_what_a_divided_model_cannot_is_said_before_it_is_read(
    world: World, options: list[Any], environment: dict[str, str], words: tuple[str, ...], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(loader, "load_main", lambda *_, **__: pytest.fail("read"))
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert_refused(world.train(tmp_path / "out", "--text", world.text, "-q", *options, ok=False), *words)


# ---- what is written down ---------------------------------------------------------------------------------------------


def test_a_dry_run_writes_nothing(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = invoke("train", world.model, "--dry-run", "--layers", 2, "--steps", 50)
    assert result.exit_code == 0, result.output
    for words in ("trained weights", "2,073,600 in 50 steps", "GFLOP a token", "GiB a device", "will be written first"):
        assert words in result.stdout
    assert not list(tmp_path.iterdir())


def test_a_dry_run_for_a_gpu_needs_none(world: World, tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    result = invoke("train", world.model, "--dry-run", "--device", "cuda", "--out", tmp_path / "out")
    assert result.exit_code in (0, 2), result.output
    assert "internal error" not in result.output


def test_a_second_run_starts_a_log_of_its_own(world: World, tmp_path: Path) -> None:
    job = world.job(tmp_path / "out")
    finish(job)
    finish(world.job(job.out, steps=6))
    assert [row["step"] for row in read_log(job.out)] == [3, 6]


def test_help_is_fast_and_has_an_example() -> None:
    code = "import sys; from mtp_engine.cli.main import main\ntry: main()\nfinally: assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code, "train", "--help"], capture_output=True, timeout=60, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert "Examples:" in done.stdout


# ---- what a user sees of an interruption, an end, and a mistake -------------------------------------------------------


def few_steps(world: World, out: Path, *more: Any) -> list[Any]:
    corpus = world.text.parent / "corpus"
    return ["train", world.model, "--layers", 1, "--data", corpus, "--batch-tokens", 4 * ROW, "--out", out, *more]


def test_a_finished_run_is_not_trained_again(world: World, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert invoke(*few_steps(world, out, "--steps", 2)).exit_code == 0
    before = contents(out)
    again = invoke(*few_steps(world, out, "--steps", 2))
    assert (again.exit_code, again.stdout) == (0, f"{out}\n")
    assert "holds a finished run of 2 steps" in again.stderr
    assert contents(out) == before
    for change, word in ((["--steps", 3], "steps"), (["--steps", 2, "--layers", 2], "layers")):
        assert_refused(invoke(*few_steps(world, out, *change)), "finished run", word)


def test_what_is_varied_is_trained_and_loaded(world: World, tmp_path: Path) -> None:
    """Matrices by AdamW, and layers that read the main model's states after its norm."""
    found = {}
    for name, options in (("plain", []), ("adamw", ["--optimiser", "adamw"]), ("normed", ["--hidden", "post_norm"])):
        assert invoke(*few_steps(world, tmp_path / name, "--steps", 3, *options)).exit_code == 0
        found[name] = load_file(tmp_path / name / "mtp.safetensors")
        config = EngineConfig(device="cpu", dtype="fp32", tree=TreeShape.parse("tree:7"), threads=1)
        with Engine.load(str(world.model), config, mtp=str(tmp_path / name)) as engine:
            assert loader.read_mtp_config(tmp_path / name).hidden == ("post_norm" if name == "normed" else "pre_norm")
            params = SamplingParams(max_tokens=20, temperature=0.8, seed=1)
            [answer] = engine.generate(["Anna bought"], params)
            [plain] = engine.undrafted().generate(["Anna bought"], params)
            assert answer.token_ids == plain.token_ids
    for name in ("adamw", "normed"):
        assert not all(torch.equal(found[name][key], found["plain"][key]) for key in found["plain"])


def own_text(text: Path, folder: Path) -> list[Any]:
    return ["--text", text, "--row-length", ROW, "--data", folder / "corpus"]


def test_a_recipe_trains_the_same_layers_again(world: World, tmp_path: Path) -> None:
    first, again, other = (tmp_path / name for name in ("first", "again", "other"))
    assert (
        invoke(*few_steps(world, first, "--steps", 3, "--non-chained", *own_text(world.text, tmp_path))).exit_code == 0
    )
    recipe = ["train", "--recipe", first / "recipe.toml"]
    assert invoke(*recipe, "--out", again).exit_code == 0
    assert invoke(*recipe, "--out", other, "--seed", 1).exit_code == 0
    layers, same, different = (load_file(folder / "mtp.safetensors") for folder in (first, again, other))
    assert all(torch.equal(layers[name], same[name]) for name in layers)
    assert not all(torch.equal(layers[name], different[name]) for name in layers)
    assert (again / "recipe.toml").read_text() == (first / "recipe.toml").read_text()
    assert "--recipe recipe.toml" in (first / "README.md").read_text()


def test_a_recipe_holds_for_the_files_that_it_was_written_for(world: World, tmp_path: Path) -> None:
    text, recipe = tmp_path / "text.txt", tmp_path / "recipe.toml"
    text.write_text(world.text.read_text())
    assert invoke(*few_steps(world, tmp_path / "out", "--steps", 1, *own_text(text, tmp_path))).exit_code == 0
    shutil.copy(tmp_path / "out" / "recipe.toml", recipe)
    text.write_text(text.read_text() + "more")
    again = ["train", "--recipe", recipe, "--dry-run", "--out", tmp_path / "again"]
    assert_refused(invoke(*again), "text.txt", "--text")
    assert invoke(*again, "--text", text).exit_code == 0


@pytest.mark.parametrize(
    ("recipe", "words"),
    [
        ("model = ", ("no TOML",)),
        ("modle = 'x'", ("'modle'", "--help")),
        ("model = 'x'\nsteps = 0", ("steps", "x>=1")),
        ("steps = [1, 2]", ("one value",)),
        ("text = 'a.txt'", ("a list",)),
        ("model = 'x'\ntext = ['nowhere.txt']", ("nowhere.txt",)),
        ("steps = 3", ("MODEL",)),
        ("[steps]\nat = 3", ("one value",)),
    ],
)
def test_a_recipe_that_is_none_is_one_line(tmp_path: Path, recipe: str, words: tuple[str, ...]) -> None:
    (tmp_path / "recipe.toml").write_text(recipe)
    assert_refused(invoke("train", "--recipe", tmp_path / "recipe.toml", "--dry-run"), *words)


def test_a_folder_of_something_else_is_refused(world: World, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    assert_refused(invoke(*few_steps(world, tmp_path, "--steps", 2)), "not empty", "--out")
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_ctrl_c_says_what_is_saved_and_how_to_go_on(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, steps, real = tmp_path / "out", iter(range(3)), trainer.distill_step

    def interrupted(*arguments: Any) -> Measures:
        if next(steps, None) is None:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(trainer, "distill_step", interrupted)
    monkeypatch.setattr(sys, "argv", ["mtp-engine", "train", "MODEL", "--out", "OUT"])
    done = invoke(*few_steps(world, out, "--steps", 9))
    assert done.exit_code == 130
    assert f"interrupted: step 3 is saved in {out}; to go on:\nmtp-engine train MODEL --out OUT\n" in done.stderr
    monkeypatch.setattr(trainer, "distill_step", real)
    done = invoke(*few_steps(world, out, "--steps", 9))
    assert done.exit_code == 0
    assert "going on after step 3" in done.stderr


@pytest.mark.parametrize("rate", [float("nan"), float("inf"), 0.0, -1.0])
def test_rates_are_numbers(rate: float) -> None:
    for rates in ({"muon": rate}, {"adam": rate}):
        with pytest.raises(EngineError, match="must be above 0 and finite"):
            Rates(**rates)


def test_the_bar_keeps_its_time_at_80_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    from rich.console import Console

    from mtp_engine.cli import train
    from mtp_engine.training.trainer import Report

    screen = io.StringIO()
    shown = Console(width=80, force_terminal=True, file=screen)
    monkeypatch.setattr(train, "console", lambda **_: shown)
    report = Report(5, [1.234] * 8, [1.0] * 8, [1.0] * 8, 284_000.0, 10.0)
    job = Job("m", Path("out"), Path("data"), settings=TrainSettings(steps=900))
    train._follow([report], job, quiet=False)
    last = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", screen.getvalue()).strip().split("\r")[-1]
    assert re.fullmatch(r"loss 1.234 .*…  *━+ 5/900 \S+:\S+", last)
    assert len(last) <= 80


# ---- first values -----------------------------------------------------------------------------------------------------


def test_a_widened_ffn_computes_what_the_narrow_one_did(tmp_path: Path) -> None:
    folder, old = write_llama(tmp_path / "main"), write_mtp(tmp_path / "mtp")
    engine_main = build_main(folder)
    outputs = []
    for width in (48, 80):
        config = plan_heads(engine_main.config, 3, chained=True, window=7, width=width)
        first = FirstValues(Checkpoint(folder), 1, 1.0, earlier=Checkpoint(old))
        weights = TrainableWeights(first, torch.float32, CPU)
        module = build_heads(config, engine_main, weights)
        gate, down = (weights.named()[f"model.mtp.layers.1.mlp.{name}_proj.weight"] for name in ("gate", "down"))
        assert (len(gate), down.shape[1]) == (width, width)
        assert (gate[48:] != 0).all(), "new rows can learn"
        x, positions = torch.randn(1, 9, 32, generator=torch.Generator().manual_seed(2)), torch.arange(9)[None]
        with torch.no_grad():
            outputs.append(module.forward(1, x, x.flip(1), positions, SequenceAttention([7] * 3)))
    torch.testing.assert_close(*outputs, atol=1e-6, rtol=1e-6)


def test_first_values_are_the_last_block_s(tmp_path: Path) -> None:
    folder = write_llama(tmp_path / "main")
    config = plan_heads(build_main(folder).config, 2, chained=True, window=0)
    assert config.layer.attention.window is None
    weights = TrainableWeights(FirstValues(Checkpoint(folder), 1, 3.0), torch.float32, CPU)
    build_heads(config, build_main(folder), weights)
    found, main_weights = weights.named(), load_file(folder / "model.safetensors")
    for name in ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj", "input_layernorm"):
        assert torch.equal(found[f"model.mtp.layers.0.{name}.weight"], main_weights[f"model.layers.1.{name}.weight"])
    norm = "model.mtp.layers.1.pre_mlp_layernorm.weight"
    assert torch.equal(found[norm], main_weights["model.layers.1.post_attention_layernorm.weight"])
    assert torch.equal(found["model.mtp.layers.1.final_layernorm.weight"], main_weights["model.norm.weight"])
    assert torch.equal(found["model.mtp.layers.1.eh_proj.weight"][:, 32:], torch.eye(32))
    assert (found["model.mtp.layers.0.hnorm.weight"] == 3).all()


def build_main(folder: Path) -> Decoder:
    return loader.load_main(folder, torch.float32, CPU, lambda *_: None)
