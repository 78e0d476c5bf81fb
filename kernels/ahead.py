"""Compiling what a call needs before it is made: all its large kernels at once, in as many threads as there are cores.

Triton compiles a kernel when it is first launched, one after the other, and a step or a pass over prompts of a new size
needs up to a dozen. Here the call is made for nothing first: kernels that are not compiled yet are noted and left out.
"""

import logging
import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, final

from triton import knobs

from mtp_engine.kernels.chain_attention_kernels import chain_kernel
from mtp_engine.kernels.dense_kernels import gated_kernel, linear_kernel, norm_kernel, place_kernel, qkv_kernel
from mtp_engine.kernels.forest_attention_kernels import own_kernel, shared_kernel
from mtp_engine.kernels.moe_kernels import down_kernel, gate_up_kernel
from mtp_engine.kernels.tree_attention_kernels import merge_kernel, runs_kernel

_LOG = logging.getLogger("mtp_engine")
# what they compute says nothing of where others read or write: these can be left out
_LARGE = (
    linear_kernel, gated_kernel, qkv_kernel, place_kernel, norm_kernel, chain_kernel, runs_kernel, merge_kernel, shared_kernel,
    own_kernel, gate_up_kernel, down_kernel,
)  # fmt: skip


@final
class Missing:
    """Kernels that were to be launched and are not compiled."""

    def __init__(self) -> None:
        self._found: dict[tuple[Any, Any], str] = {}  # the kernel and its key, and what to compile
        self._thread = threading.get_ident()

    def __bool__(self) -> bool:
        return bool(self._found)

    def note(self, *, key: Any, fn: Any, compile: dict[str, Any], **_: Any) -> bool:
        """Triton's hook: whether to leave this launch out. Those of other threads are meant."""
        if fn.jit_function not in _LARGE or threading.get_ident() != self._thread:
            return False
        self._found[fn.jit_function, key] = compile["specialization_data"]
        return True

    def compile(self) -> None:
        """All of them, in threads; Triton's compiler and ptxas leave Python's lock to others."""

        def one(item: tuple[tuple[Any, Any], str]) -> None:
            (kernel, _), given = item
            try:
                kernel.preload(given)
            except Exception as error:  # it is compiled when it is launched
                _LOG.debug("%s was not compiled ahead: %s", kernel, error)

        with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
            list(pool.map(one, self._found.items()))


@contextmanager
def compiling_ahead() -> Iterator[Missing]:
    """Within, large kernels that are not compiled are not launched, so that results mean nothing; they are compiled at the end.
    Others run: what decides where they read and write must not come from a large one."""
    missing, before = Missing(), knobs.runtime.jit_cache_hook
    knobs.runtime.jit_cache_hook = missing.note
    try:
        yield missing
    finally:
        knobs.runtime.jit_cache_hook = before
    missing.compile()
