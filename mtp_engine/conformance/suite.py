"""All checks in a row."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from mtp_engine.config import SamplingParams
from mtp_engine.conformance.case import Case, Generate, Unsupported, Verdict
from mtp_engine.conformance.distribution import same_distribution
from mtp_engine.conformance.exact import equality, honesty, resume, seeds
from mtp_engine.conformance.output import logprobs, stops

SETTINGS: Mapping[str, Mapping[str, Any]] = {
    "temperature": {"temperature": 0.7},
    "top_k": {"temperature": 1.0, "top_k": 3},
    "top_p": {"temperature": 1.0, "top_p": 0.5},
    "min_p": {"temperature": 1.0, "min_p": 0.2},
    "repetition_penalty": {"temperature": 1.0, "repetition_penalty": 1.5},
    "frequency_penalty": {"temperature": 1.0, "frequency_penalty": 1.5},
    "presence_penalty": {"temperature": 1.0, "presence_penalty": 1.5},
}
"""What each parameter is tried with. Those that name tokens are added by `run_suite`, which knows the prompts."""


def run_suite(
    baseline: Generate,
    candidate: Generate,
    prompts: Sequence[tuple[int, ...]],
    *,
    exact: bool = True,
    tokens: int = 40,
    depths: int = 1,
    rounds: int = 24,
    draws: int = 400,
    horizon: int = 2,
    tie: float = 0.0,
    slack: float = 0.0,
) -> Iterator[Verdict]:
    """Verdicts as they come. exact: the candidate claims the baseline's very tokens at temperature > 0 too; otherwise
    equality is asked for at temperature 0 and the distribution above it. depths: of the candidate's trees; 0 for an
    unknown."""
    greedy = SamplingParams(max_tokens=tokens, seed=0, ignore_eos=True)
    warm = replace(greedy, temperature=0.8)
    cases = [Case(prompt, params) for params in ((greedy, warm) if exact else (greedy,)) for prompt in prompts]
    settings = {**SETTINGS, **_token_settings(baseline, prompts, greedy)}
    hot = replace(greedy, temperature=1.0)
    alike = partial(same_distribution, baseline, candidate, draws=draws, horizon=horizon)
    yield _try("equality", partial(equality, baseline, candidate, cases, tie=tie))
    for name, setting in settings.items():
        case = Case(prompts[0], replace(hot, **setting))
        honest = partial(honesty, name, setting, baseline, candidate, prompts, greedy, depths=depths, rounds=rounds)
        yield _try(f"honesty of {name}", honest if exact else partial(alike, case, name=f" under {name}"))
    yield _try("distribution", partial(alike, Case(prompts[0], replace(hot, top_k=8))))
    yield _try("seeds", partial(seeds, candidate, prompts, warm))
    yield _try("stops", partial(stops, candidate, cases[:4]))
    yield _try("logprobs", partial(logprobs, baseline, candidate, cases))
    if exact:
        yield _try("resume", partial(resume, candidate, cases[:4], slack=slack))


def count_checks(*, exact: bool) -> int:
    """How many verdicts `run_suite` gives."""
    return 1 + len(SETTINGS) + len(_TOKEN_SETTINGS) + 4 + exact


def _try(check: str, run: Callable[[], Verdict]) -> Verdict:
    try:
        return run()
    except Unsupported as refusal:
        return Verdict(check, None, str(refusal))


_TOKEN_SETTINGS = ("logit_bias", "bad_words", "allowed_token_ids", "min_tokens")


def _token_settings(
    baseline: Generate, prompts: Sequence[tuple[int, ...]], greedy: SamplingParams
) -> dict[str, dict[str, Any]]:
    """Parameters that name tokens, set so that they must act: on what the model says without them."""
    said = [
        sample.tokens for sample in baseline([Case(prompt, replace(greedy, temperature=1.0)) for prompt in prompts])
    ]
    common = sorted({token for text in said for token in text})
    # not the most of them: what acts at the first token never shows that it acts deeper
    some = tuple(common[::4])
    others = tuple(sorted(set(range(common[-1] + 1)) - set(some)))
    values: tuple[dict[str, Any], ...] = (
        {"logit_bias": dict.fromkeys(some, -2.0)},
        {"bad_words": tuple((token,) for token in some)},
        {"allowed_token_ids": others},
        {"stop_token_ids": some, "min_tokens": greedy.max_tokens // 2},
    )
    return {name: {"temperature": 1.0, **value} for name, value in zip(_TOKEN_SETTINGS, values, strict=True)}
