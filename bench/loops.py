"""Decode loops under test: built as the engine builds them, with made-up contexts, clocks, and forced acceptance."""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import final

import torch
from shapes import Model
from torch import Tensor, profiler

from mtp_engine import DraftTree, EngineConfig, SamplingParams, TreeShape, VerifyResult
from mtp_engine.assemble import make_loop, mtp_drafter
from mtp_engine.assemble.backend import make_backend
from mtp_engine.drafters import RootDrafter
from mtp_engine.engine import Engine
from mtp_engine.protocols import Progress, Verifier
from mtp_engine.runtime.loop import DecodeLoop
from mtp_engine.runtime.request import Launched, Members, PromptChunk, Request
from mtp_engine.runtime.step import EagerRunner, ModelStep, Runner, Said
from mtp_engine.sampling.batch import Batch
from mtp_engine.sampling.sampler import choose_scores

ROOM = 512  # tokens that a request may emit while it is timed


@final
class Recorder:
    """A Runner that notes the steps it launches, and on a GPU when each began and ended."""

    def __init__(self, inner: Runner, device: torch.device) -> None:
        self.in_flight, self._inner, self._cuda = inner.in_flight, inner, device.type == "cuda"
        self.launched: list[Launched] = []
        self.events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def capture(self, batch: int, longest: int, progress: Progress) -> str:
        return self._inner.capture(batch, longest, progress)

    def prepare(self, members: Members, bound: int) -> None:
        self._inner.prepare(members, bound)

    def prepare_reading(self, chunks: Sequence[PromptChunk]) -> None:
        self._inner.prepare_reading(chunks)

    def settle(self) -> None:
        self._inner.settle()

    def proceed(self) -> None:
        self._inner.proceed()

    def complete(self) -> None:
        self._inner.complete()

    def read(self, chunks: Sequence[PromptChunk]) -> Launched:
        return self._inner.read(chunks)

    def launch(self, members: Members, bound: int, said: Said) -> Launched:
        begin, end = (torch.cuda.Event(enable_timing=True) if self._cuda else None for _ in range(2))
        if begin:
            begin.record()
        launched = self._inner.launch(members, bound, said)
        self.launched.append(launched)
        if begin and end:
            end.record()
            self.events.append((begin, end))
        return launched


@final
@dataclass(frozen=True)
class Bench:
    """A loop and the clock on its runner."""

    loop: DecodeLoop
    recorder: Recorder

    def close(self) -> None:
        for request in list(self.loop.requests):
            self.loop.remove(request)


@final
@dataclass(frozen=True)
class Timing:
    """Seconds per step, medians. draft, verify: the GPU's (or the CPU's) own. wall: from one step's tokens to the next's.
    idle: between the end of a step, its tokens copied, and the start of the next one; 0 without a GPU."""

    draft: float
    verify: float
    wall: float
    idle: float
    accepted: float  # tokens per step and request

    @property
    def gap(self) -> float:
        """What the host adds to a step."""
        return self.wall - self.draft - self.verify


def build(
    model: Model, tree: str | None, batch: int, context: int, config: EngineConfig, *, packs: bool = True
) -> Bench:
    """A loop with room for `batch` requests of `context` tokens. tree None: plain decoding. packs: see Scheduler."""
    shape, group = TreeShape.parse(tree) if tree else None, model.main.group
    config = replace(
        config, tree=shape, max_batch=batch, max_context=0, kv_tokens=batch * (context + 2 * ROOM), tensor_parallel=group.size
    )  # fmt: skip
    device, recorders = model.main.embedding.device, []
    backend = replace(
        make_backend(config, device, lambda *_: None, group), fuse_mtp=lambda module: module, packs=packs
    )  # it is fused already

    def runner(slots: int) -> Callable[..., Runner]:
        def make(step: ModelStep) -> Runner:
            recorders.append(Recorder(backend.runner(slots)(step), device))
            return recorders[-1]

        return make

    drafter = mtp_drafter(model.module, config, backend) if shape else RootDrafter()
    loop = make_loop(model.main, drafter, config, replace(backend, runner=runner), slots=batch, tokenizer=None)
    return Bench(loop, recorders[0])


@torch.inference_mode()
def pretend(loop: DecodeLoop, batch: int, context: int) -> list[Request]:
    """`batch` requests as if each had `context` tokens cached: a prompt of two is prefilled, then the length is set.

    The keys and values are random numbers: a kernel may be faster on zeros.
    """
    for cache in {
        id(x): x for x in (loop.work.cache, getattr(loop.work.drafter, "cache", None)) if x is not None
    }.values():
        for group in cache.groups:
            for stored in (group.k, group.v):
                for layer in stored:
                    layer.normal_()
    vocab, params = loop.work.model.config.vocab_size, SamplingParams(max_tokens=context + ROOM, ignore_eos=True)
    prompts = [[(7919 * (index + 1)) % vocab, (104729 * (index + 1)) % vocab] for index in range(batch)]
    requests = [loop.add(prompt, params) for prompt in prompts]  # each reserves the room of its max_tokens
    while (plan := loop.scheduler.plan(0.0, 0)) and plan.chunks:
        loop.runner.read(plan.chunks)
    for request in requests:
        last = request.prompt[-1]
        request.prompt = [0] * context + [last]
        loop.work.state.set(request.slot, request.length, last)
    return requests


def measure(bench: Bench, steps: int, warm: int = 8) -> Timing:
    """Time `steps` steps of the requests in the loop, once kernels are compiled, graphs captured and the queue is full."""
    loop, recorder = bench.loop, bench.recorder
    for _ in range(warm):
        loop.step()
    before, marks = sum(len(r.output) for r in loop.requests), [time.perf_counter()]
    for _ in range(steps):
        loop.step()
        marks.append(time.perf_counter())
    emitted = sum(len(r.output) for r in loop.requests) - before
    assert all(len(r.output) < ROOM for r in loop.requests), "fewer steps, or more ROOM"
    timed = [step.wait() for step in recorder.launched[warm : warm + steps]]
    idle = [0.0]
    if recorder.events:
        torch.cuda.synchronize()
        events = recorder.events[warm : warm + steps]
        idle = [a[1].elapsed_time(b[0]) / 1e3 for a, b in pairwise(events)]
    return Timing(
        draft=statistics.median(step.draft_s for step in timed),
        verify=statistics.median(step.verify_s for step in timed),
        wall=statistics.median(b - a for a, b in pairwise(marks)),
        idle=statistics.median(idle),
        accepted=emitted / steps / max(len(loop.requests), 1),
    )


def kernel_times(bench: Bench, steps: int = 8) -> dict[str, tuple[float, float]]:
    """Microseconds and calls per step of every kernel (of every operator on a CPU), the longest first."""
    cuda = bench.loop.work.device.type == "cuda"
    for _ in range(5):
        bench.loop.step()
    if cuda:
        torch.cuda.synchronize()
    with profiler.profile(
        activities=[profiler.ProfilerActivity.CUDA if cuda else profiler.ProfilerActivity.CPU]
    ) as seen:
        for _ in range(steps):
            bench.loop.step()
        if cuda:
            torch.cuda.synchronize()
    sums = {
        event.key: (event.self_device_time_total if cuda else event.self_cpu_time_total, event.count)
        for event in seen.key_averages()
    }
    ordered = sorted(sums.items(), key=lambda item: -item[1][0])
    return {name: (total / steps, count / steps) for name, (total, count) in ordered}


@final
class Forced:
    """Pretends that every step keeps `counts` nodes, or what there is, on the way to a deep node. For timing only. Of 2.7
    some steps keep 3 and others 2, as a request's length says.

    The real verifier runs too, so that its time counts; its choice at the root is the last token of the step.
    """

    picks = False

    def __init__(self, verifier: Verifier, counts: float) -> None:
        self.verifier, self.counts = verifier, counts

    def verify(self, tree: DraftTree, logits: Tensor, batch: Batch) -> VerifyResult:
        result = self.verifier.verify(tree, logits, batch)
        fewest, share = divmod(self.counts, 1)
        more = (batch.lengths * 7919 % 1009) < share * 1009  # neighbouring lengths fall anywhere
        most = torch.where(more, int(fewest), int(fewest) - 1)
        depth = torch.where(tree.real, tree.depths, 0).amax(1).minimum(most)  # [B], of the last kept node
        upwards = [((tree.depths == depth[:, None]) & tree.real).int().argmax(1)]
        for _ in range(tree.max_depth):
            upwards.append(tree.parents.gather(1, upwards[-1][:, None])[:, 0].clamp(min=0))
        steps = depth[:, None] - torch.arange(tree.max_depth + 1, device=depth.device)
        path = torch.stack(upwards, 1).gather(1, steps.clamp(min=0))
        tokens = torch.cat([tree.tokens.gather(1, path)[:, 1:], result.tokens[:, :1]], 1)
        return VerifyResult(path, tokens.scatter(1, depth[:, None], result.tokens[:, :1]), depth + 1)


@final
class Scores:
    """Keeps the scores that the last step's choices were made from, noise included."""

    picks = False

    def __init__(self, verifier: Verifier) -> None:
        self.verifier = verifier
        self.last: Tensor | None = None  # [B, N, V] fp32

    def verify(self, tree: DraftTree, logits: Tensor, batch: Batch) -> VerifyResult:
        self.last = choose_scores(logits, tree.depths, tree.max_depth, batch.lengths, batch.sampling)
        return self.verifier.verify(tree, logits, batch)


def rescored(engine: Engine) -> Callable[[list[int], int, SamplingParams], Tensor]:
    """A function (prompt, index, params) -> scores [V] fp32 of output token `index`, from plain decoding all over."""
    backend = replace(engine.backend, runner=lambda slots: EagerRunner)  # a graph would not call the verifier again
    loop = make_loop(engine.model, RootDrafter(), engine.config, backend, slots=1, tokenizer=None)
    probe = loop.work.verifier = Scores(loop.work.verifier)

    def scores(prompt: list[int], index: int, params: SamplingParams) -> Tensor:
        request = loop.add(prompt, replace(params, max_tokens=index + 1, ignore_eos=True))
        while request.finish_reason is None:
            loop.step()
        assert probe.last is not None
        return probe.last[0, 0]

    return scores
