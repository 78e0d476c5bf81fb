"""`mtp-engine chat`: history, commands, interrupts; through a pseudo-terminal as a user has it, and through a pipe."""

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator

import pexpect
import pytest
from click.testing import CliRunner
from test_cli import FakeEngine

import mtp_engine.cli.answer as answer_module
from mtp_engine import Engine, EngineConfig, SamplingParams
from mtp_engine.cli.chat import Conversation
from mtp_engine.cli.main import main
from mtp_engine.errors import EngineError
from mtp_engine.hub import hub

OPTIONS = ["--threads", "1", "--device", "cpu", "--max-context", "1024"]


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> FakeEngine:
    fake = FakeEngine("Yes.")
    monkeypatch.setattr(answer_module, "load_engine", lambda *_: fake)
    return fake


def talk(*lines: str, options: tuple[str, ...] = ()) -> tuple[str, str]:
    result = CliRunner().invoke(main, ["chat", *options], input="\n".join(lines).encode())
    assert result.exit_code == 0, result.output
    return result.stdout, result.stderr


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


YES = {"role": "assistant", "content": "Yes."}


def test_every_turn_sees_those_before_it(engine: FakeEngine) -> None:
    out, _ = talk("One?", "", "Two?", options=("--system", "Be brief."))
    system = {"role": "system", "content": "Be brief."}
    assert out == "Yes.\nYes.\n"
    assert engine.prompts[0][:2] == [system, user("One?")]
    assert engine.prompts[1][:4] == [system, user("One?"), YES, user("Two?")]


def test_commands(engine: FakeEngine) -> None:
    out, err = talk(
        "/stats", "One?", "/stats", "/seed 7", "Two?", "/seed", "/reset", "Three?", "/seed x", "/nonsense", "/help"
    )
    assert out == "Yes.\n" * 3
    assert [params.seed for params in engine.params] == [None, 7, None]
    assert engine.prompts[2][0] == user("Three?")
    for words in ("no whole answer yet", "mean accepted length", "'x' is no whole number", "/nonsense is no command",
                  "/reset       forget"):  # fmt: skip
        assert words in err


def test_quit_ends_it(engine: FakeEngine) -> None:
    assert talk("One?", "/quit", "Two?")[0] == "Yes.\n"


def test_an_answer_that_fails_is_not_history(engine: FakeEngine) -> None:
    engine.fail_after, engine.failure = 0, EngineError("the prompt has 9 tokens")
    conversation = Conversation(engine, SamplingParams())  # type: ignore[arg-type]
    with pytest.raises(EngineError):
        conversation.ask("One?", None, lambda: None)
    assert conversation.messages == []
    _, err = talk("One?", "Two?")
    assert err.count("error: the prompt has 9 tokens; /reset begins anew") == 2


def test_a_model_without_a_template_is_refused(engine: FakeEngine) -> None:
    engine.tokenizer.has_chat_template = False
    result = CliRunner().invoke(main, ["chat"], input=b"Hi")
    assert (result.exit_code, result.stderr.count("\n")) == (2, 1)
    assert "generate" in result.stderr


# ---- a user at a terminal -----------------------------------------------------------------------------------------


def plain(text: str) -> str:
    """What a terminal shows of it, roughly: without escape sequences."""
    return re.sub(r"\x1b(\[[0-9;?]*[A-Za-z]|[=>])", "", text).replace("\r", "")


class Terminal:
    """A chat on a pseudo-terminal."""

    def __init__(self, *options: str) -> None:
        arguments = ["-m", "mtp_engine.cli", "chat", *OPTIONS, *options]
        environment = os.environ | {"TERM": "xterm", "PROMPT_TOOLKIT_NO_CPR": "1", "PYTHONUNBUFFERED": "1"}
        self.process = pexpect.spawn(
            sys.executable, arguments, env=environment, encoding="utf-8", timeout=90, dimensions=(50, 400)
        )
        self.wait()

    def wait(self) -> str:
        """Up to the next prompt; what was shown before it."""
        self.process.expect(r">(?: |\x08\x1b\[2C)")
        return plain(self.process.before or "")


CONFIG = EngineConfig(device="cpu", threads=1, max_context=1024, max_batch=1)


@pytest.fixture(scope="module")
def nano() -> Iterator[Engine]:
    with Engine.load(hub.NANO, CONFIG) as engine:
        yield engine


def test_five_turns_an_interrupt_and_a_reset(nano: Engine) -> None:
    """The text is that of Engine.generate on the same history, the interrupted answer as far as it came included."""
    params = SamplingParams(max_tokens=16, temperature=0.8, seed=5)
    history: list[dict[str, str]] = []

    def expected(question: str) -> str:
        history.append(user(question))
        text = nano.generate([history], params)[0].text
        history.append({"role": "assistant", "content": text})
        return text

    chat = Terminal("--model", hub.NANO, "--max-tokens", "16", "--temperature", "0.8", "--seed", "5")
    try:
        for question in ("My name is Ada.", "What is the capital of France?"):
            assert expected(question) in ask(chat, question)
        chat.process.send("Now say a word that I do not want to hear, and then many more.")
        chat.process.send("\x03")  # the line is dropped
        chat.wait()
        assert "what was said is forgotten" in ask(chat, "/reset", mark="forgotten")
        history.clear()
        for question in ("Name three colours.", "And three more?", "Thank you."):
            assert expected(question) in ask(chat, question)
        assert "mean accepted length" in ask(chat, "/stats", mark="seed  ")
        chat.process.sendeof()
        chat.process.expect(pexpect.EOF)
    finally:
        chat.process.close()
    assert chat.process.exitstatus == 0


def ask(chat: Terminal, line: str, mark: str = " a second") -> str:
    """What is shown between a line and the prompt after the answer, in one piece."""
    chat.process.send(f"{line}\r")
    chat.process.expect_exact(mark)
    shown = plain((chat.process.before or "") + mark)
    chat.wait()
    return shown


@pytest.mark.model
def test_an_interrupted_answer_stays_as_far_as_it_came() -> None:
    """With the default model: mimo-nano would have said it all before it can be interrupted."""
    first, second = "Write a long story about the sea.", "Thank you."
    params = SamplingParams(max_tokens=300, seed=5)
    with Engine.load(config=CONFIG) as reference:
        whole = reference.generate([[user(first)]], params)[0].text
        chat = Terminal("--max-tokens", "300", "--seed", "5")
        try:
            chat.process.send(f"{first}\r")
            chat.process.expect_exact("\x1b[?2004l")  # the line is entered
            chat.process.expect_exact(whole[:40].splitlines()[0])
            begin = chat.process.after
            chat.process.sendintr()
            chat.process.expect_exact("interrupted")
            shown = plain(f"{begin}{chat.process.before}").replace("^C", "")
            chat.wait()
            said = next(whole[:size] for size in range(len(whole), 0, -1) if shown.startswith(whole[:size]))
            assert 0 < len(said) < len(whole)
            history = [user(first), {"role": "assistant", "content": said}, user(second)]
            assert reference.generate([history], params)[0].text in ask(chat, second)
            chat.process.kill(signal.SIGTERM)
            chat.process.expect(pexpect.EOF)
        finally:
            chat.process.close()
        assert chat.process.exitstatus == 143


def test_through_a_pipe_the_text_is_all_of_stdout(nano: Engine) -> None:
    lines = ["What is the capital of France?", "And of Spain?"]
    command = [
        sys.executable,
        "-m",
        "mtp_engine.cli",
        "chat",
        *OPTIONS,
        "--model",
        hub.NANO,
        "--max-tokens",
        "12",
        "-q",
    ]
    done = subprocess.run(command, input="\n".join(lines), capture_output=True, text=True, timeout=200)
    conversation = Conversation(nano, SamplingParams(max_tokens=12))
    texts = [conversation.ask(line, None, lambda: None).text for line in lines]
    assert (done.returncode, done.stdout, done.stderr) == (0, "".join(f"{text}\n" for text in texts), "")
