"""What Triton needs before its first kernel, made ready beside other work: a hash over its own files, most of a second."""

import threading
from contextlib import suppress
from functools import cache


@cache
def waking() -> threading.Thread:
    """The thread that does it, from the first call on. Nothing heavy is imported but by it, so it may begin before torch does."""

    def prepare() -> None:
        with suppress(ImportError, OSError):  # another version: then the first kernel waits for it
            from triton.runtime.cache import triton_key

            triton_key()

    thread = threading.Thread(target=prepare, name="triton", daemon=True)
    thread.start()
    return thread
