"""Training for a main model that ranks share: what one process learns, on every rank. Here ranks are threads; those of
tests/test_train.py are processes."""

from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import together
from test_parallel import folders
from torch import Tensor

from mtp_engine.models import loader
from mtp_engine.models.checkpoint import Checkpoint
from mtp_engine.parallel.group import Group
from mtp_engine.training.data import ANSWER, GIVEN, Corpus
from mtp_engine.training.heads import FirstValues, plan_heads
from mtp_engine.training.memory import Memory
from mtp_engine.training.objective import Objective
from mtp_engine.training.optimiser import Rates
from mtp_engine.training.processes import Process
from mtp_engine.training.trainer import Report, Trainer, TrainSettings

CPU = torch.device("cpu")
ROWS, LENGTH = 17, 24


def corpus() -> Corpus:
    draws = torch.Generator().manual_seed(0)
    tokens = torch.randint(264, (ROWS, LENGTH), generator=draws, dtype=torch.int32)
    kinds = torch.where(torch.rand(ROWS, LENGTH, generator=draws) < 0.7, ANSWER, GIVEN).to(torch.uint8)
    return Corpus(tokens, kinds, {})


def learn(folder: Path, out: Path, group: Group, most: int, **objective: Any) -> tuple[list[Report], dict[str, Tensor]]:
    """Ten steps of four rows, in epochs of four steps. most: rows whose states are kept."""
    with torch.inference_mode(False):
        main = loader.load_main(folder, torch.float32, CPU, lambda *_: None, group=group)
        config = plan_heads(loader.read_config(folder), 2, chained=True, window=8, features=(0,))
        settings = TrainSettings(
            10, 4 * LENGTH, Objective(acceptance=0.5, reach=0.7, **objective), Rates(2e-2, 1e-2, 2), log_every=2
        )
        process = Process(group.shard.rank, group.size, group)
        first = FirstValues(Checkpoint(folder), len(main.config.layers) - 1, 1.0)
        trainer = Trainer(main, config, first, corpus(), settings, out, process)
        trainer._memory = Memory(trainer._states, ROWS, most, group)
        reports = list(trainer.run())
        return reports, {name: master.clone() for name, master in trainer.weights.named().items()}


@pytest.mark.parametrize("kind", ["llama", "llama-untied", "mimo-7b", "mimo-fp8"])
@pytest.mark.parametrize(("drafted", "most"), [(0, 0), (40, 7)])
def test_ranks_learn_what_one_process_does(kind: str, drafted: int, most: int, tmp_path: Path) -> None:
    folder, _ = folders(kind, tmp_path / "model", scale=0.3)
    reports, weights = learn(folder, tmp_path / "one", Group(), 0, drafted=drafted)
    first, other = together(2, lambda g: learn(folder, tmp_path / f"of-{g.shard.rank}", g, most, drafted=drafted))
    for name, expected in weights.items():
        assert torch.equal(first[1][name], other[1][name]), f"other bits of {name}"
        # AdamW makes steps of one size of gradients that are next to nothing, such as a key's bias
        assert (first[1][name] - expected).norm() < (1e-3 if "bias" in name else 1e-4) * expected.norm(), name
    for found, _ in (first, other):
        for a, b in zip(found, reports, strict=True):
            for key in ("loss", "lengths", "sampled"):
                assert getattr(a, key) == pytest.approx(getattr(b, key), rel=1e-4), (a.step, key)
