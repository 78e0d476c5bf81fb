"""Compiling kernels side by side, before they are launched.

Triton compiles a kernel when it is first launched, and then the next one. Here a pass is gone through in which kernels
that are not compiled yet are noted instead of launched; then all of them are compiled at once, and Triton keeps them on
its disk. Many are compiled in forked processes, as in threads they would wait for each other, for Python's lock.
"""

import gc
import hashlib
import json
import os
import select
import signal
import threading
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from types import TracebackType
from typing import Any, final

import torch
from triton import knobs
from triton.runtime import driver
from triton.runtime.cache import get_cache_manager

from mtp_engine.kernels.waking import waking

Kernel = tuple[Any, dict[str, Any]]  # a JITFunction, and how it is compiled

_MANY = 8  # kernels that are worth processes
_PATIENCE = 60  # seconds in which one of them compiles a kernel, or all are given up


@final
class Missing:
    """Within it, kernels that this thread would have to compile are not launched, but noted.

    What such a kernel would have written is not there, so the pass around it must not run either: it is captured into a
    graph that is never replayed.
    """

    def __init__(self) -> None:
        self._found: dict[tuple[int, str], Kernel] = {}
        self._thread, self._before = 0, knobs.runtime.jit_cache_hook

    def __enter__(self) -> "Missing":
        self._thread, self._before = threading.get_ident(), knobs.runtime.jit_cache_hook
        knobs.runtime.jit_cache_hook = self._note
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._thread = 0  # where another thread has set its own hook meanwhile, this one may be asked once more
        knobs.runtime.jit_cache_hook = self._before

    def __len__(self) -> int:
        return len(self._found)

    def _note(self, *, key: str, fn: Any, compile: dict[str, Any], **_: Any) -> bool:
        """Triton's JITHook: True where the kernel is neither to be compiled nor launched."""
        if self._thread != threading.get_ident():
            return False
        self._found[id(fn.jit_function), key] = fn.jit_function, compile
        return True

    def compile(self, device: torch.device, threads: int, progress: Callable[[str, int, int | None], None]) -> None:
        """Compile and load what was noted. Where that fails, whoever launches the kernel will say why."""
        if not self._found:
            return
        waking().join()  # what it does is done once, and not by all threads
        found = list(self._found.values())
        new = [each for each in found if not _kept(*each)]
        if len(new) >= _MANY and threads > 1:
            _in_processes(new, threads, lambda number: progress("compiling kernels", number, len(new)))
            new = [each for each in new if not _kept(*each)]
        with ThreadPoolExecutor(threads) as pool:
            done = [pool.submit(_compile_on, device, *each) for each in new]
            for number, _ in enumerate(as_completed(done)):
                progress("compiling kernels", number, len(new))
        for each in found:
            with suppress(Exception), torch.cuda.device(device):
                _made(*each).run  # noqa: B018  which loads it
        progress("compiling kernels", len(found), len(found))


def _compile(function: Any, how: dict[str, Any]) -> Any:
    """As JITFunction.preload does, which would make lists of tuples among the constants, and so another kernel.

    The launcher is made, too, which a C compiler does, but not kept: all launchers are modules of one name, and of two that
    threads load at a time either may be handed out for the other. They are loaded one after the other, from the disk.
    """
    kernel = _read(function, how)
    driver.active.launcher_cls(kernel.src, kernel.metadata)
    return kernel


def _read(function: Any, how: dict[str, Any]) -> Any:
    """The kernel, from Triton's disk if it is there."""
    options, attributes = _options(function, how), how["configs"][0]
    given = how["key"], how["signature"], how["device"], how["constants"], options, attributes
    return function._do_compile(*given, warmup=True)


def _made(function: Any, how: dict[str, Any]) -> Any:
    return function.device_caches[how["device"]][0].get(how["key"]) or _read(function, how)


def _compile_on(device: torch.device, function: Any, how: dict[str, Any]) -> Any:
    with torch.cuda.device(device):
        return _compile(function, how)


def _options(function: Any, how: dict[str, Any]) -> Any:
    options = json.loads(how["specialization_data"])["options"]
    given = {name: tuple(value) if isinstance(value, list) else value for name, value in options.items()}
    return function.device_caches[how["device"]][3].parse_options(given)


def _kept(function: Any, how: dict[str, Any]) -> bool:
    """Whether Triton has it on its disk."""
    with suppress(Exception):  # another version: then it is compiled, or read, like one that is not there
        from triton.compiler.compiler import get_cache_invalidating_env_vars, get_cache_key

        source = function.ASTSource(function, how["signature"], how["constants"], how["configs"][0])
        backend, variables = function.device_caches[how["device"]][3], get_cache_invalidating_env_vars()
        key = get_cache_key(source, backend, _options(function, how), env_vars=variables)
        kept = get_cache_manager(hashlib.sha256(key.encode()).hexdigest())
        return bool(kept.get_group(f"{source.name[:150]}.json"))
    return False


def _in_processes(kernels: Sequence[Kernel], processes: int, done: Callable[[int], None]) -> None:
    """Compile them to Triton's disk. Whatever fails, or takes too long, is left to who launches it. done: is told how many.

    The processes are copies of this one that do nothing else, so they must not touch the GPU, and do not.
    """
    (todo, numbers), (said, say) = os.pipe(), os.pipe()
    os.write(numbers, b"".join(number.to_bytes(2, "big") for number in range(len(kernels))))  # each reads the next one
    os.close(numbers)
    children = []
    with warnings.catch_warnings(
        action="ignore", category=DeprecationWarning
    ):  # of other threads, whose locks are not used
        for _ in range(min(processes, len(kernels))):
            child = os.fork()
            if not child:
                _work(kernels, todo, say)
            children.append(child)
    os.close(todo)
    os.close(say)
    number = 0
    try:
        while select.select([said], [], [], _PATIENCE)[0] and (more := os.read(said, len(kernels))):
            number += len(more)
            done(number)
    finally:
        os.close(said)
        for child in children:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)


def _work(kernels: Sequence[Kernel], todo: int, say: int) -> None:
    """What such a process does."""
    gc.disable()  # a tensor of the GPU that is collected here would have to be given back by a driver that is not
    try:
        while number := os.read(todo, 2):
            with suppress(Exception):
                _compile(*kernels[int.from_bytes(number, "big")])
            os.write(say, b".")
    finally:
        os._exit(0)


def wake() -> None:
    """Have what Triton needs before the first kernel made ready beside other work; a C compiler makes its way to the driver."""

    def find_driver() -> None:
        with suppress(Exception):  # whoever launches a kernel will say what is wrong
            driver.active.utils  # noqa: B018

    waking()
    threading.Thread(target=find_driver, name="triton's driver", daemon=True).start()
