"""The same prompts against a server with OpenAI's API, with the statistics that it gives of each request.

vLLM's `metrics.speculative_decoding` (started with --per-request-spec-decode-metrics, vllm#48915; ours where draft_metrics
is asked for), and SGLang's `meta_info` (spec_verify_ct; asked for with return_meta_info). Without them the accepted length is
unknown, and tokens per second are all there is.
"""

import http.client
import json
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any, final

from mtp_engine.errors import EngineError
from mtp_engine.experiments.grid import Case
from mtp_engine.experiments.prompts import Encoded
from mtp_engine.experiments.rows import Done

_TIMEOUT = 600  # seconds without a word from the server
_STATISTICS = {"draft_metrics": True, "return_meta_info": True}  # asked of servers that know such fields
_REFUSALS = (400, 422)  # of servers that take no unknown fields
_ADVICE = "is the server running, and does the URL end in /v1?"


def ask_server(case: Case, prompts: Sequence[Encoded]) -> Iterator[Done]:
    """Yield the row of each request as it ends; `batch` of them are under way at a time. Of a server no steps are known.

    Raises EngineError where it does not answer."""
    url = case.engine.removeprefix("openai:").rstrip("/") + "/chat/completions"
    pool = ThreadPoolExecutor(case.batch)
    try:
        waiting = [pool.submit(_answer, url, case, own) for own in prompts]
        for done in as_completed(waiting):
            yield done.result(), []
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


@final
@dataclass
class _Heard:
    """What came back so far. Times are seconds since the request was sent."""

    first: float | None = None
    finish_reason: str = ""
    pieces: int = 0
    usage: Mapping[str, Any] = field(default_factory=dict)
    metrics: Mapping[str, Any] = field(default_factory=dict)
    meta: Mapping[str, Any] = field(default_factory=dict)

    def hear(self, chunk: Mapping[str, Any], now: float) -> None:
        """Take in a chunk of the stream. Raises EngineError where it says that something failed."""
        if error := chunk.get("error"):
            raise EngineError(str(error.get("message", error)) if isinstance(error, dict) else str(error))
        self.usage = chunk.get("usage") or self.usage
        self.metrics = (chunk.get("metrics") or {}).get("speculative_decoding") or self.metrics
        self.meta = chunk.get("meta_info") or self.meta
        for choice in chunk.get("choices") or ():
            self.meta = choice.get("meta_info") or self.meta
            self.finish_reason = choice.get("finish_reason") or self.finish_reason
            delta = choice.get("delta") or {}
            if any(delta.get(name) for name in ("content", "reasoning", "reasoning_content")):
                self.first = now if self.first is None else self.first
                self.pieces += 1


def _answer(url: str, case: Case, own: Encoded) -> dict[str, Any]:
    params = case.params(own.index)
    body = {
        "model": case.model, "messages": list(own.item.messages), "max_tokens": params.max_tokens, "seed": params.seed,
        "temperature": params.temperature, "stream": True, "stream_options": {"include_usage": True},
    }  # fmt: skip
    try:
        try:
            heard, wall = _listen(url, body | _STATISTICS)
        except urllib.error.HTTPError as error:
            if error.code not in _REFUSALS:
                raise
            heard, wall = _listen(url, body)
    except urllib.error.HTTPError as error:
        said = " ".join(error.read()[:200].decode(errors="replace").split())
        raise EngineError(f"{url} answered {error.code} to prompt {own.item.id}: {said}") from error
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise EngineError(f"{url}: {error}; {_ADVICE}") from error
    except (AttributeError, TypeError, LookupError) as error:
        raise EngineError(f"{url} answered prompt {own.item.id} with what is no chat completion; {_ADVICE}") from error
    except EngineError as error:
        raise EngineError(f"{url} failed at prompt {own.item.id}: {error}") from error
    return _row(own, heard, wall, params.seed or 0)


def _listen(url: str, body: Mapping[str, Any]) -> tuple[_Heard, float]:
    """What comes back, and after how many seconds it ended."""
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    heard, begin = _Heard(), time.perf_counter()
    with urllib.request.urlopen(request, timeout=_TIMEOUT) as response:
        for line in response:
            data = line.decode("utf-8", "replace").removeprefix("data:").strip()
            if line.startswith(b"data:") and data != "[DONE]":
                heard.hear(json.loads(data), time.perf_counter() - begin)
    return heard, time.perf_counter() - begin


def _row(own: Encoded, heard: _Heard, wall: float, seed: int) -> dict[str, Any]:
    """As `run.request_row`; what the server does not say is None."""
    if heard.first is None and not heard.usage:
        raise EngineError(f"the server said nothing to prompt {own.item.id} that is a chat completion; {_ADVICE}")
    tokens = int(heard.usage.get("completion_tokens") or heard.pieces)
    first = heard.first if heard.first is not None else wall
    decoding = wall - first
    return {
        "prompt": own.index, "id": own.item.id, "category": own.item.category, "seed": seed,
        "prompt_tokens": heard.usage.get("prompt_tokens"), "tokens": tokens, **statistics(heard.metrics, heard.meta, tokens),
        "clean_tokens": None, "clean_steps": None, "finish_reason": heard.finish_reason, "draft_s": None, "verify_s": None,
        "prefill_s": None, "ttft_s": first, "wall_s": wall, "token_ids": [],
        "decode_tokens_per_s": (tokens - 1) / decoding if tokens > 1 and decoding > 0 else None,
    }  # fmt: skip


def statistics(metrics: Mapping[str, Any], meta: Mapping[str, Any], tokens: int) -> dict[str, Any]:
    """Steps, nodes, and per depth how many steps proposed and accepted a draft, of what vLLM or SGLang say; else None.

    Both count steps that verify drafts. The first token comes from reading the prompt there and belongs to no step, so
    accepted length is 1 + accepted drafts / steps in their terms and ours, with the steps' own tokens as `emitted`.
    """
    if steps := metrics.get("num_spec_steps"):
        counts = metrics.get("acceptance_histogram") or ()
        if isinstance(counts, Mapping):  # by accepted drafts, without those that no step had
            counts = [counts.get(str(accepted), 0) for accepted in range(max(map(int, counts)) + 1)]
        histogram = list(counts)
        accepted = list(accumulate(reversed(histogram[1:])))[::-1]
        drafted, kept = metrics.get("num_draft_tokens"), metrics.get("num_accepted_draft_tokens", sum(accepted))
        nodes = None if drafted is None else drafted + steps
        return {"steps": steps, "nodes": nodes, "emitted": steps + kept, "accepted": accepted, "proposed": []}
    if steps := meta.get("spec_verify_ct"):
        length = meta.get("spec_accept_length") or tokens / steps
        return {"steps": steps, "nodes": None, "emitted": round(steps * length), "accepted": [], "proposed": []}
    return {"steps": None, "nodes": None, "emitted": None, "accepted": [], "proposed": []}
