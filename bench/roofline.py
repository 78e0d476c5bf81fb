"""What a step costs and what its bytes cost: plain steps, drafts, verification of N nodes, over contexts and batches.

    python bench/roofline.py --model mimo-7b --model default --model mimo-slice
    python bench/roofline.py --many bench/results/roofline-mimo-slice-h100.jsonl      # 48 layers on many GPUs, on paper

Bandwidth is measured first. A floor is bytes (floors.py) over that read bandwidth. Models with random weights are timed
only: an accepted length comes from `Forced`, and the output says so. Times are medians of CUDA graph replays (events of
the runner); `gap` is wall time per step less the graphs', `idle` the GPU's pause between two steps.
"""

import gc
import json
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from typing import Any, TextIO, final

import click
import torch
from common import SOME, conditions, require_commit, run
from floors import draft_bytes, main_bytes
from layers import measure_layers, seconds
from loops import Forced, build, kernel_times, measure, pretend
from paper import estimates, on_paper, paper_table, table
from rich.console import Console
from rich.table import Table
from shapes import SHAPES, Model, load

from mtp_engine import EngineConfig, TreeShape
from mtp_engine.config import DEFAULT_MODEL, DRAFT_VOCAB

CONSOLE = Console(width=150)


def bandwidth(device: torch.device, size: int) -> dict[str, float]:
    """Bytes per second. read: the best of several reductions over `size` bytes; copy: bytes read plus bytes written."""
    x = torch.randn(size // 4, device=device)
    reductions: dict[str, Callable[[], object]] = {
        "fp32 sum": lambda: x.sum(),
        "int32 max": lambda: x.view(torch.int32).amax(),
        "fp32 mv": lambda: x.view(-1, 4096).mv(x[:4096]),
        "bf16 rows": lambda: x.view(torch.bfloat16).view(-1, 8192).sum(1),
    }
    rates = {name: size / seconds(run, device) for name, run in reductions.items()}
    y = torch.empty_like(x)
    rates["copy"] = 2 * size / seconds(lambda: y.copy_(x), device)
    CONSOLE.print("TB/s: " + ", ".join(f"{name} {rate / 1e12:.3f}" for name, rate in rates.items()))
    return {"read": max(rate for name, rate in rates.items() if name != "copy"), "copy": rates["copy"]}


def tree_of(nodes: int) -> str | None:
    """The tree of so many nodes, root included: chains up to the depth that all models have."""
    return None if nodes == 1 else f"chain:{nodes - 1}" if nodes <= 4 else f"tree:{nodes - 1}"


def step_floor(model: Model, tree: str | None, batch: int, context: int, read: float) -> tuple[float, float]:
    """Seconds of draft and of verification."""
    shape, mtp = TreeShape.parse(tree) if tree else None, model.module.config
    rows = batch * (shape.max_nodes if shape else 1)
    levels = 0 if shape is None else min(mtp.depth, shape.best) if shape.best else len(shape.widths)
    vocab = len(model.module.draft_ids)
    drafted = draft_bytes(model.config, mtp, model.names, vocab, levels, batch, context)
    return drafted / read, main_bytes(model.config, rows, batch, context) / read


@final
@dataclass(frozen=True)
class Session:
    """What all cases of a model share. read: bytes per second. deadline: of time.perf_counter(), for beginning a case."""

    model: Model
    config: EngineConfig
    steps: int
    read: float
    deadline: float

    def attempt(self, case: dict[str, Any], run: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The case with what `run` measures, or why it could not; printed at once, in case the time runs out."""
        if time.perf_counter() > self.deadline:
            return case | {"failed": "out of time"}
        try:
            case = case | run()
        except Exception as error:  # a GPU's minutes are few: the other cases still count
            full = isinstance(error, torch.OutOfMemoryError) or "memory is full" in str(error)
            case = case | {"failed": "does not fit" if full else f"{type(error).__name__}: {error}"}
            if not full:
                traceback.print_exc()
        gc.collect()  # graphs and caches go, before the next case makes its own
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        click.echo(json.dumps(case))
        return case

    def timed(self, case: dict[str, Any], forced: int = 0) -> dict[str, Any]:
        """One kind of step. Adds microseconds and multiples of floors."""
        return self.attempt(case, lambda: self._time(case, forced))

    def _time(self, case: dict[str, Any], forced: int) -> dict[str, Any]:
        tree, batch, context = case["tree"], case["batch"], case["context"]
        bench = build(self.model, tree, batch, context, self.config)
        if forced and tree:
            bench.loop.work.verifier = Forced(bench.loop.work.verifier, forced)
        pretend(bench.loop, batch, context)
        t = measure(bench, self.steps)
        bench.close()
        draft, verify = step_floor(self.model, tree, batch, context, self.read)
        times = {name: round(getattr(t, name) * 1e6, 1) for name in ("draft", "verify", "wall", "gap", "idle")}
        ratios = {"verify_x": t.verify / verify, "wall_x": t.wall / (draft + verify)}
        if tree:
            ratios["draft_x"] = t.draft / draft
        return times | {name: round(value, 3) for name, value in ratios.items()} | {"accepted": round(t.accepted, 3)}

    def profiled(self, tree: str | None, context: int) -> dict[str, float]:
        """Microseconds a step of the 30 longest kernels; prints them."""
        bench = build(self.model, tree, 1, context, self.config)
        pretend(bench.loop, 1, context)
        spent = kernel_times(bench)
        bench.close()
        title = f"{self.model.name}, {tree or 'plain'}, batch 1, context {context}"
        table = Table("us a step", "calls a step", "kernel", title=title)
        for name, (total, count) in list(spent.items())[:30]:
            table.add_row(f"{total:.1f}", f"{count:.1f}", name[:110])
        table.add_row(f"{sum(total for total, _ in spent.values()):.1f}", "", "all")
        CONSOLE.print(table)
        return {name: round(total, 2) for name, (total, _) in list(spent.items())[:30]}


def steps_table(model: Model, rows: list[dict[str, Any]]) -> Table:
    table = Table(
        "nodes", "batch", "context", "draft us", "x floor", "verify us", "x floor", "x plain", "step us", "x floor", "gap us",
        "idle us", title=f"{model.name}: one step; floors from bytes at the measured read bandwidth",
    )  # fmt: skip
    plain = {(r["batch"], r["context"]): r["verify"] for r in rows if r["nodes"] == 1 and "verify" in r}
    for r in rows:
        key = [str(r[name]) for name in ("nodes", "batch", "context")]
        if "failed" in r:
            table.add_row(*key, r["failed"][:40])
            continue
        base = plain.get((r["batch"], r["context"]))
        r["verify_x_plain"] = round(r["verify"] / base, 3) if base else None
        draft = (str(r["draft"]), f"{r['draft_x']:.2f}") if "draft_x" in r else ("", "")
        table.add_row(
            *key, *draft, str(r["verify"]), f"{r['verify_x']:.2f}", str(r["verify_x_plain"] or ""), str(r["wall"]),
            f"{r['wall_x']:.2f}", str(r["gap"]), str(r["idle"]),
        )  # fmt: skip
    return table


def forced_table(model: Model, rows: list[dict[str, Any]], counts: int) -> Table:
    table = Table(
        "tree", "batch", "context", "accepted length", "step ms", "x floor", "tokens/s",
        title=f"{model.name}: whole loop, accepted length forced to at most {counts}: says nothing about real text",
    )  # fmt: skip
    for r in rows:
        key = [r["tree"] or "plain", str(r["batch"]), str(r["context"])]
        if "failed" in r:
            table.add_row(*key, r["failed"][:40])
            continue
        r["tokens_per_s"] = round(r["accepted"] * r["batch"] / r["wall"] * 1e6, 1)
        figures = (f"{r['accepted']:.2f}", f"{r['wall'] / 1e3:.3f}", f"{r['wall_x']:.2f}", str(r["tokens_per_s"]))
        table.add_row(*key, *figures)
    return table


def layers_table(rows: list[dict[str, Any]]) -> Table:
    table = Table(
        *(name.replace("_x", " x floor").replace("_", " ") for name in rows[0]), title="one sliding MoE layer"
    )
    for row in rows:
        table.add_row(*map(str, row.values()))
    return table


def measure_model(session: Session, options: dict[str, Any], contexts: tuple[int, ...], tree: str) -> dict[str, Any]:
    """The whole loop first, then layers, profiles, and all kinds of steps: what matters most comes before time is out."""
    model, result = session.model, {"draft_vocab": len(session.model.module.draft_ids), "tree": tree}
    pairs = () if options["only_steps"] else product(options["batches"], [None, tree])
    whole = [
        session.timed(
            {"tree": t, "batch": b, "context": contexts[0]} | ({"accepted_length": "forced"} if t else {}),
            options["forced"],
        )
        for b, t in pairs
    ]
    if whole:
        CONSOLE.print(forced_table(model, whole, options["forced"]))
    result["accepted_length_forced"] = whole
    if any(layer.moe and layer.attention.window for layer in model.config.layers):
        layers = session.attempt({"layers": model.name}, lambda: {
            "rows": measure_layers(model, session.config, (1, 4, 16, 64, 256), contexts[0], session.read)})  # fmt: skip
        result["layers"] = layers
        if "rows" in layers:
            CONSOLE.print(layers_table(layers["rows"]))
    if options["profiled"]:
        result["profile"] = [
            session.attempt({"tree": each}, lambda each=each: {"us": session.profiled(each, contexts[0])})
            for each in (None, tree)
        ]
    result["steps"] = [
        session.timed({"nodes": nodes, "tree": tree_of(nodes), "batch": batch, "context": context})
        for context, batch, nodes in product(contexts, options["batches"], options["nodes"])
    ]
    CONSOLE.print(steps_table(model, result["steps"]))
    return result


def print_many(results: list[dict[str, Any]]) -> None:
    """results: of full_size.py, or of this bench with layers of a slice."""
    for result in results:
        if result["bench"] == "roofline":
            rows = on_paper(result)
            CONSOLE.print(paper_table(result, rows))
        else:
            rows = estimates(result)
            CONSOLE.print(table(result, rows))
        click.echo(json.dumps({key: result[key] for key in ("bench", "device", "commit")} | {"rows": rows}))


@click.command()
@click.option("--model", "models", multiple=True, default=["default", "mimo-7b", "mimo-slice"], show_default=True,
              type=click.Choice(["default", *SHAPES]))  # fmt: skip
@click.option("--nodes", multiple=True, type=SOME, default=[1, 2, 4, 8, 16, 32], show_default=True)
@click.option("--batch", "batches", multiple=True, type=SOME, default=[1, 4, 16, 32], show_default=True)
@click.option("--context", "contexts", multiple=True, type=SOME, help="Default: what suits the model.")
@click.option("--tree", default=None, help="Of the whole loop. Default: tree:31 for the default model, else chain:3.")
@click.option("--forced", default=3, type=SOME, show_default=True, help="Accepted length to pretend in the whole loop.")
@click.option("--steps", default=40, type=SOME, show_default=True)
@click.option("--draft-vocab", type=SOME, help="Default: all tokens; for the default model 16384.")
@click.option("--attention", default="exact", type=click.Choice(["exact", "flashinfer", "torch"]), show_default=True)
@click.option("--in-flight", default=2, type=SOME, show_default=True, help="Steps queued ahead (steps_in_flight).")
@click.option("--path", default=DEFAULT_MODEL, show_default=True, help="Of the default model's files.")
@click.option("--mtp", default=None, help="A folder of other MTP layers for the default model.")
@click.option("--device", default="cuda", show_default=True)
@click.option("--dtype", default="auto", show_default=True)
@click.option("--profile", "profiled", is_flag=True, help="Kernel times of a plain and of a speculative step.")
@click.option("--only-steps", is_flag=True, help="No whole loops.")
@click.option(
    "--many", type=click.File(), help="Lines of full_size.py or of this: print 48 layers on many GPUs, measure nothing."
)
@click.option("--budget", default=540.0, show_default=True, help="Seconds after which no case is begun.")
def main(models: tuple[str, ...], contexts: tuple[int, ...], tree: str | None, steps: int, draft_vocab: int | None,
         attention: Any, in_flight: int, path: str, mtp: str | None, device: str, dtype: Any, budget: float,
         many: TextIO | None, **options: Any) -> None:  # fmt: skip
    commit = require_commit()
    if many:
        print_many([json.loads(line) for line in many])
        return
    begin, where = time.perf_counter(), torch.device(device)
    if dtype == "auto":
        dtype = "bf16" if where.type == "cuda" else "fp32"
    rates = bandwidth(where, 4 << 30 if where.type == "cuda" else 64 << 20)
    record: dict[str, Any] = {"bench": "roofline", "attention": attention, "dtype": dtype, "steps_in_flight": in_flight}
    record |= {"bandwidth_tb_s": {name: round(rate / 1e12, 4) for name, rate in rates.items()}, "models": {}}
    for name in models:
        vocab = draft_vocab if draft_vocab is not None else DRAFT_VOCAB if name == "default" else 0
        config = EngineConfig(
            device=device, dtype=dtype, attention=attention, steps_in_flight=in_flight, draft_vocab=vocab, max_batch=1,
            max_context=1024, tree=TreeShape.parse("chain:3"),
        )  # fmt: skip
        session = Session(load(name, config, path, mtp), config, steps, rates["read"], begin + budget)
        record["models"][name] = measure_model(
            session, options, contexts or session.model.contexts, tree or session.model.tree
        )
        del session
        gc.collect()
    record["seconds"] = round(time.perf_counter() - begin, 1)
    click.echo(json.dumps(record | conditions(commit, device)))


if __name__ == "__main__":
    run(main)
