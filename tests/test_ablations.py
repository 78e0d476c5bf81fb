"""bench/ablations.py: a plan's variants are what `mtp-engine train` would run, and steps of all on one batch are their own."""

import importlib
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch
from tiny import write_llama

from mtp_engine.models import loader
from mtp_engine.models.checkpoint import Checkpoint
from mtp_engine.training.data import Corpus
from mtp_engine.training.heads import FirstValues, plan_heads
from mtp_engine.training.objective import Objective
from mtp_engine.training.optimiser import Rates
from mtp_engine.training.trainer import Trainer, TrainSettings

BENCH = Path(__file__).parent.parent / "bench"


@pytest.fixture
def ablations(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.syspath_prepend(str(BENCH))
    yield importlib.import_module("ablations")
    for name in ("ablations", "common"):
        sys.modules.pop(name, None)


def test_every_variant_of_the_plan_is_a_job(ablations: ModuleType, tmp_path: Path) -> None:
    common, variants = ablations.read_plan(BENCH / "grids" / "ablations.toml", ())
    jobs = {name: ablations.job_of({**common, **changes}, tmp_path / "x", "cpu") for name, changes in variants.items()}
    assert jobs["base"].features == (9, 18, 26)
    assert not jobs["non-chained"].chained
    assert jobs["adamw"].settings.rates.matrices == "adamw"
    assert jobs["warm-data"].dialogues.temperatures == ((0.0, 0.2), (0.7, 0.4), (1.0, 0.4))
    others = [job for name, job in jobs.items() if name not in ("base", "greedy-data", "warm-data", "mixed-data")]
    assert len({str(job) for job in jobs.values()}) == len(jobs)
    assert all(job.dialogues == jobs["base"].dialogues for job in others)
    groups = ablations.groups(common, variants)
    assert set(groups) == {"data", "data-greedy-data", "data-mixed-data", "data-warm-data"}
    assert len(groups["data"]) == len(others) + 1


def test_variants_of_the_same_text_share_it(ablations: ModuleType) -> None:
    _, variants = ablations.read_plan(BENCH / "grids" / "mixes.toml", ())
    groups = {corpus: list(group) for corpus, group in ablations.groups({}, variants).items()}
    assert groups == {
        "data": ["base", "slow", "fast", "adamw", "adamw-fast", "mixed-on"],
        "data-greedy": ["greedy", "greedy-on"],
        "data-warm": ["warm", "warm-on"],
    }


def test_side_by_side_is_one_by_one(ablations: ModuleType, tmp_path: Path) -> None:
    """Weights after some steps are those of a run of one's own, whatever the others read and draft."""
    folder = write_llama(tmp_path / "main")
    main = loader.load_main(folder, torch.float32, torch.device("cpu"), lambda *_: None)
    generator = torch.Generator().manual_seed(0)
    kinds = torch.full((12, 24), 2, dtype=torch.uint8)
    corpus = Corpus(torch.randint(61, (12, 24), generator=generator).int(), kinds, {})
    settings = TrainSettings(5, 4 * 24, Objective(reach=0.7, acceptance=0.5), Rates(warmup=2), log_every=5)
    some = replace(settings, objective=replace(settings.objective, drafted=20))

    def trainers() -> dict[str, Trainer]:
        found = {}
        for name, chosen, features in (("plain", settings, ()), ("some", some, ()), ("featured", some, (0,))):
            config = plan_heads(main.config, 2, chained=True, window=8, features=features)
            first = FirstValues(Checkpoint(folder), 1, 1.0)
            found[name] = Trainer(main, config, first, corpus, chosen, tmp_path / name)
        return found

    together, alone = trainers(), trainers()
    ablations.learn(together, 0.0, tmp_path / "log.jsonl")
    for name, trainer in alone.items():
        list(trainer.run())
        for key, value in trainer.weights.named().items():
            torch.testing.assert_close(together[name].weights.named()[key], value, atol=1e-4, rtol=1e-3)
