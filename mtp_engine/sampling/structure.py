"""Structured output through llguidance (MIT, no dependencies of its own; extra `grammar`).

Chosen over xgrammar (Apache-2.0), which brings transformers, pydantic, triton and apache-tvm-ffi along.
"""

import json
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor

from mtp_engine.config import Structure
from mtp_engine.errors import EngineError
from mtp_engine.sampling.matchers import Matchers

_LONGEST_REASON = 300  # characters
_KEPT = 64  # compiled structures
_LONGEST_END = 256  # tokens that are tried to close an answer
# Sets of tokens that are let through as a whole where all of them may follow: characters of a JSON string, up to so many.
# llguidance has {1,10}, {1,30} and all; in a string with a maxLength each step between halves what is tried one by one.
_SLICES = [
    r"[\x20\x0A\x0D\x09]+",
    *(rf'[^"\\\x00-\x1F\x7F]{{1,{most}}}' for most in (3, 6, 10, 16, 30)),
    r'[^"\\\x00-\x1F\x7F]+',
]
_RENEWED = 1000  # answers after which structures are compiled anew
_LEFT_OUT = 3  # tokens of a known way that another token may have stood for
_SPARE = 24  # tokens kept for what a free choice may open, before an answer is closed


@final
class Grammars:
    """Compiles structures for one tokenizer."""

    def __init__(self, folder: Path, vocab: int, eos: Sequence[int]) -> None:
        """folder: holds tokenizer.json. vocab: rows of the model's head. eos: tokens that may end a complete answer."""
        self._folder, self._vocab, self._eos, self._started = folder, vocab, tuple(eos), 0
        self._tokenizer: Any = None
        self._compiled = lru_cache(_KEPT)(self._compile)
        self._closers = lru_cache(_KEPT)(self._closer)

    def start(self, structure: Structure) -> "GrammarState":
        """A fresh answer's state. Raises EngineError if llguidance is missing or does not accept the structure.

        Copies share a lexer, and with it what each has found out; what that holds does not grow for ever.
        """
        self._started += 1
        if self._started % _RENEWED == 0:
            self._compiled.cache_clear()
        matcher = self._compiled(replace(structure, within=0)).deep_copy()
        ends = structure.json and structure.within
        closer, look = self._closers(structure) if ends else (None, None)
        return GrammarState(Matchers(matcher, frozenset(self._eos)), self._vocab, closer, look)

    def _closer(self, structure: Structure) -> "tuple[Closer, Look | None]":
        """For all answers to it, with what it says at their beginning: that takes longest, and nobody is held up by it here."""
        closer, look = Closer(self._tokenizer, structure.within, self._tokenizer.eos_token), None
        with suppress(Exception):  # an answer will meet it, too
            look = closer.look(self._compiled(replace(structure, within=0)), 0, (), taken=False)
        return closer, look

    def _compile(self, structure: Structure) -> Any:
        """A matcher."""
        try:
            import llguidance
        except ImportError:
            raise EngineError("structured output needs llguidance: pip install 'mtp-engine[grammar]'") from None
        if self._tokenizer is None:
            path = self._folder / "tokenizer.json"
            try:
                self._tokenizer = llguidance.LLTokenizer(
                    str(path), n_vocab=self._vocab, eos_token=list(self._eos), slices=_SLICES
                )
            except ValueError as error:
                raise EngineError(f"{path}: llguidance cannot use it: {' '.join(str(error).split())}") from error
        try:
            source = _source(llguidance.LLMatcher, structure)
            matcher = llguidance.LLMatcher(self._tokenizer, source, log_level=0)
        except ValueError as error:
            raise EngineError(_invalid(str(error))) from error
        if matcher.is_error():
            raise EngineError(_invalid(matcher.get_error()))
        return matcher


def _invalid(reason: str) -> str:
    """llguidance gives several lines: some say where, the last one why."""
    text = " ".join(reason.split())
    return f"the structure is not valid: {text if len(text) <= _LONGEST_REASON else f'... {text[-_LONGEST_REASON:]}'}"


def _source(matcher: Any, structure: Structure) -> str:
    if structure.regex:
        return str(matcher.grammar_from_regex(structure.regex))
    if structure.grammar:
        return str(matcher.grammar_from_lark(structure.grammar))
    try:
        schema = json.loads(structure.json)
    except (ValueError, RecursionError) as error:
        raise EngineError(f"the JSON schema is not JSON: {error}") from error
    if not isinstance(schema, dict):
        raise EngineError('the JSON schema is not an object, as in {"type": "integer"}')
    # white space that a small model may go on writing for ever is left out, as json.dumps writes it is what is allowed
    layout = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
    return str(matcher.grammar_from_json_schema(schema, defaults=layout))


@final
class GrammarState:
    """Where one answer stands in its grammar. What is known of the states behind drafts is kept until the answer leaves them."""

    def __init__(
        self, matchers: Matchers, vocab: int, closer: "Closer | None" = None, look: "Look | None" = None
    ) -> None:
        """look: the closer's, where the answer begins; None: it is asked when that is wanted."""
        self._matchers, self._closer, self._said = matchers, closer, 0
        self._free = torch.full((-(-vocab // 32),), -1, dtype=torch.int32)
        self._known: dict[tuple[int, ...], Tensor] = {}
        self._looked: dict[tuple[int, ...], Look] = {} if look is None else {(): look}
        self._before = Look(), -1  # what was found before the last token, and that token
        self._ahead = deque[str]()  # of each token that is expected, what is wrong with it

    def forced(self, path: tuple[int, ...]) -> list[int]:
        """What the grammar has in one way only, such as the names of members, or the way to the end."""
        matcher = self._matchers.at(path)
        if matcher is None:
            return []
        look = self._look(path)
        return list(look.way if look.closing else matcher.compute_ff_tokens())

    def mask(self, path: tuple[int, ...]) -> Tensor:
        """[W] int32, one bit per token; all ones after the end, and after a path that the grammar forbids."""
        if path not in self._known:
            matcher = self._matchers.at(path)
            self._known[path] = self._free if matcher is None else self._read(matcher, self._look(path))
        return self._known[path]

    def fits(self, path: tuple[int, ...], tokens: Sequence[int]) -> int:
        """See Constraint."""
        fit = self._matchers.fits(path, tokens)
        for number in range(fit if self._closer else 0):
            before = (*path, *tokens[:number])
            if self._matchers.at(before) is None:
                break  # it is over
            look = self._look(before)
            if look.closing and look.way[0] != tokens[number]:
                return number
        return fit

    def _look(self, path: tuple[int, ...]) -> "Look":
        """Whether the answer must be closed after `path`, which the grammar allows."""
        if self._closer is None:
            return _NEVER
        if path not in self._looked:
            before, token = (self._look(path[:-1]), path[-1]) if path else self._before
            taken, said = before.way[:1] == (token,), self._said + len(path)
            look = Look(before.due, before.way[taken:], before.closing and taken and len(before.way) > 1)
            if not look.closing and said >= look.due:
                look = self._closer.look(self._matchers.at(path), said, look.way, taken=taken)
            self._looked[path] = look
        return self._looked[path]

    def _read(self, matcher: Any, look: "Look") -> Tensor:
        """Its mask; where there is one way only, that of its first token."""
        if not look.closing:
            bits = bytearray(matcher.compute_bitmask())
            return torch.frombuffer(bits, dtype=torch.int32)[: len(self._free)]
        only, token = torch.zeros_like(self._free), look.way[0]
        only[token // 32] = 1 << token % 32 if token % 32 < 31 else -(1 << 31)
        return only

    @property
    def complete(self) -> bool:
        """Whether the answer so far matches as it is, or has ended."""
        return self._matchers.complete(len(self._ahead))

    def expect(self, tokens: Sequence[int]) -> None:
        """See Constraint."""
        new = tokens[len(self._ahead) :]
        taken = 0 if self._closer else self._matchers.take(new)
        if taken:
            self._known, self._said = {}, self._said + taken
        self._ahead += [""] * taken
        for token in new[taken:]:
            try:
                self._ahead.append(self._go(token))
            except Exception as failure:
                self._ahead.append(str(failure) or type(failure).__name__)

    def advance(self, tokens: Sequence[int]) -> None:
        """`tokens` were emitted. Raises EngineError if the grammar forbids one: the masks were not obeyed."""
        for token in tokens:
            if error := self._ahead.popleft() if self._ahead else self._go(token):
                raise EngineError(f"token {token} does not fit the structure: {error}")

    def _go(self, token: int) -> str:
        """What is wrong with the token; empty if the answer has gone on with it."""
        if self._closer:
            self._before = (Look() if self._matchers.over else self._look(())), token
            self._looked = {path[1:]: look for path, look in self._looked.items() if path[:1] == (token,)}
        self._known, self._said = {}, self._said + 1
        return self._matchers.advance(token)


@final
@dataclass(frozen=True)
class Look:
    """What was found of an end in time. due: how many tokens the answer has when that is to be asked again. way: a short one to
    the end, as it was seen last. closing: there is no time for another, and this one is taken to its end."""

    due: int = 0
    way: tuple[int, ...] = ()
    closing: bool = False


_NEVER = Look()


@final
class Closer:
    """Ends a JSON answer before its limit: once there is just room for it, the shortest way out is the only one.

    What it says depends on the answer so far alone, so drafts change nothing. An answer that it finds no end for within
    _LONGEST_END tokens, as a string may need that must match a pattern, is left alone.
    """

    def __init__(self, tokenizer: Any, within: int, end: int) -> None:
        """tokenizer: llguidance's. within: tokens of the whole answer, end-of-text included, which is `end`."""
        self._within, self._end = within, end
        tokens: dict[str, int] = {
            text: tokenizer.tokenize_str(text)[-1] for text in ("}", "]", '"', ",", "0", "1", "e")
        }
        self._letter, self._quote, self._brace = tokens.pop("e"), tokens['"'], tokens["}"]
        self._ends = list(tokens.values())

    def look(self, matcher: Any, said: int, known: tuple[int, ...], *, taken: bool) -> Look:
        """Where a matcher stands, after `said` tokens: the way to the end, and whether there is time for any other. known: the
        way as it was seen last; taken: it is one still, as its first token was chosen.

        One token is taken to open at most what _SPARE tokens close; so where time is left it need not be asked each time.
        """
        left = self._within - said
        if left > _LONGEST_END + _SPARE:
            return Look(self._within - _LONGEST_END - _SPARE)
        way = known if known and taken else tuple(self._way(matcher, known))
        spare = left - (len(way) + 1 + _SPARE)
        if not way:
            return Look(said + 1)
        return Look(said + 1 + max(0, (spare - 1) // (_SPARE + 1)), way, spare <= 0)

    def _way(self, matcher: Any, known: tuple[int, ...]) -> list[int]:
        """Tokens to the nearest end; empty where it is over, or none is near. It may lead into the way that is known."""
        way: list[int] = []
        while not matcher.is_accepting():
            for rest in (known[number:] for number in range(min(_LEFT_OUT, len(known)))):
                near = len(way) + len(rest) <= min(len(known) + _SPARE, _LONGEST_END)
                if near and matcher.validate_tokens([*rest, self._end]) > len(rest):
                    return [*way, *rest]
            step = matcher.compute_ff_tokens() or [self._step(matcher)]
            matcher = matcher if way else matcher.deep_copy()
            if len(way) + len(step) > _LONGEST_END or matcher.try_consume_tokens(step) < len(step):
                return []
            way += step
        return way

    def _step(self, matcher: Any) -> int:
        """A token that ends what is open, or else any: in a string, where letters may follow, its quote."""
        within_string = matcher.validate_tokens([self._letter]) and matcher.validate_tokens([self._brace])
        for token in [self._quote] if within_string else self._ends:
            if matcher.validate_tokens([token]):
                return token
        bits = int.from_bytes(matcher.compute_bitmask(), "little")
        return (bits & -bits).bit_length() - 1 if bits else self._quote  # which will not fit
