"""Many rows in lock step: all are at the same position, so there is no padding and no mask, and what a row does next
(copy a given token, or take the one it sampled) is worked out on the device. On a GPU with Triton a step is one CUDA
graph that is replayed for every position.
"""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, final

import torch
from torch import Tensor

from mtp_engine.models.decoder import Decoder
from mtp_engine.protocols import Attention
from mtp_engine.sampling.sampler import gumbel
from mtp_engine.text.tokenizer import Tokenizer
from mtp_engine.training import data
from mtp_engine.training.lockstep_cache import KernelAttention, LockStepCache, PromptAttention, StepAttention
from mtp_engine.training.prompts import Template
from mtp_engine.training.quick import quick_main

if TYPE_CHECKING:
    from mtp_engine.training.dialogues import DialogueSettings, ShardPlan

USER, ANSWER = 0, 1  # what a row writes when no token is given
HEAD, MID, FOLLOW = 0, 1, 2  # given pieces: before an answer, before a user turn, and from here on the follow-ups
_LAGS = 64  # a loop is the newest 16 tokens repeating those 1..64 tokens before
_CHECK = 16  # positions between two looks for loops
_PREFILL = 1 << 15  # tokens that go through the model at once
_SCORES = 1 << 22  # logits that get noise at once, without kernels
_MOST_ROWS = 2048  # in a batch
_CPU_BYTES = 2 << 30  # of caches
_REPORT = 64  # steps between two reports of progress


def most_answers(length: int) -> int:
    """More answers than a row can hold: each goes with a user turn, and both have a token."""
    return length // 2 + 1


@final
@dataclass(frozen=True)
class _Pieces:
    """Given tokens: all pieces one after the other, then room for each row's opening."""

    begin: Tensor  # [P] int64, where piece p begins in `tokens`: with the token that ends a turn
    end: Tensor  # [P] int64
    writing: Tensor  # [P] int64, what a row writes after it
    tokens: Tensor  # [F + B * L + 1] int64; the last is there to be read, and never used

    @classmethod
    def build(cls, template: Template, rows: int, length: int, device: torch.device) -> "_Pieces":
        pieces = [template.head, template.mid, *template.follow_ups]
        end = torch.tensor([len(piece) for piece in pieces]).cumsum(0)
        begin = torch.cat([end.new_zeros(1), end[:-1]])
        writing = torch.tensor([ANSWER, USER, *[ANSWER] * len(template.follow_ups)])
        fixed = torch.tensor([token for piece in pieces for token in piece])
        tokens = torch.cat([fixed, fixed.new_zeros(rows * length + 1)])
        return cls(*(x.to(device) for x in (begin, end, writing, tokens)))


@final
@dataclass(frozen=True)
class _Rows:
    """The state of a batch, changed in place. `tokens` and `kinds` are known up to `position`."""

    tokens: Tensor  # [B, L] int64
    kinds: Tensor  # [B, L] uint8
    position: Tensor  # [B] int64, all equal
    cursor: Tensor  # [B] int64, the next given token in _Pieces.tokens
    stop: Tensor  # [B] int64, where they end: tokens are given while cursor < stop
    writing: Tensor  # [B] int64, USER or ANSWER, once none is given
    count: Tensor  # [B] int64, tokens written of this turn
    turn: Tensor  # [B] int64, answers so far
    seeds: Tensor  # [B] int64
    temperature: Tensor  # [B, A] fp32, see ShardPlan
    pieces: Tensor  # [B, A] int64

    @classmethod
    def empty(cls, rows: int, length: int, device: torch.device) -> "_Rows":
        answers = most_answers(length)

        def zeros(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.zeros(rows, *shape, dtype=dtype, device=device)

        return cls(
            tokens=zeros(length), kinds=zeros(length, dtype=torch.uint8), position=zeros(), cursor=zeros(), stop=zeros(),
            writing=zeros(), count=zeros(), turn=zeros(), seeds=zeros(), temperature=zeros(answers, dtype=torch.float32),
            pieces=zeros(answers),
        )  # fmt: skip


@final
class LockStep:
    """Writes shards, a batch of rows at a time. Its tensors are made once."""

    def __init__(
        self, model: Decoder, tokenizer: Tokenizer, template: Template, settings: "DialogueSettings", *,
        kernels: bool | None = None,
    ) -> None:  # fmt: skip
        """kernels: whether to use Triton's; None is where there is a GPU that has them."""
        device, dtype = model.embedding.device, model.embedding.dtype
        if kernels is None:
            kernels = device.type == "cuda" and importlib.util.find_spec("triton") is not None
        self._model, self._settings, self._device = quick_main(model) if kernels else model, settings, device
        self._batch = batch_size(model, settings)
        self._cache = LockStepCache(model.config, self._batch, settings.length, dtype, device)
        self._rows = _Rows.empty(self._batch, settings.length, device)
        self._given = _Pieces.build(template, self._batch, settings.length, device)
        self._answer_ends = torch.tensor(tokenizer.eos_ids, device=device)
        self._user_end = template.head[0]
        self._limits = torch.tensor([settings.max_user, settings.max_answer], device=device)
        self._lags = torch.arange(_LAGS, 0, -1, device=device)
        self._attention: Attention | None = KernelAttention(self._cache, self._rows.position) if kernels else None
        self._choose = _kernel_choice(model, self._batch) if kernels else _portable_choice(model)
        plain = model.config.fp8_block is None and all(layer.moe is None for layer in model.config.layers)
        plain = plain and model.group.size == 1  # what NCCL does is left out of graphs
        self._captures = kernels and plain and device.type == "cuda"  # torch's mixtures of experts ask the host
        self._graph: torch.cuda.CUDAGraph | None = None

    def write(self, plan: "ShardPlan", report: Callable[[int], None]) -> tuple[Tensor, Tensor]:
        """Tokens [R, L] int32 and kinds [R, L] uint8, on the CPU. report: called with the tokens written so far."""
        count, length, parts = len(plan.openings), self._settings.length, []
        for start in range(0, count, self._batch):
            size = min(self._batch, count - start)
            known = self._begin(plan, start)
            for position in range(known - 1, length - 1):
                self._step(position)
                if position % _REPORT == 0:
                    if self._device.type == "cuda":
                        torch.cuda.synchronize(self._device)  # or the report would run ahead by a whole batch
                    report(start * length + size * position)
            tokens, kinds = self._rows.tokens[:size], self._rows.kinds[:size]
            parts.append((tokens.int().cpu(), data.mark_loops(tokens, kinds).cpu()))
        report(count * length)
        return torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts])

    def _begin(self, plan: "ShardPlan", start: int) -> int:
        """Load rows start, start + 1, ..., the last one again and again where there are no more, and take in what all of
        them are given. Returns how many tokens that is."""
        rows, batch, length = self._rows, self._batch, self._settings.length
        chosen = [min(start + i, len(plan.openings) - 1) for i in range(batch)]
        lengths = torch.tensor([len(plan.openings[i]) for i in chosen])
        known, pool = int(lengths.min()), len(self._given.tokens) - batch * length - 1
        openings = torch.zeros(batch, length, dtype=torch.int64)
        for row, i in enumerate(chosen):
            openings[row, : len(plan.openings[i])] = torch.tensor(plan.openings[i])
        self._given.tokens[pool:-1].copy_(openings.flatten())
        rows.tokens.copy_(openings)
        rows.kinds.fill_(data.GIVEN)
        rows.position.fill_(known - 1)
        origin = pool + torch.arange(batch) * length
        rows.cursor.copy_(origin + known)
        rows.stop.copy_(origin + lengths)
        rows.count.zero_()
        rows.turn.zero_()
        for held, planned in (
            (rows.writing, plan.writing), (rows.seeds, plan.seeds), (rows.temperature, plan.temperature),
            (rows.pieces, plan.pieces),
        ):  # fmt: skip
            held.copy_(planned[chosen])
        self._prefill(known - 1)
        return known

    def _prefill(self, count: int) -> None:
        """Keys and values of the first `count` positions."""
        if count == 0:
            return
        size = max(1, _PREFILL // (count * self._model.group.size))  # sums over ranks hold what each has computed
        for start in range(0, self._batch, size):
            some = slice(start, min(start + size, self._batch))
            tokens = self._rows.tokens[some, :count]
            positions = torch.arange(count, device=self._device).expand(len(tokens), -1)
            self._model.forward(tokens, positions, PromptAttention(self._cache, some))

    def _step(self, position: int) -> None:
        """All rows go from `position` to the next."""
        if self._graph:
            self._graph.replay()
            return
        self._advance(self._attention or StepAttention(self._cache, position))
        if self._captures:  # kernels are compiled now; capturing runs nothing
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph):
                self._advance(self._attention)

    def _advance(self, attention: Attention | None) -> None:
        """One step of the model, and of every row. Nothing here waits for the device."""
        assert attention is not None
        rows, given = self._rows, self._given
        last, here = rows.tokens.gather(1, rows.position[:, None]), rows.position[:, None]
        hidden = self._model.forward(last, here, attention)
        answering = rows.writing == ANSWER
        temperature = rows.temperature.gather(1, rows.turn[:, None])[:, 0].masked_fill(~answering, 1.0)
        chosen = self._choose(hidden, here, rows.seeds, temperature)
        forced = rows.cursor < rows.stop
        token = torch.where(forced, given.tokens[rows.cursor], chosen)
        written = ~forced
        kind = (written & answering).to(torch.uint8) * (data.ANSWER - data.GIVEN) + data.GIVEN
        rows.position.add_(1)
        at = rows.position[:1]
        rows.tokens.index_copy_(1, at, token[:, None])
        rows.kinds.index_copy_(1, at, kind[:, None])
        rows.count.add_(1).mul_(written)
        ended = (token[:, None] == self._answer_ends).any(1) | (~answering & (token == self._user_end))
        full = rows.count >= self._limits[rows.writing]
        over = written & (ended | full | (answering & self._loops()))
        piece = rows.pieces.gather(1, rows.turn[:, None])[:, 0].masked_fill(~answering, HEAD)
        # a turn that ended by itself has written the first token of the piece, the one that ends a turn
        rows.cursor.copy_(torch.where(over, given.begin[piece] + ended, rows.cursor + forced))
        rows.stop.copy_(torch.where(over, given.end[piece], rows.stop))
        rows.turn.add_(over & answering)
        rows.writing.copy_(torch.where(over, given.writing[piece], rows.writing))

    def _loops(self) -> Tensor:
        """[B] bool: the newest 16 tokens stood 1..64 tokens earlier in this answer. Only every 16 positions, which ends
        loops soon enough and lets most short repetitions pass."""
        rows, gram = self._rows, data.LOOP_GRAM
        newest = rows.position[:1]
        back = torch.arange(1 - gram - _LAGS, 1, device=self._device)
        text = rows.tokens.index_select(1, (newest + back).clamp(min=0))  # [B, 16 + 64]
        same = text.unfold(1, gram, 1)[:, :_LAGS] == text[:, None, -gram:]
        found = same.all(-1) & (rows.count[:, None] >= gram + self._lags)
        return found.any(1) & (newest % _CHECK == 0)


def batch_size(model: Decoder, settings: "DialogueSettings") -> int:
    """Rows to decode together: as many as the memory holds, in batches of one size."""
    device, size = model.embedding.device, model.embedding.element_size()
    if settings.batch:
        return min(settings.batch, settings.rows)
    attentions = [layer.attention for layer in model.config.layers]
    cached = sum(a.kv_size for a in attentions) * size  # bytes per token
    per_row = settings.length * (cached + 32) + 3 * size * model.vocab_size
    free = _CPU_BYTES
    if device.type == "cuda":
        torch.cuda.empty_cache()  # what training took before is free, too
        free = int(0.8 * torch.cuda.mem_get_info(device)[0])
    room = model.group.gather(torch.tensor([free // per_row], device=device))  # of every rank
    most = max(1, min(_MOST_ROWS, settings.rows, int(room.min())))
    return -(-settings.rows // -(-settings.rows // most))


Choose = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""Hidden states [B, 1, H], their positions [B, 1], seeds [B] and temperatures [B] -> the next tokens [B] int64: what
the engine chooses for a request with this seed and temperature."""


def _portable_choice(model: Decoder) -> Choose:
    vocabulary = torch.arange(model.vocab_size, device=model.embedding.device)

    def choose(hidden: Tensor, positions: Tensor, seeds: Tensor, temperature: Tensor) -> Tensor:
        size, parts = max(1, _SCORES // model.vocab_size), []
        for part in (slice(start, start + size) for start in range(0, len(hidden), size)):
            noise = gumbel(seeds[part], positions[part] + 1, vocabulary)
            parts.append((model.logits(hidden[part]) + noise * temperature[part, None, None]).argmax(-1)[:, 0])
        return torch.cat(parts)

    return choose


def _kernel_choice(model: Decoder, batch: int) -> Choose:
    from mtp_engine.kernels.accept import choose as choose_kernel

    arrivals = torch.zeros(batch, dtype=torch.int32, device=model.embedding.device)

    def choose(hidden: Tensor, positions: Tensor, seeds: Tensor, temperature: Tensor) -> Tensor:
        # as model.logits, but left in bf16: [B, 1, V] is large
        logits = model.group.join(model.unembed(model.norm(hidden)))
        return choose_kernel(logits, positions, seeds, temperature, arrivals, ahead=1)[:, 0]

    return choose
