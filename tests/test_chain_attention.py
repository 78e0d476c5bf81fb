"""Attention of chains: against the dense twin, and bit for bit against the kernel for trees, row by row and in any chunks."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from test_tree_attention import PAGE, REAL, SPLITS, TINY, Heads, error, make

from mtp_engine.attention.exact import MOST_ROWS, exact_attention
from mtp_engine.attention.rows import StepRows
from mtp_engine.cache import HybridKV, Pages
from mtp_engine.config import AttentionConfig, RopeConfig
from mtp_engine.kernels.chain_attention import Packed, chain_attention, chain_plan
from mtp_engine.kernels.tree_attention import Plan, tree_attention, tree_attention_twin

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def chain(
    call: Any, start: int = 0, stop: int | None = None, plan: Plan | None = None, *, teams: bool = True
) -> torch.Tensor:
    """Rows start..stop-1 of the call's chains, the ones before them counted as cached."""
    names = ("k_cache", "v_cache", "pages", "page_size", "wrap", "window", "scale", "sink")
    given = {name: call[name] for name in names} | {"q": call["q"][:, start:stop], "lengths": call["lengths"] + start}
    heads, (_, kv_heads, _) = call["q"].shape[2], call["k_cache"].shape
    plan = plan or chain_plan(call["q"].dtype, given["q"].shape[1], heads, kv_heads, call["q"].shape[3])
    first = call["first"] if int(call["first"][0]) else None
    return chain_attention(**given, first=first, plan=replace(plan, splits=call["plan"].splits), teams=teams)


def straight(nodes: int, batch: int) -> torch.Tensor:
    return torch.arange(-1, nodes - 1).expand(batch, -1).contiguous()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("lengths", "first"), [([0, 61], 0), ([127, 3], 3), ([400, 190], 150)])
def test_chains_have_the_bits_of_the_kernel_for_trees(lengths: list[int], first: int, dtype: torch.dtype) -> None:
    for heads in (TINY, Heads(24, 16, 3, 1), replace(TINY, window=20, sink=True)):
        call = make(heads, straight(6, 2), lengths, first=first, dtype=dtype)
        y = chain(call)
        assert error(y, tree_attention_twin(**call)) <= (1e-6 if dtype == torch.float32 else 1e-2)
        assert torch.equal(y, tree_attention(**call))
        assert torch.equal(torch.cat([chain(call, 0, 1), chain(call, 1, 4), chain(call, 4, 6)], 1), y)


def packed(call: Any, counts: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """The first counts[b] rows of each request, in one row, and what `chain` says of them."""
    names = ("k_cache", "v_cache", "pages", "page_size", "wrap", "window", "scale", "sink", "lengths")
    q, y = (torch.cat([x[b, :count] for b, count in enumerate(counts)])[None] for x in (call["q"], chain(call)))
    heads, (_, kv_heads, _) = q.shape[2], call["k_cache"].shape
    plan = replace(chain_plan(q.dtype, max(counts), heads, kv_heads, q.shape[3]), splits=call["plan"].splits)
    first, table = call["first"] if int(call["first"][0]) else None, torch.tensor(counts, device=q.device)
    given = {name: call[name] for name in names} | {"q": q, "first": first, "plan": plan}
    return chain_attention(**given, packed=Packed.of(call["lengths"], table, sum(counts))), y


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("lengths", [[0, 61, 190], [127, 3, 0]])
def test_packed_chains_have_the_bits_of_each_alone(lengths: list[int], dtype: torch.dtype) -> None:
    for heads in (TINY, replace(TINY, window=20, sink=True)):
        call = make(heads, straight(6, 3), lengths, dtype=dtype)
        assert torch.equal(*packed(call, [6, 1, 4]))


def test_packed_rows_over_pages_and_rings_have_the_bits_of_each_alone() -> None:
    """Of a step's attention, layer by layer: one chunk is longer than rings take at once, one is shorter than a window."""
    kinds = [AttentionConfig(2, 1, 8, 8, RopeConfig(8, 1e4), window) for window in (None, 20)]
    g = torch.Generator(DEVICE).manual_seed(0)
    found = []
    for packs in (True, False):
        pages = Pages(slots=3, tokens=600, page_size=PAGE, device=torch.device(DEVICE))
        cache = HybridKV(kinds, pages, max_nodes=MOST_ROWS, ring_page=PAGE, kernels=True, dtype=torch.float32)
        for slot in range(3):
            pages.reserve(slot, 150)
        steps = []
        for spans in (((0, 0, 70), (2, 0, 3), (1, 0, 25)), ((0, 70, 2), (1, 25, 66))):
            table = torch.tensor(spans, device=DEVICE).T.contiguous()
            rows = StepRows.prompts(table, total := int(table[2].sum()), 150)
            parts = [(exact_attention(cache, rows), slice(None))]
            if not packs:
                ends = table[2].cumsum(0).tolist()
                cuts = [slice(end - count, end) for end, (_, _, count) in zip(ends, spans, strict=True)]
                parts = [(exact_attention(cache, each), cut) for each, cut in zip(rows.apart(), cuts, strict=True)]
            g.manual_seed(len(spans))
            for layer in range(2):
                q, k, v = (torch.randn(1, total, n, 8, generator=g, device=DEVICE) for n in (2, 1, 1))
                steps.append(torch.cat([part(layer, q[:, c], k[:, c], v[:, c], scale=0.3) for part, c in parts], 1))
        found.append(steps)
    assert all(torch.equal(*each) for each in zip(*found, strict=True))


@pytest.mark.cuda
@pytest.mark.parametrize("heads", REAL, ids=lambda h: f"{h.qk}-{h.v}-{h.query}-{h.kv}")
@pytest.mark.parametrize("start", [0, 37, 5000])
def test_chunks_of_any_size_on_the_gpu(heads: Heads, start: int) -> None:
    heads = replace(heads, window=0)
    call = make(heads, straight(64, 1), [start], dtype=torch.bfloat16, seed=start)
    nodes = 700
    pages = -(-(start + nodes) // call["page_size"])
    g = torch.Generator(DEVICE).manual_seed(1)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=g, device=DEVICE).bfloat16()

    rows = pages * call["page_size"]
    call |= {
        "q": randn(1, nodes, heads.query, heads.qk), "k_cache": randn(rows, heads.kv, heads.qk), "wrap": pages,
        "v_cache": randn(rows, heads.kv, heads.v), "pages": torch.randperm(pages, device=DEVICE).int()[None],
    }  # fmt: skip
    call["plan"] = Plan.default(torch.bfloat16, 1, heads.kv, heads.qk)
    y = chain(call)
    for size in (1, 3, 64, 100, 256):
        for at in sorted({0, 26, 27, 28, 64, 300, nodes - size}):
            assert torch.equal(chain(call, at, at + size), y[:, at : at + size]), (size, at)
    for at in (0, 27, 300, 699):  # plain decoding, by the other kernel
        lengths = call["lengths"] + at
        one = {"paths": torch.zeros(1, 1, 1, dtype=torch.int32, device=DEVICE), "positions": lengths[:, None]}
        one |= {"q": call["q"][:, at : at + 1], "lengths": lengths, "bound": start + at + 1}
        assert torch.equal(tree_attention(**call | one)[0, 0], y[0, at])
    assert call["plan"].splits != SPLITS


@pytest.mark.cuda
@pytest.mark.parametrize("heads", [Heads(128, 128, 32, 8), Heads(64, 64, 9, 3), Heads(64, 128, 16, 4)])
@pytest.mark.parametrize("nodes", [1, 4, 16])
def test_a_fetching_warp_changes_no_bit(heads: Heads, nodes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Few and many requests, from no key to thousands, over NaN where nothing was written; rows in one tile and in two."""
    monkeypatch.setattr("test_tree_attention.PAGE", 64)
    for lengths in (
        [0, 1, 63, 64, 127, 130, 1000, 5000, 9000],
        [61 + 37 * i for i in range(70)],
        [*range(110, 130), *range(250, 260)],
    ):
        call = make(heads, straight(nodes, len(lengths)), lengths, dtype=torch.bfloat16, seed=nodes)
        for splits in (SPLITS, Plan.default(torch.bfloat16, 1, heads.kv, heads.qk).splits):
            call["plan"] = replace(call["plan"], splits=splits)
            y = chain(call)
            assert torch.equal(y, chain(call, teams=False))
            assert torch.equal(y, tree_attention(**call))
            assert all(torch.equal(y, chain(call)) for _ in range(3))
        assert torch.equal(y[:, :1], chain(call, 0, 1))
