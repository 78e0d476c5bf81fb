"""The options of `generate` and `chat`, and what they ask for, checked as far as that goes without the model."""

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, final

import click

from mtp_engine.cli.options import build, setting, settings
from mtp_engine.cli.output import JsonTarget, console
from mtp_engine.cli.record import Record
from mtp_engine.config import DEFAULT_MODEL, EngineConfig, SamplingParams, Structure, TreeShape
from mtp_engine.errors import EngineError
from mtp_engine.text.tool_calls import call_schema

PROMPT = settings(
    click.argument("prompt", required=False),
    click.option("--prompt-file", metavar="FILE", help="Take the prompt from FILE, all of it but a final newline."),
    click.option("--chat/--raw", default=None, help="Use the model's chat template, or not.  [default: if it has one]"),
    click.option(
        "--from",
        "earlier",
        metavar="FILE",
        help="Repeat the answer that --json FILE recorded, with what else is given here changed.",
    ),
)
MESSAGES = settings(
    click.option(
        "--thinking/--no-thinking",
        default=None,
        help="Let a model that can think do so first (implies --chat); thoughts are dimmed on a terminal.  "
        "[default: the template's]",
    ),
    click.option("--system", metavar="TEXT", help="A system message in front of the prompt (implies --chat)."),
)
SAMPLING = settings(
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
STRUCTURE = settings(
    click.option("--json-schema", metavar="FILE", help="The answer must match this JSON schema (extra `grammar`)."),
    click.option("--regex", metavar="REGEX", help="The answer must match this regular expression."),
    click.option("--grammar", metavar="FILE", help="The answer must match this Lark/EBNF grammar."),
    click.option("--tools", metavar="FILE", help="The answer must be a call of one of these tools, as JSON."),
)
_COUNT = click.IntRange(min=0)
ENGINE = settings(
    click.option(
        "--model", default=DEFAULT_MODEL, metavar="NAME|PATH", help="A name, folder, .gguf file, or org/name."
    ),
    click.option("--mtp", metavar="DIR", help="A folder of MTP layers to use instead of the model's own."),
    setting(EngineConfig, "drafter", "Who drafts: MTP layers, prompt lookup, or nobody (plain decoding)."),
    setting(
        EngineConfig,
        "tree",
        "What is drafted per step: chain:K, widths per depth such as 4x2x2, tree:N nodes, or auto: what pays, step by step.",
        kind=str,
        unset="suits the drafter",
    ),
    setting(EngineConfig, "verifier", "The rule that keeps drafts; all but match keep the distribution, not the text."),
    click.option("--allow-lossy", is_flag=True, help="Let a lossy --verifier run."),
    setting(
        EngineConfig,
        "draft_vocab",
        "Most frequent tokens that MTP layers may propose; 0 is all.",
        kind=_COUNT,
        unset="8192 in int8, else 16384",
    ),
    setting(EngineConfig, "device", "cpu, cuda, cuda:1, ...; auto takes the GPU if there is one."),
    setting(
        EngineConfig,
        "dtype",
        "Number format of weights and cache; auto is bf16 on a GPU and int8 on a CPU; int8 is for CPUs.",
    ),
    setting(EngineConfig, "attention", "On a GPU: the same bits in every tree and batch, FlashInfer, or plain torch."),
    setting(EngineConfig, "steps_in_flight", "Steps queued on a GPU before the first one's tokens are looked at."),
    setting(EngineConfig, "threads", "CPU threads; 0 is one per core.", kind=_COUNT),
    click.option("--dequantize", is_flag=True, help="Turn FP8 weights into --dtype when loading."),
    setting(EngineConfig, "experts", "Hold the experts of a mixture in 4 bits (int4), or as the other weights are."),
    setting(
        EngineConfig,
        "window_keys",
        "Keys a sliding-window query sees, itself included.",
        kind=_COUNT,
        unset="the model's own",
    ),
    setting(
        EngineConfig,
        "tensor_parallel",
        "Processes that share the model, one per GPU; on a CPU several share its threads.",
        kind=click.IntRange(1),
    ),
    setting(EngineConfig, "max_context", "Tokens of prompt and answer; 0 is the model's own limit.", kind=_COUNT),
)
COLOUR = click.option("--color-drafts", is_flag=True, help="Colour accepted drafts green (if stdout is a terminal).")
EXPLAIN = click.option(
    "--explain", is_flag=True, help="Say what the statistics mean, as is done the first time on a terminal."
)
OUTPUT = settings(
    click.option(
        "--json",
        "json_file",
        metavar="FILE",
        help="Write answer, statistics and all that it takes to repeat them as JSON; - for stdout, without the text.",
    ),
    click.option("-q", "--quiet", is_flag=True, help="Only the text: no progress, no statistics."),
    COLOUR,
    EXPLAIN,
    click.option(
        "--compare",
        type=click.Choice(["full", "sample", "off"]),
        default=None,
        help="Decode again, plainly and drafted in turns: all of it, checking that tokens are identical, or for some seconds.  "
        "[default: sample, but off where --quiet is given without --json]",
    ),
)
_CHANGES_NOTHING = {"earlier", "json_file", "quiet", "color_drafts", "explain", "compare", "threads"}
_STRUCTURES = ("json_schema", "regex", "grammar", "tools")


@final
@dataclass(frozen=True)
class Job:
    """One checked command line of `generate`. expected: the tokens of the earlier answer that it must repeat, if any."""

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
    explain: bool
    compare: Literal["full", "sample", "off"]
    expected: tuple[int, ...] | None = None

    @property
    def streams(self) -> bool:
        """Whether the text goes to stdout."""
        return self.json is None or self.json.path is not None

    @classmethod
    def read(cls, options: Mapping[str, Any], given: frozenset[str]) -> "Job":
        """given: the options that the user gave. Raises EngineError or a usage error."""
        record = Record.read(options["earlier"]) if options["earlier"] is not None else None
        o = {**options, **record.options(given)} if record else dict(options)
        if o["system"] is not None and o["chat"] is False:
            raise click.UsageError("--system needs a chat template and cannot go with --raw")
        if o["thinking"] is not None and o["chat"] is False:
            raise click.UsageError("--thinking and --no-thinking need a chat template and cannot go with --raw")
        structure = _structure(options) if given & set(_STRUCTURES) or not record else record.structure()
        params, config = sampling(o, structure), engine_config(o)
        target = None if o["json_file"] is None else JsonTarget.check(o["json_file"])
        compare = o["compare"] or ("off" if o["quiet"] and not target else "sample")
        text = _text(o["prompt"], o["prompt_file"])
        expected = tuple(record.token_ids) if record and not given - _CHANGES_NOTHING else None
        return build(
            cls, {**o, "compare": compare}, text=text, params=params, config=config, json=target, expected=expected
        )


def given_options() -> frozenset[str]:
    """The options of the running command that the user gave."""
    context = click.get_current_context()
    told = click.core.ParameterSource.COMMANDLINE
    return frozenset(name for name in context.params if context.get_parameter_source(name) is told)


def sampling(options: Mapping[str, Any], structure: Structure | None = None) -> SamplingParams:
    """Raises EngineError for values out of range."""
    return build(SamplingParams, {**options, "tree": None}, structure=structure)  # tree is the engine's


def engine_config(options: Mapping[str, Any]) -> EngineConfig:
    """Of an engine for one request at a time. Raises EngineError for values out of range."""
    tree = None if options["tree"] is None else TreeShape.parse(options["tree"])
    return build(EngineConfig, {**options, "tree": tree, "max_batch": 1})


def _structure(options: Mapping[str, Any]) -> Structure | None:
    """What the answer must match. Raises EngineError for what is empty, cannot be read, or is given twice."""
    named = [name for name in _STRUCTURES if options[name] is not None]
    if len(named) > 1:
        raise click.UsageError(
            "an answer can match one of --json-schema, --regex, --grammar and --tools: give exactly one"
        )
    texts = {name: _required(name, options[name]) for name in named}
    if "json_schema" in texts:
        _json(texts["json_schema"], options["json_schema"])
    if "tools" in texts:
        file = options["tools"]
        try:
            texts["json_schema"] = json.dumps(call_schema(_json(texts.pop("tools"), file)))
        except (ValueError, RecursionError) as error:
            raise EngineError(f"{file}: not a JSON list of tools: {error}") from error
    given: dict[str, Any] = {name.removesuffix("_schema"): text for name, text in texts.items()}
    return Structure(**given) if given else None


def _required(name: str, value: str) -> str:
    """The text of a structure; an empty one would ask for nothing."""
    text = value if name == "regex" else _decode(_read(value, name), value)
    if not text.strip():
        raise EngineError(f"--{name.replace('_', '-')} {value!r} is empty: the answer could be anything; leave it out")
    return text


def _json(text: str, file: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise EngineError(f"{file}: not JSON: {error}") from error


def _text(prompt: str | None, file: str | None) -> str:
    """The prompt, from wherever it is to come. Raises EngineError if it is empty, unreadable or not UTF-8."""
    if (prompt is None) == (file is None):
        raise click.UsageError("give one prompt: PROMPT, - for stdin, or --prompt-file FILE")
    if file is not None:
        text = _decode(_read(file), file)
    elif prompt == "-":
        if sys.stdin.isatty():
            console(stderr=True).print("reading the prompt from the terminal: end it with Ctrl-D on a line of its own")
        text = _decode(sys.stdin.buffer.read(), "stdin")
    else:
        text = str(prompt)
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
        raise EngineError(f"{source}: byte {error.start} is not UTF-8 text; convert it to UTF-8") from None
