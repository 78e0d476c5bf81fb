"""Logits of every tree node, processed as plain decoding would process them at that position.

A node's path is the committed answer and the drafts from the root's child down to the node. What depends on the answer
so far (penalties, bad words, min_tokens) is kept per slot in device tensors for the committed part, and worked out from
the tree's ancestors for the drafts: tensor code without host synchronisation. Order and meaning follow vLLM's sampler
(vllm/v1/sample/sampler.py, 0.11): allowed tokens, bad words, bias, min_tokens, then repetition, frequency and presence
penalties; temperature, min-p, top-k and top-p come afterwards, in `mtp_engine.sampling.sampler`.
"""

from collections.abc import Iterable, Sequence
from typing import final

import torch
import torch.nn.functional as F
from torch import Tensor

from mtp_engine.config import SamplingParams
from mtp_engine.errors import EngineError
from mtp_engine.sampling.batch import Batch
from mtp_engine.tree import DraftTree, VerifyResult

_NEVER = -float("inf")
NO_TOKEN = -1  # in a step's table: the parameters left nothing to choose here


@final
class Processors:
    """What the running requests want done to their logits, by slot. Costs nothing while nobody wants anything."""

    def __init__(self, *, slots: int, eos_token_ids: Iterable[int], device: torch.device) -> None:
        self._slots, self._eos, self._device = slots, tuple(eos_token_ids), device
        self._wanted: dict[int, SamplingParams] = {}  # by slot; only those that want something
        self._prompt_length = self._zeros(dtype=torch.int64)
        self._min_tokens = self._zeros(dtype=torch.int64)
        self._penalties = self._zeros(3) + torch.tensor(
            [1.0, 0.0, 0.0], device=device
        )  # repetition, frequency, presence
        self._early = self._zeros(0, dtype=torch.int64) - 1  # ids that min_tokens forbids
        self._words = self._zeros(0, 0, dtype=torch.int64) - 1  # bad words, padded in front
        self._recent = self._zeros(0, dtype=torch.int64)  # the newest tokens of the answer, as long as a bad word
        self._bias = self._counts = self._prompt = torch.empty(0, device=device)  # [slots, V] once somebody needs them

    def _zeros(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.zeros(self._slots, *shape, dtype=dtype, device=self._device)

    def start(
        self, slot: int, prompt: Sequence[int], params: SamplingParams, vocab: int, output: Sequence[int] = ()
    ) -> None:
        """A request takes `slot`, and has said `output` already. Raises EngineError, with nothing changed, for tokens
        outside the vocabulary."""
        words = check_tokens(params, vocab)
        self._reset(slot)
        if not processes(params):
            return
        self._wanted[slot] = params
        self._prompt_length[slot], self._min_tokens[slot] = len(prompt), params.min_tokens
        self._set_bias(slot, params, [word[0] for word in words if len(word) == 1], vocab)
        self._set_penalties(slot, prompt, output, params, vocab)
        self._set_words(slot, output, [word for word in words if len(word) > 1])
        ends = (*params.stop_token_ids, *self._eos) if params.min_tokens else ()
        early = [token for token in ends if 0 <= token < vocab]
        self._early = F.pad(self._early, (0, max(0, len(early) - self._early.shape[1])), value=-1)
        self._early[slot, : len(early)] = torch.tensor(early, dtype=torch.int64, device=self._device)

    def release(self, slot: int) -> None:
        self._wanted.pop(slot, None)

    def _reset(self, slot: int) -> None:
        """Back to wanting nothing, whatever was noted while others shared a batch with the slot."""
        self._min_tokens[slot] = 0
        self._early[slot] = self._words[slot] = self._recent[slot] = -1
        self._penalties[slot] = torch.tensor([1.0, 0.0, 0.0], device=self._device)
        for table in (self._bias, self._counts, self._prompt):
            if len(table):
                table[slot] = 0

    def _set_bias(self, slot: int, params: SamplingParams, forbidden: Sequence[int], vocab: int) -> None:
        if not (params.logit_bias or params.allowed_token_ids or forbidden):
            return
        if not len(self._bias):
            self._bias = self._zeros(vocab)
        row = torch.zeros(vocab)
        if params.allowed_token_ids is not None:
            row.fill_(_NEVER)[list(params.allowed_token_ids)] = 0
        for token, bias in params.logit_bias.items():
            row[token] += bias
        row[list(forbidden)] = _NEVER
        self._bias[slot] = row

    def _set_penalties(
        self, slot: int, prompt: Sequence[int], output: Sequence[int], params: SamplingParams, vocab: int
    ) -> None:
        values = (params.repetition_penalty, params.frequency_penalty, params.presence_penalty)
        self._penalties[slot] = torch.tensor(values, device=self._device)
        if not _penalises(params):
            return
        if not len(self._counts):
            self._counts, self._prompt = self._zeros(vocab), self._zeros(vocab, dtype=torch.bool)
        self._prompt[slot, list(prompt)] = True
        self._counts[slot] = torch.bincount(torch.tensor(output, dtype=torch.int64), minlength=vocab).float()

    def _set_words(self, slot: int, output: Sequence[int], words: Sequence[tuple[int, ...]]) -> None:
        number, longest = self._words.shape[1:]
        wide = max([longest, *map(len, words)])
        # padding stands in front, so that the last token of every word is in the last column
        self._words = F.pad(self._words, (wide - longest, 0, 0, max(0, len(words) - number)), value=-1)
        for index, word in enumerate(words):
            self._words[slot, index, wide - len(word) :] = torch.tensor(word, device=self._device)
        self._recent = F.pad(self._recent, (max(0, wide - 1) - self._recent.shape[1], 0), value=-1)
        if newest := list(output)[-self._recent.shape[1] :] if self._recent.shape[1] else []:
            self._recent[slot, -len(newest) :] = torch.tensor(newest, device=self._device)

    def apply(self, tree: DraftTree, logits: Tensor, batch: Batch) -> Tensor:
        """logits: [B, N, V] fp32 of the main model -> the same shape."""
        if batch.guide is not None:
            logits = batch.guide.apply(tree.tokens, tree.parents, logits)
        wanted = self._wanted.values()
        if not wanted:
            return logits
        slots = batch.slots
        if len(self._bias):
            logits = logits + self._bias[slots][:, None]
        if any(map(_penalises, wanted)):
            logits = self._penalise(tree, logits, slots)
        if any(params.min_tokens for params in wanted):
            answered = (batch.lengths + 1 - self._prompt_length[slots])[:, None] + tree.depths
            soon = answered < self._min_tokens[slots][:, None]
            logits = _forbid(logits, self._early[slots], soon[..., None])
        if self._words.numel():
            words = self._words[slots]  # [B, W, L]
            before, path = words[:, None, :, :-1], self._path(tree, slots)[:, :, None]
            logits = _forbid(logits, words[..., -1], ((before == path) | (before < 0)).all(-1))
        return logits

    def _penalise(self, tree: DraftTree, logits: Tensor, slots: Tensor) -> Tensor:
        """All tokens by the committed answer, then those on a node's path anew, with the path's occurrences added."""
        penalties = self._penalties[slots][:, :, None, None]  # [B, 3, 1, 1]
        counts, prompt = self._counts[slots][:, None], self._prompt[slots][:, None]  # [B, 1, V]
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
        recent, found = self._recent[slots], []
        node = torch.arange(tree.nodes, device=tree.tokens.device).expand_as(tree.tokens)
        for back in range(recent.shape[1]):
            committed = recent.gather(1, (recent.shape[1] - 1 - back + tree.depths).clamp(max=recent.shape[1] - 1))
            found.append(torch.where(back < tree.depths, tree.tokens.gather(1, node), committed))
            node = tree.parents.gather(1, node).clamp(min=0)
        return torch.stack(found[::-1], -1)

    def observe(self, batch: Batch, result: VerifyResult) -> None:
        """A step was kept: its tokens are part of the answers now."""
        if not self._wanted:
            return
        kept = torch.arange(result.tokens.shape[1], device=result.tokens.device) < result.counts[:, None]
        if len(self._counts):
            tokens = torch.where(kept, result.tokens, 0)
            rows = batch.slots[:, None].expand_as(tokens)
            self._counts.index_put_((rows, tokens), kept.float(), accumulate=True)
        if width := self._recent.shape[1]:
            text = torch.cat([self._recent[batch.slots], result.tokens], 1)
            newest = result.counts[:, None] + torch.arange(width, device=text.device)
            self._recent[batch.slots] = text.gather(1, newest)


def check_tokens(params: SamplingParams, vocab: int) -> list[tuple[int, ...]]:
    """The bad words. Raises EngineError for tokens outside the vocabulary, and for words that are still text."""
    words = [tuple(word) for word in params.bad_words if not isinstance(word, str)]
    if len(words) < len(params.bad_words):
        raise EngineError("bad_words holds text; the engine turns it into token ids, the loop takes those only")
    named = {*params.logit_bias, *(params.allowed_token_ids or ()), *(t for word in words for t in word)}
    if wrong := [token for token in named if not 0 <= token < vocab]:
        raise EngineError(f"token {wrong[0]} is outside the vocabulary of {vocab} tokens")
    return words


def forbids(params: SamplingParams) -> bool:
    """Whether it may forbid every token at once, if only together with a structure."""
    return bool(params.bad_words or params.min_tokens or params.allowed_token_ids is not None)


def stuck(logits: Tensor, result: VerifyResult) -> Tensor:
    """Which of result.tokens were chosen where nothing could be: [B, D+1] bool. logits: [B, N, V], processed."""
    return (logits.amax(-1) == _NEVER).gather(1, result.path)


def _penalises(params: SamplingParams) -> bool:
    return params.repetition_penalty != 1 or params.frequency_penalty != 0 or params.presence_penalty != 0


def processes(params: SamplingParams) -> bool:
    fixed = params.logit_bias or params.bad_words or params.min_tokens or params.allowed_token_ids is not None
    return bool(fixed) or _penalises(params)


def _penalty(logits: Tensor, counts: Tensor, prompt: Tensor, penalties: Tensor) -> Tensor:
    """logits: [B, N, K]; counts, prompt: [B, 1 or N, K]; penalties: [B, 3, 1, 1] (see SamplingParams)."""
    repetition, frequency, presence = penalties.unbind(1)
    occurs = counts > 0
    factor = torch.where(prompt | occurs, repetition, 1.0)
    logits = torch.where(logits > 0, logits / factor, logits * factor)
    return logits - (frequency * counts + presence * occurs)


def _forbid(logits: Tensor, tokens: Tensor, where: Tensor) -> Tensor:
    """-inf for tokens [B, K] at the nodes `where` [B, N, K or 1] says; tokens of -1 are none."""
    where = where & (tokens >= 0)[:, None]
    # added, not written: the same token may stand in two columns of which one is off
    penalty = torch.where(where, _NEVER, 0.0)
    return logits.scatter_add(2, tokens.clamp(min=0)[:, None].expand_as(penalty), penalty)
