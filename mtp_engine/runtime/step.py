"""The work of one step: draft a tree and verify it, or read chunks of prompts. Here at once; in cuda_graph.py as graphs."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, final

import torch
from torch import Tensor

from mtp_engine.attention.rows import AttentionFactory, StepRows
from mtp_engine.cache import HybridKV
from mtp_engine.errors import EngineError
from mtp_engine.protocols import Drafter, Progress, TargetModel, TreePlanner, Verifier
from mtp_engine.runtime.request import Landed, Launched, Members, PromptChunk, Request
from mtp_engine.runtime.slots import SlotState
from mtp_engine.sampling.batch import Batch, SamplingBatch, to_device
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
    shares: bool = False  # the verifier chooses among ranks, each over its own logits, where nothing else decides

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
        """bound: no member has more tokens than this. Where members have a guide, the drafter asks it."""
        batch = self.state.batch(members.slots, members.sampling, bound, members.guide)
        if not members.speculates:
            return batch, DraftTree.root(batch.tokens)
        tree = self.drafter.draft(batch)
        return batch, members.limits.apply(tree) if members.limits else tree

    def verify(
        self, members: Members, batch: Batch, tree: DraftTree, mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Returns SlotState.advance's table, with NO_TOKEN where a request's parameters forbid every token, and Landed.notes.
        mask: see Processors.apply."""
        sampling = members.sampling
        rows = self.rows(batch, tree)
        hidden = self.model.forward(tree.tokens, rows.positions, self.attention(self.cache, rows))
        own = self.shares and sampling.bare
        logits = self.model.own_logits(hidden) if own else self.model.logits(hidden)
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


Said = Callable[[Request], Sequence[int]]
"""What the steps in flight emit for a request. Waits for them, so it is asked for requests with a structure only."""


class Runner(Protocol):
    """Runs steps, in the order in which they are launched."""

    @property
    def in_flight(self) -> int: ...  # steps launched before the first is waited for

    def capture(self, batch: int, longest: int, progress: Progress) -> str:
        """Get ready for all steps of at most `batch` requests of at most `longest` tokens, so that none has to wait for it.
        Returns what it took, in words; empty where there is nothing to do."""

    def prepare(self, members: Members, bound: int) -> None:
        """What a first use needs, such as compiling; not counted in any statistics."""

    def launch(self, members: Members, bound: int, said: Said) -> Launched: ...

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

    def settle(self) -> None:
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
            self._step.planner.timed(tree.nodes, len(rows), draft_s, verify_s)
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
    if isinstance(error, torch.OutOfMemoryError):
        return f"the GPU's memory is full: lower kv_tokens, max_batch or max_context ({text})"
    if isinstance(error, torch.AcceleratorError):
        return f"the GPU failed: start anew, and look at nvidia-smi if it happens again ({text})"
    return f"{type(error).__name__}: {text}"
