"""What long steps of a loop did: the host's time in the parts of each step, garbage collections among them."""

import gc
import time
from collections.abc import Callable
from typing import Any, final

from mtp_engine.runtime.request import Members
from mtp_engine.sampling.masks import Guide

_LEAST = 0.1  # ms: shorter parts are left out


@final
class Watch:
    """Times the parts of a loop's steps from now on. Parts lie in one another: `load` and `start` in `enter`, that in `plan`.
    worked: what the thread itself ran, in ms; the rest it waited, for the device or for a core."""

    def __init__(self, loop: Any) -> None:
        self._loop, self._parts = loop, dict[str, float]()
        self.steps: list[dict[str, Any]] = []
        runner, scheduler, memory = loop.runner, loop.scheduler, loop.memory
        for owner, names in (
            (runner, ("complete", "prepare", "prepare_reading", "launch", "proceed", "read")),
            (scheduler, ("plan", "commit", "sweep", "take_outputs")), (loop.work, ("learn",)),
            (memory, ("enter", "keep", "leave", "_load")), (memory.processors, ("start",)), (loop, ("_land",)),
        ):  # fmt: skip
            for name in names:
                setattr(owner, name, self._timed(name.strip("_"), getattr(owner, name)))
        self._kept = [(Members, "build", Members.build), (Guide, "unfit", Guide.unfit), (Guide, "fill", Guide.fill)]
        for owner, name, method in self._kept:
            setattr(owner, name, self._timed("members" if owner is Members else name, method))
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
        chunks = loop.scheduler._reading
        self.steps.append(
            {
                "ms": round(total, 2), "worked": round(1000 * worked, 2), "running": len(running), "joined": len(joined),
                "found": [request.stats.cached_tokens for request in joined if request.stats.cached_tokens],
                "left": sum(request not in running for request in before),
                "rows_read": sum(chunk.stop - chunk.start for chunk in chunks),
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

    def _note(self, name: str, seconds: float) -> None:
        self._parts[name] = self._parts.get(name, 0.0) + seconds

    def _collected(self, phase: str, info: dict[str, int]) -> None:
        if phase == "start":
            self._begin = time.perf_counter()
        else:
            self._note(f"garbage {info['generation']}", time.perf_counter() - self._begin)
