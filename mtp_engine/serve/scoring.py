"""How probable a given text is to the model, token by token."""

import asyncio
from collections.abc import Sequence

from mtp_engine.async_engine import AsyncEngine
from mtp_engine.engine import Engine
from mtp_engine.runtime.loop import DecodeLoop
from mtp_engine.sampling.logprobs import TokenLogprob
from mtp_engine.serve.errors import ApiError


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
    plain = inner.turns.run(lambda: inner.undrafted(max_batch=1))
    entries: list[TokenLogprob | None] = [None]
    with plain:
        for start in range(0, len(tokens) - 1, inner.config.prefill_chunk):
            part = tokens[start : start + inner.config.prefill_chunk + 1]
            entries += await asyncio.to_thread(_score, inner, plain.loop, part, start, most)
    return entries


def _score(engine: Engine, loop: DecodeLoop, tokens: Sequence[int], start: int, most: int) -> list[TokenLogprob]:
    turn = engine.turns.new()
    with turn.lock:
        turn.wait()
        engine.check_open()
        return loop.score(tokens, start, most)
