"""What MTP layers would have drafted of texts that nobody trains on: one pass over the main model's own answers.

Row n of layer d of a pass over a whole text is the row of a drafted node whose path is the text (drafters/mtp.py). So the
rank that layer d gives the text's own token says whether a node with so many candidates would have held it, and ranks of
all positions and depths answer for every chain and every tree of fixed widths, as a recording does (experiments/ask.py).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import final

import torch
import torch.nn.functional as F
from torch import Tensor

from mtp_engine.models.decoder import Decoder
from mtp_engine.models.mtp import MTPModule
from mtp_engine.protocols import Progress
from mtp_engine.sampling.sampler import gumbel
from mtp_engine.text.tokenizer import Tokenizer
from mtp_engine.training.attention import sequence_hidden
from mtp_engine.training.data import ANSWER
from mtp_engine.training.dialogues import DialogueSettings, ShardPlan
from mtp_engine.training.lockstep import ANSWER as ANSWERING
from mtp_engine.training.lockstep import MID, LockStep, most_answers
from mtp_engine.training.objective import chosen, layer_outputs
from mtp_engine.training.prompts import Template
from mtp_engine.training.quick import quick_layers, quick_main

_ROWS = 16  # texts that go through the models at a time
_SCORES = 1 << 27  # scores that are ranked at a time


@final
@dataclass(frozen=True)
class Answers:
    """The main model's answers to prompts, each with a seed and a temperature of its own."""

    tokens: Tensor  # [R, L] int32: prompt and answer
    begins: Tensor  # [R] int64, where answers begin
    ends: Tensor  # [R] int64, and end
    seeds: Tensor  # [R] int64
    temperature: Tensor  # [R] fp32

    @property
    def lengths(self) -> Tensor:
        """[R] of the answers."""
        return self.ends - self.begins


@torch.no_grad()
def write_answers(
    main: Decoder, tokenizer: Tokenizer, prompts: Sequence[Sequence[int]], temperature: float, *, max_tokens: int = 128,
    seed: int = 0, progress: Progress,
) -> Answers:  # fmt: skip
    """The answer to prompt i is that of a request with seed `seed` + i, but that it ends in a repetition. In the prompts'
    order."""
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    count, length = len(prompts), len(prompts[order[-1]]) + max_tokens + 1
    settings = DialogueSettings(shards=1, rows=count, length=length, max_answer=max_tokens)
    answers = most_answers(length)
    seeds = torch.tensor([seed + i for i in order])
    plan = ShardPlan(
        [prompts[i] for i in order], torch.full((count,), ANSWERING), seeds,
        torch.full((count, answers), temperature), torch.full((count, answers), MID),
    )  # fmt: skip
    writer = LockStep(main, tokenizer, Template.cut(tokenizer), settings)
    tokens, kinds = writer.write(plan, lambda done: progress("answering held-out prompts", done, count * length))
    begins = torch.tensor([len(prompts[i]) for i in order])
    at = torch.arange(length)
    given = (kinds < ANSWER) & (at >= begins[:, None])
    ends = torch.where(given.any(1), given.int().argmax(1), length)
    back = torch.tensor(order).argsort()
    ends = torch.minimum(ends, begins + max_tokens)
    return Answers(tokens[back], begins[back], ends[back], seeds[back], torch.full((count,), temperature))


@final
@dataclass(frozen=True)
class Ranks:
    """How layers rank the answers' tokens, P in all, one answer behind the other: at every depth D and among the tokens of
    every draft vocabulary W, [P, D, W] int32, 0 the best; -1 where it is not in the vocabulary. best: by probability alone;
    noise: as the drafter ranks, which knows a request's noise."""

    noise: Tensor
    best: Tensor


@torch.no_grad()
def rank(
    main: Decoder, modules: Sequence[MTPModule], answers: Answers, frequent: Tensor, sizes: Sequence[int]
) -> list[Ranks]:
    """Of each module. frequent: all tokens, the most frequent first, [V] int64; sizes: draft vocabularies, rising."""
    device = main.embedding.device
    frequent = frequent.to(device)[: sizes[-1]]
    column = torch.full((main.vocab_size,), -1, device=device)
    column[frequent] = torch.arange(len(frequent), device=device)
    features = tuple(sorted({each for module in modules for each in module.config.features}))
    ranker = _Ranker(main.head_weight[frequent], frequent, column, tuple(sizes))
    main, quick = replace(quick_main(main), features=features), [quick_layers(module) for module in modules]
    parts = [part for rows in _batches(answers, device) for part in ranker.ranks(main, quick, rows)]
    each = [[torch.cat([part[m][i] for part in parts]).cpu() for i in (0, 1)] for m in range(len(modules))]
    return [Ranks(noise, best) for noise, best in each]


def _batches(answers: Answers, device: torch.device) -> Iterator[Answers]:
    for start in range(0, len(answers.tokens), _ROWS):
        some = slice(start, start + _ROWS)
        longest = int(answers.ends[some].max())
        tokens, begins, ends, seeds, temperature = (
            each[some].to(device)
            for each in (answers.tokens[:, :longest], answers.begins, answers.ends, answers.seeds, answers.temperature)
        )
        yield Answers(tokens, begins, ends, seeds, temperature)


@final
@dataclass(frozen=True)
class _Ranker:
    head: Tensor  # [n, H], in the order of `ids`
    ids: Tensor  # [n] int64
    column: Tensor  # [V] int64: where a token stands in `ids`, or -1
    sizes: tuple[int, ...]

    def ranks(
        self, main: Decoder, modules: Sequence[MTPModule], rows: Answers
    ) -> Iterator[list[tuple[Tensor, Tensor]]]:
        """Per module by noise and by probability, [p, D, W] each, for parts of the rows' positions, in their order."""
        tokens = rows.tokens.long()
        hidden, positions = sequence_hidden(main, tokens)
        outputs = []  # per module [B, L, D, H]
        for module in modules:
            states = module.main_hidden(chosen(hidden, main.features, module.config.features))
            outputs.append(torch.stack(layer_outputs(module, tokens, states, positions), 2))
        at = torch.arange(tokens.shape[1], device=tokens.device)
        row, index = ((at >= rows.begins[:, None]) & (at < rows.ends[:, None])).nonzero(as_tuple=True)
        size = max(1, _SCORES // (len(self.ids) * outputs[0].shape[2]))
        for start in range(0, len(row), size):
            r, i = row[start : start + size], index[start : start + size]
            true, temperature = self.column[tokens[r, i]], rows.temperature[r].view(-1, 1, 1)
            noise = gumbel(rows.seeds[r], i[:, None], self.ids) * (temperature > 0)
            found = []
            for output in outputs:
                depths = torch.arange(output.shape[2], device=tokens.device)
                drafted = F.linear(output[r[:, None], i[:, None] - depths - 2, depths], self.head).float()  # [p, D, n]
                scaled = torch.where(temperature > 0, drafted / temperature.clamp(min=1e-6), drafted)
                found.append((self._rank(scaled + noise, true), self._rank(drafted, true)))
            yield found

    def _rank(self, scores: Tensor, true: Tensor) -> Tensor:
        """scores: [p, D, n]; true: [p] -> [p, D, W] int32."""
        known = true.clamp(min=0).view(-1, 1, 1).expand(-1, scores.shape[1], 1)
        better = scores > scores.gather(-1, known)
        parts = [better[..., low:high].sum(-1) for low, high in pairwise((0, *self.sizes))]
        counts = torch.stack(parts, -1).cumsum(-1)
        inside = (true.view(-1, 1) >= 0) & (true.view(-1, 1) < torch.tensor(self.sizes, device=true.device))
        return torch.where(inside[:, None], counts, -1).int()
