"""How probable a given text is to the model."""

from collections.abc import Sequence

import torch

from mtp_engine.attention.rows import StepRows
from mtp_engine.runtime.step import ModelStep
from mtp_engine.sampling.logprobs import Notes, TokenLogprob, emitted_logprobs
from mtp_engine.tree import VerifyResult


def score(work: ModelStep, tokens: Sequence[int], start: int, most: int) -> list[TokenLogprob]:
    """Of tokens[1:], which stand at positions start + 1, ...; slot 0 holds what goes before them, and then them too. most: best
    tokens to name beside each."""
    count = len(tokens) - 1
    work.cache.pages.reserve(0, start + len(tokens))
    given = torch.tensor([list(tokens)], device=work.device)
    rows = StepRows.prompt(0, start, count, work.device)
    hidden = work.model.forward(given[:, :-1], rows.positions, work.attention(work.cache, rows))
    path = torch.arange(count, device=work.device)[None]
    result = VerifyResult(path, given[:, 1:], torch.full_like(rows.slots, count))
    notes = Notes(emitted_logprobs(work.model.logits(hidden), result, most).cpu())
    return notes.read(0, tokens[1:], most)
