"""One test that runs the suite and lists what failed; `-s` shows every verdict."""

import sys

import pytest

from mtp_engine.conformance.run import verdicts


def test_conformance(pytestconfig: pytest.Config) -> None:
    options = pytestconfig.option
    found = []
    for verdict in verdicts(options.engine, options.model, prompts=options.prompts, draws=options.draws):
        sys.stdout.write(f"{verdict}\n")
        found.append(verdict)
    failed = [str(verdict) for verdict in found if verdict.passed is False]
    assert found
    assert not failed, "\n".join(failed)
