"""How probable a given text is to the model, token by token."""

import asyncio
from collections.abc import Sequence

import torch

from mtp_engine.async_engine import AsyncEngine
from mtp_engine.attention.rows import StepRows
from mtp_engine.engine import Engine
from mtp_engine.runtime.loop import DecodeLoop
from mtp_engine.sampling.logprobs import Notes, TokenLogprob, emitted_logprobs
from mtp_engine.serve.errors import ApiError
from mtp_engine.tree import VerifyResult


async def score(engine: AsyncEngine, tokens: Sequence[int], most: int) -> list[TokenLogprob | None]:
    """One entry per token, with the `most` best ones beside it; None for the first, which nothing goes before.

    Read in chunks by a loop without drafts, in turns with the engine's steps. Raises ApiError for what does not fit.
    """
    inner = engine.engine
    intake = inner.check_open().intake
    if not 0 < len(tokens) < intake.max_context or not all(0 <= token < intake.vocab for token in tokens):
        raise ApiError(
            400, f"prompt: 1 to {intake.max_context - 1} tokens of the vocabulary can be scored", param="prompt"
        )
    with inner.lock:
        loop = inner.undrafted(max_batch=1).loop
    loop.memory.pages.reserve(0, len(tokens))
    entries: list[TokenLogprob | None] = [None]
    for start in range(0, len(tokens) - 1, inner.config.prefill_chunk):
        part = tokens[start : start + inner.config.prefill_chunk + 1]
        entries += await asyncio.to_thread(_score, inner, loop, part, start, most)
    return entries


@torch.inference_mode()
def _score(engine: Engine, loop: DecodeLoop, tokens: Sequence[int], start: int, most: int) -> list[TokenLogprob]:
    """Of tokens[1:], which stand at positions start + 1, ..."""
    work, count = loop.work, len(tokens) - 1
    with engine.lock:
        engine.check_open()
        given = torch.tensor([list(tokens)], device=work.device)
        rows = StepRows.prompt(0, start, count, work.device)
        hidden = work.model.forward(given[:, :-1], rows.positions, work.attention(work.cache, rows))
        path = torch.arange(count, device=work.device)[None]
        result = VerifyResult(path, given[:, 1:], torch.full_like(rows.slots, count))
        notes = Notes(emitted_logprobs(work.model.logits(hidden), result, most).cpu())
        return notes.read(0, tokens[1:], most)
