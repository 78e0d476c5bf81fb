"""Compiling the library for this processor, once, with whatever C compiler there is."""

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from importlib import resources, util
from pathlib import Path

_SOURCES = ("cpu.h", "step.h", "team.c", "products.c", "step.c", "choose.c", "draft.c")
FLAGS = ("-O3", "-march=native", "-ffp-contract=off", "-std=gnu11", "-shared", "-fPIC", "-pthread")
_SECONDS = 300  # for a compiler that starts cold


class NoCompiler(Exception):
    """Why the library cannot be made here, in words."""


def compiled(folder: Path, flags: tuple[str, ...] = FLAGS) -> ctypes.CDLL:
    """The library, kept in `folder`. Raises NoCompiler where it cannot be made."""
    if not sys.platform.startswith(("linux", "darwin")):
        raise NoCompiler(f"the library needs POSIX threads, and this is {sys.platform}")
    here = resources.files(__package__)
    sources = {name: (here / name).read_text(encoding="utf-8") for name in _SOURCES}
    key = hashlib.sha256("\n".join([*sources.values(), *flags, processor()]).encode()).hexdigest()[:16]
    path = folder / f"cpu-{key}.so"
    if not path.exists():
        _compile(sources, path, flags)
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        path.unlink(missing_ok=True)  # a damaged one; the next start makes it anew
        raise NoCompiler(str(error)) from error


def _compile(sources: Mapping[str, str], path: Path, flags: tuple[str, ...]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    said = "there is no C compiler: pip install ziglang, or install gcc or clang"
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".new-") as folder:
        made, code = Path(folder) / path.name, []
        for name, text in sources.items():
            (Path(folder) / name).write_text(text, encoding="utf-8")
            if name.endswith(".c"):
                code.append(str(Path(folder) / name))
        for compiler in _compilers():
            command = [*compiler, *flags, *code, "-o", str(made), "-lm"]
            try:
                done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS)
            except (OSError, subprocess.TimeoutExpired) as error:
                said = f"{compiler[0]} does not run: {error}"
                continue
            if done.returncode == 0:
                os.replace(made, path)
                return
            said = f"{' '.join(compiler)} failed: {(done.stderr.strip().splitlines() or ['no word why'])[0]}"
    raise NoCompiler(said)


def _compilers() -> Iterator[list[str]]:
    if chosen := os.environ.get("CC"):
        yield chosen.split()
    for name in ("cc", "gcc", "clang"):
        if found := shutil.which(name):
            yield [found]
    if util.find_spec("ziglang"):
        yield [sys.executable, "-m", "ziglang", "cc"]


def processor() -> str:
    """What -march=native depends on, and how fast things are."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return platform.machine() + platform.processor()
    named = {line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part"))}
    return platform.machine() + "".join(sorted(named))
