"""The decode loop: draft a tree, verify it in one forward pass, keep a path."""

import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import final

import torch
from torch import Tensor

from mtp_engine.attention import StepRows, TorchAttention
from mtp_engine.cache import HybridKV
from mtp_engine.config import SamplingParams, Structure
from mtp_engine.errors import EngineError
from mtp_engine.guide import Constraint, Guide
from mtp_engine.limits import TreeLimits
from mtp_engine.logprobs import TokenLogprob, emitted_logprobs
from mtp_engine.processors import Processors
from mtp_engine.protocols import Drafter, TargetModel, Verifier
from mtp_engine.sampler import SamplingBatch
from mtp_engine.stats import GenerationStats
from mtp_engine.stops import Ends, FinishReason, NewDecoder, StopStrings
from mtp_engine.tree import DraftTree, VerifyResult


@final
@dataclass(eq=False)
class Request:
    """A prompt on its way: its slot, what it has emitted, and its statistics."""

    prompt: list[int]
    params: SamplingParams
    seed: int
    slot: int
    ends: Ends
    stats: GenerationStats
    started: float  # on the loop's clock
    output: list[int] = field(default_factory=list)
    drafted: list[bool] = field(default_factory=list)  # per output token: an accepted draft, not the main model's own
    logprobs: list[TokenLogprob] = field(default_factory=list)  # per output token, where they were asked for
    finish_reason: FinishReason | None = None
    constraint: Constraint | None = None

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
class StepBatch:
    """The running requests as tensors (see protocols.Batch)."""

    requests: Sequence[Request]
    sampling: SamplingBatch
    slots: Tensor
    host_slots: list[int]
    guide: Guide | None

    @classmethod
    def build(cls, requests: Sequence[Request], device: torch.device) -> "StepBatch":
        slots = [request.slot for request in requests]
        sampling = SamplingBatch.build([r.params for r in requests], [r.seed for r in requests], device)
        guide = Guide.build([request.constraint for request in requests])
        return cls(requests, sampling, torch.tensor(slots, device=device), slots, guide)

    def now(self) -> "StepBatch":
        """The same requests at their present lengths."""
        return StepBatch(self.requests, self.sampling, self.slots, self.host_slots, self.guide)

    @cached_property
    def host_lengths(self) -> list[int]:
        return [request.length for request in self.requests]

    @cached_property
    def lengths(self) -> Tensor:
        return torch.tensor(self.host_lengths, device=self.slots.device)

    @cached_property
    def tokens(self) -> Tensor:
        return torch.tensor([(r.output or r.prompt)[-1] for r in self.requests], device=self.slots.device)


@final
class DecodeLoop:
    """Requests join with `add`, every `step` advances all of them, and finished ones leave by themselves.

    Requests may join and leave between any two steps. Prefill covers the prompt without its last token; that token is
    the root of the first tree, so sampling happens in one place only.
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
        text: NewDecoder | None = None,
        grammars: Callable[[Structure], Constraint] | None = None,
    ) -> None:
        """text: makes a decoder of tokens to text, which stop strings need. grammars: the same for structures."""
        self.model, self.cache, self.drafter, self.verifier = model, cache, drafter, verifier
        self.max_context, self.eos_token_ids = max_context, frozenset(eos_token_ids)
        self.prefill_chunk, self.device = prefill_chunk, device
        self.text, self.grammars = text, grammars
        self.processors = Processors(slots=slots, eos_token_ids=eos_token_ids, device=device)
        self.requests: list[Request] = []
        self._free_slots = list(range(slots))[::-1]
        self._batch: StepBatch | None = None  # of the present members; None after a change
        self._limits: TreeLimits | None = None  # theirs
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
        ends, constraint = self._ends(params, limit), self._constraint(params)
        request = Request(list(prompt), params, seed, self._free_slots[-1], ends, stats, self._busy_s)
        request.constraint = constraint
        begin = time.perf_counter()
        try:
            self.cache.reserve(request.slot, len(prompt) + limit + self.drafter.max_nodes)
            self.drafter.reserve(request.slot, len(prompt) + limit)
            self.processors.start(request.slot, prompt, params, self.model.vocab_size)
            self._prefill(request)
        except BaseException:
            self.processors.release(request.slot)
            self.cache.release(request.slot)
            self.drafter.release(request.slot)
            raise
        self._free_slots.pop()
        self.requests.append(request)
        self._batch = None
        stats.prefill_s = time.perf_counter() - begin
        self._busy_s += stats.prefill_s
        return request

    def _ends(self, params: SamplingParams, limit: int) -> Ends:
        tokens = frozenset(params.stop_token_ids) | (frozenset() if params.ignore_eos else self.eos_token_ids)
        if not params.stop:
            return Ends(limit, tokens)
        if self.text is None:
            raise EngineError("stop strings need text, and this loop was given no decoder")
        return Ends(limit, tokens, StopStrings(params.stop, self.text(), params.min_tokens))

    def _constraint(self, params: SamplingParams) -> Constraint | None:
        if params.structure is None:
            return None
        if self.grammars is None:
            raise EngineError("a structure was asked for, and this loop was given no grammars")
        return self.grammars(params.structure)

    def _prefill(self, request: Request) -> None:
        tokens = torch.tensor(request.prompt, device=self.device)
        slots = torch.tensor([request.slot], device=self.device)
        recent: list[Tensor] = []
        for start in range(0, len(tokens) - 1, self.prefill_chunk):
            chunk = tokens[None, start : min(start + self.prefill_chunk, len(tokens) - 1)]
            positions = start + torch.arange(chunk.shape[1], device=self.device)[None]
            rows = StepRows(
                slots=slots,
                lengths=torch.tensor([start], device=self.device),
                host_slots=[request.slot],
                host_lengths=[start],
                positions=positions,
                mask=positions[:, :, None] >= positions[:, None, :],
            )
            hidden = self.model.forward(chunk, positions, TorchAttention(self.cache, rows))[0]
            recent = [torch.cat([*recent, hidden])[-self.drafter.history :]] if self.drafter.history else []
        hidden = recent[0] if recent else torch.empty(0, 0, device=self.device)
        self.drafter.prefill(request.slot, tokens, hidden)

    @torch.inference_mode()
    def step(self) -> list[StepOutput]:
        """Advance every request by one draft-and-verify step; returns what each emitted."""
        if not self.requests:
            return []
        begin = time.perf_counter()
        batch = self._current()
        tree = self.drafter.draft(batch)
        tree = self._limits.apply(tree) if self._limits else tree
        drafted = time.perf_counter()
        rows = self._rows(batch, tree)
        hidden = self.model.forward(tree.tokens, rows.positions, TorchAttention(self.cache, rows))
        logits = self.model.logits(hidden)
        result = self.verifier.verify(tree, self.processors.apply(tree, logits, batch), batch)
        self.cache.commit(batch.slots, batch.lengths, result)
        self.processors.observe(batch, result)
        self.drafter.observe(batch, result, result.gather(hidden))
        self._note_logprobs(batch, logits, result)
        outputs = self._emit(batch, tree, result, begin, drafted)
        self._leave()
        return outputs

    def _current(self) -> StepBatch:
        if self._batch is None:
            self._batch = StepBatch.build(tuple(self.requests), self.device)
            self._limits = TreeLimits.build([request.params for request in self.requests], self.device)
        return self._batch.now()

    def _rows(self, batch: StepBatch, tree: DraftTree) -> StepRows:
        return StepRows(
            slots=batch.slots,
            lengths=batch.lengths,
            host_slots=batch.host_slots,
            host_lengths=batch.host_lengths,
            positions=batch.lengths[:, None] + tree.depths,
            mask=tree.ancestors,
        )

    def _note_logprobs(self, batch: StepBatch, logits: Tensor, result: VerifyResult) -> None:
        """For the requests that want them; `_emit` then drops those of tokens that were not emitted."""
        most = max(-1 if r.params.logprobs is None else r.params.logprobs for r in batch.requests)
        if most < 0:
            return
        for request, found in zip(batch.requests, emitted_logprobs(logits, result, most), strict=True):
            if request.params.logprobs is not None:
                request.logprobs += [replace(each, top=each.top[: request.params.logprobs]) for each in found]

    def _emit(
        self, batch: StepBatch, tree: DraftTree, result: VerifyResult, begin: float, drafted_at: float
    ) -> list[StepOutput]:
        """Take a step's result to the host, the step's one synchronisation, and hand the tokens out."""
        reached = torch.where(tree.real, tree.depths, 0).amax(1)
        table = torch.cat([result.counts[:, None], tree.size[:, None], reached[:, None], result.tokens], 1).tolist()
        now = time.perf_counter()
        self._busy_s += now - begin
        outputs = []
        for request, (count, nodes, depth, *tokens) in zip(batch.requests, table, strict=True):
            cut, request.finish_reason = request.ends.cut(tokens[:count])
            kept = tokens[:cut]
            if request.constraint:
                request.constraint.advance(kept)
            drafted = [index < count - 1 for index in range(len(kept))]
            request.output += kept
            request.drafted += drafted
            del request.logprobs[len(request.output) :]
            stats = request.stats
            stats.record_step(len(kept), nodes, depth)
            stats.draft_s += (drafted_at - begin) / len(table)
            stats.verify_s += (now - drafted_at) / len(table)
            stats.total_s = self._busy_s - request.started
            stats.ttft_s = stats.ttft_s or stats.total_s
            outputs.append(StepOutput(request, kept, drafted))
        return outputs

    def _leave(self) -> None:
        for request in [r for r in self.requests if r.finish_reason]:
            self.remove(request)

    def remove(self, request: Request) -> None:
        """Drop a request, finished or not, and free its slot."""
        self.requests.remove(request)
        self.processors.release(request.slot)
        self.cache.release(request.slot)
        self.drafter.release(request.slot)
        self._free_slots.append(request.slot)
        self._batch = None
