"""A kit that decides whether an engine that speculates says what one that does not would say.

It sees two callables, a baseline and a candidate (see `case.Generate`), and knows nothing of what is behind them:

    from mtp_engine.conformance import run_suite
    for verdict in run_suite(baseline, candidate, prompts):
        print(verdict)

Or `mtp-engine conformance --engine ours|hf|openai:URL`, or `pytest --pyargs mtp_engine.conformance`, to which
`-p mtp_engine.conformance.plugin` adds the same options.
"""

from mtp_engine.conformance.case import Case, Generate, Sample, Unsupported, Verdict
from mtp_engine.conformance.distribution import fits, same_distribution
from mtp_engine.conformance.exact import equality, honesty, resume, seeds
from mtp_engine.conformance.output import logprobs, stops
from mtp_engine.conformance.suite import SETTINGS, run_suite

__all__ = [
    "SETTINGS",
    "Case",
    "Generate",
    "Sample",
    "Unsupported",
    "Verdict",
    "equality",
    "fits",
    "honesty",
    "logprobs",
    "resume",
    "run_suite",
    "same_distribution",
    "seeds",
    "stops",
]
