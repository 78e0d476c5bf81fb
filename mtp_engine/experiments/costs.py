"""What a step costs, by tree and by how many requests are in it: from it and accepted length follows the speed-up.

Predicted speed-up = accepted length x time of a plain step / time of a step that drafts and verifies, for one batch size.
Both times are measured for every tree and batch size, or follow from the planner's table (runtime/planner.py): drafting by
levels and verifying by rows, which it measures for one request and carries on along straight lines.
"""

import json
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any, cast, final

from mtp_engine.assemble import measured_costs
from mtp_engine.config import SamplingParams, TreeShape
from mtp_engine.engine import Engine
from mtp_engine.errors import EngineError
from mtp_engine.experiments.grid import Case
from mtp_engine.experiments.wide import levels_of
from mtp_engine.hub import hub
from mtp_engine.hub.files import atomically
from mtp_engine.protocols import Progress

NAME = "costs.json"
PLAIN, PLANNER = "plain", " by the planner's table"
_STEPS, _CONTEXT = 5, 96


@final
@dataclass(frozen=True)
class Costs:
    """Seconds of a step, draft and verification, by model, then tree (or PLAIN), then batch size. Trees and PLAIN with
    PLANNER behind them: as the planner has them."""

    seconds: Mapping[str, Mapping[str, Mapping[int, float]]]

    @classmethod
    def load(cls, folder: Path) -> "Costs":
        """What `measure` left in an experiment's folder; nothing where it was not measured."""
        path = folder / NAME
        if not path.is_file():
            return cls({})
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
            return cls({model: {tree: {int(batch): float(s) for batch, s in row.items()} for tree, row in trees.items()}
                        for model, trees in raw.items()})  # fmt: skip
        except (ValueError, AttributeError) as error:
            raise EngineError(f"{path}: is not what experiment costs writes ({error}); measure it again") from error

    def save(self, folder: Path) -> None:
        atomically(folder / NAME, lambda fresh: fresh.write_text(json.dumps(self.seconds, indent=1), encoding="utf-8"))

    def speedup(self, model: str, tree: str, accepted_length: float, source: str = "") -> dict[int, float]:
        """Predicted, by batch size; empty for what was not measured. source: PLANNER, or nothing for steps that were
        timed."""
        steps = self.seconds.get(model, {})
        plain, drafted = steps.get(PLAIN + source, {}), steps.get(tree + source, {})
        return {batch: accepted_length * plain[batch] / drafted[batch] for batch in drafted if batch in plain}

    def with_measured(self, model: str, rows: Mapping[str, Mapping[int, float]]) -> "Costs":
        """Together with more trees and batch sizes of a model."""
        known = self.seconds.get(model, {})
        joined = {name: {**known.get(name, {}), **rows.get(name, {})} for name in {**known, **rows}}
        return Costs({**self.seconds, model: {name: dict(sorted(row.items())) for name, row in joined.items()}})


def measure(
    case: Case, trees: Sequence[str], batches: Sequence[int], device: str, progress: Progress = hub.silent
) -> Costs:
    """Time steps of full batches at a context of about 100 tokens: the median of five. On a CPU the planner's table is
    measured, too."""
    rows: dict[str, dict[int, float]] = {}
    for shape in (None, *map(TreeShape.parse, trees)):
        name = str(shape) if shape else PLAIN
        own = replace(
            case, mode="run", batch=max(batches), drafter="mtp" if shape else "root", tree=str(shape or ""),
            verifier="match", candidates="auto",
        )  # fmt: skip
        emitted = _emitted(shape)
        config = replace(
            own.config(device), max_context=_CONTEXT + 1 + emitted + 64, prefix_cache=True, draft_int8=True
        )
        with closing(Engine.load(own.model, config, mtp=own.mtp or None, progress=progress)) as engine:
            rows[name] = {}
            for number, batch in enumerate(sorted(batches)):
                progress(f"timing {name}", number, len(batches))
                rows[name][batch] = _step_seconds(engine, batch, emitted)
            if shape and PLAIN + PLANNER not in rows and engine.model.embedding.device.type == "cpu":
                progress("timing for the planner's table", 0, None)
                rows |= _planned(engine, trees, batches)
    return Costs({case.model: rows})


def _planned(engine: Engine, trees: Sequence[str], batches: Sequence[int]) -> dict[str, dict[int, float]]:
    """What the planner takes steps to cost."""
    module = cast(Any, engine.loop.work.drafter).module
    model = replace(engine.model, features=module.config.features)
    table = measured_costs(model, module, engine.config, engine.backend)
    rows = {PLAIN + PLANNER: {batch: table.draft[0] + table.verifying(batch) for batch in batches}}
    for shape in map(TreeShape.parse, trees):
        depth = min(module.config.depth, shape.best) if shape.best else len(shape.widths)
        keeps = [keep for _, keep in levels_of(shape, depth)]
        nodes, drafted_from = min(shape.max_nodes, 1 + sum(keeps)), 1 + sum(keeps[:-1])
        rows[f"{shape}{PLANNER}"] = {
            batch: table.drafting(depth, batch * drafted_from - depth) + table.verifying(batch * nodes)
            for batch in batches
        }
    return rows


def _emitted(shape: TreeShape | None) -> int:
    """Tokens at most while steps are timed."""
    depth = len(shape.widths) if shape and not shape.best else min(shape.best, 8) if shape else 0
    return (_STEPS + 4) * (depth + 1)


def _step_seconds(engine: Engine, batch: int, emitted: int) -> float:
    """What all prompts begin with is read once; each goes on with a token of its own, and says something else."""
    loop, vocab = engine.loop, engine.model_config.vocab_size
    prompt = [17 * i % (vocab - 1) for i in range(_CONTEXT)]
    first = loop.add(prompt, SamplingParams(max_tokens=1))
    while first.finish_reason is None:
        loop.step()
    params = SamplingParams(max_tokens=emitted, ignore_eos=True)
    requests = [loop.add([*prompt, 31 * number % (vocab - 1)], params) for number in range(batch)]
    try:
        while any(not request.output for request in requests):
            loop.step()
        times = []
        for _ in range(_STEPS):
            before = _spent(requests)
            loop.step()
            times.append(_spent(requests) - before)
        return median(times)
    finally:
        for request in requests:
            loop.remove(request)


def _spent(requests: Sequence[Any]) -> float:
    return float(sum(request.stats.draft_s + request.stats.verify_s for request in requests))
