"""MiMo-V2-Flash with all its layers and true dimensions on the GPUs of one host: what a step takes, and what its bytes take.

    python bench/full_size.py --dry-run --ranks 8                   # memory of each GPU and floors, without one
    python bench/full_size.py --ranks 4                             # 48 layers and three MTP layers, 312 GB in FP8
    python bench/full_size.py --ranks 2 --experts int4              # 86 GB on each of two
    python bench/full_size.py --ranks 8 --alone                     # on one GPU: the work of one of 8, which sums with itself
    python bench/full_size.py --ranks 2 --device cpu --shape tiny --parts all_reduce,steps

Weights are random numbers that each rank makes in place; nothing is read from disk, and keys and values are made too, not
prefilled. Accepted lengths are forced (loops.Forced) and say nothing about real text. A part that fails or takes too long
costs itself alone: the ranks are started anew for those that are left. The last line is all that was measured, as JSON.
"""

import json
import queue
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, final

import click
from common import SOME, conditions, require_commit, run
from floors import draft_bytes, main_bytes
from full_size_rank import Job, command, cut_shape
from shapes import SHAPES

from mtp_engine.config import Experts
from mtp_engine.models.plan import GPU_GB, make_share
from mtp_engine.parallel.processes import new_store
from mtp_engine.parallel.shard import Shard

CHAIN, FORCED = "chain:3", (2.7, 3.0)
_BANDWIDTH = {"H100": 3.06e12, "H200": 4.2e12}  # bytes per second, as sums over large tensors measured them
_USABLE = 0.94  # of a GPU's memory
Part = dict[str, Any]


def plan_parts(kinds: Sequence[str], batches: Sequence[int], contexts: Sequence[int]) -> list[Part]:
    """What matters most comes first: whole steps at the shortest context, longer contexts of few requests, wider trees, and then
    single layers, whose kernels these have compiled."""
    first, *longer = contexts
    chain, plain = (CHAIN, FORCED[0]), (None, 0.0)
    shortest = [(b, first, *way) for b in batches for way in (chain, plain)]
    longest = [(b, c, *way) for c in longer[::-1] for b in batches[1::-1] for way in (chain, plain)]
    longest += [(b, first, CHAIN, FORCED[1]) for b in batches]
    wider = [(b, first, "tree:15", 0.0) for b in batches[:2]]
    many = [(b, c, *way) for way in (chain, plain) for c in longer for b in batches[2:]]
    steps = [
        [{"part": "step", "batch": b, "context": c, "tree": tree, "forced": forced} for b, c, tree, forced in pairs]
        for pairs in (shortest, longest, wider, many)
    ]
    profiles = [{"part": "profile", "batch": b, "context": first, "tree": CHAIN} for b in (batches[0], batches[-1])]
    found = [
        {"part": "all_reduce"},
        *steps[0],
        profiles[0],
        *steps[1],
        *steps[2],
        {"part": "layers"},
        profiles[1],
        *steps[3],
    ]
    return [part for part in found if part["part"] in kinds or (part["part"] == "step" and "steps" in kinds)]


def planned(name: str, layers: int, experts: Experts, ranks: int, parts: Sequence[Part]) -> dict[str, Any]:
    """Memory of each GPU and milliseconds that the bytes take, from the configuration alone."""
    shape = cut_shape(name, layers, experts)
    (config, mtp), names = shape.parse(), shape.family.MTP_NAMES
    share, shard = make_share(config, mtp, names, ranks), Shard(0, ranks)
    held, held_mtp, weights = shard.model(config), shard.mtp(mtp), sum(share.weights.values())
    rows = []
    for part in parts:
        if part["part"] != "step":
            continue
        batch, context, nodes = part["batch"], part["context"], {None: 1, CHAIN: 4}.get(part["tree"], 16)
        read = main_bytes(held, batch * nodes, batch, context, ranks)
        drafts = draft_bytes(held, held_mtp, names, config.vocab_size // ranks, 3, batch, context, ranks)
        read += drafts if part["tree"] else 0.0
        needed = weights + batch * (share.kv_per_token * context + share.kv_per_sequence)
        rows.append(part | {
            "gb": round(needed / 1e9, 1), "fits": [size for size in GPU_GB if needed < _USABLE * size * 1e9],
            "read_gb": round(read / 1e9, 2), "floor_ms": {gpu: round(read / rate * 1e3, 2) for gpu, rate in _BANDWIDTH.items()},
        })  # fmt: skip
    return {
        "layers": len(config.layers), "weights_gb": {part: round(size / 1e9, 2) for part, size in share.weights.items()},
        "weights_gb_in_all": round(weights / 1e9, 2), "kv_bytes_per_token": share.kv_per_token, "parts": rows,
    }  # fmt: skip


@final
@dataclass(frozen=True)
class Limits:
    """Seconds: of one part, of making weights (starting the ranks and what is compiled first included), and the moment of
    time.monotonic() at which no part is begun any more."""

    part: float
    start: float
    end: float


def measured(job: Job, parts: Sequence[Part], limits: Limits, restarts: int) -> Iterator[Part]:
    """Every part with what came of it, as soon as it is there."""
    left = list(parts)
    for _ in range(restarts + 1):
        if not left or time.monotonic() > limits.end:
            break
        for found in _started(replace(job, parts=[{"part": "weights"}, *left]), limits):
            left = [part for part in left if not part.items() <= found.items()]
            yield found
    yield from (part | {"failed": "not begun"} for part in left)


def _started(job: Job, limits: Limits) -> Iterator[Part]:
    """Until all parts are done, or one fails, with which all ranks end."""
    count = 1 if job.alone else job.ranks
    store = new_store(count) if count > 1 else None
    with tempfile.TemporaryDirectory(prefix="full-size-") as folder:
        logs = [(Path(folder) / f"{rank}").open("w+b") for rank in range(count)]
        jobs = [replace(job, rank=rank, port=store.port if store else 0) for rank in range(count)]
        processes = [
            subprocess.Popen(command(each), stdout=subprocess.PIPE if not each.rank else log, stderr=log)
            for each, log in zip(jobs, logs, strict=True)
        ]
        try:
            yield from _heard(processes, logs, limits)
        finally:
            for process in processes:
                process.kill()
            for process in processes:
                process.wait()


def _heard(processes: Sequence["subprocess.Popen[bytes]"], logs: Sequence[Any], limits: Limits) -> Iterator[Part]:
    lines: queue.Queue[bytes] = queue.Queue()
    threading.Thread(target=_listen, args=(processes[0].stdout, lines), daemon=True).start()
    running: Part | None = {"part": "weights"}
    while True:
        limit = limits.start if running == {"part": "weights"} else limits.part
        try:
            line = lines.get(timeout=min(limit, max(1.0, limits.end + limits.part - time.monotonic())))
        except queue.Empty:
            yield (running or {}) | {"failed": f"took more than {limit:.0f} s"}
            return
        if not line:
            if running:
                yield running | {"failed": _last_words(processes, logs)}
            return
        if not line.startswith(b'{"'):
            continue
        said = json.loads(line)
        running = said.get("begin")
        if "done" in said:
            yield said["done"]
            if time.monotonic() > limits.end:
                return


def _listen(stream: Any, lines: "queue.Queue[bytes]") -> None:
    for line in stream:
        lines.put(line)
    lines.put(b"")


def _last_words(processes: Sequence["subprocess.Popen[bytes]"], logs: Sequence[Any]) -> str:
    """Of the rank that ended with an error, if one did."""
    time.sleep(1.0)  # for the others to end too
    said = []
    for rank, (process, log) in enumerate(zip(processes, logs, strict=True)):
        log.seek(0)
        lines = log.read().decode("utf-8", "replace").strip().splitlines()
        click.echo("\n".join(f"rank {rank}: {line}" for line in lines[-12:]), err=True)
        if process.poll():
            said.append(f"rank {rank} ended with {process.returncode}: {lines[-1] if lines else ''}")
    return "; ".join(said)[:600] or "rank 0 ended"


@click.command()
@click.option("--shape", default="mimo-v2-flash", show_default=True, type=click.Choice(sorted(SHAPES)))
@click.option("--layers", default=0, type=click.IntRange(0), help="The first so many of the main model; 0: all.")
@click.option("--experts", default="auto", show_default=True, type=click.Choice(["auto", "int4"]))
@click.option("--ranks", default=8, show_default=True, type=SOME)
@click.option("--alone", is_flag=True, help="One GPU does the work of one rank, and sums with itself.")
@click.option("--dry-run", is_flag=True, help="The plan only: memory of each GPU, and what the bytes take.")
@click.option(
    "--parts", "kinds", default="all_reduce,steps", show_default=True, help="Also: layers, one by one; profile."
)
@click.option("--batch", "batches", multiple=True, type=SOME, default=[1, 8, 32, 64], show_default=True)
@click.option("--context", "contexts", multiple=True, type=SOME, default=[1 << 10, 1 << 14, 1 << 16, 1 << 18])
@click.option("--steps", default=24, show_default=True, type=SOME)
@click.option("--device", default="cuda", show_default=True, type=click.Choice(["cuda", "cpu"]))
@click.option("--bandwidth", default=3.06, show_default=True, help="TB/s of a GPU, for floors; 4.2 for an H200.")
@click.option("--part-limit", default=45.0, show_default=True, help="Seconds of one part.")
@click.option("--start-limit", default=150.0, show_default=True, help="Seconds until all weights are made.")
@click.option("--budget", default=520.0, show_default=True, help="Seconds after which no part is begun.")
@click.option("--restarts", default=2, show_default=True, type=click.IntRange(0))
def main(shape: str, layers: int, experts: Experts, ranks: int, alone: bool, dry_run: bool, kinds: str, batches: tuple[int, ...],
         contexts: tuple[int, ...], steps: int, device: str, bandwidth: float, part_limit: float, start_limit: float,
         budget: float, restarts: int) -> None:  # fmt: skip
    commit = require_commit()
    parts = plan_parts(kinds.split(","), batches, contexts)
    plan = planned(shape, layers, experts, ranks, parts)
    record: dict[str, Any] = {
        "bench": "full_size", "shape": shape, "layers": plan["layers"], "experts": experts, "ranks": ranks, "alone": alone,
        "accepted_length": "forced", "keys_and_values": "random", "weights": "random", "bandwidth_tb_s": bandwidth,
    }  # fmt: skip
    if dry_run:
        for row in plan["parts"]:
            click.echo(json.dumps(row))
        click.echo(json.dumps(record | {"plan": plan} | conditions(commit)))
        return
    limits = Limits(part_limit, start_limit, time.monotonic() + budget)
    job = Job(0, ranks, 0, alone, shape, layers, device, steps, bandwidth * 1e12, [], experts)
    found = []
    for each in measured(job, parts, limits, restarts):
        click.echo(json.dumps(each))
        found.append(each)
    plan.pop("parts")
    click.echo(json.dumps(record | {"plan": plan, "measured": found} | conditions(commit, device)))


if __name__ == "__main__":
    run(main)
