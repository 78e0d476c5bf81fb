"""One test that runs the suite and lists what failed; `-s` shows every verdict. plugin.py adds the options."""

import sys

import pytest

from mtp_engine.conformance.run import verdicts


def test_conformance(pytestconfig: pytest.Config) -> None:
    engine, model, prompts, draws = (
        pytestconfig.getoption(name, default)
        for name, default in (("engine", "ours"), ("model", None), ("prompts", 2), ("draws", 100))
    )
    shown = []
    for verdict in verdicts(engine, model, prompts=prompts, draws=draws):
        sys.stdout.write(f"{verdict}\n")
        shown.append(verdict)
    failed = [str(verdict) for verdict in shown if verdict.passed is False]
    assert shown
    assert not failed, "\n".join(failed)
