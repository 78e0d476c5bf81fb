"""Text to token ids and back, chat templates, and decoding as the tokens come in."""

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any, NoReturn, final

import tokenizers
from jinja2 import TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from mtp_engine.errors import EngineError
from mtp_engine.text.stream import ByteLevelStream, StreamDecoder

_PRIVATE_USE = range(0xF0000, 0xFFFFE)  # plane 15: no meaning outside a private agreement


@final
class Tokenizer:
    """A model's tokenizer, read from a Hugging Face folder.

    `vocab_size` counts the ids the tokenizer knows (the embedding may have more rows). `eos_ids` end a generation:
    those of generation_config.json or else config.json, and the tokenizer's own eos_token.
    """

    def __init__(self, folder: Path, backend: tokenizers.Tokenizer) -> None:
        """Use `Tokenizer.load`. Raises EngineError for a damaged JSON file in `folder`."""
        self.folder = self._folder = folder
        self._backend = backend
        # Special-token strings in text are text: a user must not be able to write control tokens.
        backend.encode_special_tokens = True
        added = backend.get_added_tokens_decoder()
        self._special = {token.content: index for index, token in added.items() if token.special}
        self._special_pattern = _special_pattern(token for token in added.values() if token.special)
        self._settings = _read_json(folder / "tokenizer_config.json")
        names = {
            key: _token_text(self._settings.get(key)) for key in ("bos_token", "eos_token", "pad_token", "unk_token")
        }
        for key, text in names.items():
            if not isinstance(text, str | None):
                raise self._damaged(key, text)
        self._names = {key: text for key, text in names.items() if text is not None}
        self._bos = self._find_bos()
        self.vocab_size: int = backend.get_vocab_size(with_added_tokens=True)
        self.eos_ids: tuple[int, ...] = self._find_eos()

    @classmethod
    def load(cls, folder: Path) -> "Tokenizer":
        """Read tokenizer.json and what lies beside it. Raises EngineError if it is missing or damaged."""
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise EngineError(f"{path}: no such file; the model's folder must hold the tokenizer.json of its model")
        try:
            backend = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the Rust extension raises bare Exception
            raise EngineError(f"{path}: not a tokenizer ({_first_line(error)}); download the file again") from error
        backend.no_truncation()
        backend.no_padding()
        return cls(folder, backend)

    @property
    def has_chat_template(self) -> bool:
        """Whether `chat` can work."""
        return self._template_text is not None

    def template_knows(self, word: str) -> bool:
        """Whether the chat template mentions `word`, such as the variable `tools` or the tag `<think>`."""
        return word in (self._template_text or "")

    def encode(self, text: str) -> list[int]:
        """Token ids of plain text, after BOS where the model wants it. Special-token strings in it stay text."""
        return self._bos + self._plain(text)

    def spellings(self, text: str) -> list[tuple[int, ...]]:
        """Token ids of a piece of text within a longer one: without and with a space in front."""
        bare = text.lstrip()
        return list(dict.fromkeys((tuple(self._plain(bare)), tuple(self._plain(" " + bare)))))

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        """Text of `ids`; bytes that are no UTF-8 become U+FFFD. Special tokens vanish unless `skip_special` is off."""
        return str(self._backend.decode(list(ids), skip_special_tokens=skip_special))

    def stream(self, skip_special: bool = True) -> StreamDecoder | ByteLevelStream:
        """A decoder for ids that arrive a few at a time."""
        if isinstance(self._backend.decoder, tokenizers.decoders.ByteLevel):
            return ByteLevelStream(self._backend, skip_special)
        return StreamDecoder(lambda ids: self.decode(ids, skip_special))

    def chat(
        self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = True, **template_args: Any
    ) -> list[int]:
        """Token ids of a conversation, rendered by the model's chat template.

        `messages` are mappings with role and content; `template_args` go to the template (tools, documents, ...).
        A special-token string is a token where the template wrote it, and text where a message or argument holds it.
        Raises EngineError if there is no template or it fails on these messages.
        """
        # Private-use characters that the input does not hold stand for its special-token strings while it renders.
        taken: set[str] = set()

        def noted(text: str) -> str:
            taken.update(text)
            return text

        _map_strings([list(messages), template_args], noted)
        free = (chr(code) for code in _PRIVATE_USE if chr(code) not in taken)
        hide = dict(zip(sorted(self._special, key=len, reverse=True), free, strict=False))
        show = str.maketrans({mark: text for text, mark in hide.items()})
        pattern = re.compile("|".join(map(re.escape, hide)) or "(?!)")

        def hidden(value: Any) -> Any:
            return _map_strings(value, lambda text: pattern.sub(lambda match: hide[match[0]], text))

        given = {"tools": None, "documents": None, **self._names, **hidden(template_args)}
        rendered = self._render(
            {**given, "messages": hidden(list(messages)), "add_generation_prompt": add_generation_prompt}
        )
        ids: list[int] = []
        end = 0
        for match in self._special_pattern.finditer(rendered):
            ids += self._plain(rendered[end : match.start()].translate(show))
            ids.append(self._special[match[0] if match[0] in self._special else match[0].strip()])
            end = match.end()
        return ids + self._plain(rendered[end:].translate(show))

    def _plain(self, text: str) -> list[int]:
        try:
            return list(self._backend.encode(text, add_special_tokens=False).ids)
        except (TypeError, UnicodeEncodeError) as error:
            raise EngineError("the text holds half of a surrogate pair, which is no character; remove it") from error

    def _render(self, values: dict[str, Any]) -> str:
        try:
            return str(self._template.render(values))
        except EngineError:
            raise
        except Exception as error:  # a template is a program of the model's author: anything can come out of it
            message = f"the chat template cannot render these messages ({_first_line(error)})"
            raise EngineError(f"{self._folder}: {message}; check roles and contents") from error

    @cached_property
    def _template_text(self) -> str | None:
        path = self._folder / "chat_template.jinja"
        if path.is_file():
            try:
                return path.read_text(encoding="utf-8")
            except UnicodeDecodeError as error:
                raise EngineError(f"{path}: byte {error.start} is not UTF-8 text; download the file again") from error
        stored = self._settings.get("chat_template")
        if isinstance(stored, list):  # older folders name several; "default" is the one for conversations
            found = [each for each in stored if isinstance(each, dict) and each.get("name") == "default"]
            stored = found[0].get("template") if found else None
        if not isinstance(stored, str | None):
            raise self._damaged("chat_template", stored)
        return stored

    @cached_property
    def _template(self) -> Any:
        if self._template_text is None:
            raise EngineError(f"{self._folder}: the model has no chat template; give it plain text instead of messages")
        try:
            return _environment().from_string(self._template_text)
        except TemplateError as error:
            problem = _first_line(error)
            raise EngineError(f"{self._folder}: the chat template is not valid Jinja ({problem}); repair it") from error

    def _damaged(self, key: str, value: Any) -> EngineError:
        return EngineError(
            f"{self._folder / 'tokenizer_config.json'}: {key} is {value!r}, not a text; download the file again"
        )

    def _find_bos(self) -> list[int]:
        """[BOS] or []: tokenizer_config.json decides, or else what tokenizer.json puts before an empty text."""
        bos = self._special.get(self._names.get("bos_token", ""))
        if bos is None:
            return []
        wanted = self._settings.get("add_bos_token")
        if wanted is None:
            wanted = bos in self._backend.encode("").ids
        return [bos] if wanted else []

    def _find_eos(self) -> tuple[int, ...]:
        stored = _read_json(self._folder / "generation_config.json").get("eos_token_id")
        if stored is None:
            stored = _read_json(self._folder / "config.json").get("eos_token_id")
        ids = [] if stored is None else list(stored) if isinstance(stored, list) else [stored]
        if not all(type(index) is int for index in ids):
            raise EngineError(
                f"{self._folder}: eos_token_id is {stored!r}, not a token's number; download its JSON files again"
            )
        own = self._backend.token_to_id(self._names.get("eos_token", ""))
        return tuple(dict.fromkeys(ids if own is None else [*ids, own]))


@final
class _GenerationTag(Extension):
    """`{% generation %}` marks the assistant's words for training; here its body is just rendered."""

    tags = {"generation"}  # noqa: RUF012 (jinja2's own declaration)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _environment() -> ImmutableSandboxedEnvironment:
    """The environment that chat templates are written for, as transformers sets it up."""
    extensions = [_GenerationTag, loopcontrols]
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
    environment.filters["tojson"] = _to_json  # jinja2's own escapes HTML
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> NoReturn:
    raise TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


def _special_pattern(tokens: Iterable[tokenizers.AddedToken]) -> re.Pattern[str]:
    """Matches any special token, longest first, with the white space that it swallows by its own settings."""
    longest_first = sorted(tokens, key=lambda token: len(token.content), reverse=True)
    space = {True: r"\s*", False: ""}
    parts = [space[token.lstrip] + re.escape(token.content) + space[token.rstrip] for token in longest_first]
    return re.compile("|".join(parts) or "(?!)")


def _map_strings(value: Any, change: Callable[[str], str]) -> Any:
    """A copy of nested mappings and lists with every string changed, keys too: templates write those out as JSON."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {_map_strings(key, change): _map_strings(item, change) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_map_strings(item, change) for item in value]
    return value


def _token_text(value: Any) -> str | None:
    """A token in tokenizer_config.json: its text, an object with it as content, or null."""
    return value.get("content") if isinstance(value, dict) else value


def _read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file, empty if there is none. Raises EngineError if it is damaged."""
    if not path.is_file():
        return {}
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError, RecursionError) as error:
        raise EngineError(f"{path}: not a JSON object ({_first_line(error)}); download the file again") from error


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
