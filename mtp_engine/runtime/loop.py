"""The decode loop: plan a step, launch it, land the oldest one in flight, commit what it says."""

import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import final

import torch

from mtp_engine.config import SamplingParams
from mtp_engine.protocols import Launched
from mtp_engine.runtime.intake import Intake
from mtp_engine.runtime.request import Members, Request, StepOutput
from mtp_engine.runtime.scheduler import Scheduler, StepPlan, StepTimes
from mtp_engine.runtime.step import ModelStep, Runner, explain

_LOG = logging.getLogger("mtp_engine")


@final
class DecodeLoop:
    """Requests join with `add`, every `step` advances all of them, and finished ones leave by themselves.

    Steps may overlap: one begins before the tokens of the one before it are seen. A request that turns out to have ended
    takes part in steps already launched, and what they give it is dropped. Not for several threads at once; Engine is.
    """

    def __init__(self, work: ModelStep, runner: Runner, scheduler: Scheduler, intake: Intake) -> None:
        self.work, self.runner, self.scheduler, self.intake = work, runner, scheduler, intake
        self._flying: deque[tuple[StepPlan, Members | None, Launched]] = deque()
        self._members: Members | None = None  # of the last step launched
        self._busy_s, self._begin = 0.0, 0.0  # the loop's clock: time spent in `step`, not in the caller

    @property
    def requests(self) -> list[Request]:
        """All that have not ended: those who run, and those who wait."""
        return [*self.scheduler.running, *self.scheduler.waiting]

    def add(
        self, prompt: Sequence[int], params: SamplingParams, sink: Callable[[StepOutput], None] | None = None
    ) -> Request:
        """Queue a prompt (token ids); with params.n > 1 the other answers are `request.others`.

        Raises EngineError, with nothing changed, for what can never run, and EngineBusy if too many requests wait.
        """
        requests = self.intake.requests(prompt, params, sink)
        self.submit(requests)
        return requests[0]

    def submit(self, requests: Sequence[Request]) -> None:
        """Queue what the intake made."""
        for request in requests:
            request.arrived = self._busy_s
        self.scheduler.add(requests)

    def remove(self, request: Request) -> bool:
        """End a request with what it has said so far, and free its slot. False if it had ended already."""
        return self.scheduler.end(request, "abort")

    @torch.inference_mode()
    def step(self) -> list[StepOutput]:
        """Advance by one step; returns what was emitted since the last call: nothing while there are only prompts to read.

        A failure ends the request whose it is. If a whole step fails or is interrupted, all who ran are queued again and
        go on from what they have said.
        """
        self._begin = time.perf_counter()
        try:
            self.scheduler.sweep()
            while self._launch():
                pass
            if self._flying:
                self._land(*self._flying.popleft())
        except BaseException as error:
            self._restart(error)
        if not self.scheduler.running:
            self._flying.clear()  # only the ended have a part in it
        return self.scheduler.take_outputs()

    def _launch(self) -> bool:
        """Start one more step, unless enough are in flight or nobody wants one."""
        if len(self._flying) == self.runner.in_flight:
            return False
        members = self._decoding()
        if members and self._flying and not members.plain:
            return False
        plan, launched = self.scheduler.plan(members.requests if members else ()), None
        if members:
            bound = max(r.length for r in members.requests) + (self.runner.in_flight + 1) * self.work.drafter.max_nodes
            preparing = time.perf_counter()
            self.runner.prepare(members, bound)
            self._begin += time.perf_counter() - preparing
            launched = self.runner.launch(members, bound)
        if plan.chunk:
            try:
                read = self.runner.read(plan.chunk)
                launched = launched or read
            except Exception as error:
                _LOG.exception("reading a prompt failed")
                self.scheduler.end(plan.chunk.request, "error", explain(error))
        if launched:
            self._flying.append((plan, members, launched))
        return launched is not None

    def _decoding(self) -> Members | None:
        requests = self.scheduler.admit(self._now())
        if requests and (self._members is None or self._members.requests != requests):
            self._members = Members.build(requests, self.work.device)
        return self._members if requests else None

    def _now(self) -> float:
        return self._busy_s + time.perf_counter() - self._begin

    def _land(self, plan: StepPlan, members: Members | None, launched: Launched) -> None:
        """Wait for a step, the only synchronisation of plain ones, and hand its tokens out."""
        table = launched.wait()
        # queued steps run on while the caller handles what came before: such a step counts in full
        spent = max(time.perf_counter() - self._begin, launched.draft_s + launched.verify_s)
        self._busy_s, self._begin = self._busy_s + spent, time.perf_counter()
        if members:
            failed = members.guide.failed if members.guide else {}
            times = StepTimes(self._busy_s, launched.draft_s, launched.verify_s)
            self.scheduler.commit(plan.decoding, table, failed, times)

    def _restart(self, error: BaseException) -> None:
        """Everybody again, from what they have said. Goes on raising what is no failure, such as Ctrl-C."""
        self._flying.clear()
        self._members = None
        failed = isinstance(error, Exception)
        if failed:
            _LOG.exception("a step failed")
        self.scheduler.restart(explain(error) if failed else None)
        if not failed:
            raise error

    def close(self) -> None:
        """End all requests and wait for what is queued."""
        for request in self.requests:
            self.remove(request)
        self._flying.clear()
        self.runner.settle()
