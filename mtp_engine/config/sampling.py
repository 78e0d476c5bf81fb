"""How a request is decoded, and what its answer must match."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import inf
from typing import final

from mtp_engine.config.checks import check_types
from mtp_engine.config.shape import TreeShape
from mtp_engine.errors import EngineError

MOST_ANSWERS = 1024  # to one prompt
MOST_BIAS = 1e6  # of a logit; OpenAI's API goes to 100
_TOO_MUCH_BIAS = f"holds a bias beyond {MOST_BIAS:g}; forbid tokens with bad_words or allowed_token_ids"


@final
@dataclass(frozen=True)
class Structure:
    """What an answer must match: one of a JSON schema (its text), a regular expression, or a Lark/EBNF grammar.

    The three of vLLM's StructuredOutputsParams. Needs the extra `grammar`.

    within: tokens, the end-of-text token included, in which a JSON answer is to be whole: what would not end in time is
    closed the shortest way, so that max_tokens does not cut it off. 0 is off.
    """

    json: str = ""
    regex: str = ""
    grammar: str = ""
    within: int = 0

    def __post_init__(self) -> None:
        check_types(self)
        if sum(bool(text) for text in (self.json, self.regex, self.grammar)) != 1:
            raise EngineError("a structure is one of json, regex and grammar: give exactly one")
        if self.within < 0:
            raise EngineError(f"within is {self.within}; it must be 0 (off) or above")


@final
@dataclass(frozen=True)
class SamplingParams:
    """How one request is decoded. The defaults leave everything but max_tokens off; names and meanings are vLLM's
    (vllm.SamplingParams, 0.11), which follow OpenAI's completions API where that has them.

    The same seed gives the same tokens whichever drafter and tree are used, and without drafting. Without a seed one
    is drawn and reported in the statistics.

    temperature: 0 is greedy. OpenAI, vLLM.
    top_k, top_p, min_p: top-k keeps every token that fewer than k tokens beat; top-p every token with less than p
        probability mass above it; min-p those with at least min_p times the largest probability. All see the
        distribution after temperature; ties are kept together. top_p is OpenAI's, the others vLLM's.
    repetition_penalty: logits of tokens in the prompt or the answer so far are divided by it if positive, else
        multiplied (Keskar et al. 2019, "CTRL"; vLLM counts the prompt too, and so do we).
    frequency_penalty, presence_penalty: subtracted per occurrence, and once, of a token in the answer so far; the
        prompt does not count. OpenAI, vLLM.
    logit_bias: {token id: what is added to its logit}, before penalties. OpenAI, vLLM.
    allowed_token_ids: only these may be chosen. vLLM.
    bad_words: texts, or tuples of token ids, that must not appear: the last token of one is forbidden where the answer
        ends in the others. A text is tried with and without a space in front. vLLM.
    min_tokens: before that many tokens neither end-of-text nor stop_token_ids may be chosen, and stop strings do not
        end the answer. vLLM.
    stop: the answer ends where one of these texts is complete; `text` is cut before it, token_ids end with the token
        that completed it. OpenAI, vLLM.
    stop_token_ids: the answer ends with such a token, which stays in token_ids. vLLM.
    n: answers per prompt; answer i uses seed + i, as in vLLM.
    logprobs: log-probabilities of every emitted token and of that many best ones, of the main model's own softmax,
        before temperature, penalties and masks (vLLM's default logprobs_mode, "raw_logprobs"). None is off.
    structure: what the answer must match.
    speculate, tree: drafting for this request only: off, or a smaller tree than the engine's (ours). The tree may be
        given as text, such as "chain:3".
    priority: of the requests that wait for room the lowest number runs first; among equals the first to come. vLLM's
        argument of the same name.
    timeout: seconds from its arrival after which the request ends, waiting or running, with finish_reason "timeout" and
        what it has said so far (ours). None is never.

    Lists count as tuples, and stop="x" as ("x",).
    """

    max_tokens: int = 256
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int | None = None
    ignore_eos: bool = False
    stop_token_ids: tuple[int, ...] = ()
    stop: tuple[str, ...] = ()
    min_tokens: int = 0
    n: int = 1
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict, hash=False)
    allowed_token_ids: tuple[int, ...] | None = None
    bad_words: tuple[str | tuple[int, ...], ...] = ()
    logprobs: int | None = None
    structure: Structure | None = None
    speculate: bool = True
    tree: TreeShape | None = None
    priority: int = 0
    timeout: float | None = None

    def __post_init__(self) -> None:
        check_types(self)
        for name, ok, wrong in (
            ("max_tokens", self.max_tokens >= 1, "is {}; it must be at least 1"),
            ("temperature", 0 <= self.temperature < inf, "is {}; it must be 0 (greedy) or above"),
            ("top_k", self.top_k >= 0, "is {}; it must be 0 (off) or above"),
            ("top_p", 0 < self.top_p <= 1, "is {}; it must be above 0 and at most 1"),
            ("min_p", 0 <= self.min_p <= 1, "is {}; it must be between 0 and 1"),
            ("seed", self.seed is None or 0 <= self.seed < 2**63, "is {}; it must be between 0 and 2**63 - 1"),
            ("repetition_penalty", 0 < self.repetition_penalty <= 10, "is {}; above 0, at most 10"),
            ("frequency_penalty", abs(self.frequency_penalty) <= 2, "is {}; from -2 to 2"),
            ("presence_penalty", abs(self.presence_penalty) <= 2, "is {}; from -2 to 2"),
            ("logit_bias", all(abs(bias) <= MOST_BIAS for bias in self.logit_bias.values()), _TOO_MUCH_BIAS),
            ("allowed_token_ids", self.allowed_token_ids != (), "is empty; name at least one token"),
            ("bad_words", all(self.bad_words), "holds an empty word"),
            ("stop", all(self.stop), "holds an empty text"),
            ("min_tokens", 0 <= self.min_tokens <= self.max_tokens, "is {}; it must be between 0 and max_tokens"),
            ("n", 1 <= self.n <= MOST_ANSWERS, f"is {{}}; it must be between 1 and {MOST_ANSWERS}"),
            ("logprobs", self.logprobs is None or 0 <= self.logprobs <= 64, "is {}; from 0 to 64"),
            ("timeout", self.timeout is None or 0 < self.timeout < inf, "is {}; it must be above 0 and finite, in seconds"),
        ):  # fmt: skip
            if not ok:
                raise EngineError(f"{name} {wrong.format(getattr(self, name))}")
