"""The table under an answer."""

from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from mtp_engine.runtime.stats import GenerationStats

_FOOTER = (
    "mean accepted length = tokens / steps: accepted drafts plus the main model's own (bonus) token of each step.\n"
    "unconditional: share of all steps that accepted a draft at that depth; conditional: of those steps that accepted "
    "the depth before."
)


def pairs(rows: Sequence[tuple[str, str]]) -> Table:
    """Two columns: what, and how much."""
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for what, value in rows:
        table.add_row(what, value)
    return table


def statistics(stats: GenerationStats, finish_reason: str, notes: Sequence[str] = ()) -> RenderableType:
    """What was drafted, accepted and emitted, how long it took, and how that compares with plain decoding."""
    rows = [
        ("tokens", f"{stats.tokens} (finish reason: {finish_reason}), prompt {stats.prompt_tokens}"),
        ("steps", f"{stats.steps}"),
        ("mean accepted length", f"{stats.mean_accepted_length:.2f}"),
        ("nodes per step", f"{stats.nodes_per_step:.1f}"),
        *_acceptance(stats),
        ("prefill", f"{_seconds(stats.prefill_s)}, first token after {_seconds(stats.ttft_s)}"),
        *_shares(stats),
        ("tokens per second", f"{stats.tokens_per_s:.1f} (prefill left out)"),
        *_comparison(stats),
        ("seed", f"{stats.seed}"),
    ]
    footer = Text("\n".join([_FOOTER, *notes]), style="dim")
    return Group(Text(), pairs(rows), Padding(footer, (1, 0, 0, 0)))


def _acceptance(stats: GenerationStats) -> list[tuple[str, str]]:
    kinds = {
        "acceptance, unconditional": stats.unconditional_acceptance(),
        "acceptance, conditional": stats.conditional_acceptance(),
    }
    return [
        (name, "  ".join(f"depth {depth}: {share:.0%}" for depth, share in enumerate(shares, 1)))
        for name, shares in kinds.items()
        if shares
    ]


def _shares(stats: GenerationStats) -> list[tuple[str, str]]:
    parts = {"draft": stats.draft_s, "verify": stats.verify_s, "other": stats.other_s}
    whole = sum(parts.values())
    return [(f"time in {name}", f"{_seconds(s)} ({s / whole if whole else 0:.0%})") for name, s in parts.items()]


def _comparison(stats: GenerationStats) -> list[tuple[str, str]]:
    if stats.plain_tokens_per_s is None or stats.speedup is None:
        return []
    extent = {
        None: "its first steps timed",
        True: "whole answer: identical tokens",
        False: "whole answer: DIFFERENT TOKENS",
    }[stats.identical_to_plain]
    return [
        ("plain decoding", f"{stats.plain_tokens_per_s:.1f} tokens/s ({extent})"),
        ("measured speed-up", f"{stats.speedup:.2f}x"),
    ]


def _seconds(value: float) -> str:
    return f"{value:.2f} s" if value >= 1 else f"{value * 1000:.0f} ms"
