"""The command line: what goes where, exit codes, one-line errors. Most tests run a fake engine, some the real model."""

import errno
import json
import os
import pty
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner, Result

import mtp_engine.cli.answer as answer_module
from mtp_engine.cli.main import main
from mtp_engine.cli.output import TextWriter, visible
from mtp_engine.cli.progress import Waits
from mtp_engine.config import EngineConfig, SamplingParams, Structure
from mtp_engine.errors import EngineError
from mtp_engine.hub import hub
from mtp_engine.runtime.stats import Comparison, GenerationStats, Timed
from mtp_engine.text.stream import StreamDecoder

TEXT = "Grüße, 世界 🙂!\nEnd."  # one token per byte below: characters of one to four tokens
STATS_KEYS = {
    "seed", "prompt_tokens", "cached_tokens", "steps", "tokens", "mean_accepted_length", "accepted_per_depth",
    "proposed_per_depth", "nodes_per_step", "trees", "preemptions", "queued_s", "prefill_s", "draft_s", "verify_s", "total_s",
    "tokens_per_s", "ttft_s", "compile_s", "plain_tokens_per_s", "drafted_tokens_per_s", "plain_range",
    "speedup", "identical_to_plain",
}  # fmt: skip


class FakeEngine:
    """Answers every prompt with `text`, a byte a token, three a step: two drafts and one of the main model."""

    def __init__(self, text: str = TEXT, *, config: EngineConfig | None = None, fail_after: int = 1 << 60) -> None:
        self.config = config or EngineConfig()
        self.device_note = "cpu, 1 threads, fp32"
        self.text, self.fail_after = text, fail_after
        self.failure: BaseException = KeyboardInterrupt()
        self.compare_failure: BaseException | None = None
        self.compared: list[bool] = []
        self.identical, self.complete = True, True
        self.prompts: list[Any] = []
        self.params: list[SamplingParams] = []
        self.tokenizer = SimpleNamespace(
            has_chat_template=True,
            folder=Path("/nowhere"),
            stream=lambda: StreamDecoder(lambda ids: bytes(ids).decode("utf-8", "replace")),
        )

    def stream(self, prompts: Sequence[Any], params: SamplingParams) -> Iterator[Any]:
        self.prompts += prompts
        self.params.append(params)
        ids, decoder = list(self.text.encode()), self.tokenizer.stream()
        stats = GenerationStats(
            seed=7, prompt_tokens=5, prefill_s=0.5, ttft_s=0.6, draft_s=0.5, verify_s=1.0, total_s=2.5
        )
        drafted: list[bool] = []
        for start in range(0, len(ids), 3):
            if start // 3 == self.fail_after:
                raise self.failure
            step = ids[start : start + 3]
            marks = [index < len(step) - 1 for index in range(len(step))]
            drafted += marks
            stats.record_step(len(step), 4, 3)
            text, finished = decoder.push(step), None
            if start + 3 >= len(ids):
                text += decoder.flush()
                finished = SimpleNamespace(
                    text=self.text,
                    token_ids=ids,
                    drafted=drafted,
                    finish_reason="stop",
                    stats=stats,
                    error="",
                    complete=self.complete,
                )
            yield SimpleNamespace(index=0, text=text, token_ids=step, drafted=marks, finished=finished)

    def compare(self, prompt: Any, params: SamplingParams, answer: Any, *, full: bool) -> None:
        if self.compare_failure:
            raise self.compare_failure
        self.compared.append(full)
        answer.stats.comparison = Comparison(((Timed(20, 2.0), Timed(20, 1.0)),))
        answer.stats.identical_to_plain = self.identical if full else None


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> FakeEngine:
    fake = FakeEngine()

    def load(name: str, config: EngineConfig, mtp: str | None, progress: Any) -> FakeEngine:
        progress("loading weights", 1, 2)
        fake.config = config
        return fake

    monkeypatch.setattr(answer_module, "load_engine", load)
    return fake


@pytest.fixture
def no_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """The model must not even be looked for."""

    def load(*args: Any) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(answer_module, "load_engine", load)


def invoke(*args: str, stdin: bytes | None = None) -> Result:
    return CliRunner().invoke(main, list(args), input=stdin)


def assert_error(result: Result, *words: str, code: int = 2) -> None:
    assert result.exit_code == code, result.output
    assert result.stdout == ""
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    assert "Traceback" not in result.stderr
    for word in words:
        assert word in result.stderr


# generate: what goes where


def test_stdout_holds_exactly_the_text(engine: FakeEngine) -> None:
    result = invoke("generate", "Hi")
    assert result.exit_code == 0
    assert result.stdout_bytes == TEXT.encode() + b"\n"
    assert "tokens" in result.stderr


def test_table_shows_every_number_in_80_columns(engine: FakeEngine) -> None:
    err = invoke("generate", "Hi", "--compare", "full", "--explain").stderr
    tokens, steps = len(TEXT.encode()), -(-len(TEXT.encode()) // 3)
    assert max(map(len, err.split("\n\n")[0].splitlines())) <= 80
    rows = {line[:26].strip(): " ".join(line[26:].split()) for line in err.splitlines() if line[24:26] in ("  ", "l ")}
    assert rows["tokens"].startswith(f"{tokens} ")
    assert "stop" in rows["tokens"]
    assert rows["steps"] == str(steps)
    assert rows["mean accepted length"] == f"{tokens / steps:.2f}"
    assert rows["nodes per step"] == "4.0"
    assert rows["acceptance, unconditional"].startswith("depth 1: ")
    assert rows["acceptance, conditional"].startswith("depth 1: ")
    assert rows["prefill"] == "500 ms, first token after 600 ms"
    times = [rows[f"time in {part}"] for part in ("draft", "verify", "other")]
    assert times == ["500 ms (25%)", "1.00 s (50%)", "500 ms (25%)"]
    assert rows["tokens per second"].startswith(f"{tokens / 2:.1f} ")
    assert rows["plain decoding"].endswith("(whole answer: identical tokens)")
    assert rows["measured speed-up"] == "2.00x (drafted 20.0, both warm and in turns)"
    assert rows["seed"] == "7"
    assert "bonus" in err


def test_quiet_shows_only_the_text_and_skips_the_comparison(engine: FakeEngine) -> None:
    result = invoke("generate", "Hi", "--quiet")
    assert (result.stdout, result.stderr) == (TEXT + "\n", "")
    assert engine.compared == []


@pytest.mark.parametrize(("mode", "compared"), [("full", [True]), ("sample", [False]), ("off", [])])
def test_compare_modes(engine: FakeEngine, mode: str, compared: list[bool]) -> None:
    assert invoke("generate", "Hi", "--compare", mode).exit_code == 0
    assert engine.compared == compared


def test_json_has_the_stable_schema(engine: FakeEngine, tmp_path: Path) -> None:
    target = tmp_path / "answer.json"
    result = invoke("generate", "Hi", "--json", str(target), "--tree", "4x2x2", "--quiet")
    assert result.stdout == TEXT + "\n"
    document = json.loads(target.read_bytes())
    assert set(document) == {
        "model", "mtp", "drafter", "tree", "version", "commit", "prompt", "system", "chat", "thinking", "params", "config",
        "text", "token_ids", "drafted", "finish_reason", "complete", "stats",
    }  # fmt: skip
    assert set(document["stats"]) == STATS_KEYS
    assert document["text"] == TEXT
    assert document["token_ids"] == list(TEXT.encode())
    assert (document["finish_reason"], document["drafter"], document["tree"]) == ("stop", "mtp", "4x2x2")
    assert document["model"] == hub.DEFAULT_MODEL
    assert document["stats"]["speedup"] == 2.0  # compared although quiet: JSON asks for it
    assert os.listdir(tmp_path) == ["answer.json"]


def test_json_to_stdout_is_all_of_stdout(engine: FakeEngine) -> None:
    result = invoke("generate", "Hi", "--json", "-")
    assert json.loads(result.stdout)["text"] == TEXT
    assert "mean accepted length" in result.stderr


def test_json_follows_links_and_writes_devices(engine: FakeEngine, tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    target, link = tmp_path / "real" / "a.json", tmp_path / "link.json"
    target.write_text("old")
    target.chmod(0o640)
    link.symlink_to(target)
    assert invoke("generate", "Hi", "--json", str(link)).exit_code == 0
    assert link.is_symlink()
    assert json.loads(target.read_text())["text"] == TEXT
    assert target.stat().st_mode & 0o777 == 0o640
    assert invoke("generate", "Hi", "--json", os.devnull).exit_code == 0
    assert not Path(os.devnull).is_file()


def test_prompt_sources(engine: FakeEngine, tmp_path: Path) -> None:
    file = tmp_path / "prompt.txt"
    file.write_bytes("Zeile 1\r\nZeile 2: é\r\n".encode())
    invoke("generate", "--raw", "--prompt-file", str(file))
    invoke("generate", "--raw", "-", stdin="aus stdin é\n\n".encode())
    invoke("generate", "--raw", "wörtlich\n")
    assert engine.prompts == ["Zeile 1\r\nZeile 2: é", "aus stdin é\n", "wörtlich\n"]


def test_chat_and_raw(engine: FakeEngine) -> None:
    user = {"role": "user", "content": "Hi"}
    invoke("generate", "Hi")
    engine.tokenizer.has_chat_template = False
    invoke("generate", "Hi")
    invoke("generate", "Hi", "--chat")
    invoke("generate", "Hi", "--system", "Be brief.")
    assert engine.prompts == [[user], "Hi", [user], [{"role": "system", "content": "Be brief."}, user]]


def test_options_reach_the_engine(engine: FakeEngine) -> None:
    sampling = "--max-tokens 3 --temperature 0.5 --top-k 4 --top-p 0.9 --min-p 0.1 --seed 11"
    running = "--drafter ngram --tree chain:5 --draft-vocab 9 --dtype bf16 --threads 1 --max-context 64 --device cuda"
    assert invoke("generate", "Hi", *sampling.split(), *running.split()).exit_code == 0
    assert engine.params == [SamplingParams(3, 0.5, 4, 0.9, 0.1, 11)]
    config = engine.config
    assert (config.drafter, str(config.tree), config.draft_vocab) == ("ngram", "chain:5", 9)
    assert (config.dtype, config.threads, config.max_context, config.device) == ("bf16", 1, 64, "cuda")


def test_defaults_are_those_of_the_library(engine: FakeEngine) -> None:
    invoke("generate", "Hi")
    assert engine.params == [SamplingParams()]
    assert engine.config == EngineConfig(max_batch=1)


# generate: errors, before anything is loaded


@pytest.mark.usefixtures("no_engine")
@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["Hi", "--temperature", "-1"], ["temperature", "-1"]),
        (["Hi", "--temperature", "nan"], ["temperature"]),
        (["Hi", "--top-p", "0"], ["top_p"]),
        (["Hi", "--top-p", "1.5"], ["top_p", "1.5"]),
        (["Hi", "--top-k", "-1"], ["top_k"]),
        (["Hi", "--min-p", "2"], ["min_p"]),
        (["Hi", "--max-tokens", "0"], ["max_tokens"]),
        (["Hi", "--max-tokens", "many"], ["many", "generate --help"]),
        (["Hi", "--seed", "-5"], ["seed"]),
        (["Hi", "--tree", "chain:64"], ["65", "64"]),
        (["Hi", "--tree", "bush"], ["bush", "chain:K"]),
        (["Hi", "--draft-vocab", "-1"], ["draft-vocab"]),
        (["Hi", "--max-context", "-1"], ["max-context"]),
        (["Hi", "--drafter", "magic"], ["magic", "mtp", "ngram", "root"]),
        (["Hi", "--dtype", "int3"], ["int3"]),
        (["Hi", "--no-such-option"], ["--no-such-option"]),
        (["Hi", "--raw", "--system", "x"], ["--system", "--raw"]),
        ([""], ["empty"]),
        ([], ["PROMPT", "--prompt-file"]),
        (["Hi", "--prompt-file", "x"], ["--prompt-file"]),
        (["--prompt-file", "/no/such/file"], ["/no/such/file", "No such file"]),
        (["--prompt-file", "/"], ["directory"]),
        (["Hi", "--json", "/no/such/folder/a.json"], ["/no/such/folder/a.json", "No such file"]),
        (["Hi", "--json", "/"], ["folder"]),
        (["Hi", "--json", ""], ["--json"]),
    ],
)
def test_bad_arguments(args: list[str], words: list[str]) -> None:
    assert_error(invoke("generate", *args), *words)


@pytest.mark.usefixtures("no_engine")
def test_bad_prompt_files(tmp_path: Path) -> None:
    (tmp_path / "empty").write_bytes(b"\n")
    (tmp_path / "binary").write_bytes(b"ab\xff\xfe")
    assert_error(invoke("generate", "--prompt-file", str(tmp_path / "empty")), "empty")
    assert_error(invoke("generate", "--prompt-file", str(tmp_path / "binary")), "byte 2", "UTF-8")
    assert_error(invoke("generate", "-", stdin=b""), "empty")


def test_unknown_model_and_command() -> None:
    assert_error(invoke("generate", "Hi", "--model", "no-such-model"), "no-such-model", hub.DEFAULT_MODEL)
    assert_error(invoke("inspect", "no-such-model"), "no-such-model")
    assert_error(invoke("models", "fetch", "no-such-model"), "no-such-model")
    assert_error(invoke("degenerate"), "degenerate", "mtp-engine --help")
    assert_error(invoke("models", "fetch"), "NAME", "mtp-engine models fetch --help")


# generate: errors and interruptions on the way


@pytest.mark.parametrize(
    ("failure", "code", "words"),
    [
        (EngineError("the prompt has 9 tokens\nand \x1b[31mmore"), 2, ["9 tokens and \\x1b[31mmore"]),
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/cache"), 2, ["/cache: No space left"]),
        (
            ZeroDivisionError("odd\nthing"),
            1,
            ["internal error: ZeroDivisionError: odd thing", "MTP_ENGINE_TRACEBACK=1"],
        ),
    ],
)
def test_failures_are_one_line(
    engine: FakeEngine, tmp_path: Path, failure: Exception, code: int, words: list[str]
) -> None:
    engine.fail_after, engine.failure = 0, failure
    assert_error(invoke("generate", "Hi", "-q", "--json", str(tmp_path / "a.json")), *words, code=code)
    assert os.listdir(tmp_path) == []


def test_traceback_on_request(engine: FakeEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    engine.fail_after, engine.failure = 0, ZeroDivisionError("odd")
    monkeypatch.setenv("MTP_ENGINE_TRACEBACK", "1")
    assert isinstance(invoke("generate", "Hi").exception, ZeroDivisionError)


def test_ctrl_c_keeps_what_was_committed(engine: FakeEngine, tmp_path: Path) -> None:
    engine.fail_after = 1
    result = invoke("generate", "Hi", "--json", str(tmp_path / "a.json"))
    assert result.exit_code == 130
    assert result.stdout == "Gr\n"  # the third byte is half a character
    assert result.stderr.endswith("interrupted: 3 tokens in 1 steps, mean accepted length 3.00\n")
    assert os.listdir(tmp_path) == []


def test_ctrl_c_while_comparing_keeps_the_statistics(engine: FakeEngine, tmp_path: Path) -> None:
    engine.compare_failure = KeyboardInterrupt()
    result = invoke("generate", "Hi", "--json", str(tmp_path / "a.json"))
    assert (result.exit_code, result.stdout) == (130, TEXT + "\n")
    assert "mean accepted length" in result.stderr
    assert "interrupted" in result.stderr
    assert "speed-up" not in result.stderr
    assert os.listdir(tmp_path) == []


def test_ctrl_c_while_loading(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*args: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(answer_module, "load_engine", load)
    result = invoke("generate", "Hi")
    assert (result.exit_code, result.stdout, result.stderr.strip()) == (130, "", "")


def test_failing_write_leaves_the_old_json(engine: FakeEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def replace(source: Any, target: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    target = tmp_path / "a.json"
    target.write_text("old")
    monkeypatch.setattr(os, "replace", replace)
    result = invoke("generate", "Hi", "--json", str(target), "--compare", "off", "--quiet")
    assert (result.exit_code, result.stderr) == (2, "error: No space left on device\n")
    assert target.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.json"]


# real pipes, devices and terminals, with the fake engine in another process

_CHILD = """
import sys
sys.path.insert(0, {folder!r})
import test_cli
test_cli.child({text!r} * {copies}, {fail_after})
"""


def child(text: str, fail_after: int) -> None:
    def load(name: str, config: EngineConfig, mtp: str | None, progress: Any) -> FakeEngine:
        progress("starting", 0, None)
        return FakeEngine(text, config=config, fail_after=fail_after)

    answer_module.load_engine = load  # type: ignore[assignment]
    main()


def command(*args: str, text: str = TEXT, copies: int = 1, fail_after: int = 1 << 60) -> list[str]:
    code = _CHILD.format(folder=str(Path(__file__).parent), text=text, copies=copies, fail_after=fail_after)
    return [sys.executable, "-c", code, "generate", "Hi", *args]


def in_terminal(arguments: list[str], **environment: str) -> tuple[str, int]:
    """Run with stdout and stderr on a terminal."""
    master, slave = pty.openpty()
    process = subprocess.Popen(
        arguments,
        stdout=slave,
        stderr=slave,
        stdin=subprocess.DEVNULL,
        env=os.environ | {"TERM": "xterm"} | environment,
    )
    os.close(slave)
    data = b""
    try:
        while part := os.read(master, 4096):
            data += part
    except OSError:  # how Linux says that the other end is closed
        pass
    os.close(master)
    return data.decode().replace("\r\n", "\n"), process.wait()


BUFFERED = os.environ | {"PYTHONUNBUFFERED": ""}  # what a buffer could not write fails again when Python exits


def test_closed_pipe_ends_quietly() -> None:
    process = subprocess.Popen(
        command("--quiet", text="word ", copies=20_000), stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=BUFFERED
    )
    assert process.stdout is not None
    assert process.stderr is not None
    assert process.stdout.read(4) == b"word"
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait(30) == 1
    process.stderr.close()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_full_disk_is_one_line() -> None:
    with open("/dev/full", "wb") as full:
        done = subprocess.run(command("--quiet"), stdout=full, stderr=subprocess.PIPE, env=BUFFERED, timeout=60)
    assert (done.returncode, done.stderr) == (2, b"error: No space left on device\n")


def test_poor_encodings_lose_characters_but_nothing_else() -> None:
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    done = subprocess.run(command("--quiet"), capture_output=True, env=environment, timeout=60)
    assert (done.returncode, done.stdout) == (0, b"Gr??e, ?? ?!\nEnd.\n")


def test_control_characters_stop_at_the_terminal() -> None:
    text = "a\x1b]0;title\x07b\x9b31m\r\tc\n"
    shown, code = in_terminal(command("--quiet", text=text))
    assert (shown, code) == ("a\\x1b]0;title\\x07b\\x9b31m\\x0d\tc\n\n", 0)
    redirected = subprocess.run(command("--quiet", text=text), capture_output=True, timeout=60)
    assert redirected.stdout == text.encode() + b"\n"


def test_colours_on_a_terminal_only() -> None:
    shown, code = in_terminal(command("--quiet", "--color-drafts", text="abcé"))
    green, plain = "\x1b[32m", "\x1b[0m"
    # steps: a b | c, then the two bytes of é, whose last is the main model's own
    assert (shown, code) == (f"{green}a{plain}{green}b{plain}cé\n", 0)
    redirected = subprocess.run(command("--quiet", "--color-drafts", text="abcé"), capture_output=True, timeout=60)
    assert redirected.stdout == "abcé\n".encode()


def test_bars_vanish_from_the_terminal() -> None:
    shown, code = in_terminal(command())
    assert code == 0
    assert "reading the prompt" in shown
    assert shown.count("\x1b[?25l") == shown.count("\x1b[?25h") > 0  # every hidden cursor comes back
    after = shown[shown.index(TEXT) :]
    assert "reading the prompt" not in after
    erase_line = "\x1b[2K"
    assert after.rindex(erase_line) > after.rindex("comparing with plain decoding")


# small parts


def test_visible_spares_text() -> None:
    assert visible("tab\tnewline\né世🙂") == "tab\tnewline\né世🙂"
    assert visible("\x00\x1b\x7f\x85") == "\\x00\\x1b\\x7f\\x85"


def test_coloured_text_adds_up(capsysbinary: pytest.CaptureFixture[bytes]) -> None:
    writer = TextWriter(colour=True)
    writer.write("ab", drafted=True)
    writer.write("c")
    assert capsysbinary.readouterr().out == b"abc"


def test_waits_mention_only_long_waits(capsys: pytest.CaptureFixture[str]) -> None:
    with Waits(patience=0.05) as waits:
        waits("short", 0, None)
        waits("long", 0, 3)
        timer = waits._timer
        assert timer is not None
        timer.join(10)
        waits("long", 2, 3)
        waits("short again", 0, None)
    with Waits(patience=0.05) as waits:
        waits("done by then", 0, 2)
        waits("done by then", 2, 2)
        assert waits._timer is None
    with Waits(patience=0.0, quiet=True) as waits:
        waits("silent", 0, None)
    assert capsys.readouterr().err == "long ...\n"


def test_help_is_fast_and_has_examples() -> None:
    code = "import sys; from mtp_engine.cli.main import main\ntry: main()\nfinally: assert 'torch' not in sys.modules"
    for name in ([], ["generate"], ["models"], ["models", "fetch"], ["inspect"]):
        result = invoke(*name, "--help")
        assert result.exit_code == 0
        assert "Examples:" in result.stdout
    done = subprocess.run(
        [sys.executable, "-c", code, "generate", "--help"], capture_output=True, timeout=60, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert f"[default: {SamplingParams().max_tokens}]" in done.stdout


def test_models_lists_the_registry(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MTP_ENGINE_CACHE", str(tmp_path))
    result = invoke("models")
    assert result.exit_code == 0
    for model in hub.registry():
        assert all(part in result.stdout for part in (model.name, model.licence, model.source))
    assert "no (first use fetches" in result.stdout


def make_model(folder: Path) -> Path:
    """A Llama folder with headers worth reading: 7 main parameters per kind, MTP layers among them."""
    import torch
    from safetensors.torch import save_file

    folder.mkdir()
    tensors = {
        "model.embed_tokens.weight": torch.zeros(10, 8, dtype=torch.bfloat16),
        "model.norm.weight": torch.zeros(8),
        "model.mtp.layers.0.enorm.weight": torch.zeros(8),
        "table": torch.zeros(100, dtype=torch.int64),
    }
    save_file(tensors, folder / "model.safetensors")
    config = {
        "architectures": ["LlamaForCausalLM"], "vocab_size": 10, "hidden_size": 8, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 4, "intermediate_size": 16,
        "rms_norm_eps": 1e-5, "max_position_embeddings": 32, "tie_word_embeddings": True,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_inspect_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")  # for a long path in one line
    folder = make_model(tmp_path / "[tiny]")
    result = invoke("inspect", str(folder), "--json", str(tmp_path / "report.json"))
    assert result.exit_code == 0, result.output
    report = json.loads((tmp_path / "report.json").read_text())
    assert (report["family"], report["layers"], report["max_context"]) == ("llama", 2, 32)
    assert (report["parameters"], report["dtypes"]) == (88, {"BF16": 80, "F32": 8})
    assert (report["mtp_parameters"], report["mtp_layers"]) == (8, 0)
    assert report["kv_bytes_per_token"] == {"fp32": 2 * 8 * 4, "bf16": 2 * 8 * 2}
    assert report["files"] == {"model.safetensors": (folder / "model.safetensors").stat().st_size}
    assert str(folder) in result.stdout
    assert json.loads(invoke("inspect", str(folder), "--json", "-").stdout) == report


def test_inspect_of_damage_is_one_line(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "m")
    with open(folder / "model.safetensors", "r+b") as file:
        file.truncate(40)
    assert_error(invoke("inspect", str(folder)), "model.safetensors")
    assert_error(invoke("inspect", str(folder), "--json", "/no/such/x"), "/no/such/x")


# the real model, as users run it

MTP_ENGINE = [sys.executable, "-m", "mtp_engine.cli"]


@pytest.mark.model
def test_real_answer(tmp_path: Path) -> None:
    target = tmp_path / "a.json"
    options = ["--max-tokens", "8", "--compare", "full", "--color-drafts", "--max-context", "128"]
    done = subprocess.run(
        [*MTP_ENGINE, "generate", "Why is the sky blue?", *options, "--json", str(target)],
        capture_output=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr.decode()
    document = json.loads(target.read_text())
    assert done.stdout == document["text"].encode() + b"\n"
    assert len(document["token_ids"]) == document["stats"]["tokens"] == 8
    assert (document["finish_reason"], document["drafter"]) == ("length", "mtp")
    assert document["stats"]["identical_to_plain"] is True
    assert document["stats"]["speedup"] > 0
    assert set(document["stats"]) == STATS_KEYS
    assert b"identical tokens" in done.stderr
    assert b"Traceback" not in done.stderr


def test_real_prompt_over_the_context() -> None:
    result = invoke("generate", "--raw", "word " * 40, "--max-context", "16", "--quiet", "--model", hub.NANO)
    assert_error(result, "the prompt has ")


@pytest.mark.model
def test_real_inspect() -> None:
    result = invoke("inspect", hub.DEFAULT_MODEL, "--json", "-")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert (report["layers"], report["mtp_layers"], report["parameters"]) == (30, 3, 134_515_008)
    assert report["kv_bytes_per_token"]["fp32"] == 30 * 3 * 2 * 64 * 4
    assert invoke("models", "fetch", hub.DEFAULT_MODEL, "--quiet").stdout.strip() == report["folder"]


# ---- sampling parameters and structures ----------------------------------------------------------------------------


def test_parameters_reach_the_engine(engine: FakeEngine) -> None:
    given = "--repetition-penalty 1.2 --frequency-penalty 0.5 --presence-penalty -1 --min-tokens 2 --stop A --stop B"
    assert invoke("generate", "Hi", *given.split(), "--bad-word", "no", "--regex", "a+").exit_code == 0
    [params] = engine.params
    assert (params.repetition_penalty, params.frequency_penalty, params.presence_penalty) == (1.2, 0.5, -1.0)
    assert (params.min_tokens, params.stop, params.bad_words) == (2, ("A", "B"), ("no",))
    assert params.structure == Structure(regex="a+")


def test_structures_come_from_files(engine: FakeEngine, tmp_path: Path) -> None:
    schema, tools = tmp_path / "schema.json", tmp_path / "tools.json"
    schema.write_text('{"type": "integer"}')
    tools.write_text('[{"name": "stop"}]')
    assert invoke("generate", "Hi", "--json-schema", str(schema)).exit_code == 0
    assert invoke("generate", "Hi", "--tools", str(tools)).exit_code == 0
    first, second = (params.structure for params in engine.params)
    assert first == Structure(json='{"type": "integer"}')
    assert second
    assert json.loads(second.json)["properties"]["name"] == {"const": "stop"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--json-schema", "missing.json"], "--json-schema needs a text file"),
        (["--regex", "a", "--json-schema", __file__], "exactly one"),
        (["--tools", __file__], "not JSON"),
        (["--verifier", "typical"], "lossy"),
        (["--verifier", "block", "--tree", "2x2"], "checks chains"),
        (["--frequency-penalty", "3"], "from -2 to 2"),
    ],
)
def test_bad_parameters_are_one_line(engine: FakeEngine, options: list[str], message: str) -> None:
    result = invoke("generate", "Hi", *options)
    assert result.exit_code == 2
    assert message in result.stderr
    assert result.stderr.count("\n") == 1


# ---- the first hour -------------------------------------------------------------------------------------------------


def test_the_first_line_says_what_it_runs_on(engine: FakeEngine) -> None:
    assert invoke("generate", "Hi").stderr.splitlines()[0] == f"{hub.DEFAULT_MODEL} on cpu, 1 threads, fp32"
    assert EngineConfig().device == "auto"


def test_devices_that_do_not_exist() -> None:
    from mtp_engine.assemble.backend import find_device

    for name in ("mps", "meta", "cuda:99", "xla:0", "cpu:0", ""):
        with pytest.raises(EngineError, match=r"here are: auto, cpu|sees no NVIDIA GPU"):
            find_device(name)
    assert find_device("auto").type in ("cpu", "cuda")


@pytest.mark.parametrize(("closed", "code"), [(">&-", 2), ("2>&-", 0), ("<&-", 0), (">&- 2>&- <&-", 2)])
def test_closed_streams(closed: str, code: int) -> None:
    done = subprocess.run(["sh", "-c", f'exec "$@" {closed}', "sh", *command()], capture_output=True, timeout=60)
    assert done.returncode == code, done.stderr
    assert b"Traceback" not in done.stderr
    assert b"internal error" not in done.stderr
    if closed == ">&-":
        assert done.stderr == b"error: stdout is closed: send it to a file, or to /dev/null\n"
    if code == 0:
        assert done.stdout == TEXT.encode() + b"\n"


def test_an_incomplete_structure_is_no_success(engine: FakeEngine) -> None:
    engine.complete = False
    result = invoke("generate", "Hi", "-q", "--regex", "a+b", "--stop", "x")
    assert result.exit_code == 3
    assert result.stderr == "warning: the answer was cut off by a stop before it matched its structure\n"
    assert result.stdout == TEXT + "\n"


def test_different_tokens_are_no_success(engine: FakeEngine) -> None:
    engine.identical = False
    for options in ([], ["-q"]):
        result = invoke("generate", "Hi", "--compare", "full", *options)
        assert result.exit_code == 4
        assert "DIFFERENT TOKENS" in result.stderr
    assert engine.compared == [True, True]
    assert invoke("generate", "Hi", "--compare", "sample").exit_code == 0


def test_rules_that_keep_the_distribution_explain_other_tokens(engine: FakeEngine) -> None:
    engine.identical = False
    result = invoke("generate", "Hi", "--compare", "full", "--verifier", "rejection")
    assert result.exit_code == 0
    assert "keeps the distribution, not the text" in " ".join(result.stderr.split())


def test_statistics_in_a_pipe_are_plain_lines(engine: FakeEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    err = invoke("generate", "Hi").stderr
    assert not [line for line in err.splitlines() if line != line.rstrip()]
    assert "bonus" not in err
    assert "bonus" in invoke("generate", "Hi", "--explain").stderr


def test_the_legend_is_shown_on_a_terminal_once(tmp_path: Path) -> None:
    for times in (1, 0):
        shown, code = in_terminal(command(), MTP_ENGINE_CACHE=str(tmp_path))
        assert (shown.count("bonus"), code) == (times, 0)


def test_a_redirected_table_keeps_to_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    for columns in ("60", "100"):
        monkeypatch.setenv("COLUMNS", columns)
        lines = invoke("inspect", hub.NANO).stdout.splitlines()
        assert max(map(len, lines)) <= int(columns)
    monkeypatch.delenv("COLUMNS")
    lines = invoke("inspect", hub.NANO).stdout.splitlines()
    assert not [line for line in lines if line != line.rstrip()]
    assert len([line for line in lines if line.startswith("bytes as published")]) == 1


def test_inspect_says_where_files_differ_from_what_config_says(tmp_path: Path) -> None:
    out = invoke("inspect", str(make_model(tmp_path / "m"))).stdout
    assert "the files here hold BF16, F32" in out
    assert "the embedding table is the output head, too" in out


def test_flashinfer_on_a_cpu_is_refused() -> None:
    import torch

    from mtp_engine.assemble.backend import make_backend

    with pytest.raises(EngineError, match="needs an NVIDIA GPU"):
        make_backend(EngineConfig(attention="flashinfer", device="cpu"), torch.device("cpu"), hub.silent)


def test_conformance_knows_how_many_checks_there_are() -> None:
    from mtp_engine.conformance.suite import SETTINGS, count_checks

    assert count_checks(exact=True) == count_checks(exact=False) + 1 == len(SETTINGS) + 10


def test_a_prompt_from_the_terminal_is_asked_for(engine: FakeEngine) -> None:
    import pexpect

    code = command()[2].replace("main()", "").replace("child(", "child(")
    chat = pexpect.spawn(sys.executable, ["-c", code, "generate", "-", "-q"], encoding="utf-8", timeout=60)
    chat.expect_exact("end it with Ctrl-D")
    chat.sendline("Hi")
    chat.sendeof()
    chat.expect_exact("End.")
    chat.expect(pexpect.EOF)
    chat.close()
    assert chat.exitstatus == 0


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129), (signal.SIGINT, 130)])
def test_signals_end_as_ctrl_c_does(sent: signal.Signals, code: int, tmp_path: Path) -> None:
    """In fp32: int8 might have said it all before the signal comes."""
    target = tmp_path / "a.json"
    arguments = [*MTP_ENGINE, "generate", "Hi", "--model", hub.NANO, "--max-tokens", "1900", "--min-tokens", "1900"]
    arguments += ["--dtype", "fp32"]
    process = subprocess.Popen(
        [*arguments, "--threads", "1", "--json", str(target)], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None
    first = process.stdout.read(1)
    process.send_signal(sent)
    out, err = process.communicate(timeout=60)
    assert process.returncode == code
    assert (first + out).endswith(b"\n")
    assert b"interrupted: " in err
    assert b"Traceback" not in err
    assert os.listdir(tmp_path) == []


# ---- an answer repeated from its JSON -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A warm answer of mimo-nano, with much that is not the default."""
    file = tmp_path_factory.mktemp("record") / "out.json"
    options = (
        "--temperature 0.9 --top-k 40 --frequency-penalty 0.2 --stop dragon --max-tokens 12 --tree 2x2 --threads 1"
        " --compare off -q"
    )
    result = invoke("generate", "Tell me a story.", "--model", hub.NANO, *options.split(), "--json", str(file))
    assert result.exit_code == 0, result.output
    return file


def test_a_record_holds_all_that_was_asked(recorded: Path) -> None:
    record = json.loads(recorded.read_text())
    assert (record["prompt"], record["chat"], record["mtp"], record["model"]) == (
        "Tell me a story.",
        True,
        None,
        hub.NANO,
    )
    assert record["params"]["stop"] == ["dragon"]
    assert record["params"]["seed"] == record["stats"]["seed"]
    assert (record["config"]["tree"], record["config"]["verifier"], record["config"]["dtype"]) == (
        "2x2",
        "match",
        "int8",
    )
    assert len(record["drafted"]) == len(record["token_ids"]) == 12
    assert record["version"] == "0.2.0"


def test_a_record_repeats_its_answer(recorded: Path) -> None:
    again = invoke("generate", "--from", str(recorded), "--compare", "off")
    assert again.exit_code == 0, again.output
    assert again.stdout == json.loads(recorded.read_text())["text"] + "\n"
    assert "the same tokens as recorded" in again.stderr
    assert invoke("generate", "--from", str(recorded), "-q").stderr == ""


def test_a_record_with_changes(recorded: Path) -> None:
    repeated = ("generate", "--from", str(recorded), "-q", "--compare", "off", "--json", "-")
    other = invoke(*repeated, "--seed", "1")
    params = json.loads(other.stdout)["params"]
    assert (params["seed"], params["top_k"]) == (1, 40)
    plain = invoke(*repeated, "--drafter", "root")
    assert json.loads(plain.stdout)["text"] == json.loads(recorded.read_text())["text"]
    shorter = invoke(*repeated, "Another prompt.")
    assert json.loads(shorter.stdout)["prompt"] == "Another prompt."


def test_a_record_that_cannot_be_repeated(recorded: Path, tmp_path: Path) -> None:
    record = json.loads(recorded.read_text())
    (tmp_path / "b.json").write_text(json.dumps({**record, "token_ids": record["token_ids"][::-1]}))
    result = invoke("generate", "--from", str(tmp_path / "b.json"), "-q")
    assert (result.exit_code, "DIFFERENT TOKENS" in result.stderr) == (4, True)


@pytest.mark.parametrize("kind", ["json_schema", "regex"])
def test_a_structure_cut_off(kind: str, tmp_path: Path) -> None:
    (tmp_path / "schema.json").write_text(
        '{"type": "object", "properties": {"name": {"type": "string", "minLength": 90}}, "required": ["name"]}'
    )
    option = ["--json-schema", str(tmp_path / "schema.json")] if kind == "json_schema" else ["--regex", "[a-z]{200}"]
    arguments = ["generate", "Hi", "--model", hub.NANO, "-q", *option, "--max-tokens", "6", "--threads", "1"]
    result = invoke(*arguments, "--compare", "off", "--json", str(tmp_path / "a.json"))
    assert result.exit_code == 3
    assert "--max-tokens 6" in result.stderr
    record = json.loads((tmp_path / "a.json").read_text())
    assert (record["finish_reason"], record["complete"]) == ("length", False)
    whole = invoke(
        "generate", "Hi", "--model", hub.NANO, "-q", "--regex", "[a-z ]+", "--max-tokens", "6", "--threads", "1"
    )
    assert whole.exit_code == 0, "it matches wherever it is cut"


# ---- the cache ------------------------------------------------------------------------------------------------------


def test_models_verify_fetch_and_remove(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from test_gguf import write_tiny

    from mtp_engine.hub import cache

    monkeypatch.setenv("MTP_ENGINE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(cache, "_HEAD", 1000)
    name = str(tmp_path / "tiny.gguf")
    write_tiny(Path(name))
    assert "nothing of it" in invoke("models", "verify", name).stdout
    folder = Path(invoke("models", "fetch", name, "-q").stdout.strip())
    assert invoke("models", "verify", name).stdout == f"{folder}: ok\n"
    weights = folder / "model.safetensors"
    before, good = weights.stat(), weights.read_bytes()
    weights.write_bytes(good[:5000] + b"\xff" * 100 + good[5100:])
    os.utime(weights, (before.st_mtime, before.st_mtime))
    result = invoke("models", "verify", name, "-q")
    assert (result.exit_code, result.stdout) == (2, f"{folder}: DAMAGED: model.safetensors\n")
    assert f"mtp-engine models fetch --force {name}" in result.stderr
    assert invoke("models", "fetch", name, "-q").exit_code == 0
    assert weights.read_bytes() == good
    assert invoke("models", "fetch", "--force", name, "-q").stdout == f"{folder}\n"
    assert invoke("models", "remove", name).stdout.endswith("freed\n")
    assert not folder.exists()
    assert invoke("models", "remove", name).stdout.endswith("nothing of it is in the cache\n")


def test_a_signal_that_an_import_swallowed_still_ends_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """As torch does with whatever is raised while it imports numpy."""

    def load(*_: Any) -> None:
        try:
            signal.raise_signal(signal.SIGTERM)
        except KeyboardInterrupt:
            raise ImportError("cannot load module more than once per process") from None

    monkeypatch.setattr(answer_module, "load_engine", load)
    result = invoke("generate", "Hi", "-q")
    assert (result.exit_code, result.stderr) == (143, "")
