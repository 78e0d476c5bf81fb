"""The folder of an experiment: a manifest, and a folder per case with its rows in Parquet.

Rows come in parts, each of which is there whole or not at all, so a run that was killed goes on with the prompts that no
part holds. A part of requests is written after its steps (or positions), and alone says which prompts are done.
"""

import json
import os
import platform
import subprocess
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, final

from filelock import FileLock, Timeout

from mtp_engine.errors import EngineError
from mtp_engine.experiments.grid import Case
from mtp_engine.hub.files import atomically

MANIFEST = "manifest.json"
_FORMAT = 1
_PACKAGES = ("mtp-engine", "torch", "numpy", "onnxruntime", "transformers", "triton", "flashinfer-python", "pyarrow")


def extras() -> tuple[Any, Any, Any]:
    """pyarrow, its parquet, and pandas. Raises EngineError where they are missing."""
    try:
        import pandas
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise EngineError(f"experiments need {error.name}: pip install 'mtp-engine[experiments]'") from error
    return pyarrow, pyarrow.parquet, pandas


@final
@dataclass(frozen=True)
class CaseFolder:
    """Where the rows of a case lie."""

    path: Path
    case: Case

    def parts(self, kind: str) -> list[Path]:
        """kind: requests, steps or positions. Of the parts that count, in order."""
        whole = sorted(self.path.glob("requests-*.parquet"))
        return [path.with_name(path.name.replace("requests", kind)) for path in whole]

    @property
    def done(self) -> set[int]:
        """The indices of the prompts that are done."""
        _, parquet, _ = extras()
        found: set[int] = set()
        for path in self.parts("requests"):
            found.update(_read(parquet, path, ["prompt"])["prompt"].to_pylist())
        return found

    @property
    def finished(self) -> bool:
        """Whether all of its prompts are done, and still there."""
        path = self.path / "finished.json"
        return path.is_file() and len(self.done) >= int(_load(path)["prompts"])

    def add(self, **rows: Sequence[Mapping[str, Any]]) -> None:
        """Write a part: `requests`, and of the same prompts `steps` or `positions`. Raises EngineError for a full disk."""
        pyarrow, parquet, _ = extras()
        number = 1 + max((int(path.stem.split("-")[1]) for path in self.parts("requests")), default=-1)
        for kind in sorted(rows, key=lambda kind: kind == "requests"):
            table = pyarrow.Table.from_pylist(list(rows[kind]))
            _write_table(parquet, table, self.path / f"{kind}-{number:05}.parquet")

    def note(self, session: Mapping[str, Any]) -> None:
        """What one process has done of it: seconds, tokens, device."""
        _write(self.path / "sessions.json", [*self.sessions, dict(session)])

    @property
    def sessions(self) -> list[dict[str, Any]]:
        """What `note` was given."""
        path = self.path / "sessions.json"
        return list(_load(path)) if path.is_file() else []

    def finish(self, prompts: int) -> None:
        """All prompts are done."""
        _write(self.path / "finished.json", {"prompts": prompts})

    def frame(self, kind: str) -> Any:
        """All rows of a kind as a pandas frame, sorted by prompt; empty where there is none."""
        pyarrow, parquet, pandas = extras()
        parts = self.parts(kind)
        if not parts:
            return pandas.DataFrame()
        table = pyarrow.concat_tables([_read(parquet, path) for path in parts], promote_options="default")
        return table.to_pandas().sort_values("prompt", kind="stable", ignore_index=True)


@final
@dataclass(frozen=True)
class Experiment:
    """An experiment's folder. only: the cases to run, by id; empty is all."""

    path: Path
    only: frozenset[str] = frozenset()

    @classmethod
    def begin(cls, path: Path, cases: Sequence[Case], settings: Mapping[str, Any]) -> "Experiment":
        """Make the folder, or go on with it: cases that it does not have yet are added, and `cases` are those to run.

        Raises EngineError where it cannot be written, or is something else."""
        there = cls.open(path).manifest if (path / MANIFEST).is_file() else {}
        if not there and path.is_dir() and any(path.iterdir()):
            raise EngineError(f"{path}: holds other files; name a new folder for --out")
        known = {**there.get("cases", {}), **{case.id: asdict(case) for case in cases}}
        if known != there.get("cases"):
            try:
                path.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise EngineError(
                    f"{path}: cannot be made ({error.strerror}); name another folder for --out"
                ) from error
            runs = [*there.get("runs", []), {"settings": dict(settings), **conditions()}]
            _write(path / MANIFEST, {"format": _FORMAT, "cases": known, "runs": runs})
        return cls(path, frozenset(case.id for case in cases))

    @classmethod
    def open(cls, path: Path, only: Iterable[str] = ()) -> "Experiment":
        """A folder that `begin` made. Raises EngineError for others."""
        if not (path / MANIFEST).is_file():
            raise EngineError(
                f"{path}: holds no experiment ({MANIFEST} is missing); make one with mtp-engine experiment run"
            )
        found = cls(path, frozenset(only))
        manifest = found.manifest
        if not isinstance(manifest, dict) or manifest.get("format") != _FORMAT:
            raise EngineError(f"{path / MANIFEST}: is not of this version's format; run the experiment anew")
        return found

    @property
    def manifest(self) -> Any:
        """Cases by id with their settings, and of every run that added some: its settings, commit, device, versions."""
        return _load(self.path / MANIFEST)

    @property
    def folders(self) -> list[CaseFolder]:
        """All cases, in the order of the grid."""
        names = {field.name for field in fields(Case)}
        cases = self.manifest["cases"]
        if bad := [name for case in cases.values() for name in case if name not in names]:
            raise EngineError(
                f"{self.path / MANIFEST}: another version wrote it, whose {bad[0]} this one does not know"
            )
        return [CaseFolder(self.path / name, Case(**case)) for name, case in cases.items()]

    def runs(self, folder: CaseFolder) -> bool:
        """Whether it is one of the cases to run."""
        return not self.only or folder.case.id in self.only

    def claimed(self) -> Iterator[CaseFolder]:
        """Cases to run that are not done and that no other process works on, each locked until the next is asked for."""
        for folder in self.folders:
            if folder.finished or not self.runs(folder):
                continue
            try:
                folder.path.mkdir(exist_ok=True)
                with FileLock(folder.path / ".lock", timeout=0):
                    if not folder.finished:  # another process may have just ended it
                        yield folder
            except Timeout:
                continue
            except OSError as error:
                raise EngineError(f"{folder.path}: cannot be written ({error.strerror})") from error


def conditions() -> dict[str, Any]:
    """Commit, software and processor, for the manifest."""
    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return {"commit": _commit(), "versions": versions, "python": platform.python_version(), "processor": _processor()}


def _commit() -> str:
    """Of the source tree that runs, "-dirty" behind it where something differs; empty where it is installed."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return ""
    git = ["git", "-C", str(root)]
    try:
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        changes = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return ""
    return head + ("-dirty" if changes.strip() else "")


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    name = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    return f"{name}, {os.cpu_count()} threads"


def _write(path: Path, value: Any) -> None:
    atomically(path, lambda fresh: fresh.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8"))


def _load(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise EngineError(f"{path}: cannot be read ({error}); delete it and run again") from error


def _write_table(parquet: Any, table: Any, path: Path) -> None:
    atomically(path, lambda fresh: parquet.write_table(table, fresh, compression="zstd"))


def _read(parquet: Any, path: Path, columns: list[str] | None = None) -> Any:
    try:
        return parquet.read_table(path, columns=columns)
    except (OSError, ValueError) as error:  # ArrowInvalid is a ValueError
        reason = str(error).splitlines()[0]
        raise EngineError(
            f"{path}: damaged ({reason}); delete it and run again: only its prompts are decoded anew"
        ) from error
