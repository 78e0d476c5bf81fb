"""The training of mimo-nano: steps, the two phases of its MTP layers, checkpoints, a log."""

import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor

from mtp_engine.errors import EngineError
from mtp_engine.training.checkpoint import RunState
from mtp_engine.training.nano.model import MTP_LAYERS, NanoModel
from mtp_engine.training.nano.text import NanoCorpus
from mtp_engine.training.optimiser import Optimiser, Rates

STATE, LOG = "state.safetensors", "log.jsonl"
_ENDLESS = 1 << 40  # steps: the cosine has not begun


@final
@dataclass(frozen=True)
class NanoSettings:
    """How long and how. minutes: if not 0, the run ends after so much time and not after `steps`.

    rows: of `length` tokens, in a step. The first MTP layer is trained with the main model, at `mtp_weights[0]` of its
    loss; in the last share `joint` of the run all of them are, at mtp_weights[1], starting as copies of the first, while
    the rates fall to zero. Until then rates are constant: the copies have much to learn, and a cosine over the whole
    run would leave them a seventh of the rate. balance: step of the experts' biases.
    """

    steps: int = 4000
    minutes: float = 0.0
    length: int = 512
    rows: int = 128
    joint: float = 0.25
    mtp_weights: tuple[float, float] = (0.3, 0.1)
    balance: float = 1e-3
    rates: Rates = field(default_factory=lambda: Rates(muon=6e-3, adam=4e-3, warmup=100, decay=0.1))
    seed: int = 0
    log_every: int = 20
    checkpoint_s: float = 60.0  # seconds between checkpoints: what a kill can cost


@final
@dataclass(frozen=True)
class Entry:
    """A line of the log. share: of the run that is over. loss: nats per token of the main model and of each MTP layer that
    takes part, over the last steps. load: per mixture, each expert's share of the tokens in the last step."""

    step: int
    share: float
    seconds: float
    loss: list[float]
    rate: float
    tokens_per_s: float
    load: list[list[float]]


@final
class NanoRun:
    """A model under training, and what is kept of it in `folder`."""

    def __init__(self, model: NanoModel, corpus: NanoCorpus, settings: NanoSettings, folder: Path) -> None:
        self.model, self.settings, self.folder = model, settings, folder
        self.corpus = corpus.to(model.main.embedding.device)
        folder.mkdir(parents=True, exist_ok=True)
        self._optimiser = Optimiser(model.weights, settings.rates)
        self._state = RunState(folder / STATE, model.weights, self._optimiser)
        self.step, self._depth, self._epoch, self._at = 0, 1, 0, 0
        self._seconds = 0.0  # trained so far
        self._rows = self._shuffled()

    def run(self) -> Iterator[Entry]:
        """Train to the end. Checkpoints as it goes; closing the iterator makes one more.

        Raises EngineError if the loss is no number any more: the checkpoint of before is kept.
        """
        s = self.settings
        begin = last = saved = time.monotonic()
        begin -= self._seconds
        losses: list[Tensor] = []
        try:
            while (share := self._share()) < 1:
                loss, load = self._train(share)
                losses.append(loss)
                self.step += 1
                self._seconds = time.monotonic() - begin
                if self.step % s.log_every and self._share() < 1:
                    continue
                means = torch.stack([x for x in losses if len(x) == len(loss)]).mean(0).tolist()  # waits for the device
                if not all(map(math.isfinite, means)):
                    raise self._state.diverged(self.step, "--muon and --adam")
                now = time.monotonic()
                self._seconds = now - begin
                speed = len(losses) * s.rows * s.length / (now - last)
                yield Entry(
                    self.step, self._share(), self._seconds, means, self._fall(share), speed,
                    [[round(part, 4) for part in row] for row in load.tolist()],
                )  # fmt: skip
                losses, last = [], time.monotonic()
                if last - saved > s.checkpoint_s or self._share() >= 1:
                    if not self._state.sound():
                        raise self._state.diverged(self.step, "--muon and --adam")
                    self.save()
                    saved = time.monotonic()
        except (GeneratorExit, KeyboardInterrupt):
            if self._state.sound():
                self.save()
            raise

    def _share(self) -> float:
        s = self.settings
        return min(1.0, self._seconds / (60 * s.minutes) if s.minutes else self.step / s.steps)

    def _fall(self, share: float) -> float:
        """The rates' part of the full ones, the warm-up aside."""
        return 0.5 * (1 + math.cos(math.pi * self._late(share)))

    def _late(self, share: float) -> float:
        """How much of the last phase is over."""
        return max(0.0, 1 - (1 - share) / self.settings.joint)

    def _train(self, share: float) -> tuple[Tensor, Tensor]:
        s, late = self.settings, self._late(share)
        joint = share >= 1 - s.joint
        if joint and self._depth == 1:
            self.model.replicate()
            self._depth = MTP_LAYERS
        losses = self.model.step(self._batch(), self._depth, s.mtp_weights[joint])
        self._optimiser.step(self.step, max(self.step + 1, round(self.step / late)) if late else _ENDLESS)
        return losses, self.model.balance(s.balance * self._fall(share))

    def _batch(self) -> Tensor:
        if (self._at + 1) * self.settings.rows > len(self._rows):
            self._epoch, self._at = self._epoch + 1, 0
            self._rows = self._shuffled()
        start = self._at * self.settings.rows
        self._at += 1
        return self._rows[start : start + self.settings.rows].long()

    def _shuffled(self) -> Tensor:
        """The rows of this epoch. Raises EngineError if they do not make one step."""
        s = self.settings
        rows = self.corpus.rows(s.length, s.seed * 1_000_003 + self._epoch)
        if len(rows) < s.rows:
            raise EngineError(f"the text has {len(rows)} rows of {s.length} tokens, a step takes {s.rows}: write more")
        return rows

    def save(self) -> None:
        """Write the checkpoint, whole or not at all."""
        self._state.save([self.step, self._depth, self._epoch, self._at, self._seconds], self._described())

    def resume(self) -> bool:
        """Go on from the checkpoint, if there is one. Raises EngineError if it is of another run."""
        if (place := self._state.load(self._described(), self.folder)) is None:
            return False
        *counts, self._seconds = place
        self.step, self._depth, self._epoch, self._at = map(int, counts)
        self._rows = self._shuffled()
        return True

    def _described(self) -> dict[str, Any]:
        """What must be the same for a run to be gone on with."""
        settings = {k: v for k, v in asdict(self.settings).items() if k not in ("log_every", "checkpoint_s")}
        return {**settings, "model": asdict(self.model.config), "tokens": len(self.corpus.tokens)}
