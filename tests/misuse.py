"""Random misuse of the command line: flags, damaged files, interrupts, closed pipes. Seeded: a case is known by its number.

Every case must end by itself, with an exit code that the command line knows, without a traceback or an "internal error",
and leave nothing in the cache's tmp/. bench/fuzz.py runs many, tests/test_fuzz.py a few.
"""

import json
import os
import random
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

from click.testing import CliRunner
from test_gguf import write_tiny

from mtp_engine.cli.main import main
from mtp_engine.models.make_tiny import make_tiny

LONGEST_S = 60.0  # a case that takes longer hangs
_CODES = {0, 2, 3, 4, 130, 143}
_NASTY = (
    "", "0", "-1", "1", "nan", "inf", "-inf", "1e400", "99999999999999999999", "0x10", "1.5", "²", "\u0661", "x" * 3000, "\t",
    "-", "--", "/", "/dev/null", "/dev/zero/x", "..", "~", "~nobody/x", "a\nb", "\udcff", "\x1b[31m", "é世🙂", "chain:2",
    "2x2", "tree:3", "tree:0", "chain:-1", "0x0", "mtp", "ngram", "root", "match", "auto", "cpu", "cuda", "cuda:-1",
    "cuda:x", "mps", "meta", "None", "true", "{}", "[]", "(", "a{99999}", "[[:x:]]", "full", "off", "%s", "$HOME",
)  # fmt: skip
_VALUED = (
    "--max-tokens", "--temperature", "--top-k", "--top-p", "--min-p", "--repetition-penalty", "--frequency-penalty",
    "--presence-penalty", "--min-tokens", "--stop", "--bad-word", "--seed", "--drafter", "--tree", "--verifier",
    "--draft-vocab", "--tensor-parallel", "--device", "--dtype", "--attention", "--steps-in-flight", "--threads", "--window-keys",
    "--max-context", "--model", "--mtp", "--system", "--experts",
)  # fmt: skip
_GENERATE = (
    *_VALUED,
    *["--json-schema", "--regex", "--grammar", "--tools", "--prompt-file", "--json", "--compare", "--from"],
)
_FLAGS = (
    "--raw", "--chat", "--thinking", "--no-thinking", "--allow-lossy", "--dequantize", "--color-drafts", "-q",
    "--explain",
)  # fmt: skip
_TRAIN = (
    "--layers", "--window", "--width", "--features", "--init", "--data", "--text", "--prompts", "--shards",
    "--rows", "--row-length", "--steps", "--batch-tokens", "--lr", "--adam-lr", "--decay", "--target-temperature",
    "--acceptance", "--reach", "--seed", "--eval-prompts", "--dtype", "--recipe", "--optimiser", "--hidden", "--temperatures",
)  # fmt: skip
_SCHEMA = {
    "type": "object", "properties": {"a": {"type": "integer"}, "b": {"enum": ["x", "y"]}}, "required": ["a"],
    "additionalProperties": False,
}  # fmt: skip
_TOOLS = [{"type": "function", "function": {"name": "f", "parameters": _SCHEMA}}]


@final
@dataclass(frozen=True)
class Outcome:
    """What a case did. problem: empty if it behaved."""

    kind: str
    what: str
    code: int
    seconds: float
    problem: str


@final
class Misuse:
    """Cases by number. Everything happens in `folder`, which becomes the working directory, and in a cache there."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.cache = folder, folder / "cache"
        folder.mkdir(parents=True, exist_ok=True)
        self.model = make_tiny(folder / "tiny", family="mimo_v2_flash", fp8=False, seed=0)
        write_tiny(folder / "tiny.gguf")
        (folder / "schema.json").write_text(json.dumps(_SCHEMA))
        (folder / "tools.json").write_text(json.dumps(_TOOLS))
        (folder / "prompt.txt").write_text("Once upon a time")
        (folder / "lark").write_text('start: "a" | "b" start')
        (folder / "here").mkdir()
        os.chdir(folder / "here")  # --json writes where it is told
        os.environ["MTP_ENGINE_CACHE"] = str(self.cache)
        os.environ["MTP_ENGINE_WHEEL"] = str(folder / "none.whl")  # the default model is not to be fetched
        self.quick = ["--max-tokens", "2", "--max-context", "64", "--threads", "1", "--compare", "off", "--seed", "1"]
        self._run(["generate", "x", "--model", str(self.model), *self.quick, "--json", str(folder / "record.json")])

    def case(self, number: int) -> Outcome:
        """Run case `number`; always the same one for a number."""
        rng = random.Random(number)
        kinds: list[tuple[int, str, Callable[[random.Random], tuple[list[str], bytes]]]] = [
            (45, "flags", self._flags), (28, "model files", self._damaged_model), (9, "gguf", self._damaged_gguf),
            (8, "cache", self._damaged_cache), (8, "inputs", self._damaged_input),
        ]  # fmt: skip
        at = rng.randrange(1000)
        if at < 10:
            return self._piped(rng)
        if at < 20:
            return self._interrupted(rng)
        _, kind, make = rng.choices(kinds, [weight for weight, *_ in kinds])[0]
        arguments, stdin = make(rng)
        return self._outcome(kind, arguments, *self._run(arguments, stdin))

    # ---- what is asked

    def _flags(self, rng: random.Random) -> tuple[list[str], bytes]:
        command = rng.choices(
            ["generate", "chat", "train", "inspect", "models", "conformance", "kernels", ""],
            [60, 10, 12, 6, 6, 2, 2, 2],
        )[0]
        value = lambda: rng.choice(_NASTY)  # noqa: E731
        if command == "generate":
            given = ["generate", *(["Hi"] if rng.random() < 0.9 else [value()])]
            if rng.random() < 0.9:
                given += ["--model", str(self.model), *self.quick]
            for _ in range(rng.randint(1, 3)):
                given += [rng.choice(_GENERATE), value()]
        elif command == "chat":
            given = ["chat", "--model", str(self.model), *self.quick[:6], rng.choice(_VALUED), value()]
        elif command == "train":
            given = ["train", str(self.model), "--dry-run", "--out", str(self.folder / "heads")]
            for _ in range(rng.randint(1, 3)):
                given += [rng.choice(_TRAIN), value()]
        elif command == "models":
            given = ["models", rng.choice(["fetch", "verify", "remove", "make-tiny", "x"]), value()]
            given = given if given[1] != "make-tiny" else ["models", "make-tiny", str(self.model), "--seed", value()]
        elif command == "conformance":
            given = ["conformance", "--engine", value(), "--device", "meta"]
        else:
            given = (
                [command, *([value()] if command == "inspect" else ["check", "--dims", value()])]
                if command
                else [value()]
            )
        given += [flag for flag in _FLAGS if rng.random() < 0.05]
        lines = "\n".join([value(), f"/{value()}", "/stats", "/reset", "/seed " + value()]).encode("utf-8", "replace")
        return given, lines if rng.random() < 0.5 else b""

    def _damaged_model(self, rng: random.Random) -> tuple[list[str], bytes]:
        target = self.folder / "damaged"
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(self.model, target)
        file = rng.choice(sorted(target.iterdir()))
        damage(file, rng)
        if rng.random() < 0.4:
            return ["inspect", str(target), "-q"], b""
        drafter = rng.choice([[], ["--drafter", "root"], ["--drafter", "ngram"]])
        return ["generate", "Hi", "--model", str(target), *self.quick, *drafter], b""

    def _damaged_gguf(self, rng: random.Random) -> tuple[list[str], bytes]:
        file = self.folder / "damaged.gguf"
        shutil.copy(self.folder / "tiny.gguf", file)
        damage(file, rng)
        if rng.random() < 0.5:
            return ["inspect", str(file), "-q"], b""
        return ["generate", "Hi", "--model", str(file), "--drafter", "root", *self.quick], b""

    def _damaged_cache(self, rng: random.Random) -> tuple[list[str], bytes]:
        """The source is there, so the model must be mended: this one may not fail."""
        given = ["generate", "a", "--raw", "--model", str(self.folder / "tiny.gguf"), "--drafter", "root", *self.quick]
        for finished in sorted((self.cache / "models").glob("tiny-*")):
            file = rng.choice(sorted(finished.iterdir()))
            before = file.stat()
            damage(file, rng)
            if rng.random() < 0.5:
                os.utime(file, (before.st_mtime, before.st_mtime))
        return given, b""

    def _damaged_input(self, rng: random.Random) -> tuple[list[str], bytes]:
        option, name = rng.choice([
            ("--json-schema", "schema.json"), ("--tools", "tools.json"), ("--grammar", "lark"), ("--prompt-file", "prompt.txt"),
            ("--from", "record.json"), ("--regex", ""),
        ])  # fmt: skip
        prompt = [] if option in ("--prompt-file", "--from") else ["Hi"]
        if option == "--regex":
            value = "".join(rng.choice("ab()[]{}|*+?\\.^$0123,-é\n") for _ in range(rng.randint(1, 12)))
        else:
            file = self.folder / f"damaged-{name}"
            shutil.copy(self.folder / name, file)
            damage(file, rng)
            value = str(file)
        return ["generate", *prompt, option, value, "--model", str(self.model), *self.quick[:8]], b""

    # ---- how it goes

    def _run(self, arguments: list[str], stdin: bytes = b"") -> tuple[int, str, float]:
        begin = time.perf_counter()
        result = CliRunner().invoke(main, arguments, input=stdin)
        text = (
            result.stderr
            if result.exception is None or isinstance(result.exception, SystemExit)
            else repr(result.exception)
        )
        return result.exit_code, text, time.perf_counter() - begin

    def _interrupted(self, rng: random.Random) -> Outcome:
        """Ctrl-C somewhere within a run that would go on for a while."""
        arguments = [
            "generate",
            "Hi",
            "--model",
            str(self.model),
            "--max-tokens",
            "1000",
            "--threads",
            "1",
            "--min-tokens",
            "1000",
        ]
        clock = threading.Timer(rng.random() * 1.0, signal.raise_signal, [signal.SIGINT])
        clock.start()
        try:
            code, text, seconds = self._run(arguments)
            clock.cancel()
            clock.join()
        except KeyboardInterrupt:  # before or after the command
            code, text, seconds = 130, "", 0.0
        return self._outcome("interrupt", arguments, code, text, seconds)

    def _piped(self, rng: random.Random) -> Outcome:
        """A process of its own whose reader goes away, that gets a signal, or that lacks a stream."""
        command = [sys.executable, "-m", "mtp_engine.cli", "generate", "Hi", "--model", str(self.model), *self.quick]
        way = rng.choice(["reader", "SIGTERM", "SIGHUP", "SIGINT", ">&-", "2>&-", "<&-"])
        begin = time.perf_counter()
        if "&-" in way:
            done = subprocess.run(["sh", "-c", f"{shlex.join(command)} {way}"], capture_output=True, timeout=LONGEST_S)
            code, text = done.returncode, done.stderr.decode()
            codes = {2} if way == ">&-" else {0}
        else:
            process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
            assert process.stdout is not None
            time.sleep(rng.random() * 3)
            if way == "reader":
                process.stdout.close()
                process.stdout = None
            else:
                process.send_signal(getattr(signal, way))
            text = process.communicate(timeout=LONGEST_S)[1].decode()
            code = process.returncode
            number = getattr(signal, way, 0)
            codes = {0, 1} if way == "reader" else {0, 128 + number, -number}  # -number: while Python itself started
            if way == "SIGINT" and "site" in text and "KeyboardInterrupt" in text:
                codes.add(1)  # Python's own words while it starts
        problem = "" if code in codes else f"exit code {code}"
        return self._outcome(f"process {way}", command[2:], code, text, time.perf_counter() - begin, problem)

    def _outcome(
        self, kind: str, arguments: list[str], code: int, text: str, seconds: float, problem: str | None = None
    ) -> Outcome:
        if "Traceback" in text and "KeyboardInterrupt" not in text:
            problem = "traceback"
        elif "internal error" in text:
            problem = "internal error"
        elif seconds > LONGEST_S:
            problem = "hang"
        elif any((self.cache / "tmp").glob("*")):
            problem = "left in tmp/"
        elif kind == "cache" and code:
            problem = "not mended"
        elif problem is None:
            problem = "" if code in _CODES else f"exit code {code}"
        return Outcome(kind, shlex.join(arguments)[:300], code, seconds, f"{problem}: {text[-300:]}" if problem else "")


def damage(file: Path, rng: random.Random) -> None:
    """Bit flips, a cut, bytes of another kind, or, in JSON, another value somewhere."""
    data = bytearray(file.read_bytes())
    way = rng.choice(["flip", "flip", "cut", "fill", "value", "value"])
    if way == "value":
        try:
            value = _changed(json.loads(data), rng)
        except (ValueError, RecursionError):
            way = "flip"
        else:
            file.write_text(json.dumps(value))
            return
    if way == "cut" or not data:
        del data[rng.randint(0, len(data)) :]
    elif way == "fill":
        at = rng.randrange(len(data))
        data[at : at + 64] = bytes([rng.choice([0, 255, 65])]) * len(data[at : at + 64])
    else:
        near = min(len(data), rng.choice([16, 600, len(data)]))  # headers matter most
        for _ in range(rng.randint(1, 4)):
            data[rng.randrange(near)] ^= 1 << rng.randrange(8)
    file.write_bytes(data)


def _changed(value: Any, rng: random.Random) -> Any:
    """The JSON value with one part replaced or left out."""
    if isinstance(value, dict | list) and value and rng.random() < 0.85:
        keys = list(value) if isinstance(value, dict) else range(len(value))
        key = rng.choice(list(keys))
        if rng.random() < 0.2:
            return (
                {k: v for k, v in value.items() if k != key}
                if isinstance(value, dict)
                else value[:key] + value[key + 1 :]
            )
        copy: Any = dict(value) if isinstance(value, dict) else list(value)
        copy[key] = _changed(copy[key], rng)
        return copy
    return rng.choice(
        [None, True, 0, -1, 1, 2, 7, 1.5, 1e300, 1 << 40, "", "x", "a" * 2000, [], {}, [[]], [1], {"a": 1}]
    )
