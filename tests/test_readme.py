"""Every example in the README and the guides runs, or says what it needs."""

import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner

from mtp_engine import EngineConfig, SamplingParams, __version__
from mtp_engine.cli.main import main
from mtp_engine.config import DEFAULT_MODEL

ROOT = Path(__file__).parent.parent
GUIDES = [
    ROOT / name
    for name in (
        "README.md", "mtp_engine/README.md", "mtp_engine/cli/README.md", "mtp_engine/training/README.md",
        "mtp_engine/serve/README.md", "mtp_engine/experiments/README.md", "bench/README.md",
    )
]  # fmt: skip
NOT_HERE = re.compile(r"# .*(needs|takes minutes|\(minutes\)|changes the cache)")
SHORT = ["--max-tokens", "6", "--threads", "1", "--compare", "off"]


def blocks(file: Path) -> Iterator[tuple[str, str]]:
    """The language and the text of every fenced block."""
    for match in re.finditer(r"^```(\w*)\n(.*?)^```$", file.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL):
        yield match[1], match[2]


def commands(file: Path) -> list[str]:
    """The shell lines of a guide, without the tree of files."""
    found = [text.splitlines() for language, text in blocks(file) if not language]
    return [
        line
        for lines in found
        for line in lines
        if re.match(r"(mtp-engine|python|pip|pytest|git|printf|torchrun) ", line)
    ]


def local(program: str) -> list[tuple[str, str]]:
    return [
        (file.parent.name, line)
        for file in GUIDES
        for line in commands(file)
        if line.startswith(program) and not NOT_HERE.search(line)
    ]


def arguments(line: str) -> list[str]:
    return shlex.split(line, comments=True)[1:]


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the files that the examples name."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "person.json").write_text(
        '{"type": "object", "properties": {"age": {"type": "integer", "maximum": 9}}, "required": ["age"]}'
    )
    record = [
        "generate",
        "Hi",
        "--model",
        "mimo-nano",
        "-q",
        "--json",
        "out.json",
        "--max-tokens",
        "3",
        "--threads",
        "1",
        "--compare",
        "off",
    ]
    assert CliRunner().invoke(main, record).exit_code == 0
    return tmp_path


def test_the_first_two_lines() -> None:
    """The second one runs below; both run as they stand in CI, in an empty environment."""
    first = commands(ROOT / "README.md")[:2]
    assert first == ["pip install .", 'mtp-engine generate "What is the capital of France?"']
    assert "README.md" in (ROOT / ".ci" / "smoke").read_text()
    assert "pip install -e '.[test]' && pytest" in commands(ROOT / "README.md")


@pytest.mark.model
def test_the_output_that_the_readme_shows() -> None:
    shown = next(text for language, text in blocks(ROOT / "README.md") if language == "text").splitlines()
    command = arguments(commands(ROOT / "README.md")[1])
    result = CliRunner().invoke(main, [*command, "--threads", "1", "--device", "cpu"])
    assert result.stdout == f"{shown[0]}\n"
    names = [line[:26].strip() for line in result.stderr.splitlines()[1:] if line[24:26] in ("  ", "l ")]
    planned = {"steps by tree", ""}  # depends on what pays at this moment, as does what needs a second line
    assert [name for name in (line[:26].strip() for line in shown[2:]) if name not in planned] == [
        name for name in names if name not in planned
    ]
    assert shown[2] in result.stderr.splitlines()


@pytest.mark.model
@pytest.mark.parametrize(("guide", "line"), local("mtp-engine"), ids=lambda text: text[:50])
def test_a_command(guide: str, line: str, workplace: Path) -> None:
    given = arguments(line)
    if given[0] == "generate":
        given += (
            SHORT if "--from" not in given and "--json-schema" not in given else ["--threads", "1", "--compare", "off"]
        )
    elif given[0] == "chat":
        given += SHORT[:4]
    result = CliRunner().invoke(main, given, input=b"Hello\n")
    assert result.exit_code == 0, result.output


@pytest.mark.model
@pytest.mark.parametrize(("guide", "line"), [*local("git"), *local("printf")], ids=lambda text: text[:50])
def test_a_pipe(guide: str, line: str, workplace: Path) -> None:
    source, _, rest = line.partition(" | ")
    script = f'{source} | "$@"'
    command = [sys.executable, "-m", "mtp_engine.cli", *arguments(rest), *SHORT[:4]]
    if "git" in source:  # a change that does not depend on what is changed here
        (workplace / "notes.txt").write_text("one\n")
        for step in (["init", "-q"], ["add", "notes.txt"]):
            subprocess.run(["git", *step], check=True, cwd=workplace)
        (workplace / "notes.txt").write_text("two\n")
    done = subprocess.run(["sh", "-c", script, "sh", *command], capture_output=True, timeout=200, cwd=workplace)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("file", "code"),
    [(str(file.relative_to(ROOT)), text) for file in GUIDES for language, text in blocks(file) if language == "python"],
    ids=lambda text: text[:24].replace("\n", " "),
)
@pytest.mark.model
def test_python(file: str, code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a script has it, but in this process, which has torch already."""
    monkeypatch.chdir(tmp_path)
    exec(compile(code, file, "exec"), {"__name__": "__main__"})


def test_lines_that_do_not_run_here_are_commands() -> None:
    """Their options exist; what they need stands behind them."""
    lines = [line for file in GUIDES for line in commands(file) if NOT_HERE.search(line)]
    assert len(lines) >= 8
    for line in lines:
        if line.startswith("mtp-engine"):
            name, *rest = arguments(line)
            command = main.commands[name]
            command.make_context(name, rest, resilient_parsing=True)
        elif line.startswith("python bench"):
            assert (ROOT / line.split()[1]).is_file(), line


def test_benches_in_the_guide_have_their_options() -> None:
    [(_, line)] = local("python bench/decode")
    done = subprocess.run(
        [sys.executable, "bench/decode.py", "--help"], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert all(option in done.stdout for option in re.findall(r"--[a-z-]+", line.partition("#")[0]))


def test_links_lead_somewhere() -> None:
    for file in GUIDES:
        for target in re.findall(r"\]\(([^)#:]+)\)", file.read_text(encoding="utf-8")):
            assert (file.parent / target).exists(), (file, target)


def test_sizes_and_versions() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 120
    assert (ROOT / "CHANGELOG.md").read_text(encoding="utf-8").splitlines()[2] == f"## {__version__}"
    assert f'version = "{__version__}"' in (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert DEFAULT_MODEL in (ROOT / "mtp_engine" / "README.md").read_text(encoding="utf-8")


def test_the_keys_of_stats_are_explained() -> None:
    guide = (ROOT / "mtp_engine" / "cli" / "README.md").read_text(encoding="utf-8")
    from mtp_engine.runtime.stats import GenerationStats

    assert not [key for key in GenerationStats().to_json() if f"`{key}`" not in guide]
    assert EngineConfig.device == "auto"
    assert SamplingParams.temperature == 0
