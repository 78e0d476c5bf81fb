"""bench/full_size.py: its plan is that of `inspect`, tiny models run through it, and what fails costs itself alone."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

BENCH = Path(__file__).parent.parent / "bench"
sys.path.insert(0, str(BENCH))
import full_size  # noqa: E402
import paper  # noqa: E402
from full_size_rank import Job  # noqa: E402

STEP = {"part": "step", "batch": 1, "context": 48, "tree": None, "forced": 0.0}


def bench(*options: str) -> list[dict[str, Any]]:
    done = subprocess.run(
        [sys.executable, BENCH / "full_size.py", *options], capture_output=True, text=True, timeout=120,
        env={**os.environ, "MTP_BENCH_DIRTY": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_the_plan() -> None:
    *rows, last = bench("--dry-run", "--ranks", "4")
    assert last["plan"]["weights_gb_in_all"] == pytest.approx(79.3, abs=0.2)
    first, longest = rows[0], max(rows, key=lambda row: (row["context"], row["batch"]))
    assert (first["batch"], first["tree"], first["fits"]) == (1, "chain:3", [141])
    assert longest["fits"] == []  # 64 requests of 256K tokens
    assert first["floor_ms"]["H200"] == pytest.approx(2.94, abs=0.02)
    [plain] = (row for row in rows if (row["batch"], row["context"], row["tree"]) == (1, 1024, None))
    assert plain["read_gb"] == pytest.approx(17.2 / 4, rel=0.05)  # that many GB a token on one GPU; routers are whole


def test_the_plan_of_4_bits() -> None:
    """Two H200 hold the model with its experts in 4 bits, 4.25 of them with the scales."""
    *rows, last = bench("--dry-run", "--ranks", "2", "--experts", "int4")
    experts = 47 * 256 * 3 * 4096 * 2048 / 2 / 1e9
    assert last["plan"]["weights_gb"]["experts"] == pytest.approx(experts * 4.25 / 8, abs=0.01)
    assert (last["experts"], rows[0]["fits"]) == ("int4", [141])


@pytest.mark.parametrize("more", [["--alone"], ["--experts", "int4"]])
def test_tiny_ranks(more: list[str]) -> None:
    options = ["--ranks", "2", "--device", "cpu", "--shape", "tiny", "--batch", "2", "--context", "48", "--steps", "3"]
    *rows, last = bench(*options, *more)
    assert [row["part"] for row in rows] == ["weights", "all_reduce", *["step"] * 4]
    assert not [row for row in rows if "failed" in row]
    chains = [row for row in rows if row.get("tree") == "chain:3"]
    assert [row["forced"] for row in chains] == [2.7, 3.0]
    assert 2 <= chains[0]["accepted"] <= 3 == chains[1]["accepted"]
    assert last["measured"] == rows


def test_what_fails_costs_itself_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A part that hangs and one that ends its rank: the others are measured, by ranks that were started anew."""
    script = tmp_path / "rank.py"
    script.write_text(
        "import json, os, sys, time\n"
        "for part in json.loads(sys.argv[1]):\n"
        "    print(json.dumps({'begin': part}), flush=True)\n"
        "    if part.get('batch') == 2: time.sleep(60)\n"
        "    if part.get('batch') == 3: sys.exit('no memory')\n"
        "    print(json.dumps({'done': {**part, 'wall': 1.0}}), flush=True)\n"
    )
    monkeypatch.setattr(full_size, "command", lambda job: [sys.executable, str(script), json.dumps(job.parts)])
    parts = [STEP | {"batch": batch} for batch in (1, 2, 3, 4)]
    job = Job(0, 2, 0, False, "tiny", 0, "cpu", 3, 1e12, [])
    limits = full_size.Limits(3.0, 10.0, time.monotonic() + 60)
    found = {row["batch"]: row for row in full_size.measured(job, parts, limits, 3) if row["part"] == "step"}
    assert found[1]["wall"] == found[4]["wall"] == 1.0
    assert found[2]["failed"] == "took more than 3 s"
    assert "no memory" in found[3]["failed"]
    late = full_size.measured(job, parts, full_size.Limits(3.0, 10.0, time.monotonic() - 1), 3)
    assert [row["failed"] for row in late] == ["not begun"] * 4


def test_the_table_for_eight() -> None:
    """What one GPU took for sums with itself gives way to what they take among 8; what was measured among ranks stays."""
    plain, chain = STEP | {"context": 1024, "wall": 3.0, "floor": 2.0}, {"tree": "chain:3", "forced": 2.7, "wall": 5.0}
    result = {
        "alone": True, "ranks": 8, "layers": 48, "device": "H100",
        "measured": [{"part": "all_reduce", "us": {"8 KB": 3.0, "32 KB": 4.8}}, plain, plain | chain],
    }  # fmt: skip
    first, *others = paper.estimates(result)
    assert first["plain"] == pytest.approx(3 + 96 * 4.8e-3, abs=0.006)
    assert first["chain:3"] == pytest.approx(5 + 105 * 3e-3, abs=0.006)
    assert others == [{"batch": batch} for batch in (8, 32, 64)]
    assert paper.estimates(result | {"alone": False})[0]["plain"] == 3.0
    assert paper.table(result, [first, *others]).row_count == 4


def test_the_table_on_paper() -> None:
    """Layers that take 50 us and 1.1 times their bytes, with few rows; sums on top."""
    rows = [
        {"rows": n, "mb": mb, "layer_us": 50 + (1.1 if n < 256 else 1.3) * mb / 3.0}
        for n, mb in ((1, 300.0), (4, 900.0), (16, 2500.0), (64, 5300.0), (256, 6400.0))
    ]
    assert paper.fitted(rows, 3e12) == pytest.approx((50e-6, 1.1, 1.3))
    models = {"mimo-7b": {}, "mimo-slice": {"layers": {"rows": rows}}}
    result = {"bench": "roofline", "device": "H100", "bandwidth_tb_s": {"read": 3.0}, "models": models}
    first, *others = paper.on_paper(result)
    bare = 48 * 0.05 + 1.1 * paper._bytes(8, 1, 1) / 3.06e9
    assert first["plain"] == pytest.approx(bare + 96 * 7.8e-3, abs=0.01)
    assert first["plain, our sums"] == pytest.approx(bare + 96 * 2.4e-3, abs=0.01)
    assert len(others) == 15
    assert paper.paper_table(result, [first, *others]).row_count == 16
