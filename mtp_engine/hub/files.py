"""Files that are there whole or not at all, and files of settings."""

import os
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mtp_engine.errors import EngineError


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Have `write` fill a file beside `path`, then put it in its place. Raises what `write` and the system raise."""
    fresh = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(fresh)
        with fresh.open("rb") as file:
            os.fsync(file.fileno())  # some file systems only now notice that they are full
        fresh.chmod(0o666 & ~_umask())  # safetensors makes files that only their owner may read
        fresh.replace(path)
    finally:
        fresh.unlink(missing_ok=True)


def read_toml(path: Path, kind: str) -> dict[str, Any]:
    """The settings in a file. kind: what it should be, as in "a recipe". Raises EngineError for what is no TOML."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise EngineError(f"{path}: cannot be read ({error.strerror}); name {kind}") from error
    except ValueError as error:
        raise EngineError(f"{path}: is no TOML: {error}") from error


def atomically(path: Path, write: Callable[[Path], object]) -> None:
    """`write_whole`, with an EngineError where the disk is full or cannot be written."""
    try:
        write_whole(path, write)
    except Exception as error:  # safetensors raises an error of its own for a full disk
        if isinstance(error, OSError) or "os error" in str(error).lower():
            reason = getattr(error, "strerror", None) or error
            raise EngineError(f"{path} cannot be written ({reason}): free space and run again") from error
        raise


def _umask() -> int:
    """The process's; reading it means setting it."""
    mask = os.umask(0o022)
    os.umask(mask)
    return mask
