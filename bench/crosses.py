"""Random engines under random loads: is every answer plain decoding's, whatever meets whatever?

    python bench/crosses.py
    python bench/crosses.py --first 123 --cases 1    # that case again
    python bench/crosses.py --device cuda --dtype bf16 --cases 200
    python bench/crosses.py --recorded --cases 100                       # a GPU's steps, on a CPU, in fp32
    python bench/crosses.py --dtype fp32 --tensor-parallel 2 --cases 50

tests/crossing.py says what a case is. What goes wrong is printed as it comes; the last line is JSON.
"""

import json
import logging
import sys
import time
from collections import Counter

import click
from common import COUNT, ROOT, SOME, conditions, require_commit, run

from mtp_engine.hub import hub


@click.command()
@click.option("--cases", default=1000, type=SOME, show_default=True)
@click.option("--first", default=0, type=COUNT, show_default=True, help="Number of the first case: its seed.")
@click.option("--model", default=hub.NANO, show_default=True)
@click.option("--device", default="cpu", show_default=True)
@click.option("--dtype", default="auto", show_default=True)
@click.option("--threads", default=0, type=COUNT, help="Of a CPU; 0 is one per core.")
@click.option("--recorded", is_flag=True, help="Steps as they are recorded for a GPU; in fp32 on a CPU.")
@click.option("--tensor-parallel", default=1, type=SOME, show_default=True)
@click.option("--seconds", default=0.0, help="No new case after so many; 0 is no limit.")
def main(
    cases: int, first: int, model: str, device: str, dtype: str, threads: int, recorded: bool, tensor_parallel: int,
    seconds: float,
) -> None:  # fmt: skip
    commit = require_commit()
    sys.path.append(str(ROOT / "tests"))
    from crossing import Crosses

    logging.getLogger("mtp_engine").setLevel(logging.CRITICAL)  # steps that break off are a part of it
    dtype = "fp32" if recorded and dtype == "auto" else dtype
    most = 16 if dtype in ("auto", "int8") or device != "cpu" else 7  # fp32 is slow there
    crosses = Crosses(
        model, recorded=recorded, most=most, ranks=tensor_parallel, device=device, dtype=dtype, threads=threads
    )
    total, ends, begin, done = Counter[str](), Counter[str](), time.monotonic(), 0
    for number in range(first, first + cases):
        outcome = crosses.case(number)
        for problem in outcome.problems:
            print(f"case {number}: {problem}\n  {outcome.config}", flush=True)
        counts = ("answers", "tokens", "accepted", "preempted", "cached")
        total.update({name: getattr(outcome, name) for name in counts}, problems=len(outcome.problems))
        ends.update(outcome.ends)
        done += 1
        if 0 < seconds < time.monotonic() - begin:
            break
    print(json.dumps({
        "bench": "crosses", "model": model, "dtype": dtype, "recorded": recorded, "ranks": tensor_parallel, "cases": done,
        "first": first, **total, "ends": ends, "seconds": round(time.monotonic() - begin), **conditions(commit, device),
    }))  # fmt: skip


if __name__ == "__main__":
    run(main)
