"""The model cache on disk: what is in it is whole, or it is made again.

It holds `gguf/` (files out of wheels, kept so that a model can be converted again offline), `models/` (finished folders,
each with a manifest), `kernels/` (what was compiled for this processor, for all models; made again where it is missing),
`tmp/` (work in progress, cleared by the next run) and `locks/`. Earlier versions kept `graphs/`, too.

A manifest says of each file its size, when it was written, the hash of its first mebibyte and the hash of all of it.
Every start compares the first three, which takes milliseconds; the whole hash is read where the time of writing differs,
when loading fails, and by `mtp-engine models verify`.
"""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import platformdirs
from filelock import FileLock, Timeout

from mtp_engine.errors import EngineError
from mtp_engine.hub.wheel import FULL, Progress, sha256_of

FORMAT = 2  # of the converted folders; raise it with every change of what models/gguf.py or this module writes
MANIFEST = "manifest.json"
_HEAD = 1 << 20
_OLD = ("graphs",)  # folders of earlier versions, of no use to this one


def cache_root() -> Path:
    """MTP_ENGINE_CACHE, or else the user's cache folder."""
    if chosen := os.environ.get("MTP_ENGINE_CACHE"):
        return Path(chosen).expanduser().absolute()
    return Path(platformdirs.user_cache_dir("mtp-engine"))


def target_of(root: Path, name: str, sha256: str) -> Path:
    """The finished folder of the GGUF file `name` whose hash is `sha256`."""
    return root / "models" / f"{_stem(name, sha256)}-v{FORMAT}"


def remove(root: Path, name: str, sha256: str) -> int:
    """Delete the converted folders of every format, and leftovers; with the last model, what was compiled. Returns the bytes
    that this frees."""
    stem = _stem(name, sha256)
    models = set((root / "models").glob("*"))
    own = set((root / "models").glob(f"{stem}-v*"))
    found = [*own, *(root / "tmp").glob(f"{stem}-v*"), *(root / each for each in _OLD if (root / each).is_dir())]
    if own and models == own and (root / "kernels").is_dir():
        found.append(root / "kernels")
    freed = sum(file.stat().st_size for folder in found for file in folder.rglob("*") if file.is_file())
    for folder in found:
        shutil.rmtree(folder)
    return freed


def _stem(name: str, sha256: str) -> str:
    return f"{Path(name).stem[:80]}-{sha256[:16]}"


def damaged_files(folder: Path, *, whole: bool = False) -> list[str]:
    """Files that are not as the manifest has them; the manifest itself where it cannot be read.

    whole: read every byte, however untouched a file looks.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        records = manifest["files"]
        if manifest["sha256"] == _sum(records):
            return [name for name, record in records.items() if not _agrees(folder / name, record, whole)]
    except (OSError, ValueError, KeyError, AttributeError, TypeError, EngineError):
        pass
    return [MANIFEST]


def discard(folder: Path) -> None:
    """From now on the folder counts as unfinished, and the next use makes it again."""
    (folder / MANIFEST).unlink(missing_ok=True)


def build(
    target: Path, root: Path, obtain: Callable[[Path], Path], progress: Progress, *, room: int = 0, force: bool = False
) -> Path:
    """`target`, converted from the GGUF file that `obtain(temporary folder)` yields unless it is whole already.

    room: bytes that all of it takes, where they are known before. force: convert even if it is whole. Raises EngineError
    and leaves nothing half-done.
    """
    if not (force or damaged_files(target)):
        return target
    from mtp_engine.models.gguf import convert, converted_bytes  # late: a finished cache needs neither numpy nor gguf

    try:
        with _workplace(root, target.name, progress) as work:
            if not (force or damaged_files(target)):  # another process was faster
                return target
            gguf = obtain(work)
            room = converted_bytes(gguf)
            require_room(root, room, f"converting {gguf.name}")
            fresh = work / "model"
            convert(gguf, fresh, progress)
            _write_manifest(fresh)
            shutil.rmtree(target, ignore_errors=True)
            target.parent.mkdir(exist_ok=True)
            fresh.replace(target)
    except OSError as error:
        if error.errno in FULL:
            raise _too_full(root, room, "preparing this model") from error
        reason = error.strerror or str(error)
        raise EngineError(f"cannot write the model cache {root}: {reason}; mend it or set MTP_ENGINE_CACHE") from error
    return target


def require_room(root: Path, needed: int, what: str) -> None:
    """Raises EngineError if the disk of the cache has less than `needed` bytes left."""
    if shutil.disk_usage(root).free < needed:
        raise _too_full(root, needed, what)


def _too_full(root: Path, needed: int, what: str) -> EngineError:
    free = shutil.disk_usage(root).free
    return EngineError(
        f"{what} needs {needed / 1e6:,.0f} MB in {root}, and its disk has {free / 1e6:,.0f} MB left: free some, or set "
        "MTP_ENGINE_CACHE to a folder on another disk"
    )


def _agrees(path: Path, record: dict[str, Any], whole: bool) -> bool:
    try:
        found = path.stat()
    except OSError:
        return False
    if found.st_size != record["size"]:
        return False
    written = record["written"]
    if not whole and int(found.st_mtime) == written:
        return bool(sha256_of(path, _HEAD) == record["head"])
    if sha256_of(path) != record["sha256"]:
        return False
    with suppress(OSError):  # a copy of the cache: the next start need not read all of it again
        os.utime(path, (written, written))
    return True


def _write_manifest(folder: Path) -> None:
    records = {}
    for file in sorted(folder.iterdir()):
        found = file.stat()
        records[file.name] = {
            "size": found.st_size,
            "written": int(found.st_mtime),
            "head": sha256_of(file, _HEAD),
            "sha256": sha256_of(file),
        }
    manifest = {"format": FORMAT, "files": records, "sha256": _sum(records)}
    (folder / MANIFEST).write_text(json.dumps(manifest), encoding="utf-8")


def _sum(records: dict[str, Any]) -> str:
    """The manifest's own hash: a record that is gone would hide a damaged file."""
    return hashlib.sha256(json.dumps(records).encode()).hexdigest()


@contextmanager
def _workplace(root: Path, name: str, progress: Progress) -> Iterator[Path]:
    """A temporary folder in the cache for the one process that may work on `name`; gone afterwards."""
    for part in ("locks", "tmp", "gguf", "models"):
        (root / part).mkdir(parents=True, exist_ok=True)
    lock = FileLock(root / "locks" / f"{name}.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        progress("waiting for another process that prepares this model", 0, None)
        lock.acquire()
    try:
        for leftover in (root / "tmp").glob(f"{name}.*"):  # of a killed process: we hold its lock
            shutil.rmtree(leftover, ignore_errors=True)
        with tempfile.TemporaryDirectory(prefix=f"{name}.", dir=root / "tmp", ignore_cleanup_errors=True) as work:
            yield Path(work)
    finally:
        lock.release()
