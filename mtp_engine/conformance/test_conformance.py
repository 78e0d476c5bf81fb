"""One test that runs the suite and lists what failed; `-s` shows every verdict. plugin.py adds the options."""

import sys

import pytest

from mtp_engine.conformance.run import verdicts


def test_conformance(pytestconfig: pytest.Config) -> None:
    engine, model, prompts, draws = (
        pytestconfig.getoption(name, default)
        for name, default in (("engine", "ours"), ("model", None), ("prompts", 2), ("draws", 100))
    )
    found = []
    for verdict in verdicts(engine, model, prompts=prompts, draws=draws):
        sys.stdout.write(f"{verdict}\n")
        found.append(verdict)
    failed = [str(verdict) for verdict in found if verdict.passed is False]
    assert found
    assert not failed, "\n".join(failed)
