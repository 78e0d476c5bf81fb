"""Cases spread over devices: a process for each, which takes one case after another that no other has.

    python -m mtp_engine.experiments.workers FOLDER DEVICE CASE...

is such a process.
"""

import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from mtp_engine.errors import EngineError
from mtp_engine.experiments.run import Tally, Tick, run_cases
from mtp_engine.experiments.store import Experiment

_LOOK = 2.0  # seconds between two looks at what is done


def run_workers(experiment: Experiment, devices: Sequence[str], tick: Tick) -> None:
    """Run all cases. Raises EngineError with what the first process said that failed, once the others have ended."""
    command = [sys.executable, "-m", "mtp_engine.experiments.workers", str(experiment.path)]
    workers = [
        subprocess.Popen(
            [*command, device, *sorted(experiment.only)], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
        )
        for device in devices
    ]
    try:
        while any(worker.poll() is None for worker in workers):
            time.sleep(_LOOK)
            tick(*Tally(experiment).sums)
    finally:
        for worker in workers:
            if worker.poll() is None:
                worker.terminate()  # it keeps what is finished
        said = [worker.communicate()[1] for worker in workers]
    for device, worker, text in zip(devices, workers, said, strict=True):
        if worker.returncode:
            lines = text.strip().splitlines() or [f"exit code {worker.returncode}"]
            raise EngineError(f"on {device}: {lines[-1].removeprefix('error: ')}; run again to go on")


def main(arguments: Sequence[str]) -> int:
    """Returns the exit code."""
    folder, device, *only = arguments
    try:
        run_cases(Experiment.open(Path(folder), only), device)
    except EngineError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
