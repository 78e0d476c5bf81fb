"""The suite on a named engine, against our own plain decoding of the same weights."""

from collections.abc import Iterator

from mtp_engine.config import DEFAULT_MODEL, EngineConfig
from mtp_engine.conformance.case import Verdict
from mtp_engine.conformance.engines import openai_server, ours, plain, transformers_engine
from mtp_engine.conformance.suite import run_suite
from mtp_engine.engine import Engine
from mtp_engine.errors import EngineError
from mtp_engine.hub import hub
from mtp_engine.protocols import Progress

PROMPTS = (
    "The capital of France is",
    "def fibonacci(n):\n    if n < 2:\n        return n\n    return fibonacci(n - 1) +",
    "One two three four, one two three four, one two",
    "Once upon a time there was a",
    "Water boils at a temperature of",
    "Dear Sir or Madam,\n\nI am writing to",
    "Ingredients:\n- 2 cups of flour\n- 1 cup of",
    "Q: What is the largest planet?\nA:",
    "The quick brown fox",
    "import numpy as np\n\n",
)


def is_exact(engine: str, config: EngineConfig) -> bool:
    """Whether the engine promises the baseline's very tokens at temperature > 0."""
    return engine == "ours" and config.verifier == "match"


def verdicts(
    engine: str,
    model: str | None = None,
    *,
    prompts: int = 4,
    draws: int = 200,
    config: EngineConfig | None = None,
    progress: Progress = hub.silent,
) -> Iterator[Verdict]:
    """engine: ours, hf or openai:URL. Raises EngineError for another name or a server that is not there.

    Only our own match rule promises the baseline's text at temperature > 0; of others the distribution is tested there.
    """
    config = config or EngineConfig(max_context=1024)
    name = model or DEFAULT_MODEL
    loaded = Engine.load(name, config, progress=progress)
    exact = is_exact(engine, config)
    if engine == "ours":
        candidate = ours(loaded)
    elif engine == "hf":
        candidate = transformers_engine(str(hub.locate(name).folder), loaded)
    elif engine.startswith("openai:"):
        candidate = openai_server(engine.removeprefix("openai:"), name, loaded)
    else:
        raise EngineError(f"engine {engine!r} is not one of ours, hf and openai:URL")
    texts = [tuple(loaded.encode(text)) for text in PROMPTS[: max(1, prompts)]]
    yield from run_suite(
        plain(loaded),
        candidate,
        texts,
        exact=exact,
        tokens=24,
        depths=1 if exact else 0,
        rounds=6,
        draws=draws,
        tie=1e-3,
        slack=0.05,
    )
