"""Logits of every tree node, processed as plain decoding would process them at that position.

A node's path is the committed answer and the drafts from the root's child down to the node. What depends on the answer
so far (penalties, bad words, min_tokens) is kept per slot in device tensors for the committed part, and worked out from
the tree's ancestors for the drafts: tensor code without host synchronisation. Order and meaning follow vLLM's sampler
(vllm/v1/sample/sampler.py, 0.11): allowed tokens, bad words, bias, min_tokens, then repetition, frequency and presence
penalties; temperature, min-p, top-k and top-p come afterwards, in `mtp_engine.sampling.sampler`.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import final

import torch
import torch.nn.functional as F
from torch import Tensor

from mtp_engine.config import SamplingParams
from mtp_engine.errors import EngineError
from mtp_engine.sampling.batch import BIAS, EARLY, PENALTIES, WORDS, Batch, SamplingBatch, processes, to_device, upload
from mtp_engine.sampling.masks import unpack
from mtp_engine.tree import DraftTree, VerifyResult

_NEVER = -float("inf")
_NEUTRAL = (1.0, 0.0, 0.0)  # penalties: repetition, frequency, presence
_ROOM = (32, 8)  # bad words of several tokens, and tokens of one, that the tables of a GPU hold at first
NO_TOKEN = -1  # in a step's table: the parameters left nothing to choose here


@final
@dataclass
class Tables:
    """What the running requests want done to their logits, by slot. Only bad words may outgrow theirs."""

    wanted: Tensor  # [S] int64, see `processes`
    prompt_length: Tensor  # [S] int64
    min_tokens: Tensor  # [S] int64
    penalties: Tensor  # [S, 3] fp32: repetition, frequency, presence
    bias: Tensor  # [S, V] fp32, -inf for what may never be chosen
    counts: Tensor  # [S, V] fp32, of the tokens of the answer
    prompt: Tensor  # [S, V] bool, whether the prompt has the token
    early: Tensor  # [S, V] bool, what min_tokens forbids
    words: Tensor  # [S, W, L] int64, bad words of several tokens; -1 stands in front of short ones
    recent: Tensor  # [S, L - 1] int64, the newest tokens of the answer, -1 before its beginning

    @classmethod
    def empty(cls, slots: int, vocab: int, room: tuple[int, int], device: torch.device) -> "Tables":
        def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.zeros(slots, *shape, dtype=dtype, device=device)

        number, longest = room
        penalties = torch.tensor(_NEUTRAL, device=device).repeat(slots, 1)
        wanted, prompt_length, min_tokens = (zeros(dtype=torch.int64) for _ in range(3))
        bias, counts = zeros(vocab), zeros(vocab)
        prompt, early = zeros(vocab, dtype=torch.bool), zeros(vocab, dtype=torch.bool)
        words = zeros(number, longest, dtype=torch.int64) - 1
        recent = zeros(max(0, longest - 1), dtype=torch.int64) - 1
        return cls(wanted, prompt_length, min_tokens, penalties, bias, counts, prompt, early, words, recent)


@final
class Processors:
    """Applies what `Tables` say, and keeps them up to date. Costs nothing while nobody in a step wants anything."""

    def __init__(
        self, *, slots: int, vocab: int, eos_token_ids: Iterable[int], device: torch.device, kernels: bool = False
    ) -> None:
        self._vocab, self._eos, self._device, self._kernels = vocab, tuple(eos_token_ids), device, kernels
        self._held = [0] * slots  # what each slot's rows hold that is not neutral
        self.tables = Tables.empty(slots, vocab, _ROOM if kernels else (0, 0), device)
        self.grown = 0  # times that tables were replaced by larger ones; who holds the old ones must take the new

    def start(self, slot: int, prompt: Sequence[int], params: SamplingParams, output: Sequence[int] = ()) -> None:
        """A request takes `slot`, and has said `output` already. Raises EngineError, with nothing changed, for tokens
        outside the vocabulary."""
        words = check_tokens(params, self._vocab)
        wanted, held, tables = processes(params), self._held[slot], self.tables
        self._held[slot] = wanted
        if not wanted | held:
            return
        tables.wanted[slot] = wanted
        if wanted & BIAS:
            self._set_bias(tables.bias[slot], params, [word[0] for word in words if len(word) == 1])
        elif held & BIAS:
            tables.bias[slot] = 0
        if (wanted | held) & PENALTIES:
            values = (params.repetition_penalty, params.frequency_penalty, params.presence_penalty)
            tables.penalties[slot] = to_device(values, torch.float32, self._device)
        if wanted & PENALTIES:
            said = self._tokens(output)
            tables.counts[slot].zero_().index_add_(0, said, torch.ones_like(said, dtype=torch.float32))
            tables.prompt[slot].zero_().index_fill_(0, self._tokens(prompt), True)
        tables.min_tokens[slot], tables.prompt_length[slot] = params.min_tokens, len(prompt)
        if wanted & EARLY:
            ends = [token for token in (*params.stop_token_ids, *self._eos) if 0 <= token < self._vocab]
            tables.early[slot].zero_().index_fill_(0, self._tokens(ends), True)
        if (wanted | held) & WORDS:
            self._set_words(slot, output, [word for word in words if len(word) > 1])

    def _tokens(self, tokens: Sequence[int]) -> Tensor:
        return to_device(tokens, torch.int64, self._device)

    def _set_bias(self, row: Tensor, params: SamplingParams, forbidden: Sequence[int]) -> None:
        """row: [V], of the table."""
        row.zero_()
        if params.allowed_token_ids is not None:
            row.fill_(_NEVER).index_fill_(0, self._tokens(list(params.allowed_token_ids)), 0.0)
        given = params.logit_bias
        row.index_add_(0, self._tokens(list(given)), to_device(list(given.values()), torch.float32, self._device))
        row.index_fill_(0, self._tokens(forbidden), _NEVER)

    def _set_words(self, slot: int, output: Sequence[int], words: Sequence[tuple[int, ...]]) -> None:
        tables = self.tables
        number, longest = tables.words.shape[1:]
        wide, high = max([longest, *map(len, words)]), max(number, len(words))
        if (wide, high) != (longest, number):
            # padding stands in front, so that the last token of every word is in the last column
            tables.words = F.pad(tables.words, (wide - longest, 0, 0, high - number), value=-1)
            tables.recent = F.pad(tables.recent, (wide - 1 - tables.recent.shape[1], 0), value=-1)
            self.grown += 1
        rows = [[-1] * (wide - len(word)) + list(word) for word in words] + [[-1] * wide] * (high - len(words))
        tables.words[slot] = upload(torch.tensor(rows), self._device)
        newest = ([-1] * wide + list(output))[len(output) + 1 :]
        tables.recent[slot] = to_device(newest, torch.int64, self._device)

    def biases(self, sampling: SamplingBatch) -> Tables | None:
        """For drafters: of what requests want done what does not depend on what they have said."""
        return self.tables if sampling.processed & BIAS else None

    def apply(self, tree: DraftTree, logits: Tensor, batch: Batch, mask: Tensor | None = None) -> Tensor:
        """logits: [B, N, V] fp32 of the main model -> the same shape. mask: [B, N, W] int32, what structures allow, one bit
        per token, for the requests that have one (SamplingBatch.masked)."""
        processed, tables = batch.sampling.processed, self.tables
        if not processed and mask is None:
            return logits
        mask = None if mask is None else mask[:, : tree.nodes]
        if self._kernels:
            from mtp_engine.kernels.process import process

            return process(logits, tree, batch.slots, batch.lengths, tables, mask, batch.sampling.masked)
        slots = batch.slots
        if processed & BIAS:
            logits = logits + tables.bias[slots][:, None]
        if processed & PENALTIES:
            logits = self._penalise(tree, logits, slots)
        if processed & EARLY:
            answered = (batch.lengths + 1 - tables.prompt_length[slots])[:, None] + tree.depths
            least = tables.min_tokens[slots][:, None]
            soon = (answered < least) & (least > 0)  # of who wants none no prompt_length is kept
            logits = logits.masked_fill(soon[..., None] & tables.early[slots][:, None], _NEVER)
        if processed & WORDS and tables.words.numel():
            words = tables.words[slots]  # [B, W, L]
            before, path = words[:, None, :, :-1], self._path(tree, slots)[:, :, None]
            logits = _forbid(logits, words[..., -1], ((before == path) | (before < 0)).all(-1))
        if mask is not None:
            allowed = unpack(mask)[..., : logits.shape[-1]] | (batch.sampling.masked == 0)[:, None, None]
            logits = logits.masked_fill(~allowed, _NEVER)
        return logits

    def _penalise(self, tree: DraftTree, logits: Tensor, slots: Tensor) -> Tensor:
        """All tokens by the committed answer, then those on a node's path anew, with the path's occurrences added."""
        penalties = self.tables.penalties[slots][:, :, None, None]  # [B, 3, 1, 1]
        counts, prompt = self.tables.counts[slots][:, None], self.tables.prompt[slots][:, None]  # [B, 1, V]
        result = _penalty(logits, counts, prompt, penalties)
        if tree.nodes == 1:
            return result
        tokens = tree.tokens[:, None, 1:].expand(-1, tree.nodes, -1)  # [B, N, N-1], the drafts as columns
        same = (tree.tokens[:, 1:, None] == tree.tokens[:, None, 1:]).float()
        counts = counts.gather(2, tokens[:, :1]) + tree.ancestors[:, :, 1:].float() @ same
        # a token that two nodes hold is two equal columns, so the order of writing does not matter
        anew = _penalty(logits.gather(2, tokens), counts, prompt.gather(2, tokens[:, :1]), penalties)
        return result.scatter(2, tokens, anew)

    def _path(self, tree: DraftTree, slots: Tensor) -> Tensor:
        """The last tokens of the answer at every node, [B, N, L-1]; -1 where the answer is shorter."""
        recent, found = self.tables.recent[slots], []
        node = torch.arange(tree.nodes, device=tree.tokens.device).expand_as(tree.tokens)
        for back in range(recent.shape[1]):
            committed = recent.gather(1, (recent.shape[1] - 1 - back + tree.depths).clamp(max=recent.shape[1] - 1))
            found.append(torch.where(back < tree.depths, tree.tokens.gather(1, node), committed))
            node = tree.parents.gather(1, node).clamp(min=0)
        return torch.stack(found[::-1], -1)

    def observe(self, batch: Batch, result: VerifyResult) -> None:
        """A step was kept: its tokens are part of the answers now."""
        processed, tables = batch.sampling.processed, self.tables
        if not processed & (PENALTIES | WORDS):
            return
        if self._kernels:
            from mtp_engine.kernels.process import observe

            observe(batch.slots, result.tokens, result.counts, tables)
            return
        if processed & PENALTIES:
            kept = torch.arange(result.tokens.shape[1], device=result.tokens.device) < result.counts[:, None]
            tokens = torch.where(kept, result.tokens, 0)
            rows = batch.slots[:, None].expand_as(tokens)
            tables.counts.index_put_((rows, tokens), kept.float(), accumulate=True)
        if processed & WORDS and (width := tables.recent.shape[1]):
            text = torch.cat([tables.recent[batch.slots], result.tokens], 1)
            newest = result.counts[:, None] + torch.arange(width, device=text.device)
            tables.recent[batch.slots] = text.gather(1, newest)


def check_tokens(params: SamplingParams, vocab: int) -> list[tuple[int, ...]]:
    """The bad words. Raises EngineError for tokens outside the vocabulary, and for words that are still text."""
    words = [tuple(word) for word in params.bad_words if not isinstance(word, str)]
    if len(words) < len(params.bad_words):
        raise EngineError("bad_words holds text; the engine turns it into token ids, the loop takes those only")
    named = {*params.logit_bias, *(params.allowed_token_ids or ()), *(t for word in words for t in word)}
    if wrong := [token for token in named if not 0 <= token < vocab]:
        raise EngineError(f"token {wrong[0]} is outside the vocabulary of {vocab} tokens")
    return words


def stuck(logits: Tensor, result: VerifyResult) -> Tensor:
    """Which of result.tokens were chosen where nothing could be: [B, D+1] bool. logits: [B, N, V], processed."""
    return logits.flatten(1).gather(1, result.path * logits.shape[2] + result.tokens) == _NEVER


def _penalty(logits: Tensor, counts: Tensor, prompt: Tensor, penalties: Tensor) -> Tensor:
    """logits: [B, N, K]; counts, prompt: [B, 1 or N, K]; penalties: [B, 3, 1, 1] (see SamplingParams)."""
    repetition, frequency, presence = penalties.unbind(1)
    occurs = counts > 0
    factor = torch.where(prompt | occurs, repetition, 1.0)
    logits = torch.where(logits > 0, logits / factor, logits * factor)
    return logits - (frequency * counts + presence * occurs)


def _forbid(logits: Tensor, tokens: Tensor, where: Tensor) -> Tensor:
    """-inf for tokens [B, K] at the nodes `where` [B, N, K] says; tokens of -1 are none."""
    where = where & (tokens >= 0)[:, None]
    # added, not written: the same token may stand in two columns of which one is off
    penalty = torch.where(where, _NEVER, 0.0)
    return logits.scatter_add(2, tokens.clamp(min=0)[:, None].expand_as(penalty), penalty)
