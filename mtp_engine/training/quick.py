"""A model's blocks with the kernels of training on a GPU in the place of many small operations; the same elsewhere."""

import importlib.util
from collections.abc import Sequence
from dataclasses import replace
from typing import cast

import torch

from mtp_engine.models.decoder import Decoder
from mtp_engine.models.layers import Block, BlockMap, GatedMLP
from mtp_engine.models.mtp import MTPModule


def quick_main(main: Decoder) -> Decoder:
    """The main model. Weights are shared."""
    return replace(main, blocks=_blocks(main.blocks)) if _has_kernels(main.embedding.device) else main


def quick_layers(module: MTPModule) -> MTPModule:
    """MTP layers. Weights are shared."""
    if not _has_kernels(module.embedding.device):
        return module
    blocks = _blocks([layer.block for layer in module.layers])
    layers = [replace(layer, block=block) for layer, block in zip(module.layers, blocks, strict=True)]
    return replace(module, layers=layers)


def _has_kernels(device: torch.device) -> bool:
    return device.type == "cuda" and importlib.util.find_spec("triton") is not None


def _blocks(blocks: Sequence[BlockMap]) -> list[BlockMap]:
    from mtp_engine.kernels.sequences import gate, rotate

    found: list[BlockMap] = []
    for each in blocks:
        block = cast(Block, each)  # models are loaded unfused for training
        ffn = replace(block.ffn, gated=gate) if isinstance(block.ffn, GatedMLP) else block.ffn
        found.append(replace(block, attention=replace(block.attention, rotate=rotate), ffn=ffn))
    return found
