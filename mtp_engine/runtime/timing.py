"""What steps of each shape cost, timed on the steps that a loop has recorded."""

import random
import time
from collections.abc import Sequence

import torch

from mtp_engine.config import SamplingParams
from mtp_engine.protocols import Progress
from mtp_engine.runtime.loop import DecodeLoop
from mtp_engine.runtime.recorded import BOUND_STEP, SMALLEST_BOUND
from mtp_engine.runtime.request import Request
from mtp_engine.runtime.shapes import READING, ShapePlanner

_PROMPT, _STEPS = 24, 4
_FURTHER, _ROOM = 3, 128  # steps with each plan where contexts are longer, and tokens that they may emit
_LEAST, _READS = 32, 3  # rows of prompts, and how often so many are read
_PATIENCE = 200  # steps for prompts to be read; where memory has no room for so many requests, it is done without


def time_shapes(
    loop: DecodeLoop, planner: ShapePlanner, batches: Sequence[int], chunk: int, progress: Progress
) -> None:
    """Decode nonsense with every plan for every batch, each request its own: so rows are routed to experts as they are for
    real, and more rows hit more of them; and the same in the midst of each longer bound of contexts, as far as memory has room
    for so many. And read prompts of up to `chunk` tokens. The loop is idle."""
    prefix, loop.memory.prefix = loop.memory.prefix, None  # nothing of this is to be kept
    rng = random.Random(1)
    try:
        for number, size in enumerate(sorted(batches, reverse=True)):
            progress("timing shapes", number, len(batches))
            _time(loop, planner, size, rng)
        for rows in (_LEAST << n for n in range(20)):
            if rows <= chunk and rows + 1 < min(loop.intake.max_context, loop.intake.capacity):
                _time_reading(loop, planner, rows, rng)
        progress("timing shapes", len(batches), len(batches))
    finally:
        planner.forced.clear()
        planner.know(planner.costs)
        for request in loop.requests:
            loop.remove(request)
        while loop.scheduler.busy:
            loop.step()
        loop.memory.prefix = prefix
        loop.work.times.clear()


def _time(loop: DecodeLoop, planner: ShapePlanner, size: int, rng: random.Random) -> None:
    plain, *drafted, late = planner.plans(size)
    planner.forced[:] = [drafted[0]]
    vocab = loop.work.model.vocab_size
    requests = [_ask(loop, [rng.randrange(vocab) for _ in range(_PROMPT)], number) for number in range(size)]
    for _ in range(_PATIENCE):
        if all(request.output or request.finish_reason for request in requests):
            break
        loop.step()
    steps, bound, longest = loop.runner.in_flight + _STEPS, SMALLEST_BOUND, loop.intake.max_context
    while True:
        for plan in (*drafted, plain, late):
            planner.forced[:] = [plan]
            for _ in range(steps):
                loop.step()
        least, bound, steps = bound, bound * BOUND_STEP, _FURTHER
        context = (least + min(bound, longest)) // 2
        if min(bound, longest) < context + _ROOM or size * (context + _ROOM + loop.memory.ahead) > loop.memory.capacity:
            break
        _lengthen(loop, requests, context)
    for request in requests:
        loop.remove(request)
    loop.runner.settle()


@torch.inference_mode()
def _lengthen(loop: DecodeLoop, requests: Sequence[Request], context: int) -> None:
    """From now on these are taken to have so many tokens: what lies before theirs is whatever the caches hold there. That is
    read as any text is, in the same time, and reading it first would take much longer."""
    for request in requests:
        more = context - request.length
        request.prompt = [0] * more + request.prompt
        loop.work.state.lengths[request.slot] += more  # behind what is in flight, as steps are


def _time_reading(loop: DecodeLoop, planner: ShapePlanner, rows: int, rng: random.Random) -> None:
    vocab = loop.work.model.vocab_size
    for number in range(_READS):
        loop.runner.settle()
        request = _ask(loop, [rng.randrange(vocab) for _ in range(rows + 1)], number)
        begin = time.perf_counter()
        loop.step()
        planner.costs.note(rows, 0, READING, time.perf_counter() - begin)
        loop.remove(request)


def _ask(loop: DecodeLoop, prompt: list[int], seed: int) -> Request:
    most = min(400, loop.intake.max_context - len(prompt), loop.intake.capacity - len(prompt))
    return loop.add(prompt, SamplingParams(max_tokens=most, temperature=1.0, seed=seed, ignore_eos=True))
