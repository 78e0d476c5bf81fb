"""Compiling kernels side by side, before they are launched.

Triton compiles a kernel when it is first launched, and then the next one. Here a pass is gone through in which kernels
that are not compiled yet are noted instead of launched; then all of them are compiled at once. Most of that is the work
of LLVM, ptxas and a C compiler (for launchers), during which other threads run Python. Triton keeps them on its disk.
"""

import json
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from types import TracebackType
from typing import Any, final

import torch
from triton import knobs
from triton.runtime import driver

from mtp_engine.kernels.waking import waking


@final
class Missing:
    """Within it, kernels that this thread would have to compile are not launched, but noted.

    What such a kernel would have written is not there, so the pass around it must not run either: it is captured into a
    graph that is never replayed.
    """

    def __init__(self) -> None:
        self._found: dict[tuple[int, str], tuple[Any, dict[str, Any]]] = {}  # functions, and how they are compiled
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
        with ThreadPoolExecutor(threads) as pool:
            done = [pool.submit(_compile, *each, device) for each in self._found.values()]
            for number, _ in enumerate(as_completed(done)):
                progress("compiling kernels", number, len(done))
        for each in done:
            with suppress(Exception), torch.cuda.device(device):
                each.result().run  # noqa: B018  which loads it
        progress("compiling kernels", len(done), len(done))


def _compile(function: Any, how: dict[str, Any], device: torch.device) -> Any:
    """As JITFunction.preload does, which would make lists of tuples among the constants, and so another kernel.

    The launcher is made, too, which a C compiler does, but not kept: all launchers are modules of one name, and of two that
    threads load at a time either may be handed out for the other. They are loaded one after the other, from the disk.
    """
    options = json.loads(how["specialization_data"])["options"]
    backend = function.device_caches[how["device"]][3]
    given = {name: tuple(value) if isinstance(value, list) else value for name, value in options.items()}
    with torch.cuda.device(device):
        kernel = function._do_compile(
            how["key"], how["signature"], how["device"], how["constants"], backend.parse_options(given), how["configs"][0],
            warmup=True,
        )  # fmt: skip
        driver.active.launcher_cls(kernel.src, kernel.metadata)
    return kernel


def wake() -> None:
    """Have what Triton needs before the first kernel made ready beside other work; a C compiler makes its way to the driver."""

    def find_driver() -> None:
        with suppress(Exception):  # whoever launches a kernel will say what is wrong
            driver.active.utils  # noqa: B018

    waking()
    threading.Thread(target=find_driver, name="triton's driver", daemon=True).start()
