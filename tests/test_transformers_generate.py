"""transformers' own generate, with our loop inside, says what transformers says."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, LogitsProcessor

from mtp_engine import Engine, EngineConfig, EngineError, transformers_generate
from mtp_engine.hub import hub

PROMPT = torch.tensor([[5, 77, 300, 12, 5, 77, 300]])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random Llama with mimo-nano's tokenizer."""
    folder = tmp_path_factory.mktemp("llama")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=8192, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, eos_token_id=8186, pad_token_id=0, initializer_range=0.3,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(hub.locate(hub.NANO).folder / name, folder)
    return folder


@pytest.fixture(scope="module")
def model(folder: Path) -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(folder).eval()


@pytest.fixture(scope="module")
def custom(folder: Path) -> Iterator[Any]:
    with Engine.load(str(folder), EngineConfig(drafter="ngram", threads=1, dtype="fp32")) as engine:
        yield transformers_generate(engine)


@pytest.mark.parametrize(
    "given", [{}, {"repetition_penalty": 1.4}, {"min_new_tokens": 12}, {"eos_token_id": [3, 8186]}]
)
def test_greedy_is_transformers_greedy(model: LlamaForCausalLM, custom: Any, given: dict[str, Any]) -> None:
    wanted = model.generate(PROMPT, do_sample=False, max_new_tokens=20, **given)
    found = model.generate(PROMPT, do_sample=False, max_new_tokens=20, custom_generate=custom, **given)
    assert found.tolist() == wanted.tolist()


def test_padded_batches(model: LlamaForCausalLM, custom: Any) -> None:
    ids = torch.tensor([[0, 0, 9, 10], [7, 8, 9, 10]])
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    given: dict[str, Any] = {"attention_mask": mask, "do_sample": False, "max_new_tokens": 9}
    assert model.generate(ids, custom_generate=custom, **given).tolist() == model.generate(ids, **given).tolist()


def test_seeds_and_stopping(model: LlamaForCausalLM, custom: Any) -> None:
    texts = []
    for _ in range(2):
        torch.manual_seed(3)
        texts.append(
            model.generate(PROMPT, do_sample=True, top_k=50, max_new_tokens=20, custom_generate=custom).tolist()
        )
    assert texts[0] == texts[1]
    token = texts[0][0][PROMPT.shape[1] + 4]

    def criterion(ids: torch.Tensor, scores: Any) -> torch.Tensor:
        return ids[:, -1] == token

    torch.manual_seed(3)
    found = model.generate(
        PROMPT, do_sample=True, top_k=50, max_new_tokens=20, custom_generate=custom, stopping_criteria=[criterion]
    )
    assert found.tolist()[0] == texts[0][0][: texts[0][0].index(token, PROMPT.shape[1]) + 1]


def test_what_cannot_be_done_is_refused(model: LlamaForCausalLM, custom: Any) -> None:
    class Mine(LogitsProcessor):  # type: ignore[misc]
        def __call__(self, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            return scores

    for given in ({"num_beams": 2}, {"logits_processor": [Mine()]}, {"return_dict_in_generate": True}):
        with pytest.raises(EngineError):
            model.generate(PROMPT, max_new_tokens=3, custom_generate=custom, **given)


def test_a_model_by_its_own_folder(model: LlamaForCausalLM) -> None:
    class Streamer:
        def __init__(self) -> None:
            self.tokens: list[int] = []

        def put(self, value: torch.Tensor) -> None:
            self.tokens += value.flatten().tolist()

        def end(self) -> None:
            self.tokens.append(-1)

    streamer = Streamer()
    custom = transformers_generate(config=EngineConfig(drafter="root", threads=1), streamer=streamer)
    found = model.generate(PROMPT, do_sample=False, max_new_tokens=5, custom_generate=custom)
    assert streamer.tokens == [*found[0, PROMPT.shape[1] :].tolist(), -1]
