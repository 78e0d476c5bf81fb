"""What long steps of a loop did: the host's time in the parts of each step, garbage collections among them."""

import gc
import time
from collections.abc import Callable
from typing import Any, final

from mtp_engine.runtime.flight import Flight, Opened, Reading
from mtp_engine.runtime.request import Members
from mtp_engine.runtime.structures import Drafted, Looked
from mtp_engine.sampling.masks import Guide
from mtp_engine.sampling.structure import Closer

_LEAST = 0.1  # ms: shorter parts are left out
_NAMES: dict[tuple[Any, str], str] = {
    (Members, "build"): "members", (Looked, "wait"): "wait: look", (Drafted, "wait"): "wait: drafts",
    (Reading, "wait"): "wait: reading",
}  # fmt: skip


@final
class Watch:
    """Times the parts of a loop's steps from now on. Parts lie in one another: `load` and `start` in `enter`, that in `plan`.
    worked: what the thread itself ran, in ms, spinning for the device too; the rest it waited for a core. wait: in `land`, for
    the device. device: ms that the step took there which landed, and between, ms since the end of the one before it, where both
    are known. new: one was launched of a kind that none had been of. read_before: rows of prompts that lie between the step that
    landed and the one before it."""

    def __init__(self, loop: Any) -> None:
        self._loop, self._parts = loop, dict[str, float]()
        self._kinds, self._reads, self._device, self._between = set[Any](), [0, 0], 0.0, 0.0
        self._end: Any = None  # mark of the step that landed last
        self.steps: list[dict[str, Any]] = []
        runner, scheduler, memory = loop.runner, loop.scheduler, loop.memory
        for owner, names in (
            (runner, ("complete", "prepare", "prepare_reading", "launch", "proceed", "read")),
            (scheduler, ("plan", "commit", "sweep", "take_outputs")), (loop.work, ("learn",)),
            (memory, ("enter", "keep", "leave", "_load")), (memory.processors, ("start",)), (loop, ("_land",)),
        ):  # fmt: skip
            for name in names:
                setattr(owner, name, self._timed(name.strip("_"), getattr(owner, name)))
        parts: tuple[tuple[Any, str], ...] = (
            (Members, "build"), (Guide, "begin"), (Guide, "forced"), (Guide, "unfit"), (Guide, "fill"), (Closer, "look"),
            (Looked, "wait"), (Drafted, "wait"), (Reading, "wait"), (Opened, "finish"),
        )  # fmt: skip
        self._kept = [(owner, name, getattr(owner, name)) for owner, name in (*parts, (Flight, "wait"))]
        for owner, name, method in self._kept:
            setattr(owner, name, self._timed(_NAMES.get((owner, name), name), method))
        setattr(Flight, "wait", self._landed(Flight.wait))  # noqa: B010
        gc.callbacks.append(self._collected)

    def close(self) -> None:
        gc.callbacks.remove(self._collected)
        for owner, name, method in self._kept:
            setattr(owner, name, method)

    def step(self) -> float:
        """Run one; returns its milliseconds."""
        loop, self._parts = self._loop, {}
        before, begin, worked = list(loop.scheduler.running), time.perf_counter(), time.thread_time()
        loop.step()
        total, running = 1000 * (time.perf_counter() - begin), loop.scheduler.running
        worked = time.thread_time() - worked
        joined = [request for request in running if request not in before]
        kind, rows = (
            getattr(loop.runner, "_next", None),
            sum(each.stop - each.start for each in loop.scheduler._reading),
        )
        new = kind not in self._kinds
        self._kinds.add(kind)
        self._reads.append(rows)
        self.steps.append(
            {
                "ms": round(total, 2), "worked": round(1000 * worked, 2), "running": len(running), "joined": len(joined),
                "found": [request.stats.cached_tokens for request in joined if request.stats.cached_tokens],
                "left": sum(request not in running for request in before),
                "rows_read": rows, "read_before": self._reads[-3], "new": new, "device": round(1000 * self._device, 2),
                "between": round(self._between, 2),
                "structures": sum(request.params.structure is not None for request in running),
                "parts": {name: round(1000 * each, 2) for name, each in self._parts.items() if 1000 * each > _LEAST},
            }
        )  # fmt: skip
        return total

    def longest(self, count: int) -> list[dict[str, Any]]:
        return sorted(self.steps, key=lambda step: -step["ms"])[:count]

    def _timed(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            begin = time.perf_counter()
            try:
                return call(*args, **kwargs)
            finally:
                self._note(name, time.perf_counter() - begin)

        return timed

    def _landed(self, wait: Callable[..., Any]) -> Callable[..., Any]:
        def landed(flight: Any) -> Any:
            landed, (start, *_, end) = wait(flight), flight._marks
            if self._end is not end:
                self._between = self._end.elapsed_time(start) if self._end and self._end.query() else 0.0
                self._end, self._device = end, landed.draft_s + landed.verify_s
            return landed

        return landed

    def _note(self, name: str, seconds: float) -> None:
        self._parts[name] = self._parts.get(name, 0.0) + seconds

    def _collected(self, phase: str, info: dict[str, int]) -> None:
        if phase == "start":
            self._begin = time.perf_counter()
        else:
            self._note(f"garbage {info['generation']}", time.perf_counter() - self._begin)
