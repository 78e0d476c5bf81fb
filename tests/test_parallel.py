"""Models divided among ranks: the values of one process's, the same bits on every rank. Here ranks are threads."""

from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import together
from tiny import write_llama, write_mtp
from torch import Tensor

from mtp_engine.attention.rows import StepRows
from mtp_engine.attention.torch import TorchAttention
from mtp_engine.cache import HybridKV, Pages
from mtp_engine.models import loader
from mtp_engine.models.make_tiny import make_tiny
from mtp_engine.parallel.group import Group

CPU = torch.device("cpu")
WIDE = {"moe_intermediate_size": 64, "intermediate_size": 128}  # whole blocks of 16 for each of four ranks
KINDS = ["mimo", "mimo-fp8", "mimo-7b", "llama", "llama-untied"]


def folders(kind: str, root: Path, scale: float = 0.1) -> tuple[Path, Path]:
    """The main model's, and that of its MTP layers. scale: of a Llama's weights."""
    if kind.startswith("llama"):
        changes = {"vocab_size": 264, "eos_token_id": 263}
        folder = write_llama(root / "main", scale=scale, tie_word_embeddings=kind == "llama", **changes)
        return folder, write_mtp(root / "mtp", scale=scale)
    if kind == "mimo-7b":
        return (make_tiny(root, family="mimo", vocab_size=264),) * 2
    return (make_tiny(root, fp8=kind == "mimo-fp8", vocab_size=264, **WIDE),) * 2


def read(folder: Path, mtp: Path, group: Group, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
    """The main model's logits of a text, and the hidden states and logits of its first MTP layer."""
    main = loader.load_main(folder, torch.float32, CPU, lambda *_: None, group=group, **options)
    module = loader.load_mtp(mtp, main, 0, lambda *_: None)
    tokens = torch.tensor([[1 + i * 7 % 50 for i in range(24)]])

    def attention(layers: list[Any]) -> Any:
        pages = Pages(slots=1, tokens=64, page_size=16, device=CPU)
        cache = HybridKV(layers, pages, max_nodes=4, dtype=torch.float32)
        pages.reserve(0, 32)
        return TorchAttention(cache, StepRows.prompt(0, 0, 24, CPU))

    positions = torch.arange(24)[None]
    hidden = main.forward(tokens, positions, attention([layer.attention for layer in main.config.layers]))
    own = attention([module.config.layer.attention] * len(module.layers))
    output = module.forward(0, main.embedding[tokens], module.main_hidden(hidden), positions, own)
    return main.logits(hidden), output, group.join(module.logits(0, output))


@pytest.fixture(scope="module", params=KINDS)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return folders(request.param, tmp_path_factory.mktemp("model"))


@pytest.mark.parametrize("size", [2, 4])
def test_ranks_compute_what_one_process_does(model: tuple[Path, Path], size: int) -> None:
    with torch.inference_mode():
        alone = read(*model, Group())
    ranks = together(size, lambda group: read(*model, group))
    for others in ranks[1:]:
        assert all(torch.equal(first, other) for first, other in zip(ranks[0], others, strict=True)), "other bits"
    for found, expected in zip(ranks[0], alone, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
