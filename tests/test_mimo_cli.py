"""The commands on a tiny MiMo: make it, look at it, talk to it."""

import json
import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from hypothesis import given
from hypothesis import strategies as st

from mtp_engine.cli.main import main
from mtp_engine.cli.thoughts import ThoughtSplitter
from mtp_engine.text.tokenizer import Tokenizer


def invoke(*args: str) -> Result:
    return CliRunner().invoke(main, list(args))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cli") / "tiny"
    assert invoke("models", "make-tiny", str(folder), "--fp8", "--seed", "4").stdout.strip() == str(folder)
    return folder


def test_make_tiny_refuses_a_full_folder(folder: Path) -> None:
    result = invoke("models", "make-tiny", str(folder))
    assert (result.exit_code, result.stderr.count("\n")) == (2, 1)
    assert "exists already" in result.stderr


def test_inspect(folder: Path) -> None:
    result = invoke("inspect", str(folder))
    assert result.exit_code == 0, result.output
    for word in ("mimo_v2_flash", "F8_E4M3", "model_mtp.safetensors", "5 (3 with a sliding window)"):
        assert word in result.stdout


@pytest.mark.parametrize("options", [[], ["--dequantize"], ["--window-keys", "7"], ["--tree", "2x2x1"]])
def test_generate(folder: Path, options: list[str], tmp_path: Path) -> None:
    common = [
        "--model",
        str(folder),
        "--max-tokens",
        "20",
        "--max-context",
        "256",
        "--threads",
        "1",
        "--compare",
        "full",
    ]
    result = invoke("generate", "Hello", "--json", str(tmp_path / "a.json"), *common, *options)
    assert result.exit_code == 0, result.output
    stats = json.loads((tmp_path / "a.json").read_text())["stats"]
    assert stats["identical_to_plain"] is True


@pytest.mark.parametrize(("option", "end"), [("--thinking", "assistant\n"), ("--no-thinking", "<think></think>")])
def test_thinking_reaches_the_template(folder: Path, option: str, end: str) -> None:
    options = [
        "--model",
        str(folder),
        "--max-tokens",
        "1",
        "--max-context",
        "256",
        "--threads",
        "1",
        "--quiet",
        "--json",
        "-",
    ]
    document = json.loads(invoke("generate", "Hi", option, *options).stdout)
    tokenizer = Tokenizer.load(folder)
    ids = tokenizer.chat([{"role": "user", "content": "Hi"}], enable_thinking=option == "--thinking")
    assert tokenizer.decode(ids, skip_special=False).endswith(end)
    assert document["stats"]["prompt_tokens"] == len(ids)
    assert invoke("generate", "Hi", option, "--raw", *options).exit_code == 2


@given(st.lists(st.sampled_from(["<think>", "</think>", "a", "<", "</thi", "nk>", "<thi", "é\n"])), st.booleans())
def test_splitter_loses_nothing(pieces: list[str], inside: bool) -> None:
    splitter = ThoughtSplitter(inside=inside)
    out = [piece for text in pieces for piece in splitter.push(text)] + splitter.flush()
    assert "".join(text for text, _ in out) == "".join(pieces)


def test_splitter_marks_thoughts() -> None:
    splitter = ThoughtSplitter()
    out = [*splitter.push("a <th"), *splitter.push("ink>b</"), *splitter.push("think>c<"), *splitter.flush()]
    thoughts = "".join(text for text, thought in out if thought)
    assert (thoughts, "".join(text for text, thought in out if not thought)) == ("<think>b</think>", "a c<")


def test_thoughts_are_dimmed_on_a_terminal_only() -> None:
    script = (
        "from mtp_engine.cli.output import TextWriter\n"
        "w = TextWriter()\nfor t in ('<thi', 'nk>hm</think>', 'yes'): w.write(t)\nw.end()"
    )
    command = [sys.executable, "-c", script]
    assert subprocess.run(command, capture_output=True, check=True).stdout == b"<think>hm</think>yes\n"
    master, slave = pty.openpty()
    subprocess.run(command, stdout=slave, check=True)
    os.close(slave)
    shown = os.read(master, 1000).decode()
    os.close(master)
    assert "\x1b[2mhm\x1b[0m" in shown
    assert shown.endswith("yes\r\n")
