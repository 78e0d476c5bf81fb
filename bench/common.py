"""What the benches share: prompt sets, and the JSON line with its conditions."""

import json
import platform
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from mtp_engine import Engine


def read_prompts(path: Path, limit: int = 0) -> list[dict[str, Any]]:
    """Lines with `turns` (the first is used) and `category`. With a limit, spread evenly over the file."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    if limit and limit < len(rows):
        rows = [rows[index * len(rows) // limit] for index in range(limit)]
    return rows


def encode(engine: Engine, rows: Iterable[dict[str, Any]], longest: int) -> list[tuple[str, list[int]]]:
    """(category, token ids in the chat template) of the prompts of at most `longest` tokens."""
    pairs = [(row["category"], engine.encode([{"role": "user", "content": row["turns"][0]}])) for row in rows]
    return [(category, tokens) for category, tokens in pairs if len(tokens) <= longest]


def conditions(device: str = "cpu") -> dict[str, Any]:
    """Device, software and commit, for the last line of every bench."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    dirty = bool(subprocess.run(["git", "status", "--porcelain"], capture_output=True, text=True).stdout.strip())
    cpu = next((x for x in Path("/proc/cpuinfo").read_text().splitlines() if x.startswith("model name")), ":?").split(
        ":"
    )[1]
    return {
        "device": torch.cuda.get_device_name() if device.startswith("cuda") else cpu.strip(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": commit + ("-dirty" if dirty else ""),
    }
