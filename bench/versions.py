"""Two checkouts of the project against each other, in one run: does a change cost speed?

    git worktree add /tmp/old 4260691
    python bench/versions.py --old /tmp/old --tree plain --tree tree:7
    python bench/versions.py --old /tmp/old --device cuda --tree plain --tree tree:15 --passes 9

Each checkout loads the default model in a process of its own; then both decode the same prompts greedily, one at a time, in
turns (old, new, new, old, ...), so that a noisy machine hurts both alike. A pass is all prompts; its rate is tokens over
decoding time (prefill left out), by each version's own statistics, which mean the same in both. Loading measures which
layout of the weights is faster and may choose wrongly on a noisy CPU, so both are loaded --loads times. The line holds the
median over all pairs of passes of new / old.
"""

import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any, final

import click
from common import COUNT, SOME, conditions, require_commit, run
from rich.console import Console
from rich.table import Table

_WORKER = """
import json, sys
from mtp_engine import Engine, EngineConfig, SamplingParams, TreeShape
options = json.loads(sys.argv[1])
tree, new = options.pop("tree"), options.pop("max_tokens")
prompts = options.pop("prompts")
drafting = {"drafter": "root"} if tree == "plain" else {"tree": TreeShape.parse(tree)}
engine = Engine.load(config=EngineConfig(max_batch=1, max_context=2048, **options, **drafting))
prompts = [engine.encode([{"role": "user", "content": text}]) for text in prompts]
params = SamplingParams(max_tokens=new, ignore_eos=True)
for _ in sys.stdin:
    answers = [engine.generate([prompt], params)[0] for prompt in prompts]
    tokens = sum(answer.stats.tokens for answer in answers)
    seconds = sum(answer.stats.tokens / answer.stats.tokens_per_s for answer in answers)
    print(json.dumps([tokens / seconds, [answer.token_ids for answer in answers]]), flush=True)
"""


@final
class Version:
    """A checkout that decodes in a process of its own."""

    def __init__(self, folder: Path, options: dict[str, Any]) -> None:
        path = os.pathsep.join([str(folder.resolve()), os.environ.get("PYTHONPATH", "")])
        self._process = subprocess.Popen(
            [sys.executable, "-c", _WORKER, json.dumps(options)], cwd="/", text=True, stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": path},
        )  # fmt: skip

    def decode(self) -> tuple[float, list[list[int]]]:
        """Tokens per second, and the tokens of every prompt."""
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        rate, tokens = json.loads(self._process.stdout.readline())
        return rate, tokens

    def close(self) -> None:
        assert self._process.stdin
        self._process.stdin.close()
        self._process.wait()


def measure(old: Path, options: dict[str, Any], passes: int, rates: list[list[float]]) -> bool:
    """Add the rates of both checkouts, freshly loaded, pass by pass. Returns whether they gave the same tokens."""
    versions, texts = [], []
    for folder in (old, Path(__file__).parents[1]):  # one by one, as loading measures
        versions.append(Version(folder, options))
        texts.append(versions[-1].decode()[1])  # compiles, captures, warms up
    for number in range(passes):
        for which in (0, 1) if number % 2 == 0 else (1, 0):
            rates[which].append(versions[which].decode()[0])
    for version in versions:
        version.close()
    return texts[0] == texts[1]


def compare(old: Path, options: dict[str, Any], passes: int, loads: int) -> dict[str, Any]:
    rates: list[list[float]] = [[], []]
    same = [measure(old, options, passes, rates) for _ in range(loads)]
    ratios = [new / before for before, new in zip(*rates, strict=True)]
    return {
        "old_tokens_per_s": round(statistics.median(rates[0]), 1),
        "new_tokens_per_s": round(statistics.median(rates[1]), 1),
        "new_over_old": round(statistics.median(ratios), 4),
        "lowest": round(min(ratios), 4),
        "highest": round(max(ratios), 4),
        "same_tokens": all(same),
    }


@click.command()
@click.option("--old", type=click.Path(exists=True, file_okay=False, path_type=Path), required=True)
@click.option("--old-commit", default="", help="Where --old has no git to ask.")
@click.option("--tree", "trees", multiple=True, default=["plain", "tree:7"], show_default=True)
@click.option("--prompts", "path", type=click.Path(exists=True, dir_okay=False, path_type=Path),
              default=Path(__file__).parent / "prompts/bench_core.jsonl")  # fmt: skip
@click.option("--limit", default=4, type=COUNT, show_default=True)
@click.option("--max-tokens", default=64, type=SOME, show_default=True)
@click.option("--passes", default=5, type=SOME, show_default=True)
@click.option("--loads", default=1, type=SOME, show_default=True, help="How often both are loaded anew.")
@click.option("--device", default="cpu", show_default=True)
@click.option("--threads", default=0, type=COUNT, help="CPU threads; 0 is one per core.")
def main(old: Path, old_commit: str, trees: tuple[str, ...], path: Path, limit: int, max_tokens: int, passes: int,
         loads: int, device: str, threads: int) -> None:  # fmt: skip
    commit = require_commit()
    if not old_commit:
        command = ["git", "-C", str(old), "rev-parse", "HEAD"]
        old_commit = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()[:limit]]
    options = {
        "prompts": [row["turns"][0] for row in rows],
        "max_tokens": max_tokens,
        "device": device,
        "threads": threads,
    }
    results = {tree: compare(old, {**options, "tree": tree}, passes, loads) for tree in trees}
    table = Table("tree", "old tokens/s", "new tokens/s", "new / old", "same tokens")
    for tree, r in results.items():
        spread = f"{r['new_over_old']:.3f} ({r['lowest']:.3f} to {r['highest']:.3f})"
        table.add_row(tree, str(r["old_tokens_per_s"]), str(r["new_tokens_per_s"]), spread, str(r["same_tokens"]))
    Console().print(table)
    record = {
        "bench": "versions",
        "old": old_commit,
        "cases": limit,
        "max_tokens": max_tokens,
        "passes": passes,
        "loads": loads,
    }
    click.echo(json.dumps({**record, "results": results, **conditions(commit, device)}))


if __name__ == "__main__":
    run(main)
