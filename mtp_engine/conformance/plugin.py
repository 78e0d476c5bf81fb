"""The kit as a pytest plugin, which adds its options:

pytest -p mtp_engine.conformance.plugin --pyargs mtp_engine.conformance --engine openai:http://localhost:8000/v1
"""

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("mtp-engine conformance")
    group.addoption("--engine", default="ours", help="ours, hf, or openai:URL (default: ours)")
    group.addoption("--model", default=None, help="name or folder of the model that all engines run")
    group.addoption("--prompts", type=int, default=4, help="how many of the built-in prompts (default: 4)")
    group.addoption("--draws", type=int, default=200, help="texts per test of a distribution (default: 200)")
