"""The kernels of training over whole sequences: against their twins, and their gradients against autograd's."""

import pytest
import torch
from torch import Tensor

from mtp_engine.config import RopeConfig
from mtp_engine.kernels import sequences
from mtp_engine.models import layers
from mtp_engine.training import attention

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def with_gradient(function: object, x: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    leaf = x.clone().requires_grad_()
    out = function(leaf)  # type: ignore[operator]
    return out.detach(), torch.autograd.grad(out, leaf, grad)[0]


@pytest.mark.parametrize(("dim", "width"), [(8, 8), (4, 12)], ids=["whole heads", "a part of each"])
@pytest.mark.parametrize("among", [0, 5], ids=["alone", "beside values"])
def test_rotation(dim: int, width: int, among: int) -> None:
    positions = torch.arange(7, device=DEVICE).expand(2, -1)
    tables = layers.RotaryEmbedding(RopeConfig(dim, 100.0), torch.device(DEVICE))(positions)
    whole = normal(2, 7, 3 * width + among, seed=1)
    x, grad = whole[..., : 3 * width].view(2, 7, 3, width), normal(2, 7, 3, width, seed=2)
    found = with_gradient(lambda leaf: sequences.rotate(leaf, tables), x, grad)
    expected = with_gradient(lambda leaf: layers.rotate(leaf, tables), x, grad)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5)
    assert torch.equal(sequences.rotate(x, tables), found[0])  # views, too


@pytest.mark.parametrize("width", [24, 1500])
def test_the_gate(width: int) -> None:
    x, grad = normal(2, 3, 2 * width, seed=3), normal(2, 3, width, seed=4)
    found, expected = with_gradient(sequences.gate, x, grad), with_gradient(layers.gate, x, grad)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5)


@pytest.mark.cuda
@pytest.mark.parametrize("window", [None, 16, 128])
def test_flash_attention_with_a_window(window: int | None) -> None:
    q, k, v = (normal(2, 200, heads, 64, seed=heads).bfloat16() for heads in (9, 3, 30))
    v, grad = v[:, :, :3].contiguous(), normal(2, 200, 9, 64, seed=5).bfloat16()
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    found = attention.flash(*leaves, 0.125, window)
    exact = [x.float().requires_grad_() for x in (q, k, v)]
    expected = attention.SequenceAttention([window])(0, *exact, scale=0.125)
    torch.testing.assert_close(found.float(), expected, atol=2e-2, rtol=2e-2)
    ours = torch.autograd.grad(found, leaves, grad)
    theirs = torch.autograd.grad(expected, exact, grad.float())
    for a, b in zip(ours, theirs, strict=True):
        assert (a.float() - b).norm() / b.norm() < 1e-2
