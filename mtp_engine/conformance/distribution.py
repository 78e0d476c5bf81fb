"""Checks for rules that keep the distribution but not the text: chi-square over short texts, with its power."""

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace

import torch

from mtp_engine.conformance.case import Case, Generate, Verdict

Text = tuple[int, ...]
_LEAST = 5.0  # a cell that is expected less often is pooled with its like (Cochran's rule)


def same_distribution(
    baseline: Generate,
    candidate: Generate,
    case: Case,
    *,
    draws: int,
    horizon: int,
    level: float = 1e-4,
    name: str = "",
) -> Verdict:
    """Are `draws` texts of `horizon` tokens from each engine, under different seeds, from one distribution?"""
    one = _texts(baseline, case, draws, horizon, 0)
    two = _texts(candidate, case, draws, horizon, draws)
    cells = sorted(one | two)
    pooled = [(one[text] + two[text]) / 2 for text in cells]
    counts = [(one[text], two[text]) for text in cells]
    common = [pair for pair, mean in zip(counts, pooled, strict=True) if mean >= _LEAST]
    rare = [pair for pair, mean in zip(counts, pooled, strict=True) if mean < _LEAST]
    if rare:
        common.append((sum(a for a, _ in rare), sum(b for _, b in rare)))
    statistic = sum((a - b) ** 2 / (a + b) for a, b in common if a + b)
    distance = sum(abs(a - b) for a, b in common) / (2 * draws)
    return _verdict(f"distribution{name}", statistic, len(common) - 1, draws / 2, draws, distance, level)


def fits(
    candidate: Generate,
    case: Case,
    distribution: Mapping[Text, float],
    *,
    draws: int,
    horizon: int,
    level: float = 1e-4,
) -> Verdict:
    """Are `draws` texts of `horizon` tokens from this distribution, which is known exactly?"""
    seen = _texts(candidate, case, draws, horizon, 0)
    pairs = [(seen[text], draws * share) for text, share in distribution.items() if draws * share >= _LEAST]
    outside = draws - sum(count for count, _ in pairs), draws - sum(expected for _, expected in pairs)
    if outside[1] > 1e-9 or outside[0]:
        pairs.append((outside[0], max(outside[1], 1e-9)))
    statistic = sum((count - expected) ** 2 / expected for count, expected in pairs)
    distance = sum(abs(count - expected) for count, expected in pairs) / (2 * draws)
    return _verdict("exact distribution", statistic, len(pairs) - 1, draws, draws, distance, level)


def _texts(engine: Generate, case: Case, draws: int, horizon: int, first: int) -> Counter[Text]:
    params = replace(case.params, max_tokens=horizon, min_tokens=min(case.params.min_tokens, horizon))
    seed = params.seed or 0
    cases = [replace(case, params=replace(params, seed=seed + first + number)) for number in range(draws)]
    return Counter(sample.tokens for sample in engine(cases))


def _verdict(
    check: str, statistic: float, freedom: int, weight: float, draws: int, distance: float, level: float
) -> Verdict:
    if freedom < 1:
        return Verdict(check, None, "one text only: nothing to compare")
    p = chi_square_p(statistic, freedom)
    distance_seen = detectable(freedom, weight, level)
    detail = f"p = {p:.2g} over {freedom + 1} cells, {draws} draws, total variation {distance:.3f}; " + (
        f"a distance of {distance_seen:.3f} spread over the cells is seen with probability 0.9"
    )
    return Verdict(check, p >= level, detail)


def chi_square_p(statistic: float, freedom: int) -> float:
    """P(chi-square with `freedom` degrees of freedom > statistic)."""
    half = torch.tensor([freedom / 2, statistic / 2], dtype=torch.float64)
    return float(torch.special.gammaincc(half[0], half[1]))


def detectable(freedom: int, weight: float, level: float) -> float:
    """The total variation distance, spread in proportion to the cells, that a test at `level` finds 9 times of 10.

    weight: draws for a test against a known distribution, half of them for one between two samples. The statistic then
    has non-centrality weight * (2 TV)^2; it is taken as normal, with mean f + n and variance 2 (f + 2n).
    """
    low, high = 0.0, 10.0 * freedom + 1000
    for _ in range(60):
        critical = (low + high) / 2
        low, high = (critical, high) if chi_square_p(critical, freedom) > level else (low, critical)
    shift, quantile = 0.0, 1.2816
    for _ in range(60):
        shift = max(0.0, critical - freedom + quantile * math.sqrt(2 * (freedom + 2 * shift)))
    return min(1.0, 0.5 * math.sqrt(shift / weight))
