"""The default model says the same with every drafter, and the same as transformers."""

from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
from test_decode_loop import check_memory

from mtp_engine import Engine, EngineConfig, SamplingParams, TreeShape
from mtp_engine.assemble import make_drafter, make_loop, settle
from mtp_engine.backend import Backend
from mtp_engine.config import DEFAULT_MODEL
from mtp_engine.hub import hub
from mtp_engine.runtime.request import Request

pytestmark = pytest.mark.model

TOKENS = 40
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
def loaded() -> Iterator[Loaded]:
    threads = torch.get_num_threads()
    loaded = Loaded(Engine.load(config=config("root")), [])
    loaded.plain = [request.output for request in loaded.answers(config("root"))]
    yield loaded
    torch.set_num_threads(threads)


@pytest.mark.parametrize(
    ("drafter", "tree"), [("mtp", "chain:3"), ("mtp", "4x2x2"), ("mtp", "tree:16"), ("ngram", "chain:4")]
)
def test_the_same_tokens_with_and_without_drafting(loaded: Loaded, drafter: str, tree: str) -> None:
    requests = loaded.answers(config(drafter, tree))
    assert [request.output for request in requests] == loaded.plain
    steps = sum(request.stats.steps for request in requests)
    assert steps < 0.95 * TOKENS * len(requests), "drafts are accepted, so this compares something"


def test_the_answers_differ(loaded: Loaded) -> None:
    assert len({tuple(output) for output in loaded.plain}) == len(loaded.plain)
    assert all(len(output) == TOKENS for output in loaded.plain)


def test_greedy_decoding_is_that_of_transformers(loaded: Loaded) -> None:
    from transformers import LlamaForCausalLM

    theirs = LlamaForCausalLM.from_pretrained(hub.locate(DEFAULT_MODEL).folder, dtype=torch.float32).eval()
    theirs.generation_config.eos_token_id = None  # ours ignores the end of text too
    prompts = (*PROMPTS, "Once upon a time", "Water boils at a temperature of")
    answers = loaded.engine.generate(prompts, SamplingParams(max_tokens=24, ignore_eos=True))
    for prompt, ours in zip(prompts, answers, strict=True):
        ids = torch.tensor([loaded.engine.encode(prompt)])
        with torch.inference_mode():
            out = theirs.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=24)
        assert out[0, ids.shape[1] :].tolist() == ours.token_ids
