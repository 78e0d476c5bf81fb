"""The decode loop: draft a tree, verify it in one forward pass, keep a path."""

import secrets
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol, final

import torch
from torch import Tensor

from mtp_engine.attention import AttentionFactory, StepRows, TorchAttention
from mtp_engine.cache import HybridKV
from mtp_engine.config import SamplingParams
from mtp_engine.errors import EngineError
from mtp_engine.protocols import Drafter, Launched, TargetModel, Verifier
from mtp_engine.sampler import SamplingBatch
from mtp_engine.slots import SlotState, StepBatch
from mtp_engine.stats import GenerationStats
from mtp_engine.tree import DraftTree

FinishReason = Literal["stop", "length"]


@final
@dataclass(eq=False)
class Request:
    """A prompt on its way: its slot, what it has emitted, and its statistics."""

    prompt: list[int]
    params: SamplingParams
    seed: int
    slot: int
    limit: int  # tokens it may emit: max_tokens, or less where the context ends first
    stats: GenerationStats
    started: float  # on the loop's clock
    output: list[int] = field(default_factory=list)
    drafted: list[bool] = field(default_factory=list)  # per output token: an accepted draft, not the main model's own
    finish_reason: FinishReason | None = None

    @property
    def length(self) -> int:
        """Tokens whose KV is cached: all but the last."""
        return len(self.prompt) + len(self.output) - 1


@final
@dataclass(frozen=True)
class StepOutput:
    """What one step emitted for one request: at least one token."""

    request: Request
    tokens: list[int]
    drafted: list[bool]


@final
@dataclass(frozen=True)
class Members:
    """The running requests, until one joins or leaves."""

    requests: tuple[Request, ...]
    slots: Tensor  # [B] int64
    sampling: SamplingBatch

    @classmethod
    def build(cls, requests: Sequence[Request], device: torch.device) -> "Members":
        slots = torch.tensor([request.slot for request in requests], device=device)
        sampling = SamplingBatch.build([r.params for r in requests], [r.seed for r in requests], device)
        return cls(tuple(requests), slots, sampling)


Draft = Callable[[Tensor, SamplingBatch, int], tuple[StepBatch, DraftTree]]
Verify = Callable[[StepBatch, DraftTree], Tensor]


class Runner(Protocol):
    """Runs the two halves of a step for the present members."""

    @property
    def in_flight(self) -> int: ...  # steps launched before the first is waited for

    def prepare(self, members: Members, bound: int) -> None:
        """What a first use needs, such as compiling; not counted in any statistics."""

    def launch(self, members: Members, bound: int) -> Launched: ...

    def settle(self) -> None:
        """Wait until all that was queued is done."""


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

    def __init__(self, draft: Draft, verify: Verify) -> None:
        self._draft, self._verify = draft, verify

    def prepare(self, members: Members, bound: int) -> None:
        pass

    def settle(self) -> None:
        pass

    def launch(self, members: Members, bound: int) -> Launched:
        begin = time.perf_counter()
        batch, tree = self._draft(members.slots, members.sampling, bound)
        drafted = time.perf_counter()
        rows = self._verify(batch, tree).tolist()
        return Done(rows, drafted - begin, time.perf_counter() - drafted)


@final
class DecodeLoop:
    """Requests join with `add`, every `step` advances all of them, and finished ones leave by themselves.

    Requests may join and leave between any two steps. Prefill covers the prompt without its last token; that token is
    the root of the first tree, so sampling happens in one place only.

    With a runner that keeps several steps in flight, a step begins before the results of the one before it are seen.
    A request that turns out to have ended takes part in steps already launched, and what they give is dropped.
    """

    def __init__(
        self,
        model: TargetModel,
        cache: HybridKV,
        drafter: Drafter,
        verifier: Verifier,
        *,
        slots: int,
        max_context: int,
        eos_token_ids: Sequence[int],
        prefill_chunk: int,
        device: torch.device,
        attention: AttentionFactory = TorchAttention,
        runner: Callable[[Draft, Verify], Runner] = EagerRunner,
        kernels: bool = False,
    ) -> None:
        self.model, self.cache, self.drafter, self.verifier = model, cache, drafter, verifier
        self.max_context, self.eos_token_ids = max_context, frozenset(eos_token_ids)
        self.prefill_chunk, self.device, self.attention = prefill_chunk, device, attention
        self.requests: list[Request] = []
        self.state = SlotState(slots + 1, device, kernels=kernels)
        self._runner = runner(self._draft, self._verify)
        self._flying: deque[tuple[Members, Launched]] = deque()
        self._free_slots = list(range(slots))[::-1]
        self._members: Members | None = None  # None after a change
        self._busy_s = 0.0  # the loop's clock: time spent in `add` and `step`, not in the caller

    @property
    def has_room(self) -> bool:
        return bool(self._free_slots)

    @torch.inference_mode()
    def add(self, prompt: Sequence[int], params: SamplingParams) -> Request:
        """Admit a request and prefill its prompt (token ids). Raises EngineError, changing nothing, if it cannot run."""
        if not prompt:
            raise EngineError("the prompt is empty: give it at least one token")
        if len(prompt) >= self.max_context:
            raise EngineError(
                f"the prompt has {len(prompt)} tokens and the context holds {self.max_context}: shorten the prompt"
            )
        if not self._free_slots:
            raise EngineError("all slots are taken: wait for a request to finish, or raise max_batch")
        limit = min(params.max_tokens, self.max_context - len(prompt))
        seed = secrets.randbits(63) if params.seed is None else params.seed
        stats = GenerationStats(seed=seed, prompt_tokens=len(prompt))
        request = Request(list(prompt), params, seed, self._free_slots[-1], limit, stats, self._busy_s)
        begin = time.perf_counter()
        try:
            ahead = self.drafter.max_nodes * self._runner.in_flight  # rows of steps that run past the end
            self.cache.reserve(request.slot, len(prompt) + limit + ahead)
            self.drafter.reserve(request.slot, len(prompt) + limit + ahead)
            self._prefill(request)
            self._runner.settle()
        except BaseException:
            self.cache.release(request.slot)
            self.drafter.release(request.slot)
            raise
        self._free_slots.pop()
        self.requests.append(request)
        self._members = None
        stats.prefill_s = time.perf_counter() - begin
        self._busy_s += stats.prefill_s
        return request

    def _prefill(self, request: Request) -> None:
        tokens = torch.tensor(request.prompt, device=self.device)
        recent: list[Tensor] = []
        for start in range(0, len(tokens) - 1, self.prefill_chunk):
            chunk = tokens[None, start : min(start + self.prefill_chunk, len(tokens) - 1)]
            rows = StepRows.prompt(request.slot, start, chunk.shape[1], self.device)
            hidden = self.model.forward(chunk, rows.positions, self.attention(self.cache, rows))[0]
            recent = [torch.cat([*recent, hidden])[-self.drafter.history :]] if self.drafter.history else []
        hidden = recent[0] if recent else torch.empty(0, 0, device=self.device)
        self.drafter.prefill(request.slot, tokens, hidden)
        self.state.set(request.slot, request.length, request.prompt[-1])

    @torch.inference_mode()
    def step(self) -> list[StepOutput]:
        """Advance the running requests by one draft-and-verify step; returns what each emitted."""
        outputs: list[StepOutput] = []
        while self.requests and not outputs:  # a step may have been launched for requests that have all ended
            members = self._members = self._members or Members.build(self.requests, self.device)
            longest = max(request.length for request in self.requests)
            bound = longest + (self._runner.in_flight + 1) * self.drafter.max_nodes
            self._runner.prepare(members, bound)
            begin = time.perf_counter()
            while len(self._flying) < self._runner.in_flight:
                self._flying.append((members, self._runner.launch(members, bound)))
            outputs = self._land(*self._flying.popleft(), begin)
            self._leave()
        return outputs

    def _draft(self, slots: Tensor, sampling: SamplingBatch, bound: int) -> tuple[StepBatch, DraftTree]:
        batch = self.state.batch(slots, sampling, bound)
        return batch, self.drafter.draft(batch)

    def _verify(self, batch: StepBatch, tree: DraftTree) -> Tensor:
        """See SlotState.advance."""
        positions = batch.lengths[:, None] + tree.depths
        rows = StepRows(
            batch.slots, batch.lengths, positions, tree.parents, tree.max_depth, batch.bound, offsets=tree.depths
        )
        hidden = self.model.forward(tree.tokens, positions, self.attention(self.cache, rows))
        result = self.verifier.verify(tree, self.model.logits(hidden), batch)
        self.cache.commit(batch.slots, batch.lengths, result)
        self.drafter.observe(batch, result, hidden)
        return self.state.advance(batch, tree, result)

    def _land(self, members: Members, launched: Launched, begin: float) -> list[StepOutput]:
        """Wait for a step, the only synchronisation, and hand its tokens out."""
        table = launched.wait()
        now = time.perf_counter()
        # queued steps run on while the caller handles what came before: such a step counts in full
        self._busy_s += max(now - begin, launched.draft_s + launched.verify_s)
        outputs = []
        for request, (count, nodes, depth, *tokens) in zip(members.requests, table, strict=True):
            if request.finish_reason or request not in self.requests:
                continue  # it ended, or was removed, after this step was launched
            kept = self._stop(request, tokens[:count])
            drafted = [index < count - 1 for index in range(len(kept))]
            request.output += kept
            request.drafted += drafted
            stats = request.stats
            stats.record_step(len(kept), nodes, depth)
            stats.draft_s += launched.draft_s / len(table)
            stats.verify_s += launched.verify_s / len(table)
            stats.total_s = self._busy_s - request.started
            stats.ttft_s = stats.ttft_s or stats.total_s
            outputs.append(StepOutput(request, kept, drafted))
        return outputs

    def _stop(self, request: Request, tokens: list[int]) -> list[int]:
        """The tokens up to the request's end, which is noted; nothing after a stop token is emitted."""
        for index, token in enumerate(tokens):
            ends = token in request.params.stop_token_ids
            if ends or (token in self.eos_token_ids and not request.params.ignore_eos):
                request.finish_reason = "stop"
                return tokens[: index + 1]
            if len(request.output) + index + 1 == request.limit:
                request.finish_reason = "length"
                return tokens[: index + 1]
        return tokens

    def _leave(self) -> None:
        for request in [r for r in self.requests if r.finish_reason]:
            self.remove(request)

    def remove(self, request: Request) -> None:
        """Drop a request, finished or not, and free its slot."""
        self.requests.remove(request)
        self.cache.release(request.slot)
        self.drafter.release(request.slot)
        self._free_slots.append(request.slot)
        self._members = None
        if not self.requests:
            self._flying.clear()
