"""How the command line takes misuse: random flags, damaged files, interrupts and closed pipes, none of which may show a
traceback or an "internal error", hang, or leave something in the cache's tmp/.

    python bench/fuzz.py
    python bench/fuzz.py --first 123 --cases 1    # that case again

tests/misuse.py says what a case is. What goes wrong is printed as it comes; the last line is JSON.
"""

import json
import resource
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import click
from common import COUNT, ROOT, SOME, conditions, require_commit, run

_MEMORY = 24 << 30  # bytes of addresses: a config.json that asks for more must be refused, not killed


@click.command()
@click.option("--cases", default=10_000, type=SOME, show_default=True)
@click.option("--first", default=0, type=COUNT, show_default=True, help="Number of the first case: its seed.")
def main(cases: int, first: int) -> None:
    commit = require_commit()
    sys.path.append(str(ROOT / "tests"))
    from misuse import Misuse

    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))
    kinds, codes, problems, longest, begin = Counter[str](), Counter[int](), Counter[str](), 0.0, time.monotonic()
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
        misuse = Misuse(Path(folder))
        for number in range(first, first + cases):
            outcome = misuse.case(number)
            kinds[outcome.kind.split()[0]] += 1
            codes[outcome.code] += 1
            longest = max(longest, outcome.seconds)
            if outcome.problem:
                problems[outcome.problem.split(":")[0]] += 1
                said = f"case {number} ({outcome.kind}): {outcome.problem}\n  {outcome.what}"
                print(said.encode("utf-8", "backslashreplace").decode(), flush=True)
    print(json.dumps({
        "bench": "fuzz", "cases": cases, "first": first, "kinds": kinds, "exit_codes": codes, "problems": problems,
        "longest_s": round(longest, 1), "seconds": round(time.monotonic() - begin), **conditions(commit),
    }))  # fmt: skip


if __name__ == "__main__":
    run(main)
