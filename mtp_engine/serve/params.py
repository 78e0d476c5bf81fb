"""From a request's fields to SamplingParams, and to the structure that its answer must have."""

import json
from collections.abc import Mapping
from typing import Any

from mtp_engine.config import SamplingParams, Structure, TreeShape
from mtp_engine.serve.errors import ApiError
from mtp_engine.serve.limits import Limits
from mtp_engine.serve.schemas import ResponseFormat, Sampling, StructuredOutputs

_SEEDS = 2**63
_SAME = (
    "top_p", "min_p", "min_tokens", "n", "presence_penalty", "frequency_penalty", "repetition_penalty", "ignore_eos",
    "stop", "stop_token_ids", "allowed_token_ids", "bad_words", "priority", "speculate",
)  # fmt: skip
"""Fields that mean the same here and there."""


def sampling_params(
    asked: Sampling, limits: Limits, *, max_tokens: int, logprobs: int | None = None, structure: Structure | None = None
) -> SamplingParams:
    """Raises EngineError or ApiError for what is out of range."""
    given = {name: value for name in _SAME if (value := getattr(asked, name)) is not None}
    if given.get("stop") in ([], ""):
        del given["stop"]
    return SamplingParams(
        **given,
        max_tokens=max_tokens,
        temperature=1.0 if asked.temperature is None else asked.temperature,
        top_k=max(0, asked.top_k or 0),
        seed=None if asked.seed is None else asked.seed % _SEEDS,
        logit_bias=_bias(asked.logit_bias or {}),
        tree=TreeShape.parse(asked.tree) if asked.tree else None,
        logprobs=logprobs,
        structure=structure,
        timeout=limits.answer_s,
    )


def _bias(given: Mapping[str, float]) -> dict[int, float]:
    try:
        return {int(token): bias for token, bias in given.items()}
    except ValueError:
        raise ApiError(400, "logit_bias: the keys must be token ids", param="logit_bias") from None


def structure_of(
    asked: Sampling, limits: Limits, response_format: ResponseFormat | None = None, schema: Any = None
) -> Structure | None:
    """What the answer must match. schema: of a call, where one is required. Raises ApiError for more than one of them, and
    for one that is too large or too deep."""
    found = [each for each in (_of_format(response_format), _of_outputs(asked.structured_outputs)) if each]
    if schema is not None:
        found.append(Structure(json=json.dumps(schema)))
    if len(found) > 1:
        raise ApiError(400, "an answer can match one of response_format, structured_outputs and a required tool call")
    if found:
        _check(found[0], limits)
    return found[0] if found else None


def _of_format(given: ResponseFormat | None) -> Structure | None:
    if given is None or given.type == "text":
        return None
    if given.type == "json_object":
        return Structure(json='{"type": "object"}')
    if given.json_schema is None:
        raise ApiError(400, "response_format: json_schema is missing", param="response_format")
    return Structure(json=json.dumps(given.json_schema.schema_ or {"type": "object"}))


def _of_outputs(given: StructuredOutputs | None) -> Structure | None:
    if given is None:
        return None
    texts = {name: text for name in ("regex", "grammar") if (text := getattr(given, name)) is not None}
    if given.json_schema is not None:
        schema = given.json_schema
        texts["json"] = schema if isinstance(schema, str) else json.dumps(schema)
    if given.choice is not None:
        options = " | ".join(json.dumps(choice, ensure_ascii=False) for choice in given.choice)
        texts["choice"] = f"start: {options}"
    if given.json_object:
        texts["json_object"] = '{"type": "object"}'
    if len(texts) != 1:
        message = "structured_outputs: give exactly one of json, regex, choice, grammar and json_object"
        raise ApiError(400, message, param="structured_outputs")
    [(name, text)] = texts.items()
    return Structure(**{{"choice": "grammar", "json_object": "json"}.get(name, name): text})


def _check(structure: Structure, limits: Limits) -> None:
    text = structure.json or structure.regex or structure.grammar
    if len(text) > limits.structure_bytes:
        raise ApiError(400, f"the structure has {len(text)} characters, and {limits.structure_bytes} is the most")
    deepest = depth = 0
    for character in text:
        depth += (character in "{[(") - (character in "}])")
        deepest = max(deepest, depth)
    if deepest > 2 * limits.structure_depth:
        raise ApiError(400, f"the structure is nested {deepest} deep, and {2 * limits.structure_depth} is the most")
