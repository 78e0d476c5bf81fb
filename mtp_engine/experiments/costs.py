"""What a step costs, by tree and by how many requests are in it: from it and accepted length follows the speed-up.

Predicted speed-up = accepted length x time of a plain step / time of a step that drafts and verifies, for one batch size.
"""

import json
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any, final

from mtp_engine.config import SamplingParams
from mtp_engine.engine import Engine
from mtp_engine.errors import EngineError
from mtp_engine.experiments.grid import Case
from mtp_engine.hub import hub
from mtp_engine.hub.files import atomically
from mtp_engine.protocols import Progress

NAME = "costs.json"
PLAIN = "plain"
_STEPS, _CONTEXT = 5, 96


@final
@dataclass(frozen=True)
class Costs:
    """Seconds of a step, draft and verification, by model, then tree (or PLAIN), then batch size."""

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

    def speedup(self, model: str, tree: str, accepted_length: float) -> dict[int, float]:
        """Predicted, by batch size; empty for what was not measured."""
        steps = self.seconds.get(model, {})
        plain, drafted = steps.get(PLAIN, {}), steps.get(tree, {})
        return {batch: accepted_length * plain[batch] / drafted[batch] for batch in drafted if batch in plain}

    def with_measured(self, model: str, rows: Mapping[str, Mapping[int, float]]) -> "Costs":
        """Together with more trees of a model."""
        return Costs({**self.seconds, model: {**self.seconds.get(model, {}), **rows}})


def measure(
    case: Case, trees: Sequence[str], batches: Sequence[int], device: str, progress: Progress = hub.silent
) -> Costs:
    """Time steps of full batches of random tokens at a context of about 100 tokens: the median of five."""
    rows: dict[str, dict[int, float]] = {}
    most = max(batches)
    for tree in (PLAIN, *trees):
        own = replace(case, batch=most, drafter="root" if tree == PLAIN else "mtp", tree="" if tree == PLAIN else tree)
        config = replace(
            own.config(device), max_context=_CONTEXT + 64 * (_STEPS + 3), prefix_cache=False, draft_int8=True
        )
        with closing(Engine.load(own.model, config, mtp=own.mtp or None, progress=progress)) as engine:
            rows[tree] = {}
            for number, batch in enumerate(sorted(batches)):
                progress(f"timing {tree}", number, len(batches))
                rows[tree][batch] = _step_seconds(engine, batch)
    return Costs({case.model: rows})


def _step_seconds(engine: Engine, batch: int) -> float:
    loop = engine.loop
    vocab = engine.model_config.vocab_size
    prompts = [[(17 * i + 31 * b) % (vocab - 1) for i in range(_CONTEXT)] for b in range(batch)]
    params = SamplingParams(max_tokens=32 * (_STEPS + 3), ignore_eos=True)
    requests = [loop.add(prompt, params) for prompt in prompts]
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
