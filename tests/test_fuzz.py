"""A short part of bench/fuzz.py: other cases than those of the last run, at every commit the same."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from misuse import Misuse


@pytest.fixture(scope="module")
def misuse(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Misuse]:
    with pytest.MonkeyPatch.context() as patch:
        for name in ("MTP_ENGINE_CACHE", "MTP_ENGINE_WHEEL"):
            patch.setenv(name, "")  # Misuse sets them; they come back
        patch.chdir(Path.cwd())
        yield Misuse(tmp_path_factory.mktemp("fuzz"))


@pytest.mark.parametrize("start", range(20_000, 20_300, 50))
def test_fifty_cases(misuse: Misuse, start: int) -> None:
    outcomes = [misuse.case(number) for number in range(start, start + 50)]
    wrong = [f"case {start + at}: {each.problem} in {each.what}" for at, each in enumerate(outcomes) if each.problem]
    assert not wrong


def test_a_case_is_known_by_its_number(misuse: Misuse) -> None:
    assert misuse.case(7).what == misuse.case(7).what


def test_it_notices(misuse: Misuse, tmp_path: Path) -> None:
    """A test of the test: what must not happen is reported."""
    for text, problem in (("Traceback (most", "traceback"), ("error: internal error: X", "internal error")):
        assert misuse._outcome("flags", [], 1, text, 0.0).problem.startswith(problem)
    assert misuse._outcome("flags", [], 7, "", 0.0).problem == "exit code 7: "
    assert misuse._outcome("flags", [], 0, "", 99.0).problem.startswith("hang")
    (misuse.cache / "tmp" / "x").touch()
    assert misuse._outcome("flags", [], 0, "", 0.0).problem.startswith("left in tmp")
    (misuse.cache / "tmp" / "x").unlink()
