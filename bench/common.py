"""What the benches share: prompt sets, the commit that runs, and the JSON line with its conditions.

    python bench/common.py --stamp

writes bench/COMMIT, from which a machine that gets the tree without its git knows the commit. A bench refuses to run on
a tree that is not a commit, unless MTP_BENCH_DIRTY=1 is set, which its line then says.
"""

import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, NoReturn, final

import click
import torch

from mtp_engine import Engine, EngineError

SOME, COUNT = click.IntRange(min=1), click.IntRange(min=0)
ROOT = Path(__file__).resolve().parents[1]
_STAMP = "bench/COMMIT"
_CODE = ("bench", "drafters", "kernels", "mtp_engine", "verifiers")


def run(command: click.Command) -> NoReturn:
    """Run a bench's `main`; what the user can mend is one line and exit code 2."""
    try:
        command(standalone_mode=False)
    except click.Abort:
        sys.exit(130)
    except (click.ClickException, EngineError, OSError) as error:
        message = error.format_message() if isinstance(error, click.ClickException) else str(error)
        sys.stderr.write(f"error: {' '.join(message.split())}\n")
        sys.exit(2)
    sys.exit(0)


def read_prompts(path: Path, limit: int = 0, category: str = "") -> list[dict[str, Any]]:
    """Lines with `turns` (the first is used) and `category`, which must begin with the given one. With a limit, spread
    evenly over them.

    Raises EngineError for a file of another kind.
    """
    try:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        usable = bool(rows) and all(isinstance(row["turns"][0], str) and "category" in row for row in rows)
    except (ValueError, LookupError, TypeError) as error:
        raise EngineError(f"{path}: not lines of JSON with `turns` and `category` ({error})") from error
    if not usable:
        raise EngineError(f"{path}: not lines of JSON with `turns` and `category`; choose another file for --prompts")
    rows = [row for row in rows if row["category"].startswith(category)]
    if not rows:
        raise EngineError(f"{path}: no prompt is of the category {category!r}")
    if limit and limit < len(rows):
        rows = [rows[index * len(rows) // limit] for index in range(limit)]
    return rows


def encode(engine: Engine, rows: Iterable[dict[str, Any]], longest: int) -> list[tuple[str, list[int]]]:
    """(category, token ids in the chat template) of the prompts of at most `longest` tokens."""
    pairs = [(row["category"], engine.encode([{"role": "user", "content": row["turns"][0]}])) for row in rows]
    return [(category, tokens) for category, tokens in pairs if len(tokens) <= longest]


def as_recorded(engine: Engine, model: str) -> None:
    """Let an fp32 engine on a CPU run its steps as they are recorded for a GPU."""
    sys.path.append(str(ROOT / "tests"))
    from crossing import record

    record(engine, model)


@final
@dataclass(frozen=True)
class Commit:
    """The commit whose tree this is. dirty: something differs from it, other than results and the stamp."""

    commit: str
    dirty: bool


def require_commit(root: Path = ROOT) -> Commit:
    """The commit that is about to run; call it before any work. Exits on a dirty tree, unless MTP_BENCH_DIRTY is 1."""
    stamped = _from_stamp(root)
    # a stamp that suits the code says more than git, of which a copy of the tree may hold an older state
    commit = stamped if not stamped.dirty or not (root / ".git").exists() else _from_git(root)
    if commit.dirty and os.environ.get("MTP_BENCH_DIRTY") != "1":
        raise SystemExit(
            f"the tree is not that of a commit ({commit.commit}): commit first (and for a machine without git, then run "
            "python bench/common.py --stamp), or set MTP_BENCH_DIRTY=1, which the result will say"
        )
    return commit


def stamp(root: Path = ROOT) -> Commit:
    """Write bench/COMMIT, to be packed with the tree. Git must not ignore it: what it ignores is not packed."""
    commit = _from_git(root)
    (root / _STAMP).write_text(json.dumps({**asdict(commit), "code": _digest(root)}) + "\n", encoding="utf-8")
    return commit


def conditions(commit: Commit, device: str = "cpu") -> dict[str, Any]:
    """Device, software and commit, for the last line of every bench."""
    cpu = next((x for x in Path("/proc/cpuinfo").read_text().splitlines() if x.startswith("model name")), ":?").split(
        ":"
    )[1]
    return {
        "device": torch.cuda.get_device_name() if device.startswith("cuda") else cpu.strip(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        **asdict(commit),
    }


def _from_git(root: Path) -> Commit:
    def git(*command: str) -> str:
        done = subprocess.run(["git", "-C", str(root), *command], capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"git {command[0]}: {done.stderr.strip()}")
        return done.stdout.strip()

    changes = git("status", "--porcelain", "--", ".", ":(exclude)bench/results", f":(exclude){_STAMP}")
    return Commit(git("rev-parse", "HEAD"), bool(changes))


def _from_stamp(root: Path) -> Commit:
    """A stamp whose code is not the tree's own was written before the last change, so the tree is no commit's."""
    if not (root / _STAMP).is_file():
        return Commit("unknown: neither git nor bench/COMMIT", True)
    written = json.loads((root / _STAMP).read_text(encoding="utf-8"))
    return Commit(written["commit"], written["dirty"] or written["code"] != _digest(root))


def _digest(root: Path) -> str:
    """Of all Python files that a bench can run."""
    digest = sha256()
    for folder in _CODE:
        for path in sorted(Path(where) / name for where, _, names in os.walk(root / folder) for name in names):
            name = path.relative_to(root)
            linked = name.parts[1] in _CODE  # mtp_engine's links, which may arrive as copies
            if path.suffix == ".py" and not linked:
                digest.update(f"{name}\0".encode() + path.read_bytes() + b"\0")
    return digest.hexdigest()


if __name__ == "__main__":
    if sys.argv[1:] != ["--stamp"]:
        raise SystemExit("usage: python bench/common.py --stamp")
    print(json.dumps(asdict(stamp())))
