"""How many threads pools get: no more than there are cores for this process."""

import os
from pathlib import Path

import pytest
import torch

from mtp_engine import Engine, EngineConfig
from mtp_engine.runtime import threads
from mtp_engine.runtime.threads import pool_size, usable_cores

MACHINE = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({}, MACHINE),
        ({"cpu.max": "max 100000\n"}, MACHINE),
        ({"cpu.max": "100000 100000\n"}, 1),
        ({"cpu.max": "20000 100000\n"}, 1),
        ({"cpu.max": "nonsense"}, MACHINE),
        ({"cpu.max": "100000 0"}, MACHINE),
        ({"cpu/cpu.cfs_quota_us": "100000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 1),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, MACHINE),
    ],
)
def test_a_containers_quota_counts(tmp_path: Path, files: dict[str, str], cores: int) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert usable_cores(tmp_path) == cores


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system has no affinities")
def test_the_affinity_counts(tmp_path: Path) -> None:
    before = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(before)})
        assert usable_cores(tmp_path) == 1
    finally:
        os.sched_setaffinity(0, before)


@pytest.mark.parametrize(("asked", "size"), [(0, 4), (1, 1), (4, 4), (5, 4), (1024, 4)])
def test_no_more_threads_than_cores(monkeypatch: pytest.MonkeyPatch, asked: int, size: int) -> None:
    monkeypatch.setattr(threads, "usable_cores", lambda: 4)
    assert pool_size(asked) == size


def test_it_says_so_in_one_line(caplog: pytest.LogCaptureFixture) -> None:
    said: list[str] = []
    cores = usable_cores()
    config = EngineConfig(device="cpu", dtype="fp32", threads=1000, max_context=64, drafter="root")
    with Engine.load("mimo-nano", config, progress=lambda what, done, total: said.append(what)):
        assert torch.get_num_threads() == cores
    line = f"running with {cores} threads, not 1000: this process has no more cores"
    assert [record.message for record in caplog.records] == [line]
    assert said.count(line) == 1
