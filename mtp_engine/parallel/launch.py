"""Starting the other ranks on this host, and ending them: none outlives the first, and all end when one does."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import final

import mtp_engine

_LEAVE = 5.0  # seconds in which a rank that was told to end does


@final
class Children:
    """The processes of ranks 1, 2, ... on this host."""

    def __init__(self, command: str, works: Sequence[bytes], remedy: str = "load the engine anew") -> None:
        """Start `python -m command` for each of `works`, which it reads from its stdin (see `handed`). remedy: what to do
        when one has ended."""
        self._remedy = remedy
        self.said = ""  # who has ended that was not told to, in one line
        self.on_lost: Callable[[], None] = lambda: None  # is called when there is one
        self._failed, self._ending, self._lock = threading.Event(), False, threading.Lock()
        root = str(Path(mtp_engine.__file__).parent.parent)
        paths = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
        self._children = [
            subprocess.Popen(
                [sys.executable, "-m", command], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
                env={**os.environ, "PYTHONPATH": paths},
            )
            for _ in works
        ]  # fmt: skip
        for rank, (child, work) in enumerate(zip(self._children, works, strict=True), 1):
            threading.Thread(
                target=self._watch, args=(rank, child), name=f"mtp-engine rank {rank}", daemon=True
            ).start()
            assert child.stdin is not None
            try:
                child.stdin.write(len(work).to_bytes(8, "little") + work)
                child.stdin.flush()  # and stays open: its end is ours
            except BrokenPipeError:
                pass  # `_watch` says why

    @property
    def processes(self) -> list[int]:
        return [child.pid for child in self._children]

    def lost(self, patience: float) -> str:
        """What `said` is, or becomes within so many seconds."""
        self._failed.wait(0 if self._ending else patience)
        return self.said

    def _watch(self, rank: int, child: "subprocess.Popen[bytes]") -> None:
        assert child.stderr is not None
        last = deque((line.decode("utf-8", "replace").strip() for line in child.stderr), 1)
        code = child.wait()
        with self._lock:
            if self._ending or self._failed.is_set():
                return
            ended = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
            said = f": {last[0]}" if last and code > 0 else ""
            self.said = f"rank {rank} (process {child.pid}) {ended}{said}; {self._remedy}"
            self._failed.set()
        for other in self._children:
            other.kill()
        self.on_lost()

    def close(self, *, wait: bool = True) -> None:
        """See that they end. Closing twice does no harm. wait: for a while, since they were told to."""
        with self._lock:
            self._ending = True
        end = time.monotonic() + (_LEAVE if wait else 0.0)
        for child in self._children:
            try:
                child.wait(max(0.0, end - time.monotonic()))
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()
            if child.stdin is not None:
                child.stdin.close()


def handed() -> bytes:
    """In a child: what it was given to do. From now on it ends when the process that started it does, however that ends."""
    work = sys.stdin.buffer.read(int.from_bytes(sys.stdin.buffer.read(8), "little"))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's Ctrl-C comes to all; the first process decides

    def follow() -> None:
        while os.read(0, 1):
            pass
        os._exit(0)

    threading.Thread(target=follow, daemon=True).start()
    return work
