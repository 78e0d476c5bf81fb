"""Tree attention: against its dense twin, and bit for bit against decoding every node's path alone."""

import os
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before triton is imported

from mtp_engine.kernels.ancestry import ancestry, ancestry_twin
from mtp_engine.kernels.tree_attention import Plan, Scratch, tree_attention, tree_attention_twin

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PAGE = 16


@dataclass(frozen=True)
class Heads:
    qk: int
    v: int
    query: int
    kv: int
    window: int = 0
    sink: bool = False


TINY = Heads(8, 8, 2, 1)
SPLITS = (64, 2, 128, 1, 256)  # so that short caches reach all three stretches


def forest(nodes: int, seed: int, roots: int = 1) -> Tensor:
    """[N] int64: a random forest whose first `roots` rows have no parent."""
    g = torch.Generator().manual_seed(seed)
    return torch.tensor([-1 if i < roots else int(torch.randint(0, i, (1,), generator=g)) for i in range(nodes)])


def offsets_of(parents: Tensor) -> Tensor:
    """[B, N] -> [B, N]: how many rows are above a row."""
    return (ancestry_twin(parents, torch.zeros_like(parents))[1][..., None] >> torch.arange(64) & 1).sum(-1) - 1


def make(heads: Heads, parents: Tensor, lengths: list[int], *, first: int = 0, dtype: Any = None, seed: int = 0) -> Any:
    """The arguments of a call: parents [B, N]; a cache whose pages are shuffled, NaN wherever nothing was written."""
    dtype = dtype or torch.float32
    g = torch.Generator(DEVICE).manual_seed(seed)
    (batch, nodes), offsets, most = parents.shape, offsets_of(parents), max(lengths) + parents.shape[1]
    pages = -(-(heads.window + 63 if heads.window else most) // PAGE)  # a ring that serves up to 64 rows
    table = torch.randperm(batch * pages + 1, generator=torch.Generator().manual_seed(seed))[: batch * pages]
    table = table.int().view(batch, pages).to(DEVICE)
    rows = (batch * pages + 1) * PAGE
    call = {
        "q": torch.randn(batch, nodes, heads.query, heads.qk, generator=g, device=DEVICE).to(dtype),
        "k_cache": torch.full((rows, heads.kv, heads.qk), float("nan"), dtype=dtype, device=DEVICE),
        "v_cache": torch.full((rows, heads.kv, heads.v), float("nan"), dtype=dtype, device=DEVICE),
        "pages": table,
        "lengths": torch.tensor(lengths, device=DEVICE),
        "positions": torch.tensor(lengths, device=DEVICE)[:, None] + offsets.to(DEVICE),
        "paths": ancestry_twin(parents.to(DEVICE), offsets.to(DEVICE))[0],
        "first": torch.full((batch,), first, device=DEVICE),
        "page_size": PAGE, "wrap": pages, "window": heads.window, "bound": most, "scale": heads.qk**-0.5,
        "sink": torch.randn(heads.query, generator=g, device=DEVICE) if heads.sink else None,
        "plan": replace(Plan.default(dtype, nodes * heads.query // heads.kv, heads.kv, heads.qk), splits=SPLITS),
    }  # fmt: skip
    for b, length in enumerate(lengths):
        begin = max(length - heads.window + 1, 0) if heads.window else 0
        written = storage(call, b, torch.arange(max(begin, min(first, length)), length + nodes))
        for cache in (call["k_cache"], call["v_cache"]):
            cache[written] = torch.randn(len(written), *cache.shape[1:], generator=g, device=DEVICE).to(dtype)
    return call


def storage(call: Any, b: int, slots: Tensor) -> Tensor:
    slots = slots.to(DEVICE)
    return call["pages"][b, slots // PAGE % call["wrap"]].long() * PAGE + slots % PAGE


def alone(call: Any, b: int, i: int) -> Any:
    """The call of plain decoding at node i of request b: its path committed, itself the only row."""
    length, position = int(call["lengths"][b]), int(call["positions"][b, i])
    path = call["paths"][b, i, : position - length + 1].cpu()
    at = torch.arange(position - length + 1)[path >= 0]
    source, target = storage(call, b, length + path[path >= 0]), storage(call, b, length + at)
    one = dict(call)
    for name in ("k_cache", "v_cache"):
        one[name] = call[name].clone()
        one[name][target] = call[name][source]
    one |= {
        "q": call["q"][b : b + 1, i : i + 1], "pages": call["pages"][b : b + 1], "first": call["first"][b : b + 1],
        "lengths": torch.tensor([position], device=DEVICE), "positions": torch.tensor([[position]], device=DEVICE),
        "paths": torch.zeros(1, 1, 1, dtype=torch.int32, device=DEVICE), "bound": position + 1,
        "plan": replace(Plan.default(call["q"].dtype, 1, 8, 64), splits=call["plan"].splits),
    }  # fmt: skip
    return one


def part(call: Any, rows: int) -> Any:
    """The same step with the first `rows` rows only."""
    group = call["q"].shape[2] // call["k_cache"].shape[1]
    fewer = {name: call[name][:, :rows] for name in ("q", "positions")}
    plan = replace(Plan.default(call["q"].dtype, rows * group, 8, 64), splits=call["plan"].splits)
    return call | fewer | {"paths": call["paths"][:, :rows, :rows].contiguous(), "plan": plan}


def error(y: Tensor, reference: Tensor) -> float:
    return float((y.float() - reference.float()).norm() / reference.float().norm())


def test_ancestry_is_what_the_parents_say() -> None:
    parents = torch.stack([forest(11, 0), forest(11, 1, roots=3)]).to(DEVICE)
    offsets = offsets_of(parents.cpu()).to(DEVICE)
    for got, want in zip(ancestry(parents, offsets), ancestry_twin(parents, offsets), strict=True):
        assert torch.equal(got, want)
    chain = torch.arange(-1, 63, device=DEVICE)[None]
    paths, bits = ancestry(chain, chain + 1)
    assert paths[0, 63].tolist() == list(range(64))
    assert paths[0, 2].tolist() == [0, 1, 2] + [-1] * 61
    assert bits[0].tolist() == [(2 << i) - 1 for i in range(63)] + [-1]  # all 64 bits


def test_the_fewest_splits_that_hold_the_far_keys() -> None:
    plan = Plan(splits=(128, 2, 256, 2, 512))
    assert [plan.far(bound) for bound in (1, 128, 129, 192, 193, 320, 384, 385)] == [0, 0, 1, 1, 1, 2, 2, 3]
    assert max(Plan.default(torch.bfloat16, 4, heads, 128).far(262144) for heads in (1, 4, 8)) <= 160


@settings(max_examples=5, deadline=None)
@given(
    heads=st.sampled_from([TINY, Heads(24, 16, 3, 1), Heads(8, 8, 4, 2, sink=True), Heads(8, 8, 2, 1, window=9)]),
    lengths=st.lists(st.sampled_from([0, 1, 63, 64, 127, 128, 200, 300]), min_size=1, max_size=2),
    nodes=st.integers(1, 5),
    roots=st.integers(1, 2),
    first=st.sampled_from([0, 0, 1, 70]),
    seed=st.integers(0, 1000),
)
def test_equals_dense_attention(
    heads: Heads, lengths: list[int], nodes: int, roots: int, first: int, seed: int
) -> None:
    parents = torch.stack([forest(nodes, seed + b, roots) for b in range(len(lengths))])
    call = make(heads, parents, lengths, first=first, seed=seed)
    y = tree_attention(**call)
    assert y.is_contiguous()
    torch.testing.assert_close(y, tree_attention_twin(**call), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("length", "first"), [(0, 0), (61, 0), (127, 3), (400, 150)])
def test_every_node_has_the_bits_of_plain_decoding(length: int, first: int, dtype: torch.dtype) -> None:
    call = make(TINY, forest(6, 3)[None], [length], first=first, dtype=dtype)
    y = tree_attention(**call)
    assert error(y, tree_attention_twin(**call)) <= (1e-6 if dtype == torch.float32 else 1e-2)
    for i in (0, 3, 5):
        assert torch.equal(tree_attention(**alone(call, 0, i))[0, 0], y[0, i])


@pytest.mark.parametrize("length", [0, 62, 150])
@pytest.mark.parametrize("window", [1, 9, 129])
def test_a_window_by_position_in_a_ring_that_wraps(window: int, length: int) -> None:
    chain = torch.arange(-1, 6)[None]
    call = make(replace(TINY, window=window, sink=True), chain, [length])
    y = tree_attention(**call)
    torch.testing.assert_close(y, tree_attention_twin(**call), rtol=1e-5, atol=1e-5)
    for i in (0, 3, 6):
        assert torch.equal(tree_attention(**alone(call, 0, i))[0, 0], y[0, i])


def test_neither_other_requests_nor_padding_nor_the_bound_change_a_bit() -> None:
    call = make(TINY, torch.stack([forest(5, 0), forest(5, 1)]), [190, 70])
    y = tree_attention(**call)
    mine = {name: call[name][1:] for name in ("q", "pages", "lengths", "positions", "paths", "first")}
    assert torch.equal(tree_attention(**call | mine)[0], y[1])
    assert torch.equal(tree_attention(**call | mine | {"bound": 75}), y[1:])  # in one kernel: no far keys
    assert torch.equal(tree_attention(**part(call, 3)), y[:, :3])
    padded = torch.tensor([-1, 0, 1, -1, -1])[None]
    call = make(TINY, padded, [125])
    longer = tree_attention(**call)
    assert torch.isfinite(longer).all()
    assert torch.equal(tree_attention(**part(call, 3)), longer[:, :3])


def test_a_padding_row_anywhere_stays_finite() -> None:
    call = make(TINY, torch.tensor([-1, 0, -1])[None], [130])
    call["positions"][0, 2] = 132  # its path is empty up to itself
    call["paths"][0, 2] = torch.tensor([-1, -1, 2])
    torch.testing.assert_close(tree_attention(**call), tree_attention_twin(**call), rtol=1e-5, atol=1e-5)


def test_strides_and_scratch_are_the_callers() -> None:
    call = make(Heads(16, 8, 2, 2), forest(3, 0)[None], [200])
    want = tree_attention(**call)
    both = torch.cat([call["k_cache"], call["v_cache"]], -1)  # keys and values side by side, queries as a slice
    q = torch.cat([call["q"], call["q"]], -1)[..., 16:]
    scratch = Scratch.empty(3 * 2, 1 + call["plan"].far(call["bound"]), 8, torch.device(DEVICE))
    got = tree_attention(**call | {"q": q, "k_cache": both[..., :16], "v_cache": both[..., 16:], "scratch": scratch})
    assert torch.equal(got, want)
    with pytest.raises(AssertionError, match="scratch"):
        tree_attention(**call | {"scratch": Scratch.empty(1, 1, 8, torch.device(DEVICE))})


REAL = [
    Heads(64, 64, 9, 3),
    Heads(128, 128, 32, 8),
    Heads(192, 128, 64, 8, window=129, sink=True),
    Heads(192, 128, 64, 4),
]


REAL_CASES = [(length, torch.bfloat16) for length in (1, 63, 64, 127, 1000, 5000, 33000)]
REAL_CASES += [(63, torch.float32), (5000, torch.float32)]


@pytest.mark.cuda
@pytest.mark.parametrize(("length", "dtype"), REAL_CASES)
@pytest.mark.parametrize("heads", REAL, ids=lambda h: f"{h.qk}-{h.v}-{h.query}-{h.kv}")
def test_real_shapes_on_the_gpu(heads: Heads, length: int, dtype: torch.dtype) -> None:
    parents = torch.stack([forest(64, length), torch.arange(-1, 63)])
    call = make(heads, parents, [length, max(length - 37, 0)], dtype=dtype, seed=length)
    call["plan"] = Plan.default(dtype, 64 * heads.query // heads.kv, heads.kv, heads.qk)
    y = tree_attention(**call)
    assert torch.isfinite(y).all()
    for b in (0, 1):
        mine = {name: call[name][b : b + 1] for name in ("q", "pages", "lengths", "positions", "paths", "first")}
        tolerance = 5e-3 if dtype == torch.bfloat16 else 1e-5
        assert error(y[b : b + 1], tree_attention_twin(**call | mine)) <= tolerance
        assert torch.equal(tree_attention(**call | mine), y[b : b + 1])
        for i in (0, 1, 17, 40, 63):
            assert torch.equal(tree_attention(**alone(call, b, i))[0, 0], y[b, i])
    for rows in (1, 4, 16):
        assert torch.equal(tree_attention(**part(call, rows)), y[:, :rows])


@pytest.mark.cuda
@pytest.mark.parametrize("heads", REAL, ids=lambda h: f"{h.qk}-{h.v}-{h.query}-{h.kv}")
def test_plans_with_the_same_arithmetic_give_the_same_bits(heads: Heads) -> None:
    call = make(heads, forest(32, 0)[None], [1000], dtype=torch.bfloat16)
    plans = [replace(call["plan"], rows=r, warps=w, depth=d) for r, w in ((64, 4), (128, 8)) for d in (0, 1, 2, 3)]
    want, *rest = [tree_attention(**call | {"plan": plan}) for plan in plans]
    assert all(torch.equal(y, want) for y in rest)


@pytest.mark.cuda
def test_a_captured_graph_replays_with_other_lengths() -> None:
    call = make(REAL[0], forest(8, 0)[None], [3000], dtype=torch.bfloat16)
    tree_attention(**call)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = tree_attention(**call)
    for length in (3000, 10, 130, 2999):
        call["positions"] += length - call["lengths"][:, None]
        call["lengths"].fill_(length)
        call["k_cache"].nan_to_num_()
        call["v_cache"].nan_to_num_()
        graph.replay()
        assert torch.equal(y, tree_attention(**call))
