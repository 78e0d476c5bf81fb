"""The decode loop: plan a step, launch it, land the oldest one in flight, commit what it says."""

import logging
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import final

import torch

from mtp_engine.config import SamplingParams
from mtp_engine.errors import EngineError
from mtp_engine.runtime.intake import Intake
from mtp_engine.runtime.memory import Memory
from mtp_engine.runtime.ranks import Ranks
from mtp_engine.runtime.request import Launched, Members, PromptChunk, Request, StepOutput
from mtp_engine.runtime.scheduler import Scheduler, StepPlan
from mtp_engine.runtime.score import score
from mtp_engine.runtime.stats import LoopClock
from mtp_engine.runtime.step import ModelStep, Runner, explain
from mtp_engine.sampling.logprobs import TokenLogprob

_LOG = logging.getLogger("mtp_engine")
_MEMBERS = 2  # batches that take turns, see Scheduler


@final
class DecodeLoop:
    """Requests join with `add`, every `step` advances all of them, and finished ones leave by themselves.

    Steps may overlap: one begins before the tokens of the one before it are seen. A request that turns out to have ended
    takes part in steps already launched, and what they give it is dropped. Not for several threads at once; Engine is.
    """

    def __init__(
        self, work: ModelStep, runner: Runner, scheduler: Scheduler, intake: Intake, memory: Memory, ranks: Ranks
    ) -> None:
        self.work, self.runner, self.scheduler, self.intake, self.memory = work, runner, scheduler, intake, memory
        self._ranks = ranks
        self._flying: deque[tuple[StepPlan, Launched]] = deque()
        self._members: list[Members] = []  # of the steps launched last, the newest first
        self._clock = LoopClock()

    @property
    def requests(self) -> list[Request]:
        """All that have not ended: those who run, and those who wait."""
        return [*self.scheduler.running, *self.scheduler.waiting]

    def add(
        self, prompt: Sequence[int], params: SamplingParams, sink: Callable[[StepOutput], None] | None = None
    ) -> Request:
        """Queue a prompt (token ids); with params.n > 1 the further answers are `request.others`. Raises EngineError, with
        nothing changed, for what can never run, and EngineBusy if too many requests wait."""
        requests = self.intake.requests(prompt, params, sink)
        self.submit(requests)
        return requests[0]

    def submit(self, requests: Sequence[Request]) -> None:
        """Queue what the intake made."""
        for request in requests:
            request.skipped = self._clock.skipped
        self.scheduler.add(requests, self._clock.standing)
        self._ranks.added(requests, self.scheduler.cancel)

    def remove(self, request: Request) -> bool:
        """End a request with what it has said so far, and free its slot. False if it had ended already."""
        return self.scheduler.dismiss(request, "abort")

    @torch.inference_mode()
    def step(self) -> list[StepOutput]:
        """Advance by one step; returns what was emitted since the last call: nothing while there are only prompts to read.

        A failure ends the request whose it is. If a whole step breaks off, all who ran are queued again and go on.
        """
        with self._ranks.step():
            self._step()
        return self.scheduler.take_outputs()

    def _step(self) -> None:
        self._clock.start()
        try:
            self._ranks.check()
            self.runner.complete()
            self.scheduler.sweep()
            times = tuple(self.work.times)
            self.work.times.clear()
            self._ranks.begin(self.scheduler.running, times)
            self.work.learn(times)
            while len(self._flying) < self.runner.in_flight and self._launch():
                pass
            if self._flying:
                self._land()
        except BaseException as error:
            self._restart(error)
        if not self.scheduler.running:
            self._flying.clear()  # only the ended have a part in it

    def _launch(self) -> bool:
        """Start a step: all who can, decode, and behind them chunks of prompts are read. Before them, where structures leave
        something of the step open: that has to be done before anything else, and the host would wait for the device."""
        self.runner.complete()  # who joins changes what the rest of it would run with
        plan = self.scheduler.plan(self._clock.now, len(self._flying))
        if plan is None:
            return False
        members = Members.of(plan.decoding, self._members, self.work.device)
        opens = members is not None and members.guide is not None
        read = self._read(plan.chunks) if opens else None
        launched = None
        if members:
            self._members = [members, *(each for each in self._members if each is not members)][:_MEMBERS]
            launched = self._decode(members)
        if not opens:
            read = self._read(plan.chunks)
        launched = launched or read
        if launched:
            self._flying.append((plan, launched))
        return launched is not None

    def _read(self, chunks: Sequence[PromptChunk]) -> Launched | None:
        """None where there are none, and where it failed."""
        if not chunks:
            return None
        try:
            with self._clock.left_out():
                self.runner.prepare_reading(chunks)
            return self.runner.read(chunks)
        except Exception as error:
            if self._ranks.failed(error):
                raise
            self.scheduler.unread(chunks, explain(error))
            _LOG.error("reading a prompt failed", exc_info=error)
            return None

    def _decode(self, members: Members) -> Launched:
        bound = members.longest + (self.runner.in_flight + 1) * self.work.drafter.max_nodes
        with self._clock.left_out():
            self.runner.prepare(members, bound)
        return self.runner.launch(members, bound, partial(self._said, tuple(self._flying)))

    def _said(self, before: Sequence[tuple[StepPlan, Launched]], requests: Sequence[Request]) -> list[list[int]]:
        """What those of these steps that are in flight still emit for each request."""
        said = [list[int]() for _ in requests]
        for plan, launched in before:
            rows = {request: row for row, request in enumerate(plan.decoding)}
            if any(launched is each for _, each in self._flying) and not rows.keys().isdisjoint(requests):
                landed = launched.wait().rows
                for tokens, request in zip(said, requests, strict=True):
                    if request in rows:
                        row = landed[rows[request]]
                        tokens += row[3 : 3 + row[0]]
        return said

    def _land(self) -> None:
        """Wait for the oldest step, the only synchronisation but for structures, and hand its tokens out."""
        landed = self._flying[0][1].wait()
        self._ranks.check()
        if len(self._flying) == 2:  # the newer one knows now what came before it
            self.runner.proceed()
        plan, _ = self._flying.popleft()
        times = self._clock.land(landed.draft_s, landed.verify_s)
        if plan.decoding:
            self.scheduler.commit(plan, landed, times)

    def _restart(self, error: BaseException) -> None:
        """Everybody again, from what they have said. Raises what is no failure (Ctrl-C), and what nobody can end with."""
        lost = self._ranks.failed(error)
        self._flying.clear()
        if lost:
            anybody = self.scheduler.abandon(lost)
        else:
            anybody = self.scheduler.restart(explain(error) if isinstance(error, Exception) else None)
        if lost and isinstance(error, Exception):
            error = EngineError(lost)
        if not anybody or not isinstance(error, Exception):
            raise error
        _LOG.error("a step failed: %s", error, exc_info=None if isinstance(error, EngineError) else error)

    def alike(self) -> AbstractContextManager[None]:
        """See Ranks.alike."""
        return self._ranks.alike()

    @torch.inference_mode()
    def score(self, tokens: Sequence[int], start: int, most: int) -> list[TokenLogprob]:
        """See `score`. For loops in which nothing else runs."""
        with self._ranks.step():
            try:
                self._ranks.scored(tokens, start, most)
                return score(self.work, tokens, start, most)
            except Exception as error:
                if lost := self._ranks.failed(error):
                    raise EngineError(lost) from error
                raise

    def close(self) -> None:
        """End all requests and wait for what is queued."""
        if lost := self._ranks.lost:
            self.scheduler.abandon(lost)
        else:
            for request in self.requests:
                self.remove(request)
            self.runner.settle()
        self._ranks.close()
