"""MTP layers that read outputs of earlier main layers, and FFNs kept in FP8: through the file and the whole engine."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny import write_llama

from mtp_engine.assemble import make_loop
from mtp_engine.assemble.backend import Backend
from mtp_engine.config import EngineConfig, SamplingParams
from mtp_engine.config import TreeShape as Shape
from mtp_engine.drafters import MTPDrafter, RootDrafter
from mtp_engine.models import loader
from mtp_engine.models.checkpoint import Checkpoint
from mtp_engine.models.decoder import Decoder
from mtp_engine.models.mtp import MTPModule
from mtp_engine.runtime.loop import DecodeLoop
from mtp_engine.training import objective
from mtp_engine.training.attention import SequenceAttention
from mtp_engine.training.heads import FirstValues, build_heads, plan_heads, save_heads
from mtp_engine.training.trainable import TrainableWeights

CPU = torch.device("cpu")


def trained(root: Path, fp8: bool) -> tuple[Decoder, MTPModule]:
    """A main model of four layers, and layers with random values for everything that begins without effect."""
    folder = write_llama(root / "main", num_hidden_layers=4)
    main = loader.load_main(folder, torch.float32, CPU, lambda *_: None)
    config = plan_heads(main.config, 2, chained=True, window=6, width=64, features=(0, 2))
    first = FirstValues(Checkpoint(folder), 3, 1.0)

    def draw(name: str, shape: tuple[int, ...]) -> torch.Tensor:
        values = first(name, shape)
        return (
            torch.randn(shape, generator=torch.Generator().manual_seed(len(name))) * 0.2 if not values.any() else values
        )

    weights = TrainableWeights(draw, torch.float32, CPU)
    build_heads(config, main, weights)
    save_heads(root / "mtp", config, weights.named(), torch.arange(61), {}, fp8=fp8)
    assert loader.read_mtp_config(root / "mtp") == config
    return main, loader.load_mtp(root / "mtp", main, 0, lambda *_: None)


@pytest.mark.parametrize("fp8", [False, True])
def test_drafts_are_those_of_a_full_recomputation(tmp_path: Path, fp8: bool) -> None:
    main, module = trained(tmp_path, fp8)
    config = EngineConfig(tree=Shape.parse("chain:2"), dtype="fp32", max_batch=2, max_context=256)
    drafter = MTPDrafter(module, Shape.parse("chain:2"), slots=3)
    prompt, params = torch.randint(61, (19,), generator=torch.Generator().manual_seed(1)).tolist(), SamplingParams(40)

    def run(loop: DecodeLoop) -> tuple[list[int], list[bool]]:
        request = loop.add(prompt, params)
        while not request.finish_reason:
            loop.step()
        return request.output, request.drafted

    loop = make_loop(main, drafter, config, Backend(), slots=2, tokenizer=None)
    plain = make_loop(
        main, RootDrafter(), replace(config, drafter="root", tree=None), Backend(), slots=2, tokenizer=None
    )
    output, drafted = run(loop)
    assert output == run(plain)[0]
    assert drafted == expected(main, module, prompt, output)
    assert any(drafted)


def expected(main: Decoder, module: MTPModule, prompt: list[int], output: list[int]) -> list[bool]:
    """Which tokens were drafted, when everything is computed anew for each step."""
    text, at, flags = [*prompt, *output], len(prompt), []
    reading = replace(main, features=module.config.features)
    tokens = torch.tensor([text])
    positions = torch.arange(len(text))[None]
    with torch.no_grad():
        hidden = reading.forward(tokens, positions, SequenceAttention([None] * 4))
        levels = [
            module.logits(k, out).argmax(-1)[0].tolist()
            for k, out in enumerate(_raw_outputs(module, tokens, module.main_hidden(hidden), positions))
        ]
    while at < len(text):
        accepted = 0  # row at - 2 of level k predicts text[at + k], the main model's token comes after what is accepted
        while accepted < 2 and at + accepted < len(text) and levels[accepted][at - 2] == text[at + accepted]:
            accepted += 1
        flags += [True] * accepted + [False]
        at += accepted + 1
    return flags[: len(output)]


def _raw_outputs(
    module: MTPModule, tokens: torch.Tensor, states: torch.Tensor, positions: torch.Tensor
) -> list[torch.Tensor]:
    """objective.layer_outputs before each layer's final norm, which module.logits applies itself."""
    bare = replace(module, layers=[replace(x, head=replace(x.head, norm=lambda y: y)) for x in module.layers])
    return objective.layer_outputs(bare, tokens, states, positions)


def test_training_begins_with_what_fp8_layers_hold(tmp_path: Path) -> None:
    main, module = trained(tmp_path, fp8=True)
    first = FirstValues(Checkpoint(tmp_path / "main"), 3, 1.0, earlier=Checkpoint(tmp_path / "mtp"))
    weights = TrainableWeights(first, torch.float32, CPU)
    again = build_heads(module.config, main, weights)
    x = torch.randn(1, 5, 32, generator=torch.Generator().manual_seed(2))
    for ours, stored in zip(again.layers, module.layers, strict=True):
        torch.testing.assert_close(ours.join(x, x), stored.join(x, x), atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(ours.block.ffn(x), stored.block.ffn(x), atol=1e-4, rtol=1e-4)


def test_features_must_be_layers(tmp_path: Path) -> None:
    main = loader.load_main(write_llama(tmp_path, num_hidden_layers=4), torch.float32, CPU, lambda *_: None)
    for wrong in ((3,), (2, 1), (1, 1), (-1,)):
        with pytest.raises(Exception, match="features are layers from 0 to 2"):
            plan_heads(main.config, 1, chained=True, window=0, features=wrong)
