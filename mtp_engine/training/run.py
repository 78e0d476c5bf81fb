"""From a model's name to a folder of trained MTP layers: data, training, evaluation, and what is written down."""

import json
import os
from collections.abc import Generator, Sequence
from contextlib import closing
from dataclasses import asdict
from hashlib import sha256
from pathlib import Path
from typing import Any, final

import torch
import torch.distributed as dist
from torch import Tensor

from mtp_engine.config import DRAFT_VOCAB, EngineConfig, ModelConfig, MTPConfig
from mtp_engine.engine import Engine, FormTeam
from mtp_engine.errors import EngineError
from mtp_engine.hub import hub
from mtp_engine.hub.files import atomically
from mtp_engine.models.checkpoint import Checkpoint, read_json
from mtp_engine.models.decoder import Decoder
from mtp_engine.models.loader import read_config, read_mtp_config
from mtp_engine.models.mtp import MTPModule
from mtp_engine.parallel.shard import check_divides
from mtp_engine.protocols import Progress
from mtp_engine.team import form_team
from mtp_engine.training import data
from mtp_engine.training.attention import sequence_hidden
from mtp_engine.training.checkpoint import append_log, saved_place
from mtp_engine.training.data import Corpus
from mtp_engine.training.dialogues import write_dialogues
from mtp_engine.training.evaluate import accepted_length, held_out
from mtp_engine.training.heads import FirstValues, plan_heads, save_heads
from mtp_engine.training.job import Job
from mtp_engine.training.plan import RunPlan, device_name, plan_run
from mtp_engine.training.processes import Process, join_processes, own_device
from mtp_engine.training.prompts import read_prompts
from mtp_engine.training.ranks import bring_together, rank_of
from mtp_engine.training.report import RECIPE, write_card, write_report
from mtp_engine.training.trainer import KEPT, LOG, STATE, Report, Trainer

_FINISHED = "finished.json"  # what was trained
_EVALUATED = 24  # held-out prompts that are decoded at a time


@final
class Training:
    """A job that is set up: `run` trains, and leaves the layers, a report and a card in `job.out`."""

    def __init__(self, job: Job, progress: Progress = hub.silent, form: FormTeam | None = None) -> None:
        """Loads the model, writes what the corpus lacks, makes the layers. form: brings together those who share the model, where
        it is not this process that starts them. Raises EngineError."""
        self.job = job
        if job.tensor_parallel > 1:
            form = form or (lambda config, files: bring_together(job, config, files))
            self.folder, self.engine = load_main(job, job.device, progress, form)
            self.process = rank_of(self.engine.team)
        else:
            device = own_device(job.device)
            self.process = join_processes(device)
            self.folder, self.engine = load_main(job, device, progress)
        try:
            self._prepare(progress)
        except BaseException:
            self.engine.team.close()
            raise

    def _prepare(self, progress: Progress) -> None:
        job = self.job
        self.config = planned(job, read_config(self.folder))
        write_corpus(job, self.folder, self.engine, self.process, progress)
        self.corpus = Corpus.load(job.corpus, tokenizer_sha=data.tokenizer_sha(self.folder))
        self.trainer = make_trainer(job, self.folder, self.engine.model, self.corpus, self.process)
        self.resumed = self.trainer.resume()

    def run(self) -> Generator[Report, None, None]:
        """Reports as training goes on. At the end, and at every evaluation, the layers are written."""
        try:
            yield from self._run()
        finally:
            self.engine.team.close()

    def _run(self) -> Generator[Report, None, None]:
        prompts = self._prompts()

        def measure(module: MTPModule) -> float:
            return accepted_length(self.engine, module, prompts, tree=f"chain:{self.config.depth}", max_tokens=64)

        if not (self.resumed or self.process.rank):
            for name in (LOG, _FINISHED):
                (self.job.out / name).unlink(missing_ok=True)  # of a run before
        try:
            with closing(self.trainer.run(measure if prompts else None)) as reports:
                for report in reports:
                    if not self.process.rank:
                        append_log(self.job.out / LOG, asdict(report))
                        if report.measured is not None or report.step == self.job.settings.steps:
                            self.write(report)
                    yield report
        except torch.OutOfMemoryError as error:
            text = str(error).splitlines()[0]
            raise EngineError(f"the GPU's memory is full: lower --batch-tokens and run again ({text})") from error
        if not self.process.rank:
            atomically(self.job.out / _FINISHED, lambda path: path.write_text(json.dumps(_described(self.job))))
        self.trainer.forget()
        if dist.is_initialized():
            dist.destroy_process_group()

    def write(self, report: Report) -> None:
        """The layers as they are, with the report and the card."""
        job, info = self.job, self.corpus.info
        about = {"name": job.out.name, "base_model": job.model, "steps": report.step}
        learnt = min(job.settings.objective.drafted or DRAFT_VOCAB, DRAFT_VOCAB)
        draft_ids = data.by_frequency(self.corpus, self.engine.model.vocab_size)[:learnt].int()
        save_heads(job.out, self.config, self.trainer.weights.named(), draft_ids, about, fp8=job.fp8)
        write_report(job.out, f"MTP layers for {job.model}")
        seen = report.step * job.settings.tokens
        facts = {
            "layers": f"{self.config.depth}, {'chained' if self.config.chained else 'each on the main hidden state'}",
            "window": self.config.layer.attention.window or "all keys",
            "parameters": f"{sum(m.numel() for m in self.trainer.weights.named().values()):,}",
            "corpus": f"{self.corpus.tokens.numel():,} tokens, {info.get('counts', {}).get('answer', 0):,} of them answers",
            "trained on": f"{seen:,} tokens in {report.step} steps",
            "speed": f"{report.tokens_per_s:,.0f} tokens/s on {self.process.world} device(s)",
        }
        if job.tensor_parallel > 1:
            facts["main model"] = f"divided among {job.tensor_parallel} processes"
        if job.recipe:
            atomically(job.out / RECIPE, lambda path: path.write_text(job.recipe, encoding="utf-8"))
        write_card(job.out, job.model, job.command, facts, recipe=bool(job.recipe))

    def _prompts(self) -> list[list[int]]:
        if self.job.evaluation is None or not self.process.decodes:
            return []
        texts = read_prompts(self.job.evaluation)[: self.job.evaluated]
        if not (found := held_out(self.engine, texts)):
            raise EngineError(f"{self.job.evaluation}: every prompt is longer than 400 tokens: give shorter ones")
        return found


def load_main(
    job: Job, device: str, progress: Progress = hub.silent, form: FormTeam = form_team
) -> tuple[Path, Engine]:
    """The main model's folder, and an engine that holds it unfused. form: see Engine.load."""
    config = EngineConfig(
        drafter="root",
        attention="torch",
        device=device,
        dtype="fp32" if job.dtype == "auto" and device == "cpu" else job.dtype,  # int8 is for decoding
        max_batch=_EVALUATED,
        kv_tokens=_EVALUATED * 1024,
        tensor_parallel=job.tensor_parallel,
    )
    folder = hub.locate(job.model, progress=progress).folder
    return folder, Engine.load(job.model, config, progress=progress, form=form)


def write_corpus(job: Job, folder: Path, engine: Engine, process: Process, progress: Progress) -> None:
    """What the job's corpus lacks, by all processes together. folder: the model's. Raises EngineError."""
    if job.texts:
        if not process.rank:
            _write_texts(job, folder, engine)
    elif not all(data.has_shard(job.corpus, index) for index in range(job.dialogues.shards)):
        shared = process.group.size > 1  # then all write each shard together
        rank, world = (0, 1) if shared else (process.rank, process.world)
        write_dialogues(
            engine.model, engine.tokenizer, job.dialogues, job.corpus, rank=rank, world=world, progress=progress
        )
    process.wait(engine.model.embedding.device)


def _write_texts(job: Job, folder: Path, engine: Engine) -> None:
    data.begin_corpus(job.corpus, {
        "model": folder.name, "tokenizer": data.tokenizer_sha(folder), "row_length": job.dialogues.length,
        "vocab_size": engine.model.vocab_size, "texts": _hashes(job.texts),
    })  # fmt: skip
    if not data.has_shard(job.corpus, 0):
        tokens, kinds = data.pack_text(engine.tokenizer, job.texts, job.dialogues.length)
        data.write_shard(job.corpus, 0, tokens, kinds)
        data.finish_corpus(job.corpus)


def planned(job: Job, model: ModelConfig) -> MTPConfig:
    """A job's layers. Raises EngineError for those that the model, or job.init, cannot have."""
    config = plan_heads(
        model, job.layers, chained=job.chained, window=job.window, width=job.width, features=job.features,
        hidden=job.hidden,
    )  # fmt: skip
    if job.init:
        _check_init(job.init, config)
    return config


def make_trainer(job: Job, folder: Path, main: Decoder, corpus: Corpus, process: Process) -> Trainer:
    """A job's layers at their beginning. Raises EngineError, as `planned`."""
    first = FirstValues(
        Checkpoint(folder), len(main.config.layers) - 1, hidden_rms(main, corpus.tokens[:4]),
        Checkpoint(job.init) if job.init else None, job.settings.seed,
    )  # fmt: skip
    return Trainer(main, planned(job, read_config(folder)), first, corpus, job.settings, job.out, process)


@torch.no_grad()
def hidden_rms(main: Decoder, tokens: Tensor) -> float:
    """Root mean square of the main model's hidden states before its final norm. tokens: [B, L]."""
    hidden, _ = sequence_hidden(main, tokens.to(main.embedding.device).long())
    return float(hidden.float().pow(2).mean().sqrt())


def _check_init(folder: Path, wanted: MTPConfig) -> None:
    found = read_mtp_config(folder)
    if found.depth < wanted.depth or found.chained != wanted.chained:
        raise EngineError(
            f"{folder} holds {found.depth} {'chained' if found.chained else 'unchained'} layers: give --layers and "
            "--chained to match, or leave --init out"
        )


def finished_steps(job: Job) -> int | None:
    """Steps of the finished run that `job.out` holds; None where the job has still something to do.

    Raises EngineError for a folder with something else in it, and for a finished run of another job.
    """
    out = job.out
    traces = (LOG, KEPT, _FINISHED, Path("data") / data.INFO)
    if out.is_dir() and any(out.iterdir()) and not any((out / trace).exists() for trace in traces):
        raise EngineError(f"{out} is not empty, and not the folder of a training run: choose a new one for --out")
    if not (out / _FINISHED).is_file():
        return None
    finished, wanted = read_json(out / _FINISHED), _described(job)
    if other := sorted(key for key in wanted if finished.get(key) != wanted[key]):
        raise EngineError(
            f"{out} holds a finished run with another {', '.join(other)}: choose another --out, or delete it"
        )
    return job.settings.steps


def _described(job: Job) -> dict[str, Any]:
    """What makes two jobs the same, in JSON's types."""
    settings = asdict(job.settings)
    for name in ("log_every", "evaluate_every", "checkpoint_s"):
        del settings[name]
    names = ("layers", "chained", "window", "width", "features", "fp8", "hidden")
    described = {
        "model": job.model, **settings, **{name: getattr(job, name) for name in names}, "text": _hashes(job.texts),
        "init": str(job.init),
    }  # fmt: skip
    return dict(json.loads(json.dumps(described)))


def _hashes(files: Sequence[Path]) -> list[str]:
    return [sha256(path.read_bytes()).hexdigest() for path in files]


def saved_step(out: Path) -> int | None:
    """Where a run in `out` would go on; None if nothing of it is saved."""
    return saved_place(out / KEPT / STATE)


def plan(job: Job) -> RunPlan:
    """What the job will take. Reads configurations only."""
    model = read_config(hub.locate(job.model).folder)
    check_divides(job.tensor_parallel, model, None)
    heads = planned(job, model)
    world = max(int(os.environ.get("WORLD_SIZE", "1")), job.tensor_parallel)
    return plan_run(model, heads, job.settings, world, device_name(job.device), job.tensor_parallel)
