"""The decode loop: draft a tree, verify it in one forward pass, keep a path."""

import secrets
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import final

import torch
from torch import Tensor

from mtp_engine.attention.rows import AttentionFactory, StepRows
from mtp_engine.attention.torch import TorchAttention
from mtp_engine.cache import HybridKV
from mtp_engine.config import SamplingParams, Structure
from mtp_engine.errors import EngineError
from mtp_engine.protocols import Drafter, Launched, TargetModel, Verifier
from mtp_engine.runtime.request import Members, Request, StepOutput
from mtp_engine.runtime.slots import SlotState
from mtp_engine.runtime.stats import GenerationStats
from mtp_engine.runtime.step import Draft, EagerRunner, Runner, Verify
from mtp_engine.sampling.batch import Batch
from mtp_engine.sampling.logprobs import emitted_logprobs
from mtp_engine.sampling.masks import Constraint
from mtp_engine.sampling.processors import Processors
from mtp_engine.sampling.stops import Ends, NewDecoder, StopStrings
from mtp_engine.tree import DraftTree, VerifyResult


@final
class DecodeLoop:
    """Requests join with `add`, every `step` advances all of them, and finished ones leave by themselves.

    Requests may join and leave between any two steps. Prefill covers the prompt without its last token; that token is
    the root of the first tree, so sampling happens in one place only.

    With a runner that keeps several steps in flight, a step begins before the results of the one before it are seen.
    A request that turns out to have ended takes part in steps already launched, and what they give is dropped. Only
    plain steps overlap (see Members.plain).
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
        text: NewDecoder | None = None,
        grammars: Callable[[Structure], Constraint] | None = None,
    ) -> None:
        """text: makes a decoder of tokens to text, which stop strings need. grammars: the same for structures."""
        self.model, self.cache, self.drafter, self.verifier = model, cache, drafter, verifier
        self.max_context, self.eos_token_ids = max_context, frozenset(eos_token_ids)
        self.prefill_chunk, self.device, self.attention = prefill_chunk, device, attention
        self.text, self.grammars = text, grammars
        self.processors = Processors(slots=slots, eos_token_ids=eos_token_ids, device=device)
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
        ends, constraint = self._ends(params, limit), self._constraint(params)
        request = Request(list(prompt), params, seed, self._free_slots[-1], ends, stats, self._busy_s)
        request.constraint = constraint
        begin = time.perf_counter()
        try:
            self._reserve(request.slot, len(prompt) + limit)
            self.processors.start(request.slot, prompt, params, self.model.vocab_size)
            self._prefill(request)
            self._runner.settle()
        except BaseException:
            self._release(request.slot)
            raise
        self._free_slots.pop()
        self.requests.append(request)
        self._members = None
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

    def _reserve(self, slot: int, tokens: int) -> None:
        ahead = self.drafter.max_nodes * self._runner.in_flight  # rows of steps that run past the end
        self.cache.reserve(slot, tokens + ahead)
        self.drafter.reserve(slot, tokens + ahead)

    def _release(self, slot: int) -> None:
        self.processors.release(slot)
        self.cache.release(slot)
        self.drafter.release(slot)

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
            while len(self._flying) < (self._runner.in_flight if members.plain else 1):
                self._flying.append((members, self._runner.launch(members, bound)))
            outputs = self._land(*self._flying.popleft(), begin)
            self._leave()
        return outputs

    def _draft(self, members: Members, bound: int) -> tuple[Batch, DraftTree]:
        batch = self.state.batch(members.slots, members.sampling, bound, members.guide)
        tree = self.drafter.draft(batch)
        return batch, members.limits.apply(tree) if members.limits else tree

    def _verify(self, members: Members, batch: Batch, tree: DraftTree) -> Tensor:
        """See SlotState.advance."""
        rows = self._rows(batch, tree)
        hidden = self.model.forward(tree.tokens, rows.positions, self.attention(self.cache, rows))
        logits = self.model.logits(hidden)
        processed = logits if members.plain else self.processors.apply(tree, logits, batch)
        result = self.verifier.verify(tree, processed, batch)
        self.cache.commit(batch.slots, batch.lengths, result)
        self.drafter.observe(batch, result, hidden)
        if not members.plain:
            self.processors.observe(batch, result)
            self._note_logprobs(members, logits, result)
        return self.state.advance(batch, tree, result)

    def _rows(self, batch: Batch, tree: DraftTree) -> StepRows:
        positions = batch.lengths[:, None] + tree.depths
        return StepRows(
            batch.slots, batch.lengths, positions, tree.parents, tree.max_depth, batch.bound, offsets=tree.depths
        )

    def _note_logprobs(self, members: Members, logits: Tensor, result: VerifyResult) -> None:
        """For the requests that want them; `_land` then drops those of tokens that were not emitted."""
        if members.logprobs < 0:
            return
        for request, found in zip(members.requests, emitted_logprobs(logits, result, members.logprobs), strict=True):
            if request.params.logprobs is not None:
                request.logprobs += [replace(each, top=each.top[: request.params.logprobs]) for each in found]

    def _land(self, members: Members, launched: Launched, begin: float) -> list[StepOutput]:
        """Wait for a step, the only synchronisation of plain ones, and hand its tokens out."""
        table = launched.wait()
        now = time.perf_counter()
        # queued steps run on while the caller handles what came before: such a step counts in full
        self._busy_s += max(now - begin, launched.draft_s + launched.verify_s)
        outputs = []
        for request, (count, nodes, depth, *tokens) in zip(members.requests, table, strict=True):
            if request.finish_reason or request not in self.requests:
                continue  # it ended, or was removed, after this step was launched
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
            stats.draft_s += launched.draft_s / len(table)
            stats.verify_s += launched.verify_s / len(table)
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
        self._release(request.slot)
        self._free_slots.append(request.slot)
        self._members = None
        if not self.requests:
            self._flying.clear()
