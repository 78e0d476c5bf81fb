"""The mixture of experts' Triton kernels against their torch twins; in Triton's interpreter where there is no GPU."""

import os
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before triton is imported
pytest.importorskip("triton")
from mtp_engine.kernels import experts, moe
from mtp_engine.kernels.experts import PlainStack
from mtp_engine.kernels.fp8 import BlockMatrix, plain_rows, quantise_blocks
from mtp_engine.kernels.int4 import Int4Stack, pack

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EPS = 1e-5
TOLERANCE = 4e-3 if DEVICE == "cuda" else 0.012  # y, h and the sum are rounded to bf16; the interpreter truncates


class Shape(NamedTuple):
    experts: int
    per_token: int
    hidden: int
    inner: int
    block: int


TINY = Shape(8, 3, 64, 16, 16)
FOUR_BITS = Shape(8, 3, 128, 32, 16)  # groups of 64 and of 16
REAL = Shape(256, 8, 4096, 2048, 128)
PART = REAL._replace(experts=64, inner=256)  # of one of eight ranks, of fewer experts


class Layer(NamedTuple):
    norm: Tensor
    router: Tensor
    bias: Tensor
    gate_up: moe.Stack
    down: moe.Stack


def stack(shape: Shape, sizes: list[int], columns: int, kind: str) -> moe.Stack:
    """One matrix of sum(sizes) x columns per expert, drawn and quantised expert by expert: real ones are large."""
    if kind == "int4":
        drawn = torch.randn(shape.experts, sum(sizes), columns, device=DEVICE) * columns**-0.5
        return Int4Stack.of(PlainStack(drawn), shape.experts)
    table = plain_rows(sizes, shape.block)
    plain, data, scale = [], [], []
    for _ in range(shape.experts):
        weight = torch.randn(sum(sizes), columns, device=DEVICE) * columns**-0.5
        if kind == "fp8":
            values, factors = (
                t.to(DEVICE) for t in quantise_blocks(weight.cpu(), table, int(table[-1]) + 1, shape.block)
            )
            data.append(values)
            scale.append(factors)
        else:
            plain.append(weight.bfloat16())
    if kind == "fp8":
        return BlockMatrix(torch.stack(data), torch.stack(scale), table.to(DEVICE), shape.block)
    return PlainStack(torch.stack(plain))


def layer(shape: Shape, kind: str) -> Layer:
    torch.manual_seed(3)
    return Layer(
        (1 + 0.1 * torch.randn(shape.hidden, device=DEVICE)).bfloat16(),
        torch.randn(shape.experts, shape.hidden, device=DEVICE) * shape.hidden**-0.5,
        torch.randn(shape.experts, device=DEVICE) * 0.02,
        stack(shape, [shape.inner, shape.inner], shape.hidden, kind),
        stack(shape, [shape.hidden], shape.inner, kind),
    )


def rows(shape: Shape, tokens: int) -> Tensor:
    return torch.randn(tokens, shape.hidden, device=DEVICE, generator=torch.Generator(DEVICE).manual_seed(1)).bfloat16()


def ffn(x: Tensor, one: Layer, shape: Shape, scale: float = 1.0) -> Tensor:
    y, routing = moe.route(x, one.norm, EPS, one.router, one.bias, shape.per_token, True, scale)
    return moe.down(moe.gate_up(y, routing, one.gate_up), routing, one.down, x)


def twin(x: Tensor, one: Layer, shape: Shape, scale: float = 1.0) -> Tensor:
    """In fp32, but for y, which both round to bf16 before the router sees it."""
    y = F.rms_norm(x.float(), (shape.hidden,), one.norm.float(), EPS).bfloat16().float()
    weights, chosen = experts.route(y, one.router, one.bias, shape.per_token, True, scale)
    gate_up, down = (PlainStack(s.weight.float()) if isinstance(s, PlainStack) else s for s in (one.gate_up, one.down))
    return x.float() + experts.mix_experts(y, weights, chosen, gate_up, down)


def error(ours: Tensor, theirs: Tensor) -> float:
    return float((ours.float() - theirs).norm() / theirs.norm())


@pytest.mark.parametrize("normalise", [True, False])
@pytest.mark.parametrize("tokens", [1, 5, 19])
def test_route(tokens: int, normalise: bool) -> None:
    """19 rows: two tiles of tokens in both kernels."""
    one, x = layer(TINY, "bf16"), rows(TINY, tokens)
    y, routing = moe.route(x, one.norm, EPS, one.router, one.bias, TINY.per_token, normalise, 2.5)
    torch.testing.assert_close(
        y, F.rms_norm(x.float(), (TINY.hidden,), one.norm.float(), EPS).bfloat16(), rtol=0.01, atol=0
    )
    weights, chosen = experts.route(y, one.router, one.bias, TINY.per_token, normalise, 2.5)
    chosen, order = chosen.sort()
    assert routing.experts.tolist() == chosen.tolist()
    torch.testing.assert_close(routing.weights, weights.gather(1, order), rtol=1e-5, atol=1e-6)
    check_groups(routing, TINY.experts)


def check_groups(routing: moe.Routing, count: int) -> None:
    """Every pair is in its expert's row, once, and the experts that have pairs come first."""
    flat = routing.experts.flatten().tolist()
    found = [expert for expert in range(count) if expert in flat]
    rest = [expert for expert in range(count) if expert not in flat]
    assert routing.slots.tolist() == [expert + (flat.count(expert) << 32) for expert in found + rest]
    for expert in found:
        amount = flat.count(expert)
        assert routing.pairs[expert, :amount].tolist() == [p for p, e in enumerate(flat) if e == expert]


def test_of_equal_scores_the_lower_expert_wins() -> None:
    one = layer(TINY, "bf16")
    router = one.router[:1].expand(TINY.experts, -1).contiguous()
    bias = torch.zeros(TINY.experts, device=DEVICE)
    _, routing = moe.route(rows(TINY, 2), one.norm, EPS, router, bias, TINY.per_token, True, 1.0)
    assert routing.experts.tolist() == [[0, 1, 2]] * 2


KINDS = pytest.mark.parametrize(("shape", "kind"), [(TINY, "bf16"), (TINY, "fp8"), (FOUR_BITS, "int4")])


@KINDS
@pytest.mark.parametrize("narrow", [0, 768])
@pytest.mark.parametrize("tokens", [1, 9])
def test_ffn(tokens: int, narrow: int, shape: Shape, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where warps share an expert's inner columns."""
    monkeypatch.setattr(moe, "_NARROW", narrow)
    one, x = layer(shape, kind), rows(shape, tokens)
    assert error(ffn(x, one, shape, 2.5), twin(x, one, shape, 2.5)) < TOLERANCE


@KINDS
def test_an_expert_with_more_tokens_than_a_tile(shape: Shape, kind: str) -> None:
    """All 18 tokens go to the same experts, which take them in two tiles."""
    one, x = layer(shape, kind), rows(shape, 18)
    one = one._replace(bias=torch.arange(shape.experts, device=DEVICE, dtype=torch.float32))
    assert error(ffn(x, one, shape), twin(x, one, shape)) < TOLERANCE


@KINDS
def test_rows_do_not_depend_on_their_neighbours(shape: Shape, kind: str) -> None:
    one, x = layer(shape, kind), rows(shape, 18)
    together = ffn(x, one, shape)
    for first, last in ((0, 1), (3, 7), (17, 18)):
        assert torch.equal(ffn(x[first:last].contiguous(), one, shape), together[first:last])


def test_shapes_that_do_not_fit_are_refused() -> None:
    one, x = layer(TINY, "bf16"), rows(TINY, 1)
    y, routing = moe.route(x, one.norm, EPS, one.router, one.bias, TINY.per_token, True, 1.0)
    with pytest.raises(ValueError, match="cannot be cut"):
        moe.gate_up(y[:, :24], routing, PlainStack(one.gate_up.matrix(0, x.dtype)[None, :, :24]))
    with pytest.raises(ValueError, match="bf16"):
        moe.route(x.float(), one.norm, EPS, one.router, one.bias, TINY.per_token, True, 1.0)


@pytest.mark.cuda
@pytest.mark.parametrize(
    ("shape", "kind"),
    [(REAL, "fp8"), (PART, "fp8"), (PART, "bf16"), *((REAL._replace(experts=32), kind) for kind in ("bf16", "int4"))],
)
def test_real_shapes(shape: Shape, kind: str) -> None:
    """Exact to bf16's rounding of h and of the sum, and the same bits for any number of rows, in any tile."""
    one, x = layer(shape, kind), rows(shape, 64)
    together = ffn(x, one, shape)
    assert error(together, twin(x, one, shape)) < TOLERANCE
    for tokens in (1, 2, 4, 8, 16, 33):
        assert torch.equal(ffn(x[:tokens], one, shape), together[:tokens])
    y, routing = moe.route(x, one.norm, EPS, one.router, one.bias, shape.per_token, True, 1.0)
    check_groups(routing, shape.experts)
    h = moe.gate_up(y, routing, one.gate_up)
    for tile in (
        moe.Tile(16, 1, 3),
        moe.Tile(64 if shape.inner > 256 else 32, 2, 2, unroll=2),
        moe.Tile(32, 2, 2, tokens=8),
    ):
        assert torch.equal(moe.gate_up(y, routing, one.gate_up, tile), h)


@pytest.mark.cuda
def test_every_fp8_value_is_widened_exactly() -> None:
    """Down projections of one-hot rows read the weights out, denormals and zeros included."""
    values = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
    values = values[~values.float().isnan()]  # 254
    data = torch.zeros(1, 128, 2, 128).to(torch.float8_e4m3fn)
    data[0, :127] = values.view(127, 2, 1).view(torch.uint8).expand(127, 2, 128).contiguous().view(torch.float8_e4m3fn)
    weight = BlockMatrix(
        data.view(1, 128, 256).to(DEVICE), torch.ones(1, 1, 2, device=DEVICE), plain_rows([128], 128).to(DEVICE), 128
    )
    one_hot = torch.zeros(2, 256, device=DEVICE, dtype=torch.bfloat16)
    one_hot[0, 5] = one_hot[1, 200] = 1
    experts, slots, pairs = (torch.tensor(t, device=DEVICE) for t in ([[0], [0]], [2 << 32], [[0, 1]]))
    routing = moe.Routing(torch.ones(2, 1, device=DEVICE), experts.int(), slots, pairs.int())
    residual = torch.zeros(2, 128, device=DEVICE, dtype=torch.bfloat16)
    out = moe.down(one_hot, routing, weight, residual, moe.Tile(64, 2, 3))
    assert torch.equal(out.T[:127].float().cpu(), values.float().view(127, 2))


def test_every_number_of_4_bits_is_widened_exactly() -> None:
    """Down projections of one-hot rows read the weights out: every number in both halves of a byte, scales of both signs."""
    numbers = torch.arange(-8, 8).repeat(4)[torch.randperm(64, generator=torch.Generator().manual_seed(0))]
    numbers = torch.stack([numbers.roll(shift) for shift in range(32)]).float()  # [32, 64]: two groups of 32
    scale = torch.tensor([0.5, -3.0]).bfloat16().expand(1, 32, 2).contiguous()
    weight = Int4Stack(pack(numbers, 32)[None].to(DEVICE), scale.to(DEVICE), 32)
    one_hot = torch.eye(64, device=DEVICE).bfloat16()
    experts, pairs = torch.zeros(64, 1), torch.arange(64)[None]
    slots = torch.tensor([64 << 32], device=DEVICE)
    routing = moe.Routing(torch.ones(64, 1, device=DEVICE), experts.int().to(DEVICE), slots, pairs.int().to(DEVICE))
    out = moe.products(one_hot, routing, weight)
    expected = numbers * torch.tensor([0.5, -3.0]).repeat_interleave(32)
    assert torch.equal(out.T.cpu(), expected)
    assert torch.equal(weight.matrix(0, torch.float32).cpu(), expected)
