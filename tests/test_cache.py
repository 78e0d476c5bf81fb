"""Caches: who owns which rows, what survives, and that a ring forgets nothing that is still needed."""

import itertools
import random
import resource
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_attention import (
    CPU,
    HEADS,
    KV_HEADS,
    QK_DIM,
    SCALE,
    V_DIM,
    causal_rows,
    dense_visible,
    draw,
    hybrid,
    naive,
    tree_rows,
)
from test_tree import lineage, random_tree
from torch import Tensor

from mtp_engine.attention.torch import TorchAttention
from mtp_engine.cache import HybridKV, PagedKV, Pages, WindowKV
from mtp_engine.tree import DraftTree, VerifyResult

SLOTS, PAGES, PAGE = 3, 6, 4


def paged() -> PagedKV:
    pages = Pages(slots=SLOTS, tokens=PAGES * PAGE, page_size=PAGE, device=CPU)
    return PagedKV(pages, layers=2, kv_heads=1, qk_dim=2, v_dim=1, dtype=torch.float32)


def ring(window: int, nodes: int, slots: int = 2) -> WindowKV:
    return WindowKV(layers=1, kv_heads=1, qk_dim=1, v_dim=1, slots=slots, window=window, max_nodes=nodes,
                    dtype=torch.float32, device=CPU)  # fmt: skip


def state(cache: PagedKV) -> tuple[Any, ...]:
    return [list(pages) for pages in cache.table], cache.owner.free, cache.k.clone(), cache.v.clone()


def fill(cache: PagedKV, slot: int, start: int, stop: int, tag: float) -> None:
    """Write tokens start..stop of the slot: layer l's key of token t is (tag, t), its value l."""
    if start == stop:
        return
    positions = torch.arange(start, stop)
    rows = cache.rows(torch.tensor([slot]), positions[None])
    k = torch.stack([torch.full((stop - start,), tag), positions.float()], -1)[None, :, None]
    for layer in range(2):
        cache.write(layer, rows, k, torch.full((1, stop - start, 1, 1), float(layer)))


def check_contents(cache: PagedKV, slot: int, tokens: int, tag: float) -> None:
    """Through `read`, a view where the pages are in a row, and through `rows`."""
    if not tokens:
        return
    expected = torch.stack([torch.full((tokens,), tag), torch.arange(tokens).float()], -1)
    rows = cache.rows(torch.tensor([slot]), torch.arange(tokens)[None])[0]
    for layer in range(2):
        k, v = cache.read(layer, slot, tokens)
        assert torch.equal(k[:, 0], expected)
        assert torch.equal(cache.k[layer, rows, 0], expected)
        assert torch.equal(v, torch.full((tokens, 1, 1), float(layer)))


OPS = st.lists(st.tuples(st.integers(0, SLOTS - 1), st.integers(-4, PAGE * (PAGES + 1))), max_size=25)


@settings(max_examples=120, deadline=None)
@given(ops=OPS)
def test_pages_under_any_history(ops: list[tuple[int, int]]) -> None:
    """Slots grow and leave at random; nobody's tokens change, no page leaks or has two owners."""
    cache, held, tags = paged(), [0] * SLOTS, [0.0] * SLOTS
    for number, (slot, tokens) in enumerate(ops):
        if tokens < 0:
            cache.owner.release(slot)
            held[slot] = 0
        else:
            tokens = max(tokens, held[slot])
            missing = -(-tokens // PAGE) - len(cache.table[slot])
            free = PAGES - sum(map(len, cache.table))
            before = state(cache)
            if missing > free:
                assert not cache.owner.reserve(slot, tokens)
                assert cache.owner.unreserved == free * PAGE
                assert state(cache)[:2] == before[:2]
                assert all(torch.equal(a, b) for a, b in zip(state(cache)[2:], before[2:], strict=True))
            else:
                assert cache.owner.reserve(slot, tokens)
                assert len(cache.table[slot]) == max(len(before[0][slot]), -(-tokens // PAGE))
                tags[slot] = tags[slot] if held[slot] else float(number + 1)
                fill(cache, slot, held[slot], max(tokens, held[slot]), tags[slot])
                held[slot] = max(tokens, held[slot])
        cache.owner.check()
        for other in range(SLOTS):
            check_contents(cache, other, held[other], tags[other])
    for slot in range(SLOTS):
        cache.owner.release(slot)
    cache.owner.reserve(0, PAGES * PAGE)
    cache.owner.check()


def test_scattered_pages_read_as_a_run_does() -> None:
    cache = paged()
    for slot, tokens in ((0, PAGE), (1, PAGE), (2, 2 * PAGE)):
        cache.owner.reserve(slot, tokens)
    cache.owner.release(0)
    cache.owner.release(2)
    cache.owner.reserve(1, 3 * PAGE)  # pages 1, 2, 3: still a run
    cache.owner.reserve(0, 3 * PAGE)  # pages 0, 4, 5: no run is left
    assert cache.table[0] == [0, 4, 5]
    for slot in (0, 1):
        fill(cache, slot, 0, 3 * PAGE, 7.0)
    for tokens in (1, PAGE, PAGE + 1, 3 * PAGE - 1, 3 * PAGE):
        for layer in range(2):
            scattered, run = cache.read(layer, 0, tokens), cache.read(layer, 1, tokens)
            assert torch.equal(scattered[0], run[0])
            assert torch.equal(scattered[1], run[1])
    assert cache.read(0, 1, 5)[0].data_ptr() == cache.k[0, PAGE].data_ptr(), "a run is read in place"


@pytest.mark.parametrize("fault", ["shared", "free", "lost"])
def test_check_sees_faults(fault: str) -> None:
    cache = paged()
    cache.owner.reserve(0, 2 * PAGE)
    cache.owner.check()
    if fault == "shared":
        cache.table[1] = [cache.table[0][0]]
    elif fault == "free":
        cache.owner.free += 1
    else:
        cache.table[0].pop()
    with pytest.raises(AssertionError):
        cache.owner.check()


# ---- rings --------------------------------------------------------------------------------------------------------


def fits(window: int, nodes: int, less: int) -> bool:
    """Whether, at every length, the keys still needed and a whole step's rows lie in different rows of the ring."""
    kv = ring(window, nodes, slots=1)
    kv.size -= less
    for length in range(3 * (window + nodes)):
        before = kv.prefix_positions(torch.tensor([length]))[0]
        needed = [p for p in before.tolist() if p >= 0] + list(range(length, length + nodes))
        rows = kv.rows(torch.zeros(1, dtype=torch.int64), torch.tensor([needed]))[0].tolist()
        if len(set(rows)) < len(rows):
            return False
    return True


@pytest.mark.parametrize(("window", "nodes"), itertools.product(range(1, 8), range(1, 8)))
def test_a_ring_is_large_enough_and_no_larger(window: int, nodes: int) -> None:
    assert ring(window, nodes).size == window + nodes - 1
    assert fits(window, nodes, less=0)
    if window + nodes > 2:
        assert not fits(window, nodes, less=1)


def test_slots_have_rings_of_their_own() -> None:
    kv = ring(3, 4, slots=3)
    rows = [set(kv.rows(torch.tensor([slot]), torch.arange(50)[None])[0].tolist()) for slot in range(3)]
    assert [len(each) for each in rows] == [6, 6, 6]
    assert set().union(*rows) == set(range(18))


class Session:
    """Requests that prefill, then step through random trees of which random paths are kept. Beside the cache stands a
    list of every token's keys and values; each attention result is compared with what that list gives."""

    def __init__(self, seed: int, windows: list[int | None], max_nodes: int, less: int = 0) -> None:
        self.rng, self.generator = random.Random(seed), torch.Generator().manual_seed(seed)
        self.windows, self.max_nodes = windows, max_nodes
        self.cache = hybrid(windows, max_nodes=max_nodes)
        for group in self.cache.groups:
            if isinstance(group, WindowKV):
                group.size -= less
        self.slots = self.rng.sample(range(3), self.rng.randint(1, 3))
        self.kept = [[self._draw(1, 0) for _ in windows] for _ in self.slots]
        for b, slot in enumerate(self.slots):
            self.cache.pages.reserve(slot, 96)
            self._prefill(b, slot, self.rng.randint(0, 25))

    def _draw(self, batch: int, nodes: int) -> list[Tensor]:
        shapes = (HEADS, QK_DIM), (KV_HEADS, QK_DIM), (KV_HEADS, V_DIM)
        return [draw(self.generator, batch, nodes, *shape) for shape in shapes]

    def length(self, b: int) -> int:
        return self.kept[b][0][1].shape[1]

    def _keep(self, b: int, parts: list[list[Tensor]], row: int, nodes: list[int]) -> None:
        for layer, part in enumerate(parts):
            old = self.kept[b][layer]
            self.kept[b][layer] = [torch.cat([a, x[row : row + 1, nodes]], 1) for a, x in zip(old, part, strict=True)]

    def _prefill(self, b: int, slot: int, tokens: int) -> None:
        while self.length(b) < tokens:
            count = self.rng.randint(1, tokens - self.length(b))
            attention = TorchAttention(self.cache, causal_rows(slot, self.length(b), count))
            parts = [self._draw(1, count) for _ in self.windows]
            for layer, part in enumerate(parts):
                attention(layer, *part, scale=SCALE)
            self._keep(b, parts, 0, list(range(count)))

    def step(self) -> None:
        lengths = [self.length(b) for b in range(len(self.slots))]
        sizes = [self.rng.randint(1, self.max_nodes) for _ in self.slots]
        tree = random_tree(self.rng, sizes, self.max_nodes, 4)
        attention = TorchAttention(self.cache, tree_rows(tree, self.slots, lengths))
        parts = [self._draw(len(self.slots), self.max_nodes) for _ in self.windows]
        for layer, part in enumerate(parts):
            out = attention(layer, *part, scale=SCALE)
            for b, size in enumerate(sizes):
                self._compare(out[b, :size], tree, b, layer, [x[b, :size] for x in part])
        self._commit(tree, lengths, sizes, parts)

    def _compare(self, out: Tensor, tree: DraftTree, b: int, layer: int, part: list[Tensor]) -> None:
        visible = dense_visible(tree.parents[b].tolist(), len(out), self.length(b), self.windows[layer])
        k, v = (torch.cat([self.kept[b][layer][i][0], part[i]]) for i in (1, 2))
        torch.testing.assert_close(out.double(), naive(part[0], k, v, visible, SCALE, None), rtol=1e-4, atol=1e-5)

    def _commit(self, tree: DraftTree, lengths: list[int], sizes: list[int], parts: list[list[Tensor]]) -> None:
        paths = [lineage(tree.parents[b].tolist(), self.rng.randrange(size))[::-1] for b, size in enumerate(sizes)]
        full = [path + path[-1:] * (tree.max_depth + 1 - len(path)) for path in paths]
        path = torch.tensor(full)
        result = VerifyResult(path, torch.zeros_like(path), torch.tensor([len(kept) for kept in paths]))
        self.cache.commit(torch.tensor(self.slots), torch.tensor(lengths), result)
        for b, kept in enumerate(paths):
            self._keep(b, parts, b, kept)


@settings(max_examples=25, deadline=None)
@given(window=st.integers(1, 12), max_nodes=st.integers(1, 8), seed=st.integers(0, 2**32))
def test_rings_and_pages_forget_nothing(window: int, max_nodes: int, seed: int) -> None:
    session = Session(seed, [window, None], max_nodes)
    for _ in range(7):
        session.step()
    session.cache.pages.check()


def test_a_smaller_ring_would_be_caught() -> None:
    """The comparison is sharp: with too few rows, the same sessions go wrong. It takes two less, since TorchAttention
    reads the ring before it writes; one less fails where a kernel writes first (see above)."""
    wrong = 0
    for seed in range(5):
        session = Session(seed, [5], 4, less=2)
        try:
            for _ in range(7):
                session.step()
        except AssertionError:
            wrong += 1
    assert wrong >= 4


# ---- commit -------------------------------------------------------------------------------------------------------


def tags(cache: HybridKV, group: int, slot: int, positions: range) -> list[float]:
    kv = cache.groups[group]
    rows = kv.rows(torch.tensor([slot]), torch.tensor([list(positions)]))[0]
    assert torch.equal(kv.k[0, rows, 0, 0] + 0.5, kv.v[0, rows, 0, 0]), "values move with their keys"
    return [float(x) for x in kv.k[0, rows, 0, 0]]


@pytest.mark.parametrize("seed", range(20))
def test_commit_moves_the_kept_rows_and_no_others(seed: int) -> None:
    rng = random.Random(seed)
    cache, nodes, window = hybrid([None, 6], max_nodes=8), 8, 6
    slots, lengths = rng.sample(range(3), 2), [rng.randint(0, 30), rng.randint(0, 30)]
    for slot in range(3):
        cache.pages.reserve(slot, 45)
    everywhere = list(range(45))
    for group in cache.groups:
        for slot in range(3):  # every row holds its slot and the newest position written there
            rows = group.rows(torch.tensor([slot]), torch.tensor([everywhere]))[0]
            last = 45 if slot not in slots else lengths[slots.index(slot)] + nodes
            for position in everywhere[:last]:
                group.k[0, rows[position]] = 100.0 * slot + position
                group.v[0, rows[position]] = 100.0 * slot + position + 0.5
    paths = [sorted(rng.sample(range(1, nodes), rng.randint(0, 5))) for _ in slots]
    full = torch.tensor([([0, *path] + [path[-1] if path else 0] * 6)[:6] for path in paths])
    counts = torch.tensor([1 + len(path) for path in paths])
    cache.commit(torch.tensor(slots), torch.tensor(lengths), VerifyResult(full, torch.zeros_like(full), counts))
    for group, kv in enumerate(cache.groups):
        ringed = isinstance(kv, WindowKV)
        for slot, length, path in zip(slots, lengths, paths, strict=True):
            start = max(0, length - window + 1) if ringed else 0
            expected = [100.0 * slot + p for p in (*range(start, length), length, *(length + node for node in path))]
            assert tags(cache, group, slot, range(start, length + 1 + len(path))) == expected
        [idle] = {0, 1, 2} - set(slots)
        start = 45 - kv.size if isinstance(kv, WindowKV) else 0
        assert tags(cache, group, idle, range(start, 45)) == [100.0 * idle + p for p in range(start, 45)]


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux's account of memory")
def test_memory_is_taken_as_it_is_written() -> None:
    """A row in each of 64 layers of 8 MB costs 64 small pages, not as many of 2 MB."""

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()

    pages = Pages(slots=1, tokens=8192, page_size=64, device=torch.device("cpu"))
    before = resident()
    cache = PagedKV(pages, layers=64, kv_heads=2, qk_dim=64, v_dim=64, dtype=torch.float32)
    assert not cache.k[:, 5].any()
    cache.k[:, 0] = cache.v[:, 0] = 1.0
    assert resident() - before < 8 << 20
