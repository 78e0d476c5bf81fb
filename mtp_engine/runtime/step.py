"""The work of one step: draft a tree and verify it, or read chunks of prompts. Here at once; in cuda_graph.py as graphs."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, final

import torch
from torch import Tensor

from mtp_engine.attention.rows import AttentionFactory, StepRows
from mtp_engine.cache import HybridKV
from mtp_engine.errors import EngineError
from mtp_engine.protocols import Drafter, Progress, StepPlanner, TargetModel, TreePlanner, Verifier
from mtp_engine.runtime.request import Landed, Launched, Members, PromptChunk, Request
from mtp_engine.runtime.slots import SlotState
from mtp_engine.sampling.batch import Batch, Chunk, Extent, SamplingBatch, to_device
from mtp_engine.sampling.logprobs import Notes, emitted_logprobs
from mtp_engine.sampling.processors import NO_TOKEN, Processors, stuck
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
    kernels: bool = False
    shapes: StepPlanner | None = None  # chooses each step's shape, where a runner records several
    shares: bool = False  # the verifier chooses among ranks, each over its own logits, where nothing else decides
    times: list[tuple[Any, ...]] = field(default_factory=list)  # of steps; a planner learns them before the next one

    def learn(self, times: Sequence[tuple[Any, ...]]) -> None:
        """Tell the planner, if there is one, how long steps took: what its `timed` takes."""
        planner: Any = self.planner or self.shapes
        for each in times if planner else ():
            planner.timed(*each)

    def read(self, chunks: Sequence[PromptChunk]) -> None:
        """Read chunks of prompts in one pass: chains whose paths are known. The drafter is told of those that want drafts."""
        numbers = [*known(chunks), *(each for column in zip(*spans(chunks), strict=True) for each in column)]
        table, count = to_device(numbers, torch.int64, self.device), sum(chunk.stop - chunk.start for chunk in chunks)
        tokens, bound = table[:count], max(chunk.stop for chunk in chunks)
        if len(chunks) == 1:
            rows = StepRows.prompt(*spans(chunks)[0], self.device)
        else:
            rows = StepRows.prompts(table[count:].view(3, -1), count, bound)
        states, reader = self.over(rows, tokens), self.drafter.prompts
        if reader is None:
            self.show(chunks, states)
        elif entries := reader.outline(told(chunks)):
            outline = to_device(
                [each for column in zip(*entries, strict=True) for each in column], torch.int64, self.device
            )
            extent = Extent(sum(entry[-1] for entry in entries), bound + 1)
            reader.read(outline.view(-1, len(entries)), extent, tokens, states)

    def over(self, rows: StepRows, tokens: Tensor) -> Tensor:
        """Rows of prompts through the main model. tokens: [N] int64. Returns [N, H], what the drafter wants of them."""
        hidden = self.model.forward(tokens[None], rows.positions, self.attention(self.cache, rows))
        reader = self.drafter.prompts
        if reader is None:
            return hidden[0]
        rows = rows.packed()
        assert rows.counts is not None
        own, stops = rows.owners, rows.lengths + rows.counts
        return reader.keep(rows.slots[own], rows.positions[0], stops[own], hidden)

    def show(self, chunks: Sequence[PromptChunk], hidden: Tensor) -> None:
        """To a drafter without `prompts`. hidden: [N, H], where the chunks' rows stand one behind the other."""
        row = 0
        for chunk in chunks:
            count = chunk.stop - chunk.start
            if chunk.request.params.speculate:
                self._show(chunk, hidden[None, row : row + count])
            row += count

    def _show(self, chunk: PromptChunk, hidden: Tensor) -> None:
        """hidden: [1, C, H] of a chunk of C tokens."""
        request, count = chunk.request, chunk.stop - chunk.start
        tokens = to_device(request.known(chunk.start, chunk.stop + 1), torch.int64, self.device)[None]
        slots, lengths = (torch.full((1,), value, device=self.device) for value in (request.slot, chunk.start))
        path = torch.arange(count, device=self.device)[None]
        result = VerifyResult(path, tokens[:, 1:], torch.full_like(slots, count))
        sampling = SamplingBatch.build([request.params], [request.seed], self.device)
        batch = Batch(slots, tokens[:, 0], lengths, chunk.stop, sampling, prompt_left=chunk.left)
        self.drafter.observe(batch, result, hidden)

    def draft(self, members: Members, bound: int) -> tuple[Batch, DraftTree]:
        """bound: no member has more tokens than this. Where members have a guide, the drafter asks it."""
        batch = self.state.batch(members.slots, members.sampling, bound, members.guide, members.plan)
        if not members.speculates or (members.plan and not members.plan.shape):
            return batch, DraftTree.root(batch.tokens)
        tree = self.drafter.draft(replace(batch, biases=self.processors.biases(members.sampling)))
        return batch, members.limits.apply(tree) if members.limits else tree

    def force(self, tree: DraftTree, chains: Tensor) -> DraftTree:
        """See DraftTree.forced."""
        if not self.kernels:
            return tree.forced(chains)
        from mtp_engine.kernels.state import force

        tables = force(tree.tokens, tree.parents, tree.depths, tree.size, chains, tree.max_depth)
        tokens, parents, depths, size = tables
        return replace(tree, tokens=tokens, parents=parents, depths=depths, size=size)

    def verify(
        self, members: Members, batch: Batch, tree: DraftTree, mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """`choose` after `forward`."""
        return self.choose(members, batch, tree, *self.forward(batch, tree), mask)

    def forward(self, batch: Batch, tree: DraftTree) -> tuple[Tensor, Tensor]:
        """The main model's hidden states [B, N, H] and logits [B, N, V] at the nodes; see `shares`."""
        rows = self.rows(batch, tree)
        hidden = self.model.forward(tree.tokens, rows.positions, self.attention(self.cache, rows))
        own = self.shares and batch.sampling.bare
        return hidden, self.model.own_logits(hidden) if own else self.model.logits(hidden)

    def choose(
        self, members: Members, batch: Batch, tree: DraftTree, hidden: Tensor, logits: Tensor, mask: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Returns SlotState.advance's table, with NO_TOKEN where a request's parameters forbid every token, and Landed.notes.
        mask: see Processors.apply."""
        sampling = members.sampling
        processed = self.processors.apply(tree, logits, batch, mask)
        result = self.verifier.verify(tree, processed, batch)
        self.cache.commit(batch.slots, batch.lengths, result)
        if members.speculates:
            self.drafter.observe(batch, result, hidden)
        self.processors.observe(batch, result)
        notes = self.logprobs(logits, result, sampling) if sampling.most_logprobs >= 0 else None
        table = self.state.advance(batch, tree, result)
        if processed is not logits:
            table[:, 3:].masked_fill_(stuck(processed, result), NO_TOKEN)
        return table, notes

    def peek(self, batch: Batch, tree: DraftTree, logits: Tensor) -> Tensor:
        """What would be chosen if structures allowed everything: how many tokens, which, and behind which nodes, [B, 1 + 2 (D+1)]
        int64, with NO_TOKEN where nothing can be chosen. Nothing is changed by it."""
        processed = self.processors.apply(tree, logits, batch)
        result = self.verifier.verify(tree, processed, batch)
        tokens = result.tokens.masked_fill(stuck(processed, result), NO_TOKEN)
        return torch.cat([result.counts[:, None], tokens, result.path], 1)

    def rows(self, batch: Batch, tree: DraftTree) -> StepRows:
        positions = batch.lengths[:, None] + tree.depths
        return StepRows(
            batch.slots, batch.lengths, positions, tree.parents, tree.max_depth, batch.bound, offsets=tree.depths,
            straight=tree.straight,
        )  # fmt: skip

    def logprobs(self, logits: Tensor, result: VerifyResult, sampling: SamplingBatch) -> Tensor:
        """See emitted_logprobs."""
        if self.kernels:
            from mtp_engine.kernels.logprobs import emitted_logprobs as kernel

            return kernel(logits, result.path, result.tokens, sampling.logprobs, sampling.most_logprobs)
        return emitted_logprobs(logits, result, sampling.most_logprobs)


def known(chunks: Sequence[PromptChunk]) -> list[int]:
    """Their tokens, one chunk behind the other."""
    return [token for chunk in chunks for token in chunk.request.known(chunk.start, chunk.stop)]


def spans(chunks: Sequence[PromptChunk]) -> list[tuple[int, int, int]]:
    """Of each its slot, its first position, and how many tokens it has."""
    return [(chunk.request.slot, chunk.start, chunk.stop - chunk.start) for chunk in chunks]


def told(chunks: Sequence[PromptChunk]) -> list[Chunk]:
    """What a drafter is told of those that want drafts."""
    found, row = list[Chunk](), 0
    for chunk in chunks:
        request, stop = chunk.request, chunk.stop
        if request.params.speculate:
            [behind] = request.known(stop, stop + 1)
            found.append(Chunk(request.slot, chunk.start, stop, chunk.left, behind, row))
        row += stop - chunk.start
    return found


Said = Callable[[Sequence[Request]], Sequence[Sequence[int]]]
"""What the steps before, which are in flight still, emit for each of these requests. Waits for steps in which one of them takes
part, so it is asked for requests with a structure only."""


class Runner(Protocol):
    """Runs steps, in the order in which they are launched."""

    @property
    def in_flight(self) -> int: ...  # steps launched before the first is waited for

    def capture(self, batch: int, longest: int, progress: Progress) -> str:
        """Get ready for all steps of at most `batch` requests of at most `longest` tokens, so that none has to wait for it.
        Returns what it took, in words; empty where there is nothing to do."""

    def prepare(self, members: Members, bound: int) -> None:
        """What a first use needs, such as compiling, which statistics count apart."""

    def prepare_reading(self, chunks: Sequence[PromptChunk]) -> None:
        """The same for `read`."""

    def launch(self, members: Members, bound: int, said: Said) -> Launched:
        """Start a step. Where a structure has a say, what is chosen may wait for `complete`, or until the step is waited for."""

    def proceed(self) -> None:
        """All steps but the newest have landed: its model may be launched, so that it runs while the host hands out what the
        others said."""

    def complete(self) -> None:
        """Launch what is left of the newest step: before slots change hands, and before any other."""

    def read(self, chunks: Sequence[PromptChunk]) -> Launched: ...

    def settle(self) -> None:
        """Wait until all that was queued is done."""


RunnerFactory = Callable[[ModelStep], Runner]


@final
@dataclass(frozen=True)
class Done:
    """A step that ran at once (a Launched)."""

    landed: Landed

    def wait(self) -> Landed:
        return self.landed


@final
class EagerRunner:
    """Runs each step at once, operation by operation."""

    in_flight = 1

    def __init__(self, step: ModelStep) -> None:
        self._step = step

    def capture(self, batch: int, longest: int, progress: Progress) -> str:
        return ""

    def prepare(self, members: Members, bound: int) -> None:
        pass

    def prepare_reading(self, chunks: Sequence[PromptChunk]) -> None:
        pass

    def settle(self) -> None:
        pass

    def proceed(self) -> None:
        pass

    def complete(self) -> None:
        pass

    def launch(self, members: Members, bound: int, said: Said) -> Launched:
        begin, guide, mask = time.perf_counter(), members.guide, None
        if guide:
            guide.begin(members.requests, said)
        batch, tree = self._step.draft(members, bound)
        drafted = time.perf_counter()
        if guide:
            mask = torch.zeros(*tree.tokens.shape, -(-self._step.model.vocab_size // 32), dtype=torch.int32)
            guide.fill(mask, tree.tokens.tolist(), tree.parents.tolist(), tree.size.tolist())
            mask = mask.to(self._step.device)
        table, notes = self._step.verify(members, batch, tree, mask)
        rows = table.tolist()
        draft_s, verify_s = drafted - begin, time.perf_counter() - drafted
        if self._step.planner and members.speculates:
            self._step.times.append((tree.nodes, len(rows), draft_s, verify_s))
        kept = None if notes is None else Notes(notes.cpu())
        return Done(Landed(rows, draft_s, verify_s, kept, guide.failed if guide else {}))

    def read(self, chunks: Sequence[PromptChunk]) -> Launched:
        self._step.read(chunks)
        return Done(Landed([], 0.0, 0.0))


def explain(error: BaseException) -> str:
    """What torch says, as something the user can act on."""
    text = (str(error).splitlines() or [""])[0]
    if isinstance(error, EngineError):
        return text
    if says_full(error):
        return f"the GPU's memory is full: lower kv_tokens, max_batch or max_context ({text})"
    if isinstance(error, torch.AcceleratorError):
        return f"the GPU failed: start anew, and look at nvidia-smi if it happens again ({text})"
    return f"{type(error).__name__}: {text}"


def says_full(error: BaseException | None) -> bool:
    """Whether torch, or the driver, says that a GPU's memory is full."""
    driver = isinstance(error, torch.AcceleratorError) and "out of memory" in str(error)
    return driver or isinstance(error, torch.OutOfMemoryError)
