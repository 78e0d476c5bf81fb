"""The work of one step: draft a tree and verify it, or read chunks of prompts. Here at once; in cuda_graph.py as graphs."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, final

import torch
from torch import Tensor

from mtp_engine.attention.rows import AttentionFactory, StepRows
from mtp_engine.cache import HybridKV
from mtp_engine.protocols import Drafter, Launched, TargetModel, TreePlanner, Verifier
from mtp_engine.runtime.request import Members, PromptChunk
from mtp_engine.runtime.slots import SlotState
from mtp_engine.sampling.batch import Batch, SamplingBatch, to_device
from mtp_engine.sampling.logprobs import emitted_logprobs
from mtp_engine.sampling.processors import NO_TOKEN, Processors, forbids, stuck
from mtp_engine.tree import DraftTree, VerifyResult


@final
@dataclass
class ModelStep:
    """What a step is made of."""

    model: TargetModel
    cache: HybridKV
    drafter: Drafter
    verifier: Verifier
    processors: Processors
    state: SlotState
    attention: AttentionFactory
    device: torch.device
    planner: TreePlanner | None = None  # is told how long steps take

    def read(self, chunks: Sequence[PromptChunk]) -> None:
        """Read chunks of prompts in one pass: chains whose paths are known. The drafter sees each as a step that kept all
        of it."""
        known = [chunk.request.known(chunk.start, chunk.stop + 1) for chunk in chunks]
        counts = [chunk.stop - chunk.start for chunk in chunks]
        flat = to_device([token for each in known for token in each], torch.int64, self.device)
        tokens = torch.split(flat, [count + 1 for count in counts])
        rows = self._prompt_rows(chunks)
        given = torch.cat([each[:-1] for each in tokens])[None]
        hidden = self.model.forward(given, rows.positions, self.attention(self.cache, rows))
        for chunk, ids, states in zip(chunks, tokens, torch.split(hidden, counts, 1), strict=True):
            if chunk.request.params.speculate:
                self._observe_chunk(chunk, ids[None], states)

    def _prompt_rows(self, chunks: Sequence[PromptChunk]) -> StepRows:
        spans = tuple((chunk.request.slot, chunk.start, chunk.stop - chunk.start) for chunk in chunks)
        if len(spans) == 1:
            return StepRows.prompt(*spans[0], self.device)
        owners = [owner for owner, (_, _, count) in enumerate(spans) for _ in range(count)]
        positions = [position for _, start, count in spans for position in range(start, start + count)]
        columns = [each for column in zip(*spans, strict=True) for each in column]  # one transfer for all
        tables = to_device([*columns, *owners, *positions], torch.int64, self.device)
        each, rows = torch.split(tables, [3 * len(spans), 2 * len(owners)])
        return StepRows.prompts(each.view(3, -1), rows.view(2, -1), spans)

    def _observe_chunk(self, chunk: PromptChunk, tokens: Tensor, hidden: Tensor) -> None:
        """tokens: [1, C + 1], hidden: [1, C, H] of a chunk of C tokens and, of tokens, the one behind it."""
        request, count = chunk.request, chunk.stop - chunk.start
        slots, lengths = (torch.full((1,), value, device=self.device) for value in (request.slot, chunk.start))
        path = torch.arange(count, device=self.device)[None]
        result = VerifyResult(path, tokens[:, 1:], torch.full_like(slots, count))
        sampling = SamplingBatch.build([request.params], [request.seed], self.device)
        batch = Batch(slots, tokens[:, 0], lengths, chunk.stop, sampling, prompt_left=chunk.left)
        self.drafter.observe(batch, result, hidden)

    def draft(self, members: Members, bound: int) -> tuple[Batch, DraftTree]:
        """bound: no member has more tokens than this."""
        batch = self.state.batch(members.slots, members.sampling, bound, members.guide)
        if not members.speculates:
            return batch, DraftTree.root(batch.tokens)
        tree = self.drafter.draft(batch)
        return batch, members.limits.apply(tree) if members.limits else tree

    def verify(self, members: Members, batch: Batch, tree: DraftTree) -> Tensor:
        """Returns SlotState.advance's table, with NO_TOKEN where a request's parameters forbid every token."""
        rows = self.rows(batch, tree)
        hidden = self.model.forward(tree.tokens, rows.positions, self.attention(self.cache, rows))
        logits = self.model.logits(hidden)
        processed = logits if members.plain else self.processors.apply(tree, logits, batch)
        result = self.verifier.verify(tree, processed, batch)
        self.cache.commit(batch.slots, batch.lengths, result)
        if members.speculates:
            self.drafter.observe(batch, result, hidden)
        if not members.plain:
            self.processors.observe(batch, result)
            self._note_logprobs(members, logits, result)
        table = self.state.advance(batch, tree, result)
        if members.guide or any(forbids(request.params) for request in members.requests):
            table[:, 3:].masked_fill_(stuck(processed, result), NO_TOKEN)
        return table

    def rows(self, batch: Batch, tree: DraftTree) -> StepRows:
        positions = batch.lengths[:, None] + tree.depths
        return StepRows(
            batch.slots, batch.lengths, positions, tree.parents, tree.max_depth, batch.bound, offsets=tree.depths,
            straight=tree.straight,
        )  # fmt: skip

    def _note_logprobs(self, members: Members, logits: Tensor, result: VerifyResult) -> None:
        """For the requests that want them; those of tokens that are not emitted are dropped there (Request.take)."""
        if members.logprobs < 0:
            return
        emitted = emitted_logprobs(logits, result, members.logprobs)
        for request, entries in zip(members.requests, emitted, strict=True):
            if request.params.logprobs is not None:
                request.logprobs += [replace(each, top=each.top[: request.params.logprobs]) for each in entries]


class Runner(Protocol):
    """Runs steps, in the order in which they are launched."""

    @property
    def in_flight(self) -> int: ...  # steps launched before the first is waited for, if members are plain

    def prepare(self, members: Members, bound: int) -> None:
        """What a first use needs, such as compiling; not counted in any statistics."""

    def launch(self, members: Members, bound: int) -> Launched:
        """If members are not plain, no step is in flight when this is called."""

    def read(self, chunks: Sequence[PromptChunk]) -> Launched: ...

    def settle(self) -> None:
        """Wait until all that was queued is done."""


RunnerFactory = Callable[[ModelStep], Runner]


@final
@dataclass(frozen=True)
class Done:
    """A step that ran at once (a Launched)."""

    rows: list[list[int]]
    draft_s: float
    verify_s: float

    def wait(self) -> list[list[int]]:
        return self.rows


@final
class EagerRunner:
    """Runs each step at once, operation by operation."""

    in_flight = 1

    def __init__(self, step: ModelStep) -> None:
        self._step = step

    def prepare(self, members: Members, bound: int) -> None:
        pass

    def settle(self) -> None:
        pass

    def launch(self, members: Members, bound: int) -> Launched:
        begin = time.perf_counter()
        batch, tree = self._step.draft(members, bound)
        drafted = time.perf_counter()
        rows = self._step.verify(members, batch, tree).tolist()
        done = Done(rows, drafted - begin, time.perf_counter() - drafted)
        if self._step.planner and members.speculates:
            self._step.planner.timed(tree.nodes, len(rows), done.draft_s, done.verify_s)
        return done

    def read(self, chunks: Sequence[PromptChunk]) -> Launched:
        self._step.read(chunks)
        return Done([], 0.0, 0.0)


def explain(error: BaseException) -> str:
    """What torch says, as something the user can act on."""
    text = (str(error).splitlines() or [""])[0]
    if isinstance(error, torch.OutOfMemoryError):
        return f"the GPU's memory is full: lower kv_tokens, max_batch or max_context ({text})"
    if isinstance(error, torch.AcceleratorError):
        return f"the GPU failed: start anew, and look at nvidia-smi if it happens again ({text})"
    return f"{type(error).__name__}: {text}"
