"""Settings say what is wrong with them: the field, the value, and what it must be; and every value has one spelling."""

import re
from typing import Any

import numpy as np
import pytest

from mtp_engine.config import EngineConfig, SamplingParams, Structure, TreeShape
from mtp_engine.errors import EngineError

WHOLE = "a whole number"
WRONG_SAMPLING: list[tuple[str, Any, str]] = [
    ("max_tokens", 2.5, WHOLE),
    ("max_tokens", True, WHOLE),
    ("max_tokens", "7", WHOLE),
    ("max_tokens", None, WHOLE),
    ("seed", 1.5, "a whole number or None"),
    ("top_k", 1.5, WHOLE),
    ("n", 1.5, WHOLE),
    ("n", 2.0, WHOLE),
    ("min_tokens", 1.5, WHOLE),
    ("logprobs", 1.5, "a whole number or None"),
    ("logprobs", True, "a whole number or None"),
    ("priority", 0.5, WHOLE),
    ("temperature", "hot", "a number"),
    ("temperature", True, "a number"),
    ("temperature", None, "a number"),
    ("top_p", "0.9", "a number"),
    ("timeout", "1s", "a number or None"),
    ("ignore_eos", 1, "True or False"),
    ("speculate", "no", "True or False"),
    ("stop_token_ids", (1, "a"), "a tuple of whole numbers"),
    ("stop_token_ids", (1.0,), "a tuple of whole numbers"),
    ("stop_token_ids", (True,), "a tuple of whole numbers"),
    ("stop_token_ids", 5, "a tuple of whole numbers"),
    ("stop_token_ids", "12", "a tuple of whole numbers"),
    ("allowed_token_ids", (1, None), "a tuple of whole numbers or None"),
    ("stop", (1,), "a tuple of texts"),
    ("stop", b"x", "a tuple of texts"),
    ("stop", None, "a tuple of texts"),
    ("bad_words", (5, 6), "a tuple of texts or tuples of whole numbers"),
    ("bad_words", ((1, "a"),), "a tuple of texts or tuples of whole numbers"),
    ("logit_bias", {"5": 1.0}, "a mapping from whole numbers to numbers"),
    ("logit_bias", {5: "more"}, "a mapping from whole numbers to numbers"),
    ("logit_bias", [5], "a mapping from whole numbers to numbers"),
    ("structure", '{"type": "object"}', "a Structure or None"),
    ("tree", 3, "a TreeShape or its text or None"),
]
WRONG_ENGINE: list[tuple[str, Any, str]] = [
    ("max_batch", 2.5, WHOLE),
    ("max_batch", True, WHOLE),
    ("threads", "4", WHOLE),
    ("kv_tokens", 1e6, WHOLE),
    ("max_waiting", 1.5, WHOLE),
    ("draft_int8", 1, "True or False"),
    ("allow_lossy", "yes", "True or False"),
    ("device", 0, "a text"),
    ("tree", 3, "a TreeShape or its text or None"),
    ("drafter", "eagle", "one of mtp, ngram, root"),
    ("drafter", None, "one of mtp, ngram, root"),
    ("verifier", "exact", "one of match, rejection, block, rrs, traversal, typical"),
    ("candidates", "top", "one of auto, noise, drawn, best"),
    ("dtype", "fp16", "one of auto, fp32, bf16, int8"),
    ("attention", "flash", "one of exact, flashinfer, torch"),
]


@pytest.mark.parametrize(("name", "value", "needed"), WRONG_SAMPLING)
def test_a_request_of_the_wrong_type(name: str, value: Any, needed: str) -> None:
    with pytest.raises(EngineError, match=rf"^{name} is {re.escape(repr(value))}; it must be {needed}$"):
        SamplingParams(**{name: value})


@pytest.mark.parametrize(("name", "value", "needed"), WRONG_ENGINE)
def test_an_engine_of_the_wrong_type(name: str, value: Any, needed: str) -> None:
    with pytest.raises(EngineError, match=rf"^{name} is {re.escape(repr(value))}; it must be {needed}$"):
        EngineConfig(**{name: value})


def test_a_structure_of_the_wrong_type() -> None:
    with pytest.raises(EngineError, match=r"^json is \{'type': 'object'\}; it must be a text$"):
        Structure(json={"type": "object"})  # type: ignore[arg-type]


def test_a_long_value_is_shortened() -> None:
    with pytest.raises(EngineError, match="stop_token_ids is") as error:
        SamplingParams(stop_token_ids=(*range(100_000), "a"))  # type: ignore[arg-type]
    assert len(str(error.value)) < 200


def test_one_spelling() -> None:
    """What two users write differently is equal, hashable, and safe from later changes of their lists."""
    ids, word, bias = [1, 2], [3, 4], {5: 1}
    loose: dict[str, Any] = {
        "stop": "x", "stop_token_ids": ids, "bad_words": ["a", word], "allowed_token_ids": range(3), "logit_bias": bias,
        "tree": "chain:3", "temperature": 1,
    }  # fmt: skip
    strict = SamplingParams(
        stop=("x",), stop_token_ids=(1, 2), bad_words=("a", (3, 4)), allowed_token_ids=(0, 1, 2), logit_bias={5: 1.0},
        tree=TreeShape.parse("chain:3"), temperature=1.0,
    )  # fmt: skip
    params = SamplingParams(**loose)
    assert params == strict
    assert hash(params) == hash(strict)
    assert SamplingParams(stop=["x", "y"]).stop == ("x", "y")  # type: ignore[arg-type]
    assert SamplingParams(bad_words="x").bad_words == ("x",)  # type: ignore[arg-type]
    ids.append(9)
    word.append(9)
    bias[6] = 2
    assert params == strict


def test_numbers_of_numpy() -> None:
    params = SamplingParams(
        max_tokens=np.int64(3),  # type: ignore[arg-type]
        temperature=np.float32(0.5),  # type: ignore[arg-type]
        stop_token_ids=np.array([1, 2]),  # type: ignore[arg-type]
    )
    assert params == SamplingParams(max_tokens=3, temperature=0.5, stop_token_ids=(1, 2))
    assert {type(params.max_tokens), *map(type, params.stop_token_ids)} == {int}
    assert type(params.temperature) is float


@pytest.mark.parametrize("cls", [SamplingParams, EngineConfig])
def test_a_tree_may_be_text(cls: Any) -> None:
    assert cls(tree="chain:3").tree == TreeShape(widths=(1, 1, 1))
    with pytest.raises(EngineError, match="tree shape 'oak' is not one of"):
        cls(tree="oak")


@pytest.mark.parametrize("value", [0, -1.0, float("inf"), float("nan")])
def test_a_timeout_is_above_0_and_finite(value: float) -> None:
    with pytest.raises(EngineError, match=r"timeout is .*; it must be above 0 and finite, in seconds"):
        SamplingParams(timeout=value)


def test_priorities_and_timeouts() -> None:
    assert (SamplingParams().priority, SamplingParams().timeout) == (0, None)
    assert SamplingParams(priority=-3, timeout=0.5) == SamplingParams(priority=-3, timeout=0.5)


def test_bounds_of_an_engine() -> None:
    assert (EngineConfig().max_waiting, EngineConfig().prefill_chunk) == (1024, 0)
    assert EngineConfig(threads=1024, max_waiting=1).threads == 1024
    with pytest.raises(EngineError, match="threads is 100000; it must be at most 1024"):
        EngineConfig(threads=100_000)
    with pytest.raises(EngineError, match="max_waiting is 0; it must be at least 1"):
        EngineConfig(max_waiting=0)


@pytest.mark.parametrize("field", ["temperature", "top_p", "min_p", "repetition_penalty", "frequency_penalty"])
def test_no_number_is_no_number(field: str) -> None:
    with pytest.raises(EngineError, match=f"{field} is nan"):
        SamplingParams(**{field: float("nan")})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "given", [{"logit_bias": {3: -1e300}}, {"logit_bias": {3: float("inf")}}, {"n": 1025}, {"n": 0}]
)
def test_values_that_no_step_could_hold(given: dict[str, Any]) -> None:
    with pytest.raises(EngineError, match=r"logit_bias holds a bias beyond 1e\+06|n is"):
        SamplingParams(**given)
