"""Cases spread over devices: a process for each, which takes one case after another that no other has.

    python -m mtp_engine.experiments.workers FOLDER DEVICE CASE...

is such a process.
"""

import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import IO

import torch

from mtp_engine.errors import EngineError
from mtp_engine.experiments.run import Tally, Tick, run_cases
from mtp_engine.experiments.store import Experiment

_LOOK = 2.0  # seconds between two looks at what is done


def run_workers(experiment: Experiment, devices: Sequence[str], tick: Tick) -> None:
    """Run all cases. Raises EngineError for a device that is not here, and with what the first process said that failed,
    once the others have ended."""
    known = devices_here()
    if unknown := [device for device in devices if device not in known]:
        raise EngineError(f"device {unknown[0]!r} is not here; with several name each of them: {', '.join(known)}")
    with ExitStack() as stack:
        words = [stack.enter_context(tempfile.TemporaryFile()) for _ in devices]
        workers = [_start(experiment, *each) for each in zip(devices, words, strict=True)]
        try:
            while any(worker.poll() is None for worker in workers):
                time.sleep(_LOOK)
                tick(*Tally(experiment).sums)
        finally:
            for worker in workers:
                assert worker.stdin
                worker.stdin.close()  # who still runs keeps what is finished, and ends
            for worker in workers:
                worker.wait()
        for device, worker, said in zip(devices, workers, words, strict=True):
            if worker.returncode:
                said.seek(0)
                lines = said.read().decode(errors="replace").strip().splitlines() or [f"exit code {worker.returncode}"]
                raise EngineError(f"on {device}: {lines[-1].removeprefix('error: ')}; run again to go on")


def devices_here() -> list[str]:
    """Names of those that a process can have."""
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return ["cpu", *(f"cuda:{index}" for index in range(gpus))]


def _start(experiment: Experiment, device: str, words: IO[bytes]) -> subprocess.Popen[bytes]:
    """words: where it writes what goes wrong. In a session of its own, so that Ctrl-C is told to it once, by `run_workers`."""
    command = [sys.executable, "-m", "mtp_engine.experiments.workers", str(experiment.path), device]
    return subprocess.Popen(
        [*command, *sorted(experiment.only)], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=words,
        start_new_session=True,
    )  # fmt: skip


def _end_with_parent() -> None:
    """Interrupt this process once the one that started it has closed its end of the pipe, or is no more."""
    while os.read(0, 1):  # sys.stdin has a lock, which this thread would hold at the interpreter's end
        pass
    os.kill(os.getpid(), signal.SIGINT)


def main(arguments: Sequence[str]) -> int:
    """Returns the exit code."""
    folder, device, *only = arguments
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        run_cases(Experiment.open(Path(folder), only), device)
    except EngineError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
