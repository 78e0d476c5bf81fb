"""The training run: batches, steps, checkpoints, and evaluation by real speculative decoding."""

import math
import shutil
import time
import zlib
from collections.abc import Callable, Generator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor

from mtp_engine.config import MTPConfig
from mtp_engine.errors import EngineError
from mtp_engine.models.decoder import Decoder
from mtp_engine.models.mtp import MTPModule
from mtp_engine.training.attention import sequence_hidden
from mtp_engine.training.checkpoint import RunState
from mtp_engine.training.data import Corpus, by_frequency
from mtp_engine.training.heads import FirstValues, build_heads, proposing, whole_head
from mtp_engine.training.memory import Memory
from mtp_engine.training.objective import Lesson, Measures, Objective, distill_step, teach
from mtp_engine.training.optimiser import Optimiser, Rates, average_gradients
from mtp_engine.training.processes import Process
from mtp_engine.training.quick import quick_layers, quick_main
from mtp_engine.training.trainable import TrainableWeights

KEPT, STATE, LOG = "checkpoint", "state.safetensors", "log.jsonl"


@final
@dataclass(frozen=True)
class TrainSettings:
    """How long and how: tokens are those of all processes together in one step."""

    steps: int = 3000
    tokens: int = 41_472
    objective: Objective = field(default_factory=Objective)
    rates: Rates = field(default_factory=Rates)
    seed: int = 0
    log_every: int = 20
    evaluate_every: int = 500
    checkpoint_s: float = 60.0  # seconds between checkpoints: what a kill can cost


@final
@dataclass(frozen=True)
class Report:
    """Where training stands. lengths: expected accepted length of chains of 1, 2, ... drafts on the training rows, greedy;
    sampled: the same by acceptance probability at T = 1. measured: accepted length of decoding the held-out prompts."""

    step: int
    loss: list[float]  # per depth
    lengths: list[float]
    sampled: list[float]
    tokens_per_s: float
    seconds: float
    measured: float | None = None


_ALONE = Process()


@final
class Trainer:
    """MTP layers under training beside their frozen main model."""

    def __init__(
        self, main: Decoder, config: MTPConfig, first: FirstValues, corpus: Corpus, settings: TrainSettings, out: Path,
        process: Process = _ALONE,
    ) -> None:  # fmt: skip
        self.main, self.config, self.corpus, self.settings, self.out = quick_main(main), config, corpus, settings, out
        self._process = process
        drafted = settings.objective.drafted
        self._learnt = by_frequency(corpus, main.vocab_size) if 0 < drafted < main.vocab_size else None
        head = whole_head(main)
        self.head = head if self._learnt is None else head[self._learnt]
        self.weights = TrainableWeights(first, main.embedding.dtype, main.embedding.device)
        self.module: MTPModule = build_heads(config, main, self.weights)
        self._learner = quick_layers(self.module)
        self._optimiser = Optimiser(self.weights, settings.rates)
        self._state = RunState(out / KEPT / STATE, self.weights, self._optimiser)
        self._tokens, self._kinds = (x.to(main.embedding.device) for x in (corpus.tokens, corpus.kinds))
        rows, length = corpus.tokens.shape
        self._rows = max(1, settings.tokens // length // process.world)  # of this process in a step
        self._per_epoch = rows // (self._rows * process.world)
        if not self._per_epoch:
            raise EngineError(
                f"the corpus has {rows} rows of {length} tokens, less than one step's {settings.tokens} tokens: "
                "write more data, or lower --batch-tokens"
            )
        again = settings.steps > self._per_epoch
        self._memory = Memory(self._states, rows, None if again else 0, main.group)
        self.step = 0
        self._orders: dict[int, Tensor] = {}

    def run(self, evaluate: Callable[[MTPModule], float] | None = None) -> Generator[Report, None, None]:
        """Train to the end, reporting now and then. Checkpoints as it goes; closing the iterator makes one more.

        Raises EngineError if the loss is no number any more: the checkpoint of before is kept.
        """
        begin = last = saved = time.monotonic()
        sums: list[Measures] = []
        settings = self.settings
        try:
            while self.step < settings.steps:
                sums.append(self._train(self.step))
                self.step += 1
                due = self.step % settings.evaluate_every == 0 or self.step == settings.steps
                if self.step % settings.log_every and not due:
                    continue
                measures = self._over_all(sums)
                loss = measures.loss.tolist()  # waits for the device
                self._process.check()
                if not (all(map(math.isfinite, loss)) and self._state.sound()):
                    raise self._state.diverged(self.step, "--lr")
                now = time.monotonic()
                speed = len(sums) * self._rows * self._process.world * self.corpus.tokens.shape[1] / (now - last)
                measured = evaluate(self._proposing()) if evaluate and due and self._process.decodes else None
                yield Report(
                    self.step, loss, measures.length(greedy=True).tolist(), measures.length(greedy=False).tolist(), speed,
                    now - begin, measured,
                )  # fmt: skip
                sums, last = [], time.monotonic()
                if last - saved > settings.checkpoint_s or self.step == settings.steps:
                    self.save()
                    saved = time.monotonic()
        except (GeneratorExit, KeyboardInterrupt):
            if self._state.sound():
                self.save()
            raise

    def _train(self, step: int) -> Measures:
        """Ranks that share the main model work out the states of all their rows together, and each learns from its own."""
        shard = self.main.group.shard
        rows = self._order(step, self._process.rank - shard.rank, shard.size)
        tokens, part = self._tokens[rows].long(), shard.part(len(rows))
        own, hidden = slice(part.start, part.stop), self._memory.states(rows, tokens)
        lesson = teach(
            self.main, tokens[own], self._kinds[rows[own]], self.head, self.config.features, hidden=hidden[own]
        )
        return self.learn(step, lesson)

    def _over_all(self, measures: Sequence[Measures]) -> Measures:
        """Those of some steps; where ranks share the main model, of all their rows."""
        parts = (torch.stack([m.sums for m in measures]), torch.stack([m.weight for m in measures]))
        return Measures(*(self._process.group.sum(part.sum(0), torch.float32) for part in parts))

    def learn(self, step: int, lesson: Lesson) -> Measures:
        """One step on a batch, which may be others' too."""
        measures = distill_step(self._learner, lesson, self.settings.objective, self._process.mean)
        if self._process.world > 1:
            average_gradients(self.weights.parameters, self._process.mean)
        self._optimiser.step(step, self.settings.steps)
        return measures

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        """Tokens [B, L] int64 and kinds [B, L] of a step, this process's rows."""
        rows = self._order(step, self._process.rank)
        return self._tokens[rows].long(), self._kinds[rows]

    def _order(self, step: int, first: int, processes: int = 1) -> Tensor:
        """The numbers of a step's rows, of some processes from `first` on: every epoch goes through the corpus in an order of its
        own."""
        epoch, at = divmod(step, self._per_epoch)
        if epoch not in self._orders:
            generator = torch.Generator().manual_seed(self.settings.seed * 1_000_003 + epoch)
            self._orders = {epoch: torch.randperm(len(self.corpus.tokens), generator=generator)}
        start = (at * self._process.world + first) * self._rows
        return self._orders[epoch][start : start + processes * self._rows]

    def _proposing(self) -> MTPModule:
        """The layers, which propose the tokens that they learn to draft: what they say of others is not trained."""
        if self._learnt is None:
            return self.module
        count = self.settings.objective.drafted
        return proposing(self.module, self._learnt[:count].to(self.head.device), self.head[:count])

    @torch.no_grad()
    def _states(self, tokens: Tensor) -> Tensor:
        main = replace(self.main, features=self.config.features)
        parts = torch.split(tokens, self._rows)  # of one process: sums over ranks hold what each has computed
        return torch.cat([sequence_hidden(main, part)[0] for part in parts])

    def save(self) -> None:
        """Write a checkpoint, by the first process."""
        if not self._process.rank:
            self._state.save([self.step], self._described())

    def resume(self) -> bool:
        """Go on from the checkpoint in `out`, if there is one. Raises EngineError if it is of another run."""
        if (place := self._state.load(self._described(), self.out)) is None:
            return False
        self.step = int(place[0])
        return True

    def _described(self) -> dict[str, Any]:
        """What must be the same for a run to be gone on with."""
        free = ("log_every", "evaluate_every", "checkpoint_s")
        settings = {key: value for key, value in asdict(self.settings).items() if key not in free}
        model = zlib.crc32(self.main.norm.weight.float().cpu().numpy().tobytes())  # two models' norms differ
        return {**settings, "layers": asdict(self.config), "rows": list(self.corpus.tokens.shape), "model": model}

    def forget(self) -> None:
        """Delete the checkpoint: the run is done."""
        if not self._process.rank:  # others may be done before it is
            shutil.rmtree(self.out / KEPT, ignore_errors=True)
