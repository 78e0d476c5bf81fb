"""Accepted length of MTP layers under training, by real speculative decoding of held-out prompts."""

from collections.abc import Sequence
from dataclasses import replace

from mtp_engine.assemble import make_loop
from mtp_engine.config import SamplingParams, TreeShape
from mtp_engine.drafters import MTPDrafter
from mtp_engine.engine import Engine, Prompt
from mtp_engine.models.mtp import MTPModule
from mtp_engine.training.data import in_loop


def accepted_length(
    engine: Engine, module: MTPModule, prompts: Sequence[Sequence[int]], *, tree: str, max_tokens: int
) -> float:
    """`outside_loops` at temperature 0, with these layers drafting.

    engine: holds the main model unfused, loaded without a drafter; as many prompts as fit its slots run at a time.
    """
    config = replace(engine.config, drafter="mtp", tree=TreeShape.parse(tree))
    assert config.tree is not None
    slots, backend = config.max_batch, engine.backend
    drafter = MTPDrafter(
        module, config.tree, slots=slots + 1, attention=backend.attention, ops=backend.ops(config.ranking),
    )  # fmt: skip
    loop = make_loop(engine.model, drafter, config, backend, slots=slots, tokenizer=engine.tokenizer)
    running = Engine(engine.model, loop, engine.tokenizer, config, backend)
    return outside_loops(running, prompts, SamplingParams(max_tokens=max_tokens))[0]


def outside_loops(
    engine: Engine, prompts: Sequence[Prompt], params: SamplingParams
) -> tuple[float, list[list[int]]]:  # fmt: skip
    """Emitted tokens per verification step, bonus token included, and the answers' tokens.

    A step is left out if the first token that it emits ends a 16-gram which the answer already held: loops flatter drafters.
    """
    tokens = steps = 0
    emitted: dict[int, list[int]] = {}
    answers: dict[int, list[int]] = {}
    for chunk in engine.stream(prompts, params):
        emitted.setdefault(chunk.index, []).append(len(chunk.token_ids))
        if chunk.finished:
            answers[chunk.index] = chunk.finished.token_ids
            loops, at = in_loop(chunk.finished.token_ids), 0
            for count in filter(None, emitted.pop(chunk.index)):
                if not loops[at]:
                    tokens, steps = tokens + count, steps + 1
                at += count
    return tokens / max(steps, 1), [answers[index] for index in range(len(prompts))]


def held_out(engine: Engine, texts: Sequence[str], longest: int = 400) -> list[list[int]]:
    """The chat prompts of these texts that have at most `longest` tokens."""
    encoded = [engine.encode([{"role": "user", "content": text}]) for text in texts]
    return [tokens for tokens in encoded if len(tokens) <= longest]
