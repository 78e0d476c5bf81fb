"""Checks of equality: the same tokens with and without speculation, for every parameter, seed and starting point."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from mtp_engine.config import SamplingParams
from mtp_engine.conformance.case import Case, Generate, Sample, Verdict, first_difference


def equality(baseline: Generate, candidate: Generate, cases: Sequence[Case], *, tie: float = 0.0) -> Verdict:
    """Tokens, text and finish reason must agree. tie: at temperature 0, a divergence at which the two tokens' logits
    lie at most this far apart is one of rounding and is forgiven; state it with the number format."""
    expected = baseline([replace(c, params=replace(c.params, logprobs=8)) for c in cases])
    answers = candidate(cases)
    bad: list[str] = []
    ties: list[str] = []
    for number, (case, a, b) in enumerate(zip(cases, expected, answers, strict=True)):
        at = first_difference(a.tokens, b.tokens)
        if at is None:
            if (a.text, a.finish_reason) != (b.text, b.finish_reason):
                bad.append(f"case {number}: same tokens, but {b.finish_reason!r} {b.text[-20:]!r}")
            continue
        margin = _margin(a, b, at) if case.params.temperature == 0 else None
        where = (
            f"case {number} token {at} depth {b.depth(at)}, margin {'unknown' if margin is None else f'{margin:.2g}'}"
        )
        (ties if margin is not None and margin <= tie else bad).append(where)
    detail = f"{len(cases) - len(bad) - len(ties)} of {len(cases)} equal"
    if ties:
        detail += f", {len(ties)} near ties: {'; '.join(ties[:3])}"
    return Verdict("equality", not bad, detail + (f"; {'; '.join(bad[:3])}" if bad else ""))


def _margin(expected: Sample, answer: Sample, at: int) -> float | None:
    """How much more probable the baseline's token was than the candidate's, in log-probability."""
    if at >= min(len(expected.logprobs), len(answer.tokens)):
        return None
    entry = expected.logprobs[at]
    return next((entry.logprob - value for token, value in entry.top if token == answer.tokens[at]), None)


def honesty(
    name: str,
    setting: Mapping[str, Any],
    baseline: Generate,
    candidate: Generate,
    prompts: Sequence[tuple[int, ...]],
    base: SamplingParams,
    *,
    depths: int,
    rounds: int = 24,
) -> Verdict:
    """The parameter must act, as in the baseline, at every depth from 0 to `depths`.

    It acts at a token where the baseline with it first parts from the baseline without it: up to there the texts are
    the same, so the candidate's token there is the proof. Seeds are tried, `rounds` times all prompts, until such
    tokens have come from every depth; if they never do, the verdict is open.
    """
    on, check, shown = replace(base, **setting), f"honesty of {name}", set[int]()
    off = replace(on, **{each: getattr(SamplingParams(), each) for each in _parameters(setting)})
    for number in range(rounds):
        seed = (base.seed or 0) + number
        with_, without = ([Case(p, replace(params, seed=seed)) for p in prompts] for params in (on, off))
        for want, plain, got in zip(baseline(with_), baseline(without), candidate(with_), strict=True):
            at = first_difference(want.tokens, got.tokens)
            if at is not None:
                return Verdict(check, False, f"differs from the baseline at token {at}, depth {got.depth(at)}")
            acts = first_difference(want.tokens, plain.tokens)
            if acts is not None and acts < len(got.tokens):
                shown.add(got.depth(acts))
        if shown >= set(range(depths + 1)):
            break
    missing = sorted(set(range(depths + 1)) - shown)
    if not shown:
        return Verdict(check, False, "never makes a difference")
    detail = f"acts at depths {sorted(shown)}" + (f"; not shown at {missing}" if missing else "")
    return Verdict(check, None if missing else True, detail)


def _parameters(setting: Mapping[str, Any]) -> list[str]:
    """What a setting is about: temperature only where there is nothing else."""
    return [name for name in setting if name != "temperature"] or ["temperature"]


def seeds(candidate: Generate, prompts: Sequence[tuple[int, ...]], base: SamplingParams) -> Verdict:
    """At temperature > 0 the same seed must give the same text, alone or in company, and other seeds other texts."""
    cases = [Case(prompt, replace(base, seed=seed)) for prompt in prompts for seed in (11, 12)]
    together, again = candidate(cases), [candidate([case])[0] for case in cases]
    for case, a, b in zip(cases, together, again, strict=True):
        if a.tokens != b.tokens:
            return Verdict("seeds", False, f"seed {case.params.seed} gave two texts")
    alike = sum(a.tokens == b.tokens for a, b in zip(together[::2], together[1::2], strict=True))
    if alike == len(prompts):
        return Verdict("seeds", False, "all seeds give the same text")
    return Verdict("seeds", True, f"{len(cases)} texts reproduced")


def resume(candidate: Generate, cases: Sequence[Case], *, slack: float = 0.0) -> Verdict:
    """Stopped after any step and started anew from the text so far, the engine must go on as if never stopped: the
    same tokens in the same steps. What differs is state that depends on rejected drafts, such as stale draft rows.

    For parameters that depend on the position but not on where the prompt ends (no frequency or presence penalty, no
    min_tokens), and for engines whose noise is keyed by position. slack: share of continuations that may part, for
    near ties in the drafter, whose rows are computed in other shapes.
    """
    asked, expected = [], []
    for case, whole in zip(cases, candidate(cases), strict=True):
        if whole.steps is None:
            return Verdict("resume", None, "the engine does not tell its steps")
        for steps in range(1, len(whole.steps)):
            done = sum(whole.steps[:steps])
            left = replace(case.params, max_tokens=case.params.max_tokens - done)
            asked.append(Case(case.prompt + whole.tokens[:done], left))
            expected.append((whole.tokens[done:], whole.steps[steps:]))
    parted = [
        number
        for number, (got, (tokens, steps)) in enumerate(zip(candidate(asked), expected, strict=True))
        if got.tokens != tokens or (got.steps or ())[:2] != steps[:2]
    ]
    share = len(parted) / max(len(asked), 1)
    return Verdict("resume", share <= slack, f"{len(parted)} of {len(asked)} continuations part ({share:.1%})")
