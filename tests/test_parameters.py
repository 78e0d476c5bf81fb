"""All sampling parameters at once on the default model: drafting says what plain decoding says, on ten prompts."""

import pytest

from mtp_engine import Engine, EngineConfig, SamplingParams, TreeShape
from mtp_engine.conformance.run import PROMPTS

pytestmark = pytest.mark.model
TOKENS = 32
COMMON = SamplingParams(max_tokens=TOKENS, ignore_eos=True, seed=4)
VARIANTS = [
    {"repetition_penalty": 1.3, "bad_words": (" the", " of the")},
    {"frequency_penalty": 0.8, "presence_penalty": -0.5, "temperature": 1.0, "top_p": 0.9},
    {"temperature": 0.9, "min_p": 0.05, "top_k": 40, "logit_bias": {28: -2.0, 30: 3.0, 198: 1.0}},
    {"temperature": 1.2, "allowed_token_ids": tuple(range(0, 49152, 2)), "repetition_penalty": 1.1},
    {"min_tokens": 20, "stop_token_ids": (28, 30, 198), "temperature": 0.7, "frequency_penalty": 0.3},
    {"stop": (" and", ".\n"), "temperature": 1.0},
    {"logprobs": 3, "presence_penalty": 1.0},
]


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine.load(config=EngineConfig(tree=TreeShape.parse("tree:7"), max_context=512, max_batch=10))


def params(**changes: object) -> list[SamplingParams]:
    """One per prompt: the seven variants, then three of them joined in pairs."""
    pairs = [{**VARIANTS[0], **VARIANTS[1]}, {**VARIANTS[2], **VARIANTS[5]}, {**VARIANTS[1], **VARIANTS[6]}]
    return [SamplingParams(**{**vars(COMMON), **each, **changes}) for each in (*VARIANTS, *pairs)]


def test_ten_prompts_with_parameters(engine: Engine) -> None:
    plain = engine.generate(PROMPTS, params(speculate=False))
    drafted = engine.generate(PROMPTS, params())
    for a, b in zip(plain, drafted, strict=True):
        assert (a.token_ids, a.text, a.finish_reason) == (b.token_ids, b.text, b.finish_reason)
        assert [entry.token for entry in a.logprobs] == [entry.token for entry in b.logprobs]
        assert [e.logprob for e in a.logprobs] == pytest.approx([e.logprob for e in b.logprobs], abs=1e-3)
    assert sum(answer.stats.steps for answer in drafted) < 0.9 * sum(answer.stats.steps for answer in plain)
    free = engine.generate(PROMPTS, COMMON)
    assert sum(a.token_ids != b.token_ids for a, b in zip(free, drafted, strict=True)) >= 9
    for answer, given in zip(drafted, params(), strict=True):
        assert not any(stop in answer.text for stop in given.stop)


def test_n_answers_and_streams_with_stops(engine: Engine) -> None:
    """The joined chunks are the text; answer i is that of seed + i."""
    wanted = SamplingParams(max_tokens=24, temperature=1.0, seed=8, n=3, stop=(" the", "ing"))
    streamed: dict[int, str] = {}
    finished = {}
    for chunk in engine.stream([PROMPTS[3]], wanted):
        streamed[chunk.sample] = streamed.get(chunk.sample, "") + chunk.text
        if chunk.finished:
            finished[chunk.sample] = chunk.finished
    assert sorted(finished) == [0, 1, 2]
    for sample, answer in finished.items():
        alone = SamplingParams(max_tokens=24, temperature=1.0, seed=8 + sample, stop=wanted.stop)
        [same] = engine.generate([PROMPTS[3]], alone)
        assert streamed[sample] == answer.text == same.text
        assert answer.token_ids == same.token_ids
