"""The statistics under an answer."""

from collections.abc import Sequence
from contextlib import suppress

from rich.table import Table

from mtp_engine.cli.output import console
from mtp_engine.hub.cache import cache_root
from mtp_engine.runtime.stats import GenerationStats

_LEGEND = [
    "",
    "mean accepted length = tokens / steps: accepted drafts plus the main model's own (bonus) token of each step.",
    "unconditional: share of all steps that accepted a draft at that depth; conditional: of those steps that accepted "
    "the depth before.",
]
_SPREAD = 0.1  # of the rate of plain decoding, above which it is shown
_LEAST_COMPILING = 0.005  # seconds, that are worth a line
_TREES = 4  # kinds of trees that are named
_SHOWN = "legend-shown"  # in the cache, once it was


def pairs(rows: Sequence[tuple[str, str]]) -> Table:
    """Two columns: what, and how much."""
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for what, value in rows:
        table.add_row(what, value)
    return table


def legend(*, asked: bool) -> list[str]:
    """What the statistics mean: where the user asked, and the first time that they stand on a terminal."""
    if asked:
        return list(_LEGEND)
    if not console(stderr=True).is_terminal:
        return []
    mark = cache_root() / _SHOWN
    with suppress(OSError):
        if mark.exists():
            return []
        mark.parent.mkdir(parents=True, exist_ok=True)
        mark.touch()
    return list(_LEGEND)


def _cached(stats: GenerationStats) -> str:
    return f", of which {stats.cached_tokens} were kept from before" if stats.cached_tokens else ""


def statistics(stats: GenerationStats, finish_reason: str, rule: str) -> Table:
    """What was drafted, accepted and emitted, how long it took, and how that compares with plain decoding."""
    rows = [
        ("tokens", f"{stats.tokens} (finish reason: {finish_reason}), prompt {stats.prompt_tokens}{_cached(stats)}"),
        ("steps", f"{stats.steps}"),
        ("mean accepted length", f"{stats.mean_accepted_length:.2f}"),
        ("nodes per step", f"{stats.nodes_per_step:.1f}"),
        *_trees(stats),
        *_acceptance(stats),
        *_compiling(stats),
        ("prefill", f"{_seconds(stats.prefill_s)}, first token after {_seconds(stats.ttft_s)}"),
        *_shares(stats),
        ("tokens per second", f"{stats.tokens_per_s:.1f} (prefill left out)"),
        *_comparison(stats, rule),
        ("seed", f"{stats.seed}"),
    ]
    return pairs(rows)


def _compiling(stats: GenerationStats) -> list[tuple[str, str]]:
    """What happens the first time, where it happened."""
    if stats.compile_s < _LEAST_COMPILING:
        return []
    return [
        ("getting ready", f"{_seconds(stats.compile_s)} (compiling kernels, capturing CUDA graphs; left out below)")
    ]


def _trees(stats: GenerationStats) -> list[tuple[str, str]]:
    """Which trees were used, where they were not all alike."""
    if len(stats.trees) < 2:
        return []
    named = [
        f"{'plain' if not depth else f'{depth} deep, {nodes} nodes'}: {steps}"
        for (depth, nodes), steps in stats.trees.most_common(_TREES)
    ]
    others = stats.steps - sum(steps for _, steps in stats.trees.most_common(_TREES))
    return [("steps by tree", "; ".join([*named, *([f"others: {others}"] if others else [])]))]


def verdict(stats: GenerationStats, rule: str) -> str:
    """What comparing with plain decoding has shown. rule: the verifier, of which only match promises the same tokens."""
    if stats.identical_to_plain is None:
        return f"{stats.comparison.plain.tokens if stats.comparison else 0} tokens timed"
    if stats.identical_to_plain:
        return "whole answer: identical tokens"
    if rule == "match":
        return "whole answer: DIFFERENT TOKENS"
    if rule == "typical":
        return "whole answer: other tokens, as the typical rule is lossy"
    return f"whole answer: other tokens, as the {rule} rule keeps the distribution, not the text"


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


def _comparison(stats: GenerationStats, rule: str) -> list[tuple[str, str]]:
    found = stats.comparison
    if found is None or found.speedup is None:
        return []
    low, high = found.plain_range
    spread = f", from {low:.1f} to {high:.1f}" if high - low > _SPREAD * found.plain.rate else ""
    return [
        ("plain decoding", f"{found.plain.rate:.1f} tokens/s{spread} ({verdict(stats, rule)})"),
        ("measured speed-up", f"{found.speedup:.2f}x (drafted {found.drafted.rate:.1f}, both warm and in turns)"),
    ]


def _seconds(value: float) -> str:
    return f"{value:.2f} s" if value >= 1 else f"{value * 1000:.0f} ms"
