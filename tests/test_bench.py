"""Every result names the commit that ran: benches refuse a tree that is none, also where there is no git."""

import ast
import importlib.util
import json
import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

BENCH = Path(__file__).parent.parent / "bench"
SCRIPTS = sorted(path for path in BENCH.glob("*.py") if "def main(" in path.read_text(encoding="utf-8"))


def load_common() -> ModuleType:
    spec = importlib.util.spec_from_file_location("bench_common", BENCH / "common.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


common = load_common()


def git(tree: Path, *command: str) -> str:
    names = ["-c", "user.name=n", "-c", "user.email=e@example.org"]
    return subprocess.run(
        ["git", *names, *command], cwd=tree, capture_output=True, text=True, check=True
    ).stdout.strip()


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small repository with one commit."""
    monkeypatch.delenv("MTP_BENCH_DIRTY", raising=False)
    tree = tmp_path / "tree"
    (tree / "bench" / "results").mkdir(parents=True)
    (tree / "kernels").mkdir()
    (tree / "kernels" / "fast.py").write_text("SPEED = 1\n")
    (tree / "bench" / "results" / "old.jsonl").write_text("{}\n")
    (tree / ".gitignore").write_text("__pycache__/\n")
    git(tree, "init", "-q")
    git(tree, "add", "-A")
    git(tree, "commit", "-qm", "one")
    return tree


def without_git(tree: Path) -> Path:
    """The tree as another machine gets it: what git does not ignore, and no .git."""
    copy = tree.parent / "copy"
    for name in git(tree, "ls-files", "--cached", "--others", "--exclude-standard").splitlines():
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(tree / name, copy / name)
    return copy


def test_a_clean_tree_is_its_commit(tree: Path) -> None:
    assert common.require_commit(tree) == common.Commit(git(tree, "rev-parse", "HEAD"), False)


@pytest.mark.parametrize("name", ["kernels/fast.py", "kernels/new.py", "notes.txt"])
def test_a_dirty_tree_is_refused(tree: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    (tree / name).write_text("SPEED = 2\n")
    with pytest.raises(SystemExit, match="commit first"):
        common.require_commit(tree)
    monkeypatch.setenv("MTP_BENCH_DIRTY", "1")
    assert common.require_commit(tree) == common.Commit(git(tree, "rev-parse", "HEAD"), True)
    assert common.conditions(common.require_commit(tree))["dirty"] is True


def test_results_and_the_stamp_are_no_dirt(tree: Path) -> None:
    (tree / "bench" / "results" / "new.jsonl").write_text("{}\n")
    (tree / "bench" / "results" / "old.jsonl").write_text("{}\n{}\n")
    common.stamp(tree)
    assert not common.require_commit(tree).dirty


def test_a_machine_without_git_reads_the_stamp(tree: Path) -> None:
    common.stamp(tree)
    assert common.require_commit(without_git(tree)) == common.Commit(git(tree, "rev-parse", "HEAD"), False)


def test_no_stamp_is_refused(tree: Path) -> None:
    with pytest.raises(SystemExit, match="neither git nor bench/COMMIT"):
        common.require_commit(without_git(tree))


def test_a_stamp_of_a_dirty_tree_is_refused(tree: Path) -> None:
    (tree / "kernels" / "fast.py").write_text("SPEED = 2\n")
    common.stamp(tree)
    with pytest.raises(SystemExit, match="commit first"):
        common.require_commit(without_git(tree))


def test_a_stamp_from_before_a_change_is_refused(tree: Path) -> None:
    common.stamp(tree)
    (tree / "kernels" / "fast.py").write_text("SPEED = 2\n")
    with pytest.raises(SystemExit, match="commit first"):
        common.require_commit(without_git(tree))


def test_the_stamp_may_be_packed() -> None:
    """Untracked, but not ignored: what git ignores does not travel."""
    ignored = subprocess.run(["git", "check-ignore", "-q", "bench/COMMIT"], cwd=BENCH.parent)
    assert ignored.returncode == 1
    assert not git(BENCH.parent, "ls-files", "bench/COMMIT")


def test_a_script_refuses_at_once(tree: Path) -> None:
    """The whole way: nothing is loaded, nothing is measured."""
    for name in ("common.py", "processing.py"):
        shutil.copy(BENCH / name, tree / "bench" / name)
    environment = {**os.environ, "PYTHONPATH": str(BENCH.parent)}
    command = [sys.executable, "bench/processing.py"]
    done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert "commit first" in done.stderr
    assert done.stdout == ""
    command = [sys.executable, "bench/common.py", "--stamp"]
    done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True, timeout=120)
    assert json.loads(done.stdout) == {"commit": git(tree, "rev-parse", "HEAD"), "dirty": True}


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_every_script_asks_before_it_works(script: Path) -> None:
    """main begins with it (only loader.py reads its arguments first), and the result line gets what it said."""
    text = script.read_text(encoding="utf-8")
    main = next(n for n in ast.parse(text).body if isinstance(n, ast.FunctionDef) and n.name == "main")
    asks = [ast.unparse(statement) == "commit = require_commit()" for statement in main.body]
    assert asks[0] or (script.stem == "loader" and any(asks))
    assert "conditions(commit" in text


def test_there_are_scripts() -> None:
    assert len(SCRIPTS) >= 9


RULES = str(BENCH / "grids" / "rules.toml")


@pytest.mark.parametrize(
    ("script", "options", "words"),
    [
        ("acceptance", ["none.toml"], "none.toml"),
        ("acceptance", [__file__], "is no TOML"),
        ("acceptance", [RULES, "--device", "mps"], "here are"),
        ("decode", ["--tree", "banana", "--no-peer"], "chain:K"),
        ("grammar", ["--tree", "banana"], "chain:K"),
        ("processing", ["--tree", "banana"], "chain:K"),
        ("soak", ["--tree", "banana"], "chain:K"),
        ("loader", ["--gb", "nan"], "--gb"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line(
    script: str, options: list[str], words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As Python runs it, but in this process, which has torch already."""
    path = str(BENCH / f"{script}.py")
    monkeypatch.setenv("MTP_BENCH_DIRTY", "1")
    monkeypatch.setattr(sys, "argv", [path, *options])
    monkeypatch.syspath_prepend(str(BENCH))
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(path, run_name="__main__")
    shown = capsys.readouterr()
    assert (ended.value.code, shown.out) == (2, "")
    last = shown.err.strip().splitlines()[-1]
    assert words in last
    assert "Traceback" not in shown.err
    assert script == "loader" or shown.err == f"{last}\n"


def test_docstrings_name_files_that_are_there() -> None:
    for script in BENCH.glob("*.py"):
        text = ast.get_docstring(ast.parse(script.read_text(encoding="utf-8"))) or ""
        for word in text.replace("=", " ").split():
            path = word.strip("().,;:`")
            if "/" in path and path.endswith((".py", ".jsonl", ".md")):
                found = [root / path for root in (BENCH.parent, BENCH.parent / "mtp_engine") if (root / path).exists()]
                assert found, f"{script.name} names {path}"
