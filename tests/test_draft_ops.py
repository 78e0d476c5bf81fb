"""What carries rows from level to level and from step to step: kernels against the torch operations, bit for bit."""

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_tree import draft_trees, random_tree
from torch import Tensor

from mtp_engine.config import SamplingParams, TreeShape
from mtp_engine.drafters.candidates import Ranking
from mtp_engine.drafters.device import DeviceDraftOps
from mtp_engine.drafters.expand import DraftOps, Growth, Level, level_sizes
from mtp_engine.drafters.portable import TorchDraftOps
from mtp_engine.kernels.state import advance, force
from mtp_engine.runtime.request import TreeLimits
from mtp_engine.runtime.slots import SlotState
from mtp_engine.sampling.batch import BIAS, Batch, SamplingBatch
from mtp_engine.sampling.processors import Tables
from mtp_engine.tree import DraftTree, VerifyResult

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
OPS: tuple[DraftOps, DraftOps] = (TorchDraftOps(), DeviceDraftOps(8, DEVICE))
FEW = settings(max_examples=25, deadline=None)


def growth(tree: DraftTree, nodes: int) -> Growth:
    """The tree's first nodes, as far as they have grown."""
    parents = torch.where(tree.real, tree.parents, 0)
    parts = (x[:, : nodes + 1].to(DEVICE) for x in (tree.tokens, parents, tree.depths))
    return Growth(*parts, torch.zeros(len(parents), nodes + 1, device=DEVICE), 1, 1)


def integers(seed: int, low: int, high: int, *shape: int) -> Tensor:
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def floats(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


@FEW
@given(tree=draft_trees(vocab=3, max_nodes=6), new=st.integers(0, 4), shift=st.integers(0, 2), seed=st.integers(0, 99))
def test_rows(tree: DraftTree, new: int, shift: int, seed: int) -> None:
    batch = len(tree.tokens)
    counts, start = integers(seed, 0, new + 1, batch), integers(seed + 1, 0, 50, batch)
    for nodes in range(0 if new else 1, tree.nodes):
        torch_rows, rows = (ops.rows(growth(tree, nodes), new, counts, start, start // 2, shift) for ops in OPS)
        for name in ("positions", "parents", "offsets", "rotary", "first"):
            assert torch.equal(getattr(rows, name), getattr(torch_rows, name)), name


def test_rows_see_their_ancestors() -> None:
    """A real row sees the real ones up to itself, a node those and its ancestors in the tree."""
    tree = random_tree(random.Random(5), [6, 6], 6, 9)
    counts, start, new = torch.tensor([3, 1], device=DEVICE), torch.tensor([10, 20], device=DEVICE), 4
    for ops in OPS:
        above = ops.rows(growth(tree, 5), new, counts, start, start * 0, 0).parents.tolist()
        for b, row in enumerate(above):
            for i in range(new + 5):
                seen, at = {i}, row[i]
                while at >= 0:
                    seen.add(at)
                    at = row[at]
                if i < new:
                    expected = set(range(i + 1)) if i < counts[b] else {i}
                else:
                    ancestors = tree.ancestors[b, i - new + 1].nonzero()[:, 0].tolist()
                    expected = set(range(int(counts[b]))) | {new + node - 1 for node in ancestors if node}
                assert seen == expected


@FEW
@given(tree=draft_trees(vocab=20, max_nodes=6), new=st.integers(1, 4), seed=st.integers(0, 99))
def test_inputs(tree: DraftTree, new: int, seed: int) -> None:
    """Embeddings and carried states, at the first level and below; padding rows may hold anything."""
    batch, width, nodes = len(tree.tokens), 24, tree.nodes - 1
    counts, slots = integers(seed, 1, new + 1, batch), torch.randperm(batch + 2, device=DEVICE)[:batch]
    tokens, embedding = integers(seed, 0, 20, batch, new), floats(seed, 20, width)
    first, above = floats(seed, batch, new, width), floats(seed + 1, batch, new + nodes, width)
    for hidden, deeper, drafted in ((first, False, 0), (above, True, nodes)):
        got = []
        for ops in OPS:
            carry, grown = floats(7, batch + 2, width), growth(tree, drafted)
            parents = ops.rows(grown, new, counts, counts, counts, 0).parents
            embedded, states = ops.inputs(
                grown, tokens, embedding, hidden, parents, carry, slots, counts, deeper=deeper
            )
            real = torch.arange(new + drafted, device=DEVICE)
            real = (real < counts[:, None]) | (real >= new)
            got.append((embedded, torch.where(real[..., None], states, 0), carry))
        assert all(torch.equal(a, b) for a, b in zip(*got, strict=True))
    assert torch.equal(*(ops.last(first, counts - 1) for ops in OPS))


@FEW
@given(tree=draft_trees(vocab=20, max_nodes=6), seed=st.integers(0, 99))
def test_rows_that_wait_stay(tree: DraftTree, seed: int) -> None:
    """A plain step's row goes behind those of the steps before it, but for the scratch slot, the last one."""
    batch, room = len(tree.tokens), 7
    slots, behind = torch.randperm(batch + 1, device=DEVICE)[:batch], integers(seed, 0, room + 2, batch)
    one = torch.ones(batch, dtype=torch.int64, device=DEVICE)
    path, tokens = torch.zeros(batch, 1, dtype=torch.int64, device=DEVICE), integers(seed, 0, 20, batch, 1)
    result, hidden = VerifyResult(path, tokens, one), floats(seed, batch, 1, 24)
    kept = []
    for ops in OPS:
        tables = (
            integers(3, 0, 9, batch + 1, room),
            floats(3, batch + 1, room, 24),
            integers(4, 0, 9, batch + 1),
            floats(5, batch + 1, room, 24),
        )
        ops.observe(slots, integers(6, 0, 99, batch), result, hidden, *tables, behind)
        kept.append(tables)
    assert all(torch.equal(a, b) for a, b in zip(*kept, strict=True))
    counts = torch.where(slots < batch, (behind + 1).clamp(max=room), 1)
    assert torch.equal(kept[0][2][slots], counts)
    assert torch.equal(kept[0][0][slots, counts - 1], tokens[:, 0])


@FEW
@given(tree=draft_trees(vocab=20, max_nodes=6), seed=st.integers(0, 99))
def test_what_a_step_leaves(tree: DraftTree, seed: int) -> None:
    """What the drafter and the slots keep, and the table that the host reads."""
    batch, depth = len(tree.tokens), tree.max_depth + 1
    slots, counts = torch.randperm(batch + 1, device=DEVICE)[:batch], integers(seed, 1, depth + 1, batch)
    path, tokens = integers(seed, 0, tree.nodes, batch, depth), integers(seed + 1, 0, 20, batch, depth)
    result, hidden = VerifyResult(path, tokens, counts), floats(seed, batch, tree.nodes, 24)
    kept = []
    for ops in OPS:
        tables = (
            integers(3, 0, 9, batch + 1, depth + 1),
            floats(3, batch + 1, depth + 1, 24),
            integers(4, 0, 9, batch + 1),
            floats(5, batch + 1, depth + 3, 24),
        )
        ops.observe(slots, integers(6, 0, 99, batch), result, hidden, *tables)
        kept.append(tables)
    assert all(torch.equal(a, b) for a, b in zip(*kept, strict=True))
    moved = DraftTree(*(x.to(DEVICE) for x in (tree.tokens, tree.parents, tree.depths, tree.size)), tree.max_depth)
    lengths, sampling = integers(seed, 5, 90, batch), SamplingBatch.build([], [], DEVICE)
    states = [SlotState(batch + 2, DEVICE, how) for how in (None, advance)]
    tables = [state.advance(Batch(slots, lengths, lengths, 99, sampling), moved, result) for state in states]
    assert torch.equal(*tables)
    assert torch.equal(*(state.lengths for state in states))
    assert torch.equal(*(state.tokens for state in states))


def grown(ops: DraftOps, batch: Batch, shape: TreeShape, logits: Tensor) -> DraftTree:
    """A tree of three levels, or as many as the shape has. logits: [B, levels, F, n]; a node reads its level's row."""
    levels, ids = level_sizes(shape, len(shape.widths) or 3, 4), torch.arange(logits.shape[3], device=DEVICE) * 3
    tree = ops.start(batch, levels, ids, 3 * len(ids))
    for number, (width, keep) in enumerate(levels):
        level = Level(logits[:, number, : tree.frontier], ids, number + 1, width, keep)
        if number < len(levels) - 1:
            tree = ops.grow(tree, batch, level)
    ready = (torch.arange(len(batch.slots), device=DEVICE) != 1).long()
    return ops.finish(tree, batch, level, shape.best, ready)


def biases_of(seed: int) -> Tables:
    """For four requests: one may not say odd tokens, one nothing at all, one favours some, and one has no bias."""
    tables = Tables.empty(4, 90, (0, 0), DEVICE)
    tables.wanted[:3] = BIAS
    tables.bias[0, 1::2], tables.bias[1], tables.bias[2] = -float("inf"), -float("inf"), floats(seed + 7, 90) * 3
    return tables


SHAPES: dict[Ranking, list[str]] = {
    "noise": ["3x2x1", "chain:2", "tree:3", "tree:9", "4"], "drawn": ["3x2x1", "chain:2", "17"], "best": ["3x2x1", "tree:5"],
}  # fmt: skip


@settings(max_examples=8, deadline=None)
@given(
    case=st.sampled_from([(ranking, text) for ranking, texts in SHAPES.items() for text in texts]),
    seed=st.integers(0, 99),
    biased=st.booleans(),
)
def test_whole_trees(case: tuple[Ranking, str], seed: int, biased: bool) -> None:
    """Node for node the same, scores and what was drawn from too; so that a request's own limits leave the same of both."""
    ranking, text = case
    params = [SamplingParams(temperature=0.9), SamplingParams(), SamplingParams(temperature=0.4), SamplingParams()]
    sampling = SamplingBatch.build(params, [seed, 2**40 + seed, seed + 1, 2], DEVICE)
    slots = torch.arange(4, device=DEVICE)
    biases = biases_of(seed) if biased else None
    batch = Batch(slots, integers(seed, 0, 9, 4), integers(seed, 3, 90, 4), 99, sampling, biases=biases)
    logits = floats(seed, 4, 3, 16, 30)
    limits = TreeLimits.build(
        [SamplingParams(tree=TreeShape.parse(limit)) for limit in ("tree:4", "tree:2", "2x1", "tree:6")], DEVICE
    )
    assert limits is not None
    both: tuple[DraftOps, DraftOps] = TorchDraftOps(ranking), DeviceDraftOps(8, DEVICE, ranking)
    torch_tree, tree = (grown(ops, batch, TreeShape.parse(text), logits) for ops in both)
    for one, two in ((torch_tree, tree), (limits.apply(torch_tree), limits.apply(tree))):
        assert one.max_depth == two.max_depth
        assert one.size.tolist() == two.size.tolist()
        assert one.scores is not None
        assert two.scores is not None
        for name in ("tokens", "parents", "depths"):
            assert torch.equal(*(getattr(each, name)[one.real] for each in (one, two))), name
        torch.testing.assert_close(two.scores[one.real], one.scores[one.real], rtol=2e-6, atol=2e-5)
        assert (one.draft is None) == (two.draft is None) == (ranking != "drawn")
        if one.draft is not None:
            torch.testing.assert_close(two.draft, one.draft, rtol=2e-6, atol=1e-7)
        if biases and ranking != "drawn":  # drawn ones may be as unlikely as can be
            assert not (one.tokens[0, 1 : int(one.size[0])] % 2).any()


@FEW
@given(tree=draft_trees(vocab=20, max_nodes=6), seed=st.integers(0, 99))
def test_forced_chains(tree: DraftTree, seed: int) -> None:
    """Chains in place of some trees: the kernel's are the twin's, and are whole trees."""
    most, batch = min(tree.max_depth, tree.nodes - 1), len(tree.tokens)
    chains = torch.cat([integers(seed, 0, most + 1, batch, 1), integers(seed, 0, 20, batch, most + 1)], 1)
    moved = DraftTree(*(x.to(DEVICE) for x in (tree.tokens, tree.parents, tree.depths, tree.size)), tree.max_depth)
    forced, ours = (
        moved.forced(chains),
        force(moved.tokens, moved.parents, moved.depths, moved.size, chains, tree.max_depth),
    )
    for name, kernels in zip(("tokens", "parents", "depths", "size"), ours, strict=True):
        assert torch.equal(getattr(forced, name), kernels), name
    for b, (count, *tokens) in enumerate(chains.tolist()):
        nodes = int(forced.size[b])
        if not count:
            assert torch.equal(forced.tokens[b], moved.tokens[b])
            assert nodes == tree.size[b]
        else:
            assert forced.tokens[b, :nodes].tolist() == [int(tree.tokens[b, 0]), *tokens[:count]]
            assert forced.parents[b, :nodes].tolist() == list(range(-1, count))
            assert forced.depths[b, :nodes].tolist() == list(range(nodes))


@pytest.mark.cuda
def test_the_scratch_slot_stays() -> None:
    """Padding of a batch shares one slot, which must not grow."""
    state = SlotState(3, DEVICE, advance)
    before, slots = state.lengths.clone(), torch.tensor([2, 2], device=DEVICE)
    ones = torch.ones(2, dtype=torch.int64, device=DEVICE)
    result = VerifyResult(ones[:, None] * 0, ones[:, None] * 7, ones)
    batch = Batch(slots, SamplingBatch.build([], [], DEVICE), state.lengths[slots], ones, 9)
    state.advance(batch, DraftTree.root(ones), result)
    assert torch.equal(state.lengths, before)
