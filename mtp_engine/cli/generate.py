"""`mtp-engine generate`: one prompt in, the answer on stdout as it is committed, statistics on stderr."""

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast, final

import click

from mtp_engine.cli.options import build, setting, settings
from mtp_engine.cli.output import JsonTarget, TextWriter, console
from mtp_engine.cli.progress import Waits
from mtp_engine.cli.report import statistics
from mtp_engine.config import DEFAULT_MODEL, SAMPLE_STEPS, EngineConfig, SamplingParams, Structure, TreeShape
from mtp_engine.errors import EngineError
from mtp_engine.text.tool_calls import THINK, call_schema

if TYPE_CHECKING:
    from mtp_engine.engine import Engine, Prompt
    from mtp_engine.protocols import Progress
    from mtp_engine.runtime.answer import Generation

_PROMPT = settings(
    click.argument("prompt", required=False),
    click.option("--prompt-file", metavar="FILE", help="Take the prompt from FILE, all of it but a final newline."),
    click.option("--chat/--raw", default=None, help="Use the model's chat template, or not.  [default: if it has one]"),
    click.option(
        "--thinking/--no-thinking",
        default=None,
        help="Let a model that can think do so first (implies --chat); thoughts are dimmed on a terminal.  "
        "[default: the template's]",
    ),
    click.option("--system", metavar="TEXT", help="A system message in front of the prompt (implies --chat)."),
)
_SAMPLING = settings(
    setting(SamplingParams, "max_tokens", "Stop after this many tokens."),
    setting(SamplingParams, "temperature", "0 is greedy."),
    setting(SamplingParams, "top_k", "Keep the k most probable tokens; 0 is off."),
    setting(SamplingParams, "top_p", "Keep the most probable tokens up to this probability mass; 1 is off."),
    setting(SamplingParams, "min_p", "Keep tokens with at least this share of the largest probability; 0 is off."),
    setting(SamplingParams, "repetition_penalty", "Divide logits of tokens that prompt or answer hold; 1 is off."),
    setting(SamplingParams, "frequency_penalty", "Subtract this for each time that the answer holds a token."),
    setting(SamplingParams, "presence_penalty", "Subtract this once for each token that the answer holds."),
    setting(SamplingParams, "min_tokens", "Do not end before this many tokens."),
    click.option("--stop", multiple=True, metavar="TEXT", help="End before this text; may be given several times."),
    click.option("--bad-word", "bad_words", multiple=True, metavar="TEXT", help="Never write this; several times."),
    setting(
        SamplingParams,
        "seed",
        "The same seed gives the same tokens, however drafted.",
        kind=int,
        unset="drawn, and shown",
    ),
)
_STRUCTURE = settings(
    click.option("--json-schema", metavar="FILE", help="The answer must match this JSON schema (extra `grammar`)."),
    click.option("--regex", metavar="REGEX", help="The answer must match this regular expression."),
    click.option("--grammar", metavar="FILE", help="The answer must match this Lark/EBNF grammar."),
    click.option("--tools", metavar="FILE", help="The answer must be a call of one of these tools, as JSON."),
)
_COUNT = click.IntRange(min=0)
_ENGINE = settings(
    click.option(
        "--model", default=DEFAULT_MODEL, metavar="NAME|PATH", help="A name, folder, .gguf file, or org/name."
    ),
    click.option("--mtp", metavar="DIR", help="A folder of MTP layers to use instead of the model's own."),
    setting(EngineConfig, "drafter", "Who drafts: MTP layers, prompt lookup, or nobody (plain decoding)."),
    setting(
        EngineConfig,
        "tree",
        "What is drafted per step: chain:K, widths per depth such as 4x2x2, or tree:N nodes.",
        kind=str,
        unset="suits the drafter",
    ),
    setting(EngineConfig, "verifier", "The rule that keeps drafts; all but match keep the distribution, not the text."),
    click.option("--allow-lossy", is_flag=True, help="Let a lossy --verifier run."),
    setting(EngineConfig, "draft_vocab", "Most frequent tokens that MTP layers may propose; 0 is all.", kind=_COUNT),
    setting(EngineConfig, "device", "cpu or cuda."),
    setting(EngineConfig, "dtype", "Number format of weights and cache; auto is bf16 on a GPU, fp32 on a CPU."),
    setting(EngineConfig, "attention", "On a GPU: the same bits in every tree and batch, FlashInfer, or plain torch."),
    setting(EngineConfig, "steps_in_flight", "Steps queued on a GPU before the first one's tokens are looked at."),
    setting(EngineConfig, "threads", "CPU threads; 0 is one per core.", kind=_COUNT),
    click.option("--dequantize", is_flag=True, help="Turn FP8 weights into --dtype when loading."),
    setting(
        EngineConfig,
        "window_keys",
        "Keys a sliding-window query sees, itself included.",
        kind=_COUNT,
        unset="the model's own",
    ),
    setting(EngineConfig, "max_context", "Tokens of prompt and answer; 0 is the model's own limit.", kind=_COUNT),
)
_OUTPUT = settings(
    click.option(
        "--json",
        "json_file",
        metavar="FILE",
        help="Write answer and statistics as JSON; - for stdout, without the text.",
    ),
    click.option("-q", "--quiet", is_flag=True, help="Only the text: no progress, no statistics."),
    click.option("--color-drafts", is_flag=True, help="Colour accepted drafts green (if stdout is a terminal)."),
    click.option(
        "--compare",
        type=click.Choice(["full", "sample", "off"]),
        default="sample",
        help=f"Measure plain decoding afterwards: all of it, checking that tokens are identical, or {SAMPLE_STEPS} steps. "
        "Skipped where --quiet is given without --json.",
    ),
)


@final
@dataclass(frozen=True)
class _Job:
    """One checked command line."""

    model: str
    mtp: str | None
    text: str
    chat: bool | None
    thinking: bool | None
    system: str | None
    params: SamplingParams
    config: EngineConfig
    json: JsonTarget | None
    quiet: bool
    color_drafts: bool
    compare: Literal["full", "sample", "off"]

    @property
    def streams(self) -> bool:
        """Whether the text goes to stdout."""
        return self.json is None or self.json.path is not None


@click.command()
@_PROMPT
@_SAMPLING
@_STRUCTURE
@_ENGINE
@_OUTPUT
def generate(**options: Any) -> None:
    """Answer PROMPT, or what stdin holds if PROMPT is -.

    The text goes to stdout as it is committed, a newline after it, and everything else to stderr.

    \b
    Examples:
      mtp-engine generate "Why is the sky blue?"
      mtp-engine generate --raw --temperature 0.8 --seed 7 "Once upon a time"
      mtp-engine generate --tree 4x2x2 --compare full --color-drafts "Count to ten."
      git diff | mtp-engine generate --system "Summarise this change." -
      mtp-engine generate --temperature 1 --json-schema person.json "Invent a person."
      mtp-engine generate --prompt-file question.txt --json answer.json --quiet > answer.txt
      mtp-engine generate --json - "Hello" | jq .stats.mean_accepted_length
      mtp-engine generate -- "-1 is a prompt that starts with a dash"
    """
    _run(_job(options))


def load_engine(name: str, config: EngineConfig, mtp: str | None, progress: "Progress") -> "Engine":
    """Engine.load, imported late: torch takes seconds to import."""
    progress("starting", 0, None)
    from mtp_engine.engine import Engine

    return Engine.load(name, config, mtp=mtp, progress=progress)


def _job(options: Mapping[str, Any]) -> _Job:
    """Everything that can be checked without the model. Raises EngineError or a usage error."""
    if options["system"] is not None and options["chat"] is False:
        raise click.UsageError("--system needs a chat template and cannot go with --raw")
    if options["thinking"] is not None and options["chat"] is False:
        raise click.UsageError("--thinking and --no-thinking need a chat template and cannot go with --raw")
    tree = None if options["tree"] is None else TreeShape.parse(options["tree"])
    params = build(SamplingParams, {**options, "tree": None}, structure=_structure(options))  # tree is the engine's
    config = build(EngineConfig, {**options, "tree": tree}, max_batch=1)
    target = None if options["json_file"] is None else JsonTarget.check(options["json_file"])
    text = _text(options["prompt"], options["prompt_file"])
    return build(_Job, options, text=text, params=params, config=config, json=target)


def _structure(options: Mapping[str, Any]) -> Structure | None:
    """What the answer must match. Raises EngineError for files that cannot be read and more than one of the options."""

    def text(name: str) -> str:
        return _decode(_read(options[name], name), options[name]) if options[name] else ""

    schema = text("json_schema")
    if options["tools"]:
        try:
            schema += json.dumps(call_schema(json.loads(text("tools"))))
        except (ValueError, TypeError, AttributeError, KeyError) as error:
            raise EngineError(f"{options['tools']}: not a JSON list of tools ({error})") from error
    given = {"json": schema, "regex": options["regex"] or "", "grammar": text("grammar")}
    if options["tools"] and options["json_schema"]:
        raise click.UsageError("give one of --tools and --json-schema")
    return Structure(**given) if any(given.values()) else None


def _text(prompt: str | None, file: str | None) -> str:
    """The prompt, from wherever it is to come. Raises EngineError if it is empty, unreadable or not UTF-8."""
    if (prompt is None) == (file is None):
        raise click.UsageError("give one prompt: PROMPT, - for stdin, or --prompt-file FILE")
    if file is not None:
        text = _decode(_read(file), file)
    else:
        text = _decode(sys.stdin.buffer.read(), "stdin") if prompt == "-" else str(prompt)
    if not text:
        raise EngineError("the prompt is empty: give it at least one character")
    return text


def _read(file: str, option: str = "prompt_file") -> bytes:
    try:
        return Path(file).read_bytes()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise EngineError(f"{file}: cannot be read: {reason}; --{option.replace('_', '-')} needs a text file") from None


def _decode(data: bytes, source: str) -> str:
    try:
        return data.decode("utf-8-sig").removesuffix("\n").removesuffix("\r")
    except UnicodeDecodeError as error:
        raise EngineError(f"{source}: byte {error.start} is not UTF-8 text; convert the prompt to UTF-8") from None


def _run(job: _Job) -> None:
    with Waits(quiet=job.quiet) as waits:
        engine = load_engine(job.model, job.config, job.mtp, waits)
        prompt = _prompt(engine, job)
        waits("reading the prompt", 0, None)
        answer = _answer(engine, prompt, job, waits)
        interrupted = False
        if job.compare != "off" and (job.json or not job.quiet):
            waits("comparing with plain decoding", 0, None)
            try:
                engine.compare(prompt, job.params, answer, full=job.compare == "full")
            except KeyboardInterrupt:
                interrupted = True
    if job.json and not interrupted:
        job.json.write(_document(engine, job, answer))
    if not job.quiet:
        console(stderr=True).print(statistics(answer.stats, answer.finish_reason, _notes(job, interrupted)))
    if interrupted:
        raise click.exceptions.Exit(130)


def _prompt(engine: "Engine", job: _Job) -> "Prompt":
    chat = job.chat
    if chat is None:
        chat = job.system is not None or job.thinking is not None or engine.tokenizer.has_chat_template
    if not chat:
        return job.text
    system = [] if job.system is None else [{"role": "system", "content": job.system}]
    messages = [*system, {"role": "user", "content": job.text}]
    if job.thinking is None:
        return messages
    return engine.tokenizer.chat(messages, enable_thinking=job.thinking)


def _starts_in_thought(engine: "Engine", prompt: "Prompt", job: _Job) -> bool:
    """Whether the template opened the thoughts itself."""
    if not job.thinking:
        return False
    ids = cast(Sequence[int], prompt)
    return engine.tokenizer.decode(ids[-8:], skip_special=False).rstrip().endswith(THINK)


def _answer(engine: "Engine", prompt: "Prompt", job: _Job, waits: Waits) -> "Generation":
    """Stream the answer to stdout. Leaves with exit code 130 on Ctrl-C, what was committed being out already."""
    writer = TextWriter(colour=job.color_drafts, thinking=_starts_in_thought(engine, prompt, job))
    decoder = engine.tokenizer.stream()
    answer, tokens, steps = None, 0, 0
    try:
        for chunk in engine.stream([prompt], job.params):
            waits.close()
            tokens, steps, answer = tokens + len(chunk.token_ids), steps + 1, chunk.finished
            if not job.streams:
                continue
            if job.color_drafts and not job.params.stop:  # what a stop string cuts off is no token's text
                for token, drafted in zip(chunk.token_ids, chunk.drafted, strict=True):
                    writer.write(decoder.push([token]), drafted=drafted)
                writer.write(decoder.flush() if answer else "")
            else:
                writer.write(chunk.text)
    except KeyboardInterrupt:
        waits.close()
        if job.streams:
            writer.end()
        if not job.quiet:
            length = f", mean accepted length {tokens / steps:.2f}" if steps else ""
            console(stderr=True).print(f"interrupted: {tokens} tokens in {steps} steps{length}")
        raise click.exceptions.Exit(130) from None
    if job.streams:
        writer.end()
    assert answer is not None, "the engine's stream ended without a last chunk"
    if answer.error:
        raise EngineError(answer.error)
    return answer


def _document(engine: "Engine", job: _Job, answer: "Generation") -> dict[str, Any]:
    """The stable schema of --json."""
    tree = engine.config.tree
    return {
        "model": job.model,
        "drafter": engine.config.drafter,
        "tree": None if tree is None else str(tree),
        "text": answer.text,
        "token_ids": answer.token_ids,
        "finish_reason": answer.finish_reason,
        "stats": answer.stats.to_json(),
    }


def _notes(job: _Job, interrupted: bool) -> list[str]:
    notes = ["green: accepted drafts"] if job.color_drafts and job.streams else []
    return [*notes, "interrupted while comparing with plain decoding"] if interrupted else notes
