"""The default model says the same with every drafter, and the same as transformers."""

from dataclasses import dataclass

import pytest
import torch
from test_decode_loop import check_memory

from mtp_engine import Engine, EngineConfig, SamplingParams, TreeShape
from mtp_engine.assemble import make_drafter, make_loop
from mtp_engine.assemble.backend import Backend
from mtp_engine.assemble.settle import settle
from mtp_engine.config import DEFAULT_MODEL
from mtp_engine.hub import hub
from mtp_engine.runtime.request import Request

pytestmark = pytest.mark.model

TOKENS = 32
PROMPTS = (
    "The capital of France is",
    "def fibonacci(n):\n    if n < 2:\n        return n\n    return fibonacci(n - 1) +",
    "One two three four, one two three four, one two",
)
PARAMS = (
    SamplingParams(max_tokens=TOKENS, ignore_eos=True),
    SamplingParams(max_tokens=TOKENS, temperature=0.8, seed=1, top_p=0.95, ignore_eos=True),
)


@dataclass
class Loaded:
    """The main model, read once, and what plain decoding answers to every prompt under both settings."""

    engine: Engine
    plain: list[list[int]]

    def answers(self, config: EngineConfig) -> list[Request]:
        """All six requests in one batch, on a loop with the drafter that `config` asks for."""
        files = hub.locate(DEFAULT_MODEL)
        config = settle(config, files)
        model, backend = self.engine.model, Backend()
        drafter = make_drafter(files, model, config, backend, hub.silent)
        loop = make_loop(model, drafter, config, backend, slots=config.max_batch, tokenizer=self.engine.tokenizer)
        requests = [loop.add(self.engine.encode(prompt), params) for params in PARAMS for prompt in PROMPTS]
        while loop.requests:
            loop.step()
        check_memory(loop)
        return requests


def config(drafter: str, tree: str | None = None) -> EngineConfig:
    shape = TreeShape.parse(tree) if tree else None
    return EngineConfig(drafter=drafter, tree=shape, max_context=1024, max_batch=6, device="cpu", dtype="fp32")  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def loaded() -> Loaded:
    loaded = Loaded(Engine.load(config=config("root")), [])
    loaded.plain = [request.output for request in loaded.answers(config("root"))]
    return loaded


@pytest.mark.parametrize(("drafter", "tree"), [("mtp", "chain:3"), ("mtp", "tree:7"), ("ngram", "chain:4")])
def test_the_same_tokens_with_and_without_drafting(loaded: Loaded, drafter: str, tree: str) -> None:
    requests = loaded.answers(config(drafter, tree))
    assert [request.output for request in requests] == loaded.plain
    steps = sum(request.stats.steps for request in requests)
    assert steps < 0.95 * TOKENS * len(requests), "drafts are accepted, so this compares something"


def test_the_answers_differ(loaded: Loaded) -> None:
    assert len({tuple(output) for output in loaded.plain}) == len(loaded.plain)
    assert all(len(output) == TOKENS for output in loaded.plain)


def test_greedy_decoding_is_that_of_transformers(loaded: Loaded) -> None:
    """Theirs reads each answer at once: where every token is its choice after those before it, it would have said the same."""
    from transformers import LlamaForCausalLM

    theirs = LlamaForCausalLM.from_pretrained(hub.locate(DEFAULT_MODEL).folder, dtype=torch.float32).eval()
    for prompt, said in zip(PROMPTS, loaded.plain, strict=False):  # greedily the first three
        ids = loaded.engine.encode(prompt)
        with torch.inference_mode():
            logits = theirs(torch.tensor([[*ids, *said]])).logits[0]
        assert logits[len(ids) - 1 : -1].argmax(-1).tolist() == said
