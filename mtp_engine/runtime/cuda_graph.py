"""A step as CUDA graphs, of drafting and of verifying, captured once per batch size and context bound and then replayed.

Between two steps the host only queues the next graphs: lengths, last tokens, caches and what requests want of their
logits are on the device. Results come back through pinned memory, and the host waits for the oldest step in flight
alone. Only a structure needs the host in between: what would be chosen without it is looked at first, and where it may not
be, the host works out what may; what is chosen in earnest is in a graph of its own, behind that. Every step is recorded
with what requests may want besides tokens, and without. On a CPU the same steps run with the same padding, operation by
operation.
"""

import gc
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import cycle
from typing import final

import torch

from mtp_engine.errors import EngineError
from mtp_engine.protocols import Progress
from mtp_engine.runtime.flight import Berth, Flight, HostMark, Mark, Opened, Reading
from mtp_engine.runtime.recorded import (
    SMALLEST_BOUND,
    Captured,
    Lane,
    Prepared,
    Uncaptured,
    bound_bucket,
)
from mtp_engine.runtime.recorded_prompts import RecordedPrompts
from mtp_engine.runtime.recorded_steps import SCRATCH_TOKENS, Key, RecordedSteps
from mtp_engine.runtime.request import Landed, Launched, Members, PromptChunk
from mtp_engine.runtime.shapes import Watched
from mtp_engine.runtime.step import ModelStep, Said
from mtp_engine.runtime.structures import Drafted, Looked, Structures

_LOG = logging.getLogger("mtp_engine")
_BATCHES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128)  # a batch is padded up to one of these
_FEW = 3  # collections of the newest objects to one of those that outlived them: 10, as is usual, make pauses of 3 ms
_RARELY = 3000  # of these to a full one, in which all wait for tens of milliseconds; 10 are usual


def bucket(size: int) -> int:
    """The batch size to capture for `size` requests."""
    return next((each for each in _BATCHES if each >= size), size)


@final
class GraphRunner:
    """Replays steps (a Runner). in_flight: steps queued before the host waits for the first of them.

    replayed, slow: steps that ran as graphs, and on a GPU operation by operation.
    """

    def __init__(
        self, step: ModelStep, *, in_flight: int, scratch: int, device: torch.device,
        refresh: Callable[[list[int], list[int]], None] | None = None, chunk: int = 2048, progress: Progress = lambda *_: None,
    ) -> None:  # fmt: skip
        """scratch: the slot that pads batches. refresh: called before each step with the slots and the most tokens that
        each may have. chunk: rows of prompts that are read at once, at most. progress: is told of kernels that are compiled,
        and of steps that cannot be captured."""
        self.in_flight = in_flight
        self.replayed = self.slow = 0
        self._step, self._scratch, self._device, self._refresh = step, scratch, device, refresh
        self._cuda = device.type == "cuda"
        self._next = Key(0, 0, False, True)  # of the step that is launched next
        self._shapes = step.shapes
        self._open: Opened[Looked | None] | None = None  # the newest step, if something is left of it to launch
        self._idle: float | None = None  # since when the host has worked for steps alone
        self._lane = Lane(device) if self._cuda else None
        self._berths = cycle([Berth(self._mark, pinned=self._cuda) for _ in range(in_flight + 1)])
        self._structures = Structures(
            batch=bucket(scratch), nodes=step.drafter.max_nodes, depth=step.drafter.depth, vocab=step.model.vocab_size,
            device=device, mark=self._mark,
        )  # fmt: skip
        self.steps = RecordedSteps(
            step, self._structures, scratch=scratch, device=device, lane=self._lane, refresh=refresh, settle=self.settle,
            progress=progress,
        )  # fmt: skip
        self.prompts = RecordedPrompts(
            step, scratch=scratch, position=SCRATCH_TOKENS - 1, most=chunk, lane=self._lane, compile=self.steps.compile
        )

    def capture(self, batch: int, longest: int, progress: Progress) -> str:
        """See Runner. Raises EngineError where memory is not enough."""
        begin, free = time.perf_counter(), self._free()
        gc.collect()  # what is left of other engines
        gc.freeze()  # what is there stays: else a full collection goes through all of it in the midst of the work
        longest += (self.in_flight + 1) * self._step.drafter.max_nodes
        bounds = {bound_bucket(bound) for bound in range(1, longest + 1, SMALLEST_BOUND)} | {bound_bucket(longest)}
        sizes = sorted(
            {bucket(size) for size in range(1, batch + 1)}, reverse=True
        )  # large ones make room for the rest
        keys = [key for size in sizes for bound in sorted(bounds, reverse=True) for key in self._keys(size, bound)]
        try:
            prompts = self.prompts.capture(sorted(bounds), progress)
            self.steps.capture(keys, progress)
        except torch.OutOfMemoryError as error:
            raise EngineError(
                f"the GPU's memory is full after {self.steps.recorded} of {len(keys)} CUDA graphs: lower max_batch, max_context "
                'or kv_tokens, or have them captured when they are needed (capture="lazy")'
            ) from error
        gc.collect()
        gc.freeze()
        gc.set_threshold(gc.get_threshold()[0], _FEW, _RARELY)
        took, room = time.perf_counter() - begin, (free - self._free()) / 1e9
        progress("capturing CUDA graphs", len(keys), len(keys))
        return f"{len(keys) + prompts} CUDA graphs captured in {took:.1f} s, {room:.2f} GB"

    def _keys(self, batch: int, bound: int) -> list[Key]:
        """Of all steps that there may be."""
        tables = self._step.processors.grown
        if self._shapes:
            plain, *drafted, late = self._shapes.plans(batch)
            kinds = [(plan, bare, False) for plan in (plain, *drafted) for bare in (True, False)]
            kinds += [(drafted[-1], False, True), (late, False, True)]
            return [
                Key(batch, bound, True, bare, limited, 0 if bare else tables, plan) for plan, bare, limited in kinds
            ]
        found = [(False, True, False), (False, False, False)]
        if self._step.drafter.max_nodes > 1:
            found += [(True, True, False), (True, False, False), (True, False, True)]
        return [Key(batch, bound, *kind, tables=0 if kind[1] else tables) for kind in found]

    def prepare(self, members: Members, bound: int) -> None:
        key = self._next = self._key(members, bound)
        if self.steps.prepare(key):
            self._idle = None

    def prepare_reading(self, chunks: Sequence[PromptChunk]) -> None:
        self.complete()
        if not self._lane or self.steps.prepared:
            self.prompts.prepare(chunks)
        else:
            self.prompts.prepare(chunks, self.steps.first(self._first(chunks)))

    def _first(self, chunks: Sequence[PromptChunk]) -> Key:
        """Of the step that comes behind the first prompts, most likely: its kernels are compiled together with theirs."""
        members = Members.build([chunk.request for chunk in chunks], self._device)
        bound = bound_bucket(members.longest + (self.in_flight + 1) * self._step.drafter.max_nodes)
        batch, bare = bucket(len(chunks)), members.sampling.bare
        plan = self._shapes.plans(batch)[-2] if self._shapes else None
        drafts = bool(plan) or (members.speculates and self._step.drafter.max_nodes > 1)
        return Key(batch, bound, drafts, bare, False, 0 if bare else self._step.processors.grown, plan)

    def launch(self, members: Members, bound: int, said: Said) -> Launched:
        key, count = self._next, len(members.slots)
        step = self.steps.prepared[key]
        step.load(members, self._scratch)
        if self._refresh:
            self._refresh(*self._bounds(members, bound, len(step.members.slots) - count))
        berth = next(self._berths)
        berth.began.record()
        tree = step.parts.draft()
        berth.draft(tree.nodes)
        drafted = self._structures.begin(tree, step.parts.outline, members) if step.given else None
        if drafted is None:
            step.parts.forward()
            return self._watched(self._chosen(step, members, berth, {}), members, key)
        opened = self._open = Opened(
            partial(self._pass, step, members, drafted, said),
            partial(self._finish, step, members, drafted, said, berth),
        )
        # what has landed needs no waiting for
        if tree.nodes == 1 or all(members.requests[row].in_flight == 1 for row in drafted.guide.rows):
            opened.proceed()
        if not isinstance(step.parts, Captured):
            self.complete()  # operations may ask the host for the pages of who will have left by then
        return self._watched(opened, members, key)

    def _pass(self, step: Prepared, members: Members, drafted: Drafted, said: Said) -> Looked | None:
        """Where structures have a say: the model over drafts of which some are forced, and a look at what would be chosen."""
        if drafted.depth:
            self._structures.force(drafted, members, said)
        step.parts.forward()
        looked = self._structures.look(drafted, members, step.parts.peek) if self._step.verifier.picks else None
        self._structures.clear()
        return looked

    def _finish(
        self,
        step: Prepared,
        members: Members,
        drafted: Drafted,
        said: Said,
        berth: Berth,
        looked: Looked | None,
    ) -> Flight:
        """What follows that. The steps before have landed by now, mostly, and the host has done their work while the device
        drafted, or ran the model; the next step is launched behind this."""
        assert step.given
        if not drafted.depth:
            drafted.guide.begin(members.requests, said)
        failed = self._structures.allow(step.given, drafted, looked)
        return self._chosen(step, members, berth, failed)

    def proceed(self) -> None:
        if self._open:
            self._open.proceed()

    def complete(self) -> None:
        opened, self._open = self._open, None
        if opened:
            opened.finish()

    def _chosen(
        self, step: Prepared, members: Members, berth: Berth, failed: Mapping[tuple[int, tuple[int, ...]], str]
    ) -> Flight:
        """The end of a step, and its way to the host."""
        table, notes = step.parts.choose()
        count, most = len(members.slots), members.sampling.most_logprobs
        kept = None if notes is None or most < 0 else berth.notes.copy(notes[:count, :, : 1 + most])
        rows = berth.rows.copy(table[:count])
        berth.landed.record()
        self.replayed += isinstance(step.parts, Captured)
        self.slow += self._cuda and isinstance(step.parts, Uncaptured)
        return Flight(rows, kept, failed, (berth.began, berth.drafted, berth.landed))

    def read(self, chunks: Sequence[PromptChunk]) -> Launched:
        self.complete()  # as graphs share their memory
        start, end = self._mark(), self._mark()
        start.record()
        self._idle = None
        self.prompts.read(chunks)
        end.record()
        return Reading(start, end)

    def settle(self) -> None:
        self.complete()
        if self._cuda:
            torch.cuda.synchronize(self._device)

    def _watched(self, flight: Launched, members: Members, key: Key) -> Launched:
        """A step of which the planner learns, if there is one."""
        shapes, plan = self._shapes, key.plan
        if shapes is None or plan is None:
            return flight
        count, alone = len(members.requests), members.guide is None

        def learn(landed: Landed, begin: float, slots: list[int], accepted: list[int]) -> None:
            if members.limits is None:  # what requests leave of a smaller tree says nothing of it
                shapes.learn(plan, slots, accepted)
            host_s = None if self._idle is None else begin - self._idle
            if alone:  # what structures wait for is no shape's
                self._step.times.append((plan, count, key.bound, landed.draft_s + landed.verify_s, host_s))
            self._idle = time.perf_counter()

        return Watched(flight, members.requests, [request.slot for request in members.requests], learn)

    def _key(self, members: Members, bound: int) -> Key:
        bound, plan = bound_bucket(bound), None
        drafts, limited = members.speculates and self._step.drafter.max_nodes > 1, members.limits is not None
        if self._shapes:
            slots = [request.slot for request in members.requests]
            plan = self._shapes.choose(slots, bound, limited=limited, speculates=members.speculates)
            drafts, limited = True, plan.late or (limited and plan.shape is not None)
        limited = drafts and limited
        bare = members.sampling.bare and not limited
        tables = 0 if bare else self._step.processors.grown
        return Key(bucket(len(members.slots)), bound, drafts, bare, limited, tables, plan)

    def _bounds(self, members: Members, bound: int, padding: int) -> tuple[list[int], list[int]]:
        """Slots and the most tokens each may have, padding included; the longest request has `bound` at most."""
        requests = members.requests
        margin = bound - max(r.length for r in requests)
        slots = [r.slot for r in requests] + [self._scratch] * padding
        return slots, [r.length + margin for r in requests] + [SCRATCH_TOKENS] * padding

    def _mark(self) -> Mark:
        return torch.cuda.Event(enable_timing=True) if self._cuda else HostMark()  # type: ignore[no-untyped-call]

    def _free(self) -> int:
        return torch.cuda.mem_get_info(self._device)[0] if self._cuda else 0
