"""Decoding the cases of an experiment for real: a row per step and one per request."""

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, final

from mtp_engine.engine import Engine
from mtp_engine.errors import EngineError
from mtp_engine.experiments.grid import Case
from mtp_engine.experiments.prompts import Encoded, encode, read_prompts
from mtp_engine.experiments.record import record
from mtp_engine.experiments.rows import Done, mark_loops, request_row
from mtp_engine.experiments.servers import ask_server
from mtp_engine.experiments.store import CaseFolder, Experiment
from mtp_engine.hub import hub
from mtp_engine.protocols import Progress
from mtp_engine.runtime.answer import Chunk
from mtp_engine.text.tokenizer import Tokenizer

_PART = 16  # requests, after which, or after so many seconds, a part is written
_PATIENCE = 20.0

Tick = Callable[[int, int], None]
"""Called with how many prompts of the case are done, and of how many."""


@final
@dataclass
class Engines:
    """The engine that ran last, kept for the next case that needs the same one."""

    device: str
    progress: Progress = hub.silent
    _key: Any = None
    _engine: Engine | None = None

    def get(self, case: Case) -> Engine:
        """The engine of a case."""
        config = case.config(self.device)
        key = (case.model, case.mtp, config)
        if self._engine is None or key != self._key:
            self.close()
            self._engine, self._key = Engine.load(case.model, config, mtp=case.mtp or None, progress=self.progress), key
        return self._engine

    def close(self) -> None:
        """Give its memory back."""
        if self._engine is not None:
            self._engine.close()
            self._engine = None


@final
@dataclass
class Rows:
    """Rows that wait for their part to be written. detail: what the rows beside those of requests are."""

    folder: CaseFolder
    detail: str = "steps"
    requests: list[dict[str, Any]] = field(default_factory=list)
    details: list[dict[str, Any]] = field(default_factory=list)
    written: float = field(default_factory=time.monotonic)

    def add(self, request: dict[str, Any], details: Sequence[dict[str, Any]]) -> None:
        """A request is done."""
        self.requests.append(request)
        self.details += details
        if len(self.requests) >= _PART or time.monotonic() - self.written > _PATIENCE:
            self.flush()

    def flush(self) -> None:
        """Write what there is."""
        if self.requests:
            kinds = {"requests": self.requests, **({self.detail: self.details} if self.details else {})}
            self.folder.add(**kinds)
        self.requests, self.details, self.written = [], [], time.monotonic()


def begin(path: Path, cases: Sequence[Case], settings: Mapping[str, Any]) -> Experiment:
    """`Experiment.begin`, once all prompt sets are read. Raises EngineError for those that cannot be."""
    for prompts, limit in {(case.prompts, case.limit) for case in cases}:
        read_prompts(prompts, limit)
    return Experiment.begin(path, cases, settings)


def run_cases(experiment: Experiment, device: str, progress: Progress = hub.silent, tick: Tick | None = None) -> None:
    """Run all cases that are not done and that no other process has. tick: over the prompts of all of them."""
    engines, tally = Engines(device, progress), Tally(experiment)
    with closing(engines):
        for folder in experiment.claimed():

            def case_tick(done: int, total: int, own: str = folder.case.id) -> None:
                tally.counts[own] = done, total
                if tick:
                    tick(*tally.sums)

            run_case(folder, engines, case_tick)


@final
class Tally:
    """Prompts that are done, and prompts in all, by case. Of a case that has not begun the whole set counts, too long
    prompts included."""

    def __init__(self, experiment: Experiment) -> None:
        folders = [folder for folder in experiment.folders if experiment.runs(folder)]
        sets = {(each.case.prompts, each.case.limit) for each in folders}
        sizes = {key: len(read_prompts(*key)) for key in sets}
        self.counts = {each.case.id: count(each, sizes[each.case.prompts, each.case.limit]) for each in folders}

    @property
    def sums(self) -> tuple[int, int]:
        """Done, and in all."""
        return sum(done for done, _ in self.counts.values()), sum(total for _, total in self.counts.values())


def count(folder: CaseFolder, most: int) -> tuple[int, int]:
    """Prompts of a case that are done, and in all, which are `most` unless it has ended."""
    done = len(folder.done)
    return done, done if folder.finished else most


def run_case(folder: CaseFolder, engines: Engines, tick: Tick) -> None:
    """Decode the prompts of a case that are not done. What is finished is kept, whatever ends it."""
    case, items = folder.case, read_prompts(folder.case.prompts, folder.case.limit)
    if case.engine == "ours":
        engine = engines.get(case)
        every = encode(engine.encode, items, case.longest)
    else:
        every = encode(tokenizer_of(case.model), items, case.longest)
    done = folder.done
    left = [each for each in every if each.index not in done]
    if case.engine == "ours":
        stream = (decode if case.mode == "run" else record)(engine, case, left)
    else:
        stream = ask_server(case, left)
    with _session(folder, engines.device) as session:
        rows = Rows(folder, "steps" if case.mode == "run" else "positions")
        try:
            tick(len(done), len(every))
            for number, (request, details) in enumerate(stream, 1):
                rows.add(request, details)
                session["tokens"] += request["tokens"]
                session["prompts"] += 1
                tick(len(done) + number, len(every))
        finally:
            rows.flush()
    folder.finish(len(every))


def tokenizer_of(model: str) -> Callable[[Any], list[int]]:
    """How long prompts are for a server's model, if its files are here; else they count as short."""
    if model in {each.name for each in hub.registry()} or Path(model).is_dir():
        return Tokenizer.load(hub.locate(model).folder).chat
    return lambda messages: []


def decode(engine: Engine, case: Case, prompts: Sequence[Encoded]) -> Iterator[Done]:
    """Yield each request as it ends. Raises EngineError where one fails."""
    steps: dict[int, list[dict[str, Any]]] = defaultdict(list)
    before: dict[int, tuple[int, float, float]] = defaultdict(lambda: (0, 0.0, 0.0))
    params = [case.params(each.index) for each in prompts]
    for chunk in engine.stream([each.tokens for each in prompts], params):
        own = prompts[chunk.index]
        if chunk.token_ids:
            steps[chunk.index].append(_step(own, chunk, before[chunk.index]))
            stats = chunk.stats
            before[chunk.index] = (stats.nodes, stats.draft_s, stats.verify_s)
        if answer := chunk.finished:
            if answer.error:
                raise EngineError(f"prompt {own.item.id} of {case.prompts} failed: {answer.error}")
            rows = steps.pop(chunk.index, [])
            mark_loops(rows, answer.token_ids)
            yield request_row(own, answer, rows), rows


def _step(own: Encoded, chunk: Chunk, before: tuple[int, float, float]) -> dict[str, Any]:
    stats = chunk.stats
    return {
        "prompt": own.index, "step": stats.steps - 1, "at": stats.tokens - len(chunk.token_ids),
        "emitted": len(chunk.token_ids), "nodes": stats.nodes - before[0], "draft_s": stats.draft_s - before[1],
        "verify_s": stats.verify_s - before[2],
    }  # fmt: skip


@contextmanager
def _session(folder: CaseFolder, device: str) -> Iterator[dict[str, Any]]:
    """Times what happens inside, and notes it with the case."""
    session: dict[str, Any] = {"device": device, "tokens": 0, "prompts": 0}
    begin = time.perf_counter()
    try:
        yield session
    finally:
        session["wall_s"] = time.perf_counter() - begin
        if session["prompts"]:
            folder.note(session)
