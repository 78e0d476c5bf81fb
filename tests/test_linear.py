"""The linear layer: packed or not, it is F.linear."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mtp_engine.kernels import linear
from mtp_engine.kernels.linear import Linear, rounded_linear

needs_mkl = pytest.mark.skipif(not hasattr(torch.ops.mkl, "_mkl_linear"), reason="this torch packs no weights")


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@needs_mkl
@pytest.mark.parametrize(("outs", "ins"), [(1, 1), (7, 5), (32, 48), (192, 576), (300, 33), (577, 64)])
def test_packed_equals_plain_for_any_number_of_rows(outs: int, ins: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "packed_is_faster", lambda: True)
    weight, bias = draw(0, outs, ins), draw(1, outs)
    plain, biased = Linear(weight), Linear(weight, bias)
    assert (plain.out_features, plain.in_features) == (outs, ins)
    for rows in range(1, 41):
        x = draw(rows, rows, ins)
        torch.testing.assert_close(plain(x), F.linear(x, weight), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(biased(x), F.linear(x, weight, bias), rtol=1e-4, atol=1e-4)
    for shape in ((2, 3), (1, 1), (4, 10), (3, 130)):
        x = draw(7, *shape, ins)
        torch.testing.assert_close(biased(x), F.linear(x, weight, bias), rtol=1e-4, atol=1e-4)


@needs_mkl
def test_packed_takes_views_and_keeps_no_link_to_the_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "packed_is_faster", lambda: True)
    weight = draw(0, 24, 40)[:, ::2]  # not contiguous
    kept = weight.clone()
    layer, x = Linear(weight), draw(1, 20, 6, 3).permute(1, 2, 0)
    weight.zero_()
    torch.testing.assert_close(layer(x), F.linear(x, kept), rtol=1e-4, atol=1e-4)


def test_falls_back_where_torch_packs_no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    class OtherTorch(SimpleNamespace):
        def __getattr__(self, name: str) -> object:
            return getattr(torch, name)

    monkeypatch.setattr(linear, "torch", OtherTorch(ops=SimpleNamespace(mkl=SimpleNamespace())))
    assert linear.packed_is_faster.__wrapped__() is False


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_unpacked_is_exactly_torch(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other dtypes are never packed, whatever was measured; fp32 is not where packing is slower."""
    monkeypatch.setattr(linear, "packed_is_faster", lambda: dtype != torch.float32)
    weight, bias, x = (draw(i, *shape).to(dtype) for i, shape in enumerate([(12, 20), (12,), (2, 3, 20)]))
    assert torch.equal(Linear(weight)(x), F.linear(x, weight))
    torch.testing.assert_close(Linear(weight, bias)(x), F.linear(x, weight, bias), rtol=1e-2, atol=1e-2)


def test_the_choice_is_made_once() -> None:
    assert linear.packed_is_faster() is linear.packed_is_faster()
    assert linear.packed_is_faster.cache_info().currsize == 1


@pytest.mark.parametrize("bias", [False, True])
def test_int8_is_close_and_close_only(bias: bool) -> None:
    """The draft layers' product: within a percent or two of the exact one, row scales and bias included."""
    generator = torch.Generator().manual_seed(5)
    weight = torch.randn(96, 64, generator=generator) * torch.logspace(-2, 2, 96)[:, None]
    added = torch.randn(96, generator=generator) if bias else None
    x = torch.randn(2, 3, 64, generator=generator)
    exact = F.linear(x, weight, added)
    got = rounded_linear(weight, added)(x)
    assert got.shape == exact.shape
    error = ((got - exact).norm(dim=(0, 1)) / exact.norm(dim=(0, 1))).max()
    assert error < 0.04, "every output row has a scale of its own"


def test_only_fp32_on_a_cpu_is_rounded() -> None:
    assert isinstance(rounded_linear(torch.randn(8, 8, dtype=torch.bfloat16)), Linear)
