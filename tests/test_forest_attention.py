"""Attention of trees whose shared keys are read once: bit for bit that of kernels/tree_attention.py."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from test_tree_attention import REAL, TINY, Heads, forest, make

from mtp_engine.kernels.chain_attention import chain_plan
from mtp_engine.kernels.forest_attention import forest_attention, suits_forest
from mtp_engine.kernels.tree_attention import tree_attention


def shared(call: Any) -> torch.Tensor:
    """`forest_attention` of a call of `tree_attention`."""
    q, (_, kv_heads, _) = call["q"], call["k_cache"].shape
    plan = replace(chain_plan(q.dtype, q.shape[1], q.shape[2], kv_heads, q.shape[3]), splits=call["plan"].splits)
    return forest_attention(**{name: value for name, value in call.items() if name != "bound"} | {"plan": plan})


@pytest.mark.parametrize(
    ("lengths", "first", "dtype"),
    [([0, 61], 0, torch.bfloat16), ([61, 1], 3, torch.float32), ([150, 127], 70, torch.bfloat16)],
)
def test_it_has_the_bits_of_tree_attention(lengths: list[int], first: int, dtype: torch.dtype) -> None:
    """Trees that stand in one tile of positions and in two, of more nodes than a block takes, and rows without parents."""
    for heads in (Heads(8, 8, 6, 1), replace(TINY, window=20, sink=True)):
        parents = torch.stack([forest(7, 1), forest(7, 2, roots=3)])
        call = make(heads, parents, lengths, first=first, dtype=dtype)
        assert torch.equal(shared(call), tree_attention(**call))


@pytest.mark.cuda
@pytest.mark.parametrize("heads", REAL, ids=lambda h: f"{h.qk}-{h.v}-{h.query}-{h.kv}-{h.window}")
@pytest.mark.parametrize("nodes", [2, 16, 40])
def test_it_has_the_bits_of_tree_attention_on_the_gpu(heads: Heads, nodes: int) -> None:
    parents = torch.stack([forest(nodes, seed, roots=1 + seed // 2) for seed in range(4)])
    for lengths in ([0, 63, 1000, 5000], [64 * 7 - 3, 64 * 20, 31, 900]):
        call = make(heads, parents, lengths, dtype=torch.bfloat16)
        assert torch.equal(shared(call), tree_attention(**call))


def test_which_kernel_suits() -> None:
    assert suits_forest(16, 16, 8, 1 << 15)
    assert suits_forest(8, 16, 8, 2048)
    assert not suits_forest(8, 16, 8, 4096), "long contexts of few requests want many programs"
    assert not suits_forest(4, 16, 8, 2048)
