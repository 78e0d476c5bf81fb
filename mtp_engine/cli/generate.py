"""`mtp-engine generate`: one prompt in, the answer on stdout as it is committed, statistics on stderr."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

import click

from mtp_engine.cli import answer as answers
from mtp_engine.cli import request
from mtp_engine.cli.answer import AnswerFailed, Said, stream_answer
from mtp_engine.cli.exits import DIFFERENT, INCOMPLETE, interrupt_code
from mtp_engine.cli.output import TextWriter, console, note, show
from mtp_engine.cli.progress import Waits
from mtp_engine.cli.record import document
from mtp_engine.cli.report import legend, statistics, verdict
from mtp_engine.cli.request import Job
from mtp_engine.hub import hub
from mtp_engine.text.tool_calls import THINK

if TYPE_CHECKING:
    from mtp_engine.engine import Engine, Prompt
    from mtp_engine.runtime.answer import Generation


@click.command()
@request.PROMPT
@request.MESSAGES
@request.SAMPLING
@request.STRUCTURE
@request.ENGINE
@request.OUTPUT
def generate(**options: Any) -> None:
    """Answer PROMPT, or what stdin holds if PROMPT is -.

    The text goes to stdout as it is committed, a newline after it, and everything else to stderr. Exit code 3: the answer
    was cut off before it matched its structure. 4: --compare full or --from found other tokens than there must be.

    \b
    Examples:
      mtp-engine generate "Explain why the sky is blue."
      mtp-engine generate --raw --temperature 0.8 --seed 7 "Once upon a time"
      mtp-engine generate --tree 4x2x2 --compare full --color-drafts "What is the capital of France?"
      git diff | mtp-engine generate --system "Summarise this change." -
      mtp-engine generate --temperature 1 --json-schema person.json "Invent a person."
      mtp-engine generate --prompt-file question.txt --json answer.json --quiet > answer.txt
      mtp-engine generate --from answer.json
      mtp-engine generate --json - "Hello" | jq .stats.mean_accepted_length
      mtp-engine generate -- "-1 is a prompt that starts with a dash"
    """
    if code := _run(Job.read(options, request.given_options())):
        raise click.exceptions.Exit(code)


def _run(job: Job) -> int:
    """The exit code."""
    with Waits(quiet=job.quiet) as waits:
        engine = answers.load_engine(job.model, job.config, job.mtp, waits)
        waits.close()
        if not job.quiet:
            note(f"{job.model} on {engine.device_note}")
        chat = _chats(engine, job)
        prompt = _prompt(engine, job, chat)
        engine, answer = _answer_or_mend(engine, prompt, job, waits)
        stopped: KeyboardInterrupt | None = None
        if job.compare != "off":
            waits("comparing with plain decoding", 0, None)
            try:
                engine.compare(prompt, job.params, answer, full=job.compare == "full")
            except KeyboardInterrupt as error:
                stopped = error
    if job.json and not stopped:
        job.json.write(document(engine, job, answer, chat=chat))
    if not job.quiet:
        rule = engine.config.verifier
        show(statistics(answer.stats, answer.finish_reason, rule), console(stderr=True))
        for line in _notes(job, interrupted=stopped is not None):
            note(line)
    return interrupt_code(stopped) if stopped else _judge(engine, job, answer)


def _judge(engine: "Engine", job: Job, answer: "Generation") -> int:
    """Warn of what the text itself does not show; the exit code."""
    code = 0
    if not answer.complete:
        cut = f"--max-tokens {job.params.max_tokens}" if answer.finish_reason == "length" else "a stop"
        note(f"warning: the answer was cut off by {cut} before it matched its structure")
        code = INCOMPLETE
    if answer.stats.identical_to_plain is False and engine.config.verifier == "match":
        note(f"warning: {verdict(answer.stats, engine.config.verifier)}")
        code = DIFFERENT
    if job.expected is not None:
        same = list(job.expected) == answer.token_ids
        if not (same and job.quiet):
            note("the same tokens as recorded" if same else "warning: DIFFERENT TOKENS from those recorded")
        code = code if same else DIFFERENT
    return code


def _chats(engine: "Engine", job: Job) -> bool:
    if job.chat is not None:
        return job.chat
    return job.system is not None or job.thinking is not None or engine.tokenizer.has_chat_template


def _prompt(engine: "Engine", job: Job, chat: bool) -> "Prompt":
    if not chat:
        return job.text
    system = [] if job.system is None else [{"role": "system", "content": job.system}]
    messages = [*system, {"role": "user", "content": job.text}]
    if job.thinking is None:
        return messages
    return engine.tokenizer.chat(messages, enable_thinking=job.thinking)


def _starts_in_thought(engine: "Engine", prompt: "Prompt", job: Job) -> bool:
    """Whether the template opened the thoughts itself."""
    if not job.thinking:
        return False
    ids = cast(Sequence[int], prompt)
    return engine.tokenizer.decode(ids[-8:], skip_special=False).rstrip().endswith(THINK)


def _answer_or_mend(engine: "Engine", prompt: "Prompt", job: Job, waits: Waits) -> tuple["Engine", "Generation"]:
    """The answer, and the engine that gave it: another one where the first failed at once because its files are damaged."""
    try:
        waits("reading the prompt", 0, None)
        return engine, _answer(engine, prompt, job, waits)
    except AnswerFailed:
        if not hub.discard_damaged(engine.tokenizer.folder, waits):
            raise
    note("warning: the model's files in the cache were damaged; they are made again")
    engine = answers.load_engine(job.model, job.config, job.mtp, waits)
    waits("reading the prompt", 0, None)
    return engine, _answer(engine, prompt, job, waits)


def _answer(engine: "Engine", prompt: "Prompt", job: Job, waits: Waits) -> "Generation":
    """Stream the answer to stdout. Leaves with exit code 130 on Ctrl-C, what was committed being out already."""
    writer = (
        TextWriter(colour=job.color_drafts, thinking=_starts_in_thought(engine, prompt, job)) if job.streams else None
    )
    said = Said()
    try:
        return stream_answer(engine, prompt, job.params, writer, said, by_token=job.color_drafts, begin=waits.close)
    except KeyboardInterrupt as error:
        if not job.quiet:
            note(f"interrupted: {said}")
        raise click.exceptions.Exit(interrupt_code(error)) from None


def _notes(job: Job, *, interrupted: bool) -> list[str]:
    notes = legend(asked=job.explain)
    if job.color_drafts and job.streams:
        notes.append("green: accepted drafts")
    return [*notes, "interrupted while comparing with plain decoding"] if interrupted else notes
