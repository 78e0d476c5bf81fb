"""The row of a finished request, which every way of decoding makes."""

from collections.abc import Sequence
from typing import Any

from mtp_engine.experiments.prompts import Encoded
from mtp_engine.runtime.answer import Generation
from mtp_engine.training.data import in_loop

Done = tuple[dict[str, Any], list[dict[str, Any]]]
"""The row of a request, and the rows of its steps or positions."""


def mark_loops(steps: Sequence[dict[str, Any]], tokens: Sequence[int]) -> None:
    """Note in every step whether the first token that it emits ends a 16-gram which the answer already held."""
    flags = in_loop(tokens)
    for each in steps:
        each["loop"] = flags[each["at"]]


def request_row(own: Encoded, answer: Generation, steps: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What is known of a finished request. Times are seconds; those of a batched step are shared out (GenerationStats)."""
    stats = answer.stats
    outside = [each["emitted"] for each in steps if not each["loop"]]
    return {
        "prompt": own.index, "id": own.item.id, "category": own.item.category, "seed": stats.seed,
        "prompt_tokens": stats.prompt_tokens, "tokens": stats.tokens, "emitted": stats.tokens,
        "steps": stats.steps, "nodes": stats.nodes,
        "clean_tokens": sum(outside), "clean_steps": len(outside), "finish_reason": answer.finish_reason,
        "proposed": list(stats.proposed_per_depth), "accepted": list(stats.accepted_per_depth),
        "draft_s": stats.draft_s, "verify_s": stats.verify_s, "prefill_s": stats.prefill_s, "ttft_s": stats.ttft_s,
        "decode_tokens_per_s": stats.tokens_per_s, "token_ids": list(answer.token_ids),
    }  # fmt: skip
