"""What users get wrong: every case is one line on stderr that says what, exit code 2, and no traceback."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner
from tiny import write_llama

from mtp_engine.cli.main import main

Files = Callable[[str], str]
DEEP = "[" * 5000 + "]" * 5000

# file name -> content; named as {name} in the cases
CONTENT = {
    "empty": b"", "blank": b" \n\n", "binary": b"ab\xff\xfe", "notjson": b"{'a': 1}", "cut.json": b'{"type": "obj',
    "deep.json": DEEP.encode(), "list.json": b"[1, 2]", "number.json": b"3", "badtype.json": b'{"type": "banana"}',
    "badref.json": b'{"$ref": "#/$defs/none"}', "notools.json": b"[]", "texttools.json": b'["a"]',
    "objtools.json": b'{"name": "a"}', "noname.json": b'[{"parameters": {}}]', "numname.json": b'[{"name": 3}]',
    "badparams.json": b'[{"name": "a", "parameters": [1]}]',
    "strparams.json": b'[{"name": "a", "parameters": {"type": "string"}}]',
    "null.json": b"null", "badlark": b"start: (", "record.json": b'{"prompt": "x"}', "bad.gguf": b"GGUF or not",
    "zero.gguf": b"", "prompt": b"Hi\n",
    "future.json": json.dumps({
        "model": "mimo-nano", "mtp": None, "prompt": "x", "system": None, "chat": False, "thinking": None, "version": "9",
        "params": {"mind_reading": 1}, "config": {}, "token_ids": [],
    }).encode(),
}  # fmt: skip

BEFORE_THE_MODEL = """
generate Hi --temperature -1 | temperature
generate Hi --temperature nan | temperature
generate Hi --temperature inf | temperature
generate Hi --top-p 0 | top_p
generate Hi --top-p 1.5 | top_p
generate Hi --top-p nan | top_p
generate Hi --top-k -1 | top_k
generate Hi --top-k 1.5 | top-k
generate Hi --min-p 2 | min_p
generate Hi --max-tokens 0 | max_tokens
generate Hi --max-tokens -3 | max_tokens
generate Hi --max-tokens many | many
generate Hi --min-tokens 300 | min_tokens
generate Hi --seed -5 | seed
generate Hi --seed 99999999999999999999 | seed
generate Hi --seed x | seed
generate Hi --stop EMPTY | stop
generate Hi --bad-word EMPTY | bad_words
generate Hi --repetition-penalty 0 | repetition_penalty
generate Hi --frequency-penalty 3 | from -2 to 2
generate Hi --presence-penalty -3 | from -2 to 2
generate Hi --tree chain:64 | 65
generate Hi --tree chain:0 | drafts nothing
generate Hi --tree bush | chain:K
generate Hi --tree EMPTY | chain:K
generate Hi --tree 2x-1 | chain:K
generate Hi --tree tree:99999999999 | at most 64
generate Hi --drafter magic | mtp
generate Hi --drafter root --tree chain:3 | leave --tree out
generate Hi --drafter ngram --tree 2x2 | chain
generate Hi --verifier typical | lossy
generate Hi --verifier block --tree 2x2 | checks chains
generate Hi --draft-vocab -1 | draft-vocab
generate Hi --max-context -1 | max-context
generate Hi --threads 100000 | threads
generate Hi --dtype int3 | int3
generate Hi --no-such-option | --no-such-option
generate Hi --raw --system x | --raw
generate Hi --raw --thinking | --raw
generate Hi there | unexpected
generate EMPTY | empty
generate | PROMPT
generate - | empty
generate Hi --prompt-file {prompt} | --prompt-file
generate --prompt-file /no/such/file | No such file
generate --prompt-file / | directory
generate --prompt-file {empty} | empty
generate --prompt-file {binary} | UTF-8
generate Hi --json /no/such/folder/a.json | No such file
generate Hi --json / | folder
generate Hi --json EMPTY | --json
generate Hi --compare sometimes | full
generate Hi --json-schema missing.json | No such file
generate Hi --json-schema {empty} | is empty
generate Hi --json-schema {blank} | is empty
generate Hi --json-schema {notjson} | not JSON
generate Hi --json-schema {cut.json} | not JSON
generate Hi --json-schema {deep.json} | not JSON
generate Hi --json-schema {binary} | UTF-8
generate Hi --regex EMPTY | is empty
generate Hi --regex a --json-schema {number.json} | exactly one
generate Hi --regex a --tools {number.json} | exactly one
generate Hi --grammar {empty} | is empty
generate Hi --tools {empty} | is empty
generate Hi --tools {notjson} | not JSON
generate Hi --tools {deep.json} | not JSON
generate Hi --tools {number.json} | a number
generate Hi --tools {null.json} | null
generate Hi --tools {objtools.json} | an object, not a list
generate Hi --tools {notools.json} | at least one tool
generate Hi --tools {texttools.json} | tool 1 is a text
generate Hi --tools {noname.json} | no name
generate Hi --tools {numname.json} | no name
generate Hi --tools {badparams.json} | parameters of tool 1
generate Hi --tools {strparams.json} | parameters of tool 1
generate --from missing.json | No such file
generate --from {empty} | cannot be read
generate --from {binary} | cannot be read
generate --from {list.json} | --json
generate --from {record.json} | --json
generate --from {future.json} | mind_reading
generate Hi --model no-such-model | smollm2-135m-mtp3
generate Hi --model EMPTY | no such model
generate Hi --model LONG | no such model
generate Hi --model {bad.gguf} | not a whole GGUF file
generate Hi --model {zero.gguf} | GGUF
generate Hi --model {prompt} | no such model
generate Hi --model / | config.json
generate Hi --mtp /no/such | .safetensors
generate Hi --mtp LONG | .safetensors
generate Hi --device mps | cpu
generate Hi --device meta | cpu
generate Hi --device cuda:77 | cuda:77
generate Hi --device EMPTY | cpu
generate Hi --device CPU | cpu
chat --temperature -1 | temperature
chat --device meta | cpu
chat --no-such | --no-such
chat Hi | unexpected
models fetch | NAME
models fetch no-such | no such model
models verify no-such | no such model
models verify / | folder of yours
models remove mimo-nano | comes with the package
models remove org/name | hf cache
models explode | explode
models make-tiny / | exists already
models make-tiny x --family gpt | gpt
inspect | MODEL
inspect no-such | no such model
inspect {bad.gguf} | GGUF
inspect mimo-nano --json /no/such/x | No such file
inspect mimo-nano --mtp /no/such | .safetensors
conformance --prompts 0 | prompts
conformance --draws x | draws
conformance --tree bush | chain:K
conformance --engine nobody --device meta | cpu
kernels check --dims 3x3 | 3x3
kernels build --dims EMPTY | 64x64
train | MODEL
train mimo-nano --lr nan | muon
train mimo-nano --lr inf | muon
train mimo-nano --lr -1 | lr
train mimo-nano --adam-lr nan | adam
train mimo-nano --decay nan | decay
train mimo-nano --reach nan | reach
train mimo-nano --layers 0 | layers
train mimo-nano --features a,b | --features
train mimo-nano --text /no/such | does not exist
train mimo-nano --out {prompt} | no folder
train mimo-nano --out / | not empty
degenerate | degenerate
"""
CASES = [tuple(part.strip() for part in line.split(" | ")) for line in BEFORE_THE_MODEL.strip().splitlines()]
SPECIAL = {"EMPTY": "", "LONG": "x" * 5000}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    for name, content in CONTENT.items():
        (folder / name).write_bytes(content)
    return folder


def refused(arguments: list[str], word: str) -> None:
    result = CliRunner().invoke(main, arguments, input=b"")
    assert result.exit_code == 2, (result.exit_code, result.output, result.exception)
    assert result.stderr.count("\n") == 1, result.stderr
    assert result.stderr.startswith("error: ")
    assert "internal error" not in result.stderr
    assert word in result.stderr
    assert result.stdout == ""


@pytest.mark.parametrize(("line", "word"), CASES, ids=[line[:60] for line, _ in CASES])
def test_one_line(line: str, word: str, files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MTP_ENGINE_CACHE", str(tmp_path / "cache"))
    arguments = [SPECIAL.get(part, part) for part in line.split()]
    arguments = [str(files / part[1:-1]) if part.startswith("{") else part for part in arguments]
    refused(arguments, word)
    assert not list((tmp_path / "cache" / "tmp").glob("*"))


def test_the_suite_is_large() -> None:
    assert len(CASES) + len(WITH_A_MODEL) + len(DAMAGE) >= 90


WITH_A_MODEL = [
    ("--attention flashinfer --device cpu", "NVIDIA GPU"),
    ("--max-context 999999", "max_context"),
    ("--max-context 1", "the prompt has"),
    ("--tree chain:9", "deeper"),
    ("--regex a(", "unclosed group"),
    ("--json-schema {badtype.json}", "banana"),
    ("--json-schema {badref.json}", "not valid"),
    ("--json-schema {list.json}", "not an object"),
    ("--json-schema {number.json}", "not an object"),
    ("--grammar {badlark}", "not valid"),
]


@pytest.mark.parametrize(("line", "word"), WITH_A_MODEL, ids=[line for line, _ in WITH_A_MODEL])
def test_one_line_once_the_model_is_there(line: str, word: str, files: Path) -> None:
    arguments = [str(files / part[1:-1]) if part.startswith("{") else part for part in line.split()]
    refused(["generate", "Hi", "--model", "mimo-nano", "--threads", "1", "-q", *arguments], word)


DAMAGE: list[tuple[str, bytes, str]] = [
    ("config.json", b"", "config.json"), ("config.json", b"[]", "config.json"), ("config.json", b"\xff\xfe", "config.json"),
    ("config.json", b"{}", "architecture"), ("config.json", b'{"architectures": ["GPT"]}', "GPT"),
    ("config.json", b'{"architectures": 3}', "config.json"), ("config.json", b'{"architectures": [3]}', "config.json"),
    ("config.json", DEEP.encode(), "config.json"),
    ("tokenizer.json", b"", "tokenizer.json"), ("tokenizer.json", b"{}", "tokenizer.json"),
    ("model.safetensors", b"", "model.safetensors"), ("model.safetensors", b"\xff" * 64, "model.safetensors"),
    ("model.safetensors", b"\x02\0\0\0\0\0\0\0{}", "missing"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "content", "word"), DAMAGE, ids=range(len(DAMAGE)))
@pytest.mark.parametrize(
    "command", [["generate", "Hi", "-q", "--drafter", "root"], ["inspect"]], ids=["generate", "inspect"]
)
def test_damaged_folders_are_one_line(name: str, content: bytes, word: str, command: list[str], tmp_path: Path) -> None:
    if name == "tokenizer.json" and command == ["inspect"]:
        pytest.skip("inspect reads none")
    folder = write_llama(tmp_path / "model")
    source = Path(__file__).parents[1] / "mtp_engine/assets/mimo-nano"
    for each in ("tokenizer.json", "tokenizer_config.json"):
        (folder / each).write_bytes((source / each).read_bytes())
    (folder / name).write_bytes(content)
    where = ["--model", str(folder)] if command[0] == "generate" else [str(folder)]
    if content == b"\x02\0\0\0\0\0\0\0{}" and command == ["inspect"]:
        assert CliRunner().invoke(main, [*command, *where]).exit_code == 0, "it is a whole file without tensors"
        return
    refused([*command, *where], word)


def test_a_folder_that_may_not_be_read(tmp_path: Path) -> None:
    if os.geteuid() == 0:
        pytest.skip("root may read everything")
    folder = write_llama(tmp_path / "model")
    (folder / "config.json").chmod(0)
    refused(["inspect", str(folder)], "config.json")
