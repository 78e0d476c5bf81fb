"""Checks of what comes with the tokens: stop strings and log-probabilities."""

import itertools
from collections.abc import Sequence
from dataclasses import replace

from mtp_engine.conformance.case import Case, Generate, Sample, Verdict


def stops(candidate: Generate, cases: Sequence[Case], *, most: int = 40) -> Verdict:
    """An answer must end with the token that completes a stop string, and its text before the string.

    The strings are taken from the engine's own free-running answers, so that they begin and end in the middle of
    tokens, within one step and across steps.
    """
    asked: list[Case] = []
    expected: list[tuple[str, str, Sample]] = []
    for case, free in zip(cases, candidate(cases), strict=True):
        for start, length in itertools.product(range(2, max(3, len(free.text) - 12), 3), (2, 5, 11)):
            stop = free.text[start : start + length]
            if len(stop) == length and "\ufffd" not in stop and len(asked) < most:
                asked.append(replace(case, params=replace(case.params, stop=(stop,))))
                expected.append((stop, free.text[: free.text.index(stop)], free))
    if not asked:
        return Verdict("stops", None, "the answers hold no text to stop at")
    for got, (stop, text, free) in zip(candidate(asked), expected, strict=True):
        if got.finish_reason != "stop":
            return Verdict("stops", False, f"{stop!r} did not end the answer")
        if got.text != text:
            return Verdict("stops", False, f"{stop!r} left {got.text[-30:]!r} instead of {text[-30:]!r}")
        if got.tokens != free.tokens[: len(got.tokens)]:
            return Verdict("stops", False, f"{stop!r} changed the tokens before it")
    return Verdict("stops", True, f"{len(asked)} stop strings")


def logprobs(baseline: Generate, candidate: Generate, cases: Sequence[Case], *, tolerance: float = 1e-3) -> Verdict:
    """One entry per token, in order, with the baseline's values; the best ones sorted, and no token better than them."""
    cases = [replace(case, params=replace(case.params, logprobs=case.params.logprobs or 3)) for case in cases]
    worst, tokens = 0.0, 0
    for case, a, b in zip(cases, baseline(cases), candidate(cases), strict=True):
        if problem := _problem(b, case.params.logprobs or 0):
            return Verdict("logprobs", False, problem)
        for entry, right in zip(b.logprobs, a.logprobs, strict=False):
            if entry.token != right.token:
                break  # the texts part here, which is for `equality` to judge
            worst, tokens = max(worst, abs(entry.logprob - right.logprob)), tokens + 1
    if not tokens:
        return Verdict("logprobs", None, "no text begins with the baseline's token: there is nothing to compare")
    if worst > tolerance:
        return Verdict("logprobs", False, f"off by {worst:.2g}")
    return Verdict("logprobs", True, f"{tokens} tokens, largest difference {worst:.1g}")


def _problem(sample: Sample, most: int) -> str:
    """What is inconsistent within one answer; empty if nothing."""
    if [entry.token for entry in sample.logprobs] != list(sample.tokens):
        return f"{len(sample.logprobs)} entries do not name the {len(sample.tokens)} tokens"
    for index, entry in enumerate(sample.logprobs):
        values = [value for _, value in entry.top]
        if len(values) < most or values != sorted(values, reverse=True):
            return f"token {index}: the best ones are not {most} in order"
        if entry.logprob > 1e-6 or (values and entry.logprob > values[0] + 1e-6):
            return f"token {index}: {entry.logprob:.3g} is above the best, {values[0] if values else 0:.3g}"
        if dict(entry.top).get(entry.token, entry.logprob) != entry.logprob:
            return f"token {index}: two values for one token"
    if len(sample.tokens) > 3 and all(entry.logprob == 0 for entry in sample.logprobs):
        return "all values are 0.0"
    return ""
