"""Steps of all kinds that a batch may need, each captured as CUDA graphs once; on a CPU they run operation by operation."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import final

import torch

from mtp_engine.protocols import Progress
from mtp_engine.runtime.recorded import (
    BOUND_STEP,
    Captured,
    Lane,
    Prepared,
    Recorded,
    Uncaptured,
    bound_bucket,
    memory_errors,
    no_collection,
    whole,
)
from mtp_engine.runtime.request import Members, TreeLimits
from mtp_engine.runtime.slots import SCRATCH_LENGTH
from mtp_engine.runtime.step import ModelStep
from mtp_engine.runtime.structures import Given, Structures
from mtp_engine.runtime.threads import usable_cores
from mtp_engine.sampling.batch import Plan, SamplingBatch

_LOG = logging.getLogger("mtp_engine")
SCRATCH_TOKENS = SCRATCH_LENGTH + 128  # room the scratch slot needs in the caches


@final
@dataclass(frozen=True)
class Key:
    """What a step is recorded for. drafts: else its trees have one node. bare: nobody wants anything but tokens, chosen by the
    model's logits. limited: somebody wants a smaller tree; never bare. tables: Processors.grown, as a graph holds the tables
    that it was captured with. plan: where steps are planned; late ones, which are rare, are recorded for whatever is wanted.
    """

    batch: int
    bound: int
    drafts: bool
    bare: bool
    limited: bool = False
    tables: int = 0
    plan: Plan | None = None


@final
class RecordedSteps:
    """Steps by what they are recorded for. recorded, late: how many were, and how many of them in the midst of the work, after
    `capture`."""

    def __init__(
        self, step: ModelStep, structures: Structures, *, scratch: int, device: torch.device, lane: Lane | None,
        refresh: Callable[[list[int], list[int]], None] | None, settle: Callable[[], None], progress: Progress,
    ) -> None:  # fmt: skip
        """lane: None where nothing is captured. settle: waits until nothing of a step is running. The others: see GraphRunner."""
        self._step, self._structures, self._scratch, self._device = step, structures, scratch, device
        self._lane, self._refresh, self._settle, self._progress = lane, refresh, settle, progress
        self.prepared: dict[Key, Prepared] = {}
        self.recorded = self.late = 0
        self._complete, self._told = False, False
        self._compiled = set[Key]()
        self._most = step.cache.pages.count * step.cache.pages.page_size
        self._likely: Key | None = None  # whose kernels are compiled

    def capture(self, keys: Sequence[Key], progress: Progress) -> None:
        """Record all steps that there may be. progress: is told of each."""
        if self._lane:
            self.compile(partial(self._run, [(key, *self._blank(key)) for key in keys]))
        with no_collection():
            for number, key in enumerate(keys):
                progress("capturing CUDA graphs", number, len(keys))
                self._record(key, compiled=True)
                parts = self.prepared[key].parts
                if isinstance(parts, Captured):
                    with memory_errors():
                        parts.once()
        self._complete = True

    def prepare(self, key: Key) -> bool:
        """Record it, unless it is. Returns whether that was to be done."""
        if key in self.prepared:
            return False
        if self._complete:
            self.late += 1
            _LOG.warning("a step is recorded in the midst of the work, which holds all up: %s", key)
        self._record(key)
        return True

    def first(self, key: Key) -> Callable[[], None]:
        """This one will come first, most likely: what is returned runs it, so that its kernels are compiled with others'."""
        self._likely = key
        return partial(self._run, [(key, *self._blank(key))])

    def _blank(self, key: Key) -> tuple[Members, Given | None]:
        """Room for any members of that kind, and for what structures allow."""
        slots = torch.full((key.batch,), self._scratch, device=self._device)
        limits = TreeLimits.none(key.batch, self._device) if key.limited else None
        sampling = SamplingBatch.room(key.batch, self._device, bare=key.bare)
        members = Members((), (), slots, sampling, limits=limits, speculates=key.drafts, plan=key.plan)
        nodes = key.plan.nodes if key.plan else self._step.drafter.max_nodes if key.drafts else 1
        return members, None if key.bare else self._structures.given(key.batch, nodes)

    def _run(self, steps: Sequence[tuple[Key, Members, Given | None]]) -> None:
        for key, members, given in steps:
            whole(self._step, members, key.bound, given)

    def _record(self, key: Key, *, compiled: bool = False) -> None:
        """Make a step ready for any members of that kind. Where it cannot be captured it will run slowly, which is said.
        compiled: its kernels are."""
        stale = [k for k in self.prepared if not (k.bare or key.bare or k.tables == key.tables)]
        if stale:  # they hold tables that are too small by now, and may be running
            self._settle()
        for each in stale:
            del self.prepared[each]
        members, given = self._blank(key)
        parts: Recorded = Uncaptured(self._step, members, key.bound, given)
        if self._lane:
            try:
                if not compiled and key != self._likely:
                    far = replace(key, bound=min(key.bound * BOUND_STEP**2, bound_bucket(self._most)))
                    new = [each for each in dict.fromkeys((key, far)) if each not in self._compiled]
                    self._compiled.update(new)  # longer contexts have kernels of their own, which others then wait for
                    self.compile(partial(self._run, [(each, members, given) for each in new]))
                with memory_errors():
                    parts = Captured(self._step, members, key.bound, given, self._lane, partial(self._plan, key.batch))
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                self._say_slow(f"steps run without CUDA graphs, which is many times slower: {error} ({key})")
        self.recorded += 1
        self.prepared[key] = Prepared(members, given, parts)

    def compile(self, run: Callable[[], object]) -> None:
        """Have all kernels of a pass compiled, side by side. Nothing runs: the pass goes into a graph that is thrown away."""
        lane = self._lane
        if lane is None or self._refresh:
            return  # plans for FlashInfer are made on the host, when a pass runs
        from mtp_engine.kernels.compiling import Missing

        missing = Missing()
        try:
            # as nothing of it runs, nothing that happens meanwhile can spoil it: modules may be loaded, memory taken
            trial = torch.cuda.graph(torch.cuda.CUDAGraph(), stream=lane.stream, capture_error_mode="relaxed")
            with memory_errors(), no_collection(), missing, trial:
                run()
        except torch.OutOfMemoryError:
            raise
        except RuntimeError:
            return  # where it is captured in earnest it will be said why
        missing.compile(self._device, usable_cores(), self._progress)

    def _say_slow(self, why: str) -> None:
        if not self._told:
            self._told = True
            _LOG.warning(why)
            self._progress(why, 0, None)

    def _plan(self, batch: int) -> None:
        """As `refresh` does, for a batch in the scratch slot."""
        if self._refresh:
            self._refresh([self._scratch] * batch, [SCRATCH_TOKENS] * batch)
