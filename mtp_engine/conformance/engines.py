"""Engines behind the kit's callables: ours, transformers' generate, and servers with OpenAI's completions API."""

import json
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

import torch

from mtp_engine.config import SamplingParams
from mtp_engine.conformance.case import Case, Generate, Sample, Unsupported
from mtp_engine.engine import Engine
from mtp_engine.errors import EngineError
from mtp_engine.sampling.logprobs import TokenLogprob

_TIMEOUT = 600  # seconds for one answer of a server


def ours(engine: Engine) -> Generate:
    """An engine of this project, with its drafter and rule."""

    def generate(cases: Sequence[Case]) -> list[Sample]:
        steps: list[list[int]] = [[] for _ in cases]
        done: list[Sample] = [Sample(())] * len(cases)
        for chunk in engine.stream([case.prompt for case in cases], [case.params for case in cases]):
            steps[chunk.index].append(len(chunk.token_ids))
            if answer := chunk.finished:
                done[chunk.index] = Sample(
                    tuple(answer.token_ids),
                    answer.text,
                    answer.finish_reason,
                    answer.logprobs,
                    tuple(steps[chunk.index]),
                )
        return done

    return generate


def transformers_engine(folder: str, engine: Engine) -> Generate:
    """transformers' generate in fp32, one prompt at a time. engine: for its tokenizer only."""
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.eval()

    def generate(cases: Sequence[Case]) -> list[Sample]:
        return [_transformers(model, engine, case) for case in cases]

    return generate


def _transformers(model: Any, engine: Engine, case: Case) -> Sample:
    p = case.params
    _refuse(p, "stop", "logit_bias", "allowed_token_ids", "frequency_penalty", "presence_penalty", "logprobs",
            "stop_token_ids", "min_tokens")  # fmt: skip
    torch.manual_seed(p.seed or 0)
    ids = torch.tensor([case.prompt])
    sampling = {"temperature": p.temperature, "top_k": p.top_k, "top_p": p.top_p, "min_p": p.min_p or None}
    model.generation_config.eos_token_id = None if p.ignore_eos else list(engine.tokenizer.eos_ids)
    with torch.inference_mode():
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=p.max_tokens, do_sample=p.temperature > 0,
            repetition_penalty=p.repetition_penalty,
            bad_words_ids=[list(word) for word in p.bad_words] or None,
            **(sampling if p.temperature > 0 else {}),
        )  # fmt: skip
    tokens = out[0, len(case.prompt) :].tolist()
    reason = "stop" if tokens[-1] in engine.tokenizer.eos_ids and not p.ignore_eos else "length"
    return Sample(tuple(tokens), engine.tokenizer.decode(tokens), reason)


def _refuse(params: SamplingParams, *names: str) -> None:
    default = SamplingParams()
    for name in names:
        if getattr(params, name) != getattr(default, name):
            raise Unsupported(f"{name} is not supported")


def openai_server(url: str, model: str, engine: Engine) -> Generate:
    """A server at `url` (up to and with /v1), such as vLLM's or SGLang's, that serves the same weights as `model`.

    Prompts go as token ids; answers' ids are asked for with vLLM's return_token_ids, or else read off the text.
    """

    def generate(cases: Sequence[Case]) -> list[Sample]:
        return [_completion(f"{url.rstrip('/')}/completions", model, engine, case) for case in cases]

    return generate


def _completion(url: str, model: str, engine: Engine, case: Case) -> Sample:
    default, p = SamplingParams(), case.params
    own = {"tree", "speculate", "structure", "bad_words", "logit_bias", "n", "timeout"}
    body: dict[str, Any] = {
        f.name: getattr(p, f.name) for f in fields(p)
        if f.name not in own and getattr(p, f.name) != getattr(default, f.name)
    }  # fmt: skip
    body |= {"model": model, "prompt": list(case.prompt), "max_tokens": p.max_tokens, "temperature": p.temperature}
    if p.bad_words:
        body["bad_words"] = [w if isinstance(w, str) else engine.tokenizer.decode(w) for w in p.bad_words]
    if p.logit_bias:
        body["logit_bias"] = {str(token): bias for token, bias in p.logit_bias.items()}
    request = urllib.request.Request(
        url, json.dumps({**body, "return_token_ids": True}).encode(), {"Content-Type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request, timeout=_TIMEOUT) as response:
            choice = json.load(response)["choices"][0]
    except urllib.error.HTTPError as error:
        raise Unsupported(f"the server answered {error.code}: {error.read()[:200].decode(errors='replace')}") from error
    except OSError as error:
        raise EngineError(f"{url}: {error}; is the server running?") from error
    return _read_choice(choice, engine)


def _read_choice(choice: dict[str, Any], engine: Engine) -> Sample:
    text = choice["text"]
    tokens = choice.get("token_ids") or engine.tokenizer.encode(text)
    entries = []
    if given := choice.get("logprobs"):
        for index, token in enumerate(tokens):
            top = [(_token_id(name, engine), value) for name, value in (given["top_logprobs"][index] or {}).items()]
            value = given["token_logprobs"][index]
            rank = 1 + sum(other > value for _, other in top)
            entries.append(TokenLogprob(token, value, rank, tuple(sorted(top, key=lambda pair: -pair[1]))))
    return Sample(tuple(tokens), text, choice.get("finish_reason", ""), tuple(entries))


def _token_id(name: str, engine: Engine) -> int:
    """The id of a token that a server names by its text (or "token_id:N", vLLM's other way)."""
    if name.startswith("token_id:"):
        return int(name.removeprefix("token_id:"))
    ids = engine.tokenizer.spellings(name)[-1 if name.startswith(" ") else 0]
    return ids[0] if len(ids) == 1 else -1


def plain(engine: Engine) -> Generate:
    """The baseline: the same weights in a loop of its own that never drafts, one row per request in every step.

    The engine's own loop with speculate=False would not do: its steps have a tree's rows all the same, so that a forward
    that is wrong only for several rows would be wrong in baseline and candidate alike.
    """
    return ours(engine.undrafted())
