"""Requests that NVIDIA Dynamo hands out, and moves to another worker when one dies, with the same text.

Dynamo's frontend sends a moved request as a new one: its prompt is the old prompt and all that was said, and max_tokens is
what is left. Noise is keyed by seed, position and token, so plain sampling goes on by itself if the seed is the same: where
the client gives none it is drawn from the request's id, which moves along. Penalties, minimum lengths, stop strings and
structures need to know where the prompt ended, which Dynamo does not say: workers keep it in a folder that they share.
"""

import asyncio
import json
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any, final

from mtp_engine.config import SamplingParams, Structure
from mtp_engine.errors import EngineError
from mtp_engine.runtime.lead import Team

_SEEDS = 2**63
_SAMPLING = ("presence_penalty", "frequency_penalty", "repetition_penalty", "temperature", "top_p", "min_p")


@final
@dataclass(frozen=True)
class Turn:
    """A request as the engine takes it: what it has said already stands in `said`, and max_tokens counts that, too."""

    prompt: list[int]
    said: list[int]
    params: SamplingParams


@final
@dataclass(frozen=True)
class Begin:
    """Tokens of a request's prompt, and its whole answer's limits: Dynamo takes off what was said."""

    prompt: int
    max_tokens: int
    min_tokens: int


@final
class Ledger:
    """Where the prompts of running requests ended: a file for each, in a folder that all workers see."""

    def __init__(self, folder: Path) -> None:
        """Raises EngineError if the folder cannot be made."""
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise EngineError(
                f"{folder}: {error.strerror}; --requests needs a folder that all workers can write to"
            ) from None
        self._folder = folder

    def begin(self, request_id: str, first: Begin) -> Begin:
        """How the request began, as the first worker noted it; `first` says so if this is that one."""
        path = self._path(request_id)
        try:
            return Begin(**json.loads(path.read_text(encoding="ascii")))
        except FileNotFoundError:
            draft = path.with_suffix(f".{os.getpid()}")
            draft.write_text(json.dumps(asdict(first)), encoding="ascii")
            draft.replace(path)
            return first

    def end(self, request_id: str) -> None:
        with suppress(OSError):
            self._path(request_id).unlink()

    def _path(self, request_id: str) -> Path:
        return self._folder / f"{sha256(request_id.encode()).hexdigest()[:32]}.json"


def read(request: Mapping[str, Any], request_id: str, context: int, ledger: Ledger | None) -> Turn:
    """What Dynamo's request asks for. context: tokens that the model holds.

    Raises EngineError for what cannot be done.
    """
    tokens, stops = list(request["token_ids"]), request.get("stop_conditions") or {}
    limit = stops.get("max_tokens") or max(1, context - len(tokens))
    params = _params(request, request_id, limit)
    if ledger is None or not _looks_back(params):
        return Turn(tokens, [], params)
    begin = ledger.begin(request_id, Begin(len(tokens), limit, params.min_tokens))
    structure = params.structure
    if structure and structure.json:
        structure = replace(structure, within=begin.max_tokens)
    params = replace(params, max_tokens=begin.max_tokens, min_tokens=begin.min_tokens, structure=structure)
    return Turn(tokens[: begin.prompt], tokens[begin.prompt :], params)


def _looks_back(params: SamplingParams) -> bool:
    """Whether what it chooses depends on which tokens are the answer's."""
    counts = params.frequency_penalty or params.presence_penalty
    return bool(counts or params.min_tokens or params.stop or params.structure)


def _params(request: Mapping[str, Any], request_id: str, limit: int) -> SamplingParams:
    given, stops = request.get("sampling_options") or {}, request.get("stop_conditions") or {}
    if (given.get("n") or 1) > 1:
        raise EngineError("n: a request that may move to another worker has one answer")
    sampling = {name: given[name] for name in _SAMPLING if given.get(name) is not None}
    drawn = int.from_bytes(sha256(request_id.encode()).digest()[:8], "big")
    seed = drawn if given.get("seed") is None else given["seed"]
    ends = {*(stops.get("stop_token_ids") or ()), *(stops.get("stop_token_ids_hidden") or ())}
    logprobs = (request.get("output_options") or {}).get("logprobs")
    return SamplingParams(
        **{"temperature": 1.0, **sampling},
        top_k=max(0, given.get("top_k") or 0),
        seed=seed % _SEEDS,
        max_tokens=limit,
        min_tokens=min(limit, stops.get("min_tokens") or 0),
        stop=tuple(stops.get("stop") or ()),
        stop_token_ids=tuple(sorted(ends)),
        ignore_eos=bool(stops.get("ignore_eos")),
        logprobs=None if logprobs is None else min(int(logprobs), 20),
        structure=_structure(given.get("guided_decoding")),
    )


def _structure(guided: Mapping[str, Any] | None) -> Structure | None:
    found = {
        key: value for key, value in (guided or {}).items() if value and key in ("json", "regex", "choice", "grammar")
    }
    if not found:
        return None
    [(kind, value), *more] = found.items()
    if more:
        raise EngineError("guided_decoding: give one of json, regex, choice and grammar")
    if kind == "choice":
        return Structure(grammar="start: " + " | ".join(json.dumps(each, ensure_ascii=False) for each in value))
    text: dict[str, Any] = {kind: value if isinstance(value, str) else json.dumps(value)}
    return Structure(**text)


def chunk_of(tokens: Sequence[int], logprobs: Sequence[Any]) -> dict[str, Any]:
    """Dynamo's chunk of tokens, with their log-probabilities where there are any."""
    chunk: dict[str, Any] = {"token_ids": list(tokens), "index": 0}
    if logprobs:
        chunk["log_probs"] = [each.logprob for each in logprobs]
        chunk["top_logprobs"] = [
            [{"rank": rank, "token_id": token, "logprob": value} for rank, (token, value) in enumerate(each.top, 1)]
            for each in logprobs
        ]
    return chunk


async def lost(team: Team) -> str:
    """Waits until another process that shares the model has ended, and says which."""
    while not (said := team.lost):
        await asyncio.sleep(0.2)
    return said
