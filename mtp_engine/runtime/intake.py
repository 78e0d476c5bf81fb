"""From a prompt and its parameters to requests; what can never run is refused here, before it costs anybody anything."""

import secrets
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from numbers import Integral
from typing import final

from mtp_engine.config import SamplingParams, Structure
from mtp_engine.errors import EngineError
from mtp_engine.runtime.request import Request, StepOutput
from mtp_engine.runtime.stats import GenerationStats
from mtp_engine.sampling.masks import Constraint
from mtp_engine.sampling.processors import check_tokens
from mtp_engine.sampling.stops import Ends, NewDecoder, StopStrings, Trail, VisibleText

_SEEDS = 2**63


@final
@dataclass(frozen=True)
class Intake:
    """What a loop can take.

    vocab: tokens of the main model. max_context: of prompt and answer. capacity: tokens that an empty cache holds for one
    request. text: makes a decoder of tokens to text; without it there are no texts, and no stop strings. spell: the ways
    to write a bad word in tokens. grammars: makes the state of a structure.
    """

    vocab: int
    max_context: int
    capacity: int
    eos_token_ids: frozenset[int]
    text: NewDecoder | None = None
    spell: Callable[[str], Iterable[Sequence[int]]] | None = None
    grammars: Callable[[Structure], Constraint] | None = None

    def requests(
        self, prompt: Sequence[int], params: SamplingParams, sink: Callable[[StepOutput], None] | None = None,
        said: Sequence[int] = (),
    ) -> list[Request]:  # fmt: skip
        """One request per answer (params.n), whose seeds are one apart (as in vLLM). said: tokens that the answer begins
        with already, where it goes on from another engine. Raises EngineError for what cannot run, whatever else runs or
        does not."""
        limit = self._check_prompt(prompt, params)
        words = tuple(word for given in params.bad_words for word in self._words(given))
        params = replace(params, bad_words=words)
        check_tokens(params, self.vocab)
        drawn = [secrets.randbelow(_SEEDS) for _ in range(params.n)]
        given = params.seed
        seeds = drawn if given is None else [(given + sample) % _SEEDS for sample in range(params.n)]
        answers = [self._request(list(map(int, prompt)), replace(params, n=1), seed, limit, sink) for seed in seeds]
        answers[0].others = tuple(answers[1:])
        if said:
            self._check_said(said, params)
            answers[0].resume(said)
        return answers

    def _request(
        self, prompt: list[int], params: SamplingParams, seed: int, limit: int,
        sink: Callable[[StepOutput], None] | None,
    ) -> Request:  # fmt: skip
        stats = GenerationStats(seed=seed, prompt_tokens=len(prompt))
        return Request(prompt, params, seed, lambda: self._trail(params, limit), stats, limit, sink=sink)

    def _check_prompt(self, prompt: Sequence[int], params: SamplingParams) -> int:
        """Returns how many tokens may be emitted."""
        if not len(prompt):
            raise EngineError("the prompt is empty: give it at least one token")
        usual = set(map(type, prompt)) == {int} and 0 <= min(prompt) <= max(prompt) < self.vocab  # 20 times faster
        for index, token in enumerate(() if usual else prompt):
            if not isinstance(token, Integral) or isinstance(token, bool):
                raise EngineError(f"token {index} of the prompt is {token!r}: token ids are whole numbers")
            if not 0 <= token < self.vocab:  # type: ignore[operator]
                raise EngineError(
                    f"token {index} of the prompt is {token}, outside the vocabulary of {self.vocab} tokens"
                )
        if len(prompt) >= self.max_context:
            raise EngineError(
                f"the prompt has {len(prompt)} tokens and the context holds {self.max_context}: shorten the prompt"
            )
        limit = min(params.max_tokens, self.max_context - len(prompt))
        if len(prompt) + limit > self.capacity:
            raise EngineError(
                f"the KV cache holds {self.capacity} tokens and prompt and answer may take {len(prompt) + limit}: raise "
                "kv_tokens, or shorten the prompt or max_tokens"
            )
        return limit

    def _check_said(self, said: Sequence[int], params: SamplingParams) -> None:
        if params.n > 1 or params.seed is None:
            raise EngineError("only one answer with a seed can go on from what it has said: n=1, and the seed it had")
        if wrong := [token for token in said if not 0 <= token < self.vocab]:
            raise EngineError(f"token {wrong[0]} is outside the vocabulary of {self.vocab} tokens")

    def _words(self, word: str | tuple[int, ...]) -> Iterable[tuple[int, ...]]:
        if not isinstance(word, str):
            return [word]
        if self.spell is None:
            raise EngineError(f"bad_words holds the text {word!r}, and this loop was given no tokenizer: use token ids")
        return [tuple(spelling) for spelling in self.spell(word)]

    def _trail(self, params: SamplingParams, limit: int) -> Trail:
        tokens = frozenset(params.stop_token_ids) | (frozenset() if params.ignore_eos else self.eos_token_ids)
        constraint = self._constraint(params.structure) if params.structure is not None else None
        if not params.stop:
            return Trail(Ends(limit, tokens), VisibleText(self.text(), None) if self.text else None, constraint)
        if self.text is None:
            raise EngineError("stop strings need text, and this loop was given no decoder")
        strings = StopStrings(params.stop, self.text(), params.min_tokens)
        return Trail(Ends(limit, tokens, strings), VisibleText(self.text(), strings), constraint)

    def _constraint(self, structure: Structure) -> Constraint:
        if self.grammars is None:
            raise EngineError("a structure was asked for, and this loop was given no grammars")
        return self.grammars(structure)
