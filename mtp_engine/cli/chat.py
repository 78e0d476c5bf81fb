"""`mtp-engine chat`: a conversation, turn by turn."""

import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any, final

import click

from mtp_engine.cli import answer as answers
from mtp_engine.cli import request
from mtp_engine.cli.answer import Said, stream_answer
from mtp_engine.cli.exits import Terminated
from mtp_engine.cli.options import settings
from mtp_engine.cli.output import TextWriter, console, note, one_line, show
from mtp_engine.cli.progress import Waits
from mtp_engine.cli.report import legend, statistics
from mtp_engine.config import SamplingParams
from mtp_engine.errors import EngineError

if TYPE_CHECKING:
    from mtp_engine.engine import Engine
    from mtp_engine.runtime.answer import Generation

_HELP = """/reset       forget what was said, but for the system message
/stats       what the last answer drafted, and how long it took
/seed [N]    use seed N from now on; alone: draw one for each answer again
/help        this
Ctrl-C ends an answer, which stays as far as it came. Ctrl-D or /quit ends the conversation."""
_OPTIONS = settings(
    click.option("--system", metavar="TEXT", help="A system message in front of the conversation."),
    request.COLOUR,
    request.EXPLAIN,
    click.option("-q", "--quiet", is_flag=True, help="Only the answers: no progress, no statistics."),
)


@click.command()
@_OPTIONS
@request.SAMPLING
@request.ENGINE
def chat(color_drafts: bool, quiet: bool, explain: bool, system: str | None, **options: Any) -> None:
    """Talk with the model: each line is a turn, and the model sees all turns before it.

    Lines may come from a pipe, too. /help lists what else a line can be.

    \b
    Examples:
      mtp-engine chat
      mtp-engine chat --system "You are a pirate." --temperature 0.8 --color-drafts
      printf 'My name is Ada.\\nWhat is my name?\\n' | mtp-engine chat --quiet
    """
    params, config = request.sampling(options), request.engine_config(options)
    with Waits(quiet=quiet) as waits:
        engine = answers.load_engine(options["model"], config, options["mtp"], waits)
        waits.close()
        if not engine.tokenizer.has_chat_template:
            raise EngineError(f"{options['model']} has no chat template: use mtp-engine generate")
        if not quiet:
            note(f"{options['model']} on {engine.device_note}; /help lists the commands, Ctrl-D ends")
        conversation = Conversation(engine, params, system)
        _Talk(conversation, waits, colour=color_drafts, quiet=quiet, explain=explain).run()


@final
class Conversation:
    """What was said so far, and how the next answer is decoded."""

    def __init__(self, engine: "Engine", params: SamplingParams, system: str | None = None) -> None:
        self.engine, self.params = engine, params
        self._system = [] if system is None else [{"role": "system", "content": system}]
        self.messages = list(self._system)
        self.last: Generation | None = None

    def ask(
        self, text: str, writer: TextWriter | None, begin: Callable[[], None], *, by_token: bool = False
    ) -> "Generation":
        """Answer `text`. An interrupted answer stays in the history as far as it came; of one that failed nothing does.

        Raises EngineError or KeyboardInterrupt.
        """
        said, before = Said(), list(self.messages)
        self.messages.append({"role": "user", "content": text})
        try:
            self.last = stream_answer(
                self.engine, self.messages, self.params, writer, said, by_token=by_token, begin=begin
            )
        except KeyboardInterrupt:
            self.messages.append({"role": "assistant", "content": said.text})
            raise
        except BaseException:
            self.messages = before
            raise
        self.messages.append({"role": "assistant", "content": self.last.text})
        return self.last

    def reset(self) -> None:
        """Forget all but the system message."""
        self.messages, self.last = list(self._system), None


@final
class _Talk:
    """Reads lines, and answers or obeys them."""

    def __init__(self, conversation: Conversation, waits: Waits, *, colour: bool, quiet: bool, explain: bool) -> None:
        self._conversation, self._waits = conversation, waits
        self._colour, self._quiet, self._explain = colour, quiet, explain

    def run(self) -> None:
        for line in _lines():
            text = line.strip()
            if text in ("/quit", "/exit"):
                return
            if text.startswith("/"):
                self._obey(text)
            elif text:
                self._answer(line)

    def _answer(self, text: str) -> None:
        self._waits.close()
        if not self._quiet:
            self._waits("reading", 0, None)
        writer = TextWriter(colour=self._colour)
        try:
            answer = self._conversation.ask(text, writer, self._waits.close, by_token=self._colour)
        except Terminated:
            raise
        except KeyboardInterrupt:
            note("interrupted; the answer stays as far as it came")
        except EngineError as error:
            self._waits.close()
            note(f"error: {one_line(str(error))}; /reset begins anew")
        else:
            stats = answer.stats
            if not self._quiet:
                note(
                    f"{stats.tokens} tokens, {stats.mean_accepted_length:.2f} a step, {stats.tokens_per_s:.1f} a second"
                )

    def _obey(self, text: str) -> None:
        command, _, value = text.partition(" ")
        if command == "/reset":
            self._conversation.reset()
            note("what was said is forgotten")
        elif command == "/stats":
            self._show_stats()
        elif command == "/seed":
            self._set_seed(value.strip())
        elif command == "/help":
            note(_HELP)
        else:
            note(f"error: {one_line(command)} is no command; /help lists them")

    def _show_stats(self) -> None:
        answer, rule = self._conversation.last, self._conversation.engine.config.verifier
        if answer is None:
            note("there is no whole answer yet")
            return
        show(statistics(answer.stats, answer.finish_reason, rule), console(stderr=True))
        for line in legend(asked=self._explain):
            note(line)

    def _set_seed(self, value: str) -> None:
        try:
            self._conversation.params = replace(self._conversation.params, seed=int(value) if value else None)
        except (ValueError, EngineError) as error:
            reason = str(error) if isinstance(error, EngineError) else f"{value!r} is no whole number"
            note(f"error: {one_line(reason)}")
        else:
            note(f"seed {value}" if value else "a seed is drawn for each answer")


def _lines() -> Iterator[str]:
    """What the user enters, line by line, until the end of input. On a terminal with line editing and a history."""
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        for data in sys.stdin.buffer:
            yield data.decode("utf-8", "replace").rstrip("\r\n")
        return
    from prompt_toolkit import PromptSession

    session: PromptSession[str] = PromptSession("> ")
    with suppress(EOFError):
        while True:
            try:
                yield session.prompt()
            except Terminated:
                raise
            except KeyboardInterrupt:  # an entry that is dropped
                continue
