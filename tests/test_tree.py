"""Tree values and their growth: masks, shapes, levels and pruning, each against brute force."""

import itertools
import random
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mtp_engine.config import MAX_TREE_NODES, TreeShape
from mtp_engine.drafters.expand import MOST_CHILDREN, Growth, finish, grow, level_sizes, prune
from mtp_engine.errors import EngineError
from mtp_engine.tree import DraftTree, ancestor_mask


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """For test modules of tiny tensors, which import this: a second thread makes them up to ten times slower."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def random_tree(rng: random.Random, sizes: list[int], nodes: int, vocab: int, slack: int = 0) -> DraftTree:
    """A tree per size, siblings distinct; padding holds junk. `slack` is added to the depth bound."""
    tokens = [[rng.randrange(vocab) for _ in range(nodes)] for _ in sizes]
    parents, depths = [], []
    for row, size in zip(tokens, sizes, strict=True):
        up, deep = [-1], [0]
        used: list[set[int]] = [set() for _ in range(nodes)]
        for node in range(1, size):
            open_nodes = [p for p in range(node) if len(used[p]) < vocab]
            parent = node - 1 if rng.random() < 0.4 else rng.choice(open_nodes)
            row[node] = rng.choice(sorted(set(range(vocab)) - used[parent]))
            used[parent].add(row[node])
            up.append(parent)
            deep.append(deep[parent] + 1)
        parents.append(up)
        depths.append(deep)
    bound = max(map(max, depths)) + slack
    for up, deep, size in zip(parents, depths, sizes, strict=True):
        up += [rng.randrange(-1, node) for node in range(size, nodes)]
        deep += [rng.randrange(bound + 1) for _ in range(size, nodes)]
    return DraftTree(*map(torch.tensor, (tokens, parents, depths)), torch.tensor(sizes), bound)


@st.composite
def draft_trees(draw: st.DrawFn, max_nodes: int = 10, max_batch: int = 3, vocab: int = 3) -> DraftTree:
    nodes = draw(st.integers(1, max_nodes))
    sizes = draw(st.lists(st.integers(1, nodes), min_size=1, max_size=max_batch))
    return random_tree(random.Random(draw(st.integers(0, 2**32))), sizes, nodes, vocab, draw(st.integers(0, 2)))


def lineage(parents: list[int], node: int) -> list[int]:
    """The node and its ancestors, up to the root."""
    path = [node]
    while parents[path[-1]] >= 0:
        path.append(parents[path[-1]])
    return path


# ---- DraftTree ----------------------------------------------------------------------------------------------------


@settings(max_examples=150, deadline=None)
@given(tree=draft_trees())
def test_ancestor_mask_equals_a_walk(tree: DraftTree) -> None:
    expected = torch.zeros(len(tree.size), tree.nodes, tree.nodes, dtype=torch.bool)
    for b, parents in enumerate(tree.parents.tolist()):
        for node in range(tree.nodes):
            inside = node < int(tree.size[b])
            expected[b, node, lineage(parents, node) if inside else [node]] = True
    assert torch.equal(tree.ancestors, expected)
    assert torch.equal(ancestor_mask(tree.parents, tree.size, tree.max_depth), expected)
    assert torch.equal(tree.real, torch.arange(tree.nodes) < tree.size[:, None])


def test_root_and_chain() -> None:
    root = DraftTree.root(torch.tensor([7, 9]))
    assert (root.tokens.tolist(), root.parents.tolist(), root.depths.tolist()) == ([[7], [9]], [[-1], [-1]], [[0], [0]])
    assert (root.size.tolist(), root.max_depth, root.nodes) == ([1, 1], 0, 1)
    chain = DraftTree.chain(torch.tensor([[7, 1, 2], [9, 3, 0]]), torch.tensor([3, 2]))
    assert chain.parents.tolist() == [[-1, 0, 1]] * 2
    assert chain.depths.tolist() == [[0, 1, 2]] * 2
    assert chain.max_depth == 2
    assert chain.ancestors.int().tolist() == [
        [[1, 0, 0], [1, 1, 0], [1, 1, 1]],
        [[1, 0, 0], [1, 1, 0], [0, 0, 1]],
    ]


def test_shapes_that_disagree_are_refused() -> None:
    one, two = torch.zeros(1, 1, dtype=torch.int64), torch.zeros(1, 2, dtype=torch.int64)
    with pytest.raises(AssertionError):
        DraftTree(two, one, two, torch.ones(1, dtype=torch.int64), 1)
    with pytest.raises(AssertionError):
        DraftTree(two, two, two, torch.ones(2, dtype=torch.int64), 1)


# ---- TreeShape ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "widths", "best", "nodes"),
    [
        ("chain:1", (1,), 0, 2),
        ("chain:3", (1, 1, 1), 0, 4),
        ("chain:63", (1,) * 63, 0, 64),
        ("4x2x2", (4, 2, 2), 0, 29),
        ("63", (63,), 0, 64),
        ("2x2x2x2x2", (2,) * 5, 0, 63),
        ("tree:1", (), 1, 2),
        ("tree:63", (), 63, 64),
    ],
)
def test_shapes_are_read(text: str, widths: tuple[int, ...], best: int, nodes: int) -> None:
    shape = TreeShape.parse(text)
    assert (shape.widths, shape.best, shape.max_nodes) == (widths, best, nodes)
    assert str(shape) == text
    assert TreeShape.parse(str(shape)) == shape


def test_a_chain_spelt_out_is_a_chain() -> None:
    assert TreeShape.parse("1x1x1") == TreeShape.parse("chain:3")
    assert str(TreeShape.parse("1x1x1")) == "chain:3"


@pytest.mark.parametrize("text", ["chain:64", "tree:64", "64", "63x1", "2x2x2x2x2x2", "8x8", "tree:999999999999"])
def test_more_nodes_than_a_mask_has_bits_are_refused(text: str) -> None:
    with pytest.raises(EngineError, match=f"at most {MAX_TREE_NODES}"):
        TreeShape.parse(text)


@pytest.mark.parametrize("text", ["chain:0", "tree:0", "0", "4x0x2"])
def test_shapes_that_draft_nothing_are_refused(text: str) -> None:
    with pytest.raises(EngineError, match="drafts nothing"):
        TreeShape.parse(text)


@pytest.mark.parametrize(
    "text", ["", "chain", "chain:", "chain:-1", "chain:2x2", "x", "4x", "x4", "4x2x", "tree:3.5", "4 x 2", "4X2", "big"]
)
def test_junk_is_refused(text: str) -> None:
    with pytest.raises(EngineError, match="is not one of"):
        TreeShape.parse(text)


# ---- growing and pruning ------------------------------------------------------------------------------------------


def test_level_sizes() -> None:
    assert level_sizes(TreeShape.parse("4x2x2"), 3, 8) == [(4, 4), (2, 8), (2, 16)]
    assert level_sizes(TreeShape.parse("chain:2"), 2, 8) == [(1, 1), (1, 1)]
    assert level_sizes(TreeShape.parse("tree:16"), 3, 8) == [(8, 8)] * 3
    assert level_sizes(TreeShape.parse("tree:5"), 2, 8) == [(5, 5)] * 2
    assert level_sizes(TreeShape.parse("tree:31"), 3, 8) == [(16, 16), (8, 8), (8, 8)]
    assert level_sizes(TreeShape.parse("tree:63"), 3, 8) == [(16, 16), (16, 24), (16, 24)]
    assert level_sizes(TreeShape.parse("tree:63"), 1, 8) == [(16, 16)]


@pytest.mark.parametrize("depth", range(1, 7))
def test_a_tree_has_the_nodes_it_is_named_after(depth: int) -> None:
    """For any tree:N; within what kernels/grow.py takes. Trees that a beam of 8 can fill are grown as by that beam."""
    for best in range(1, 64):
        sizes, frontier, nodes = level_sizes(TreeShape.parse(f"tree:{best}"), depth, 8), 1, 0
        assert len(sizes) == depth
        for width, keep in sizes:
            assert width <= MOST_CHILDREN
            assert keep <= frontier * width <= 1024
            frontier, nodes = keep, nodes + keep
        assert nodes >= best if depth > 1 else nodes == min(best, 16)
        assert nodes <= 256
        if best <= depth * 8:
            assert sizes == [(min(best, 8), min(best, 8))] * depth


def log_probs(generator: torch.Generator, *shape: int, ties: bool) -> Tensor:
    """Random scores of at most 0; with ties, from few values, 0 among them: a certain token scores as its parent."""
    if ties:
        return -torch.randint(0, 3, shape, generator=generator) / 2
    return torch.randn(*shape, generator=generator).log_softmax(-1)


def check_growth(tree: Growth) -> None:
    """What holds at any time: parents before children, depths and siblings right, levels in order."""
    rows = zip(tree.tokens.tolist(), tree.parents.tolist(), tree.depths.tolist(), tree.scores.tolist(), strict=True)
    for tokens, parents, depths, scores in rows:
        assert (parents[0], depths[0], scores[0]) == (-1, 0, 0.0)
        assert all(0 <= parents[i] < i for i in range(1, len(parents)))
        assert all(depths[i] == depths[parents[i]] + 1 for i in range(1, len(parents)))
        assert all(scores[i] <= scores[parents[i]] for i in range(1, len(parents)))
        assert len({(p, t) for p, t in zip(parents[1:], tokens[1:], strict=True)}) == len(parents) - 1
        assert depths == sorted(depths)
        assert max(depths) <= tree.level
        if tree.frontier:
            assert depths.count(tree.level) == tree.frontier


def check_level(before: Growth, after: Growth, scores: Tensor, ids: Tensor, width: int, keep: int) -> None:
    """The new nodes are the best `keep` of every frontier node's `width` best candidates."""
    first = before.tokens.shape[1] - before.frontier
    for b in range(len(scores)):
        candidates = []
        for f, row in enumerate(scores[b]):
            joint = (row + before.scores[b, first + f]).tolist()
            candidates += sorted(joint, reverse=True)[:width]
        old = before.tokens.shape[1]
        assert sorted(after.scores[b, old:].tolist()) == sorted(sorted(candidates, reverse=True)[:keep])
        for node in range(old, after.tokens.shape[1]):
            parent = int(after.parents[b, node])
            token = ids.tolist().index(int(after.tokens[b, node]))
            assert float(after.scores[b, node]) == float(before.scores[b, parent] + scores[b, parent - first, token])


SHAPES = st.sampled_from(["chain:3", "2x1x2", "3x2", "4", "1x3x1", "tree:1", "tree:2", "tree:5", "tree:9", "tree:40"])


@settings(max_examples=120, deadline=None)
@given(text=SHAPES, beam=st.integers(1, 5), ties=st.booleans(), seed=st.integers(0, 2**32), batch=st.integers(1, 3))
def test_growth_and_pruning(text: str, beam: int, ties: bool, seed: int, batch: int) -> None:
    shape, generator = TreeShape.parse(text), torch.Generator().manual_seed(seed)
    ids = torch.randperm(50, generator=generator)[:6]
    tree = Growth.start(torch.randint(0, 50, (batch,), generator=generator))
    for width, keep in level_sizes(shape, len(shape.widths) or 3, beam):
        scores = log_probs(generator, batch, tree.frontier, 6, ties=ties)
        before, tree = tree, grow(tree, scores, ids, width, keep)
        check_growth(tree)
        check_level(before, tree, scores, ids, width, keep)
    drafts = torch.arange(batch) % 2 == 0
    final = finish(tree, shape.best, drafts)
    kept = final.nodes
    assert final.size.tolist() == [kept if d else 1 for d in drafts.tolist()]
    assert kept == min(shape.max_nodes, tree.tokens.shape[1])
    if shape.best:
        check_pruned(tree, prune(tree, shape.best), shape.best)
    else:
        assert torch.equal(final.tokens, tree.tokens)


def paths_of(tokens: Tensor, parents: Tensor) -> list[tuple[int, ...]]:
    """Every drafted node of one tree as its tokens from the root. tokens, parents: [n]."""
    paths: list[tuple[int, ...]] = [()]
    for token, parent in zip(tokens[1:].tolist(), parents[1:].tolist(), strict=True):
        paths.append((*paths[parent], token))
    return paths[1:]


def check_pruned(tree: Growth, small: Growth, nodes: int) -> None:
    """The best nodes by score, closed under ancestors, and each still on the path it was on."""
    for b, (tokens, parents, depths) in enumerate(zip(small.tokens, small.parents, small.depths, strict=True)):
        full = dict(zip(paths_of(tree.tokens[b], tree.parents[b]), tree.scores[b, 1:].tolist(), strict=True))
        kept = paths_of(tokens, parents)
        assert len(set(kept)) == len(kept) == min(nodes, len(full))
        assert int(parents[0]) == -1
        assert all(0 <= parent < i for i, parent in enumerate(parents.tolist()) if i)
        assert depths.tolist() == [0, *map(len, kept)]
        assert sorted(full[path] for path in kept) == sorted(sorted(full.values(), reverse=True)[:nodes])
        assert int(tokens[0]) == int(tree.tokens[b, 0])


@pytest.mark.parametrize("seed", range(5))
def test_best_n_of_all_paths(seed: int) -> None:
    """With a beam of N, tree:N holds the N best of all paths, here of 4 + 16 + 64."""
    tables = torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(seed)).log_softmax(-1)
    tree, ids = Growth.start(torch.tensor([4])), torch.arange(4)
    for level, (width, keep) in enumerate(level_sizes(TreeShape.parse("tree:4"), 3, 4)):
        last = tree.tokens[0, -tree.frontier :]
        tree = grow(tree, tables[level][last][None], ids, width, keep)
    scores: dict[tuple[int, ...], float] = {}
    for depth in range(1, 4):
        for path in itertools.product(range(4), repeat=depth):
            steps = zip((4, *path), path, strict=False)
            scores[path] = float(sum(tables[level, a, b] for level, (a, b) in enumerate(steps)))
    best = sorted(scores, key=lambda path: -scores[path])[:4]
    small = prune(tree, 4)
    assert set(paths_of(small.tokens[0], small.parents[0])) == set(best)


@pytest.mark.parametrize("certain", [0, 1, 2])
def test_a_certain_token_ties_with_its_parent_and_loses(certain: int) -> None:
    """log p = 0 at every depth: a chain of equal scores, cut from its end."""
    tree = Growth.start(torch.tensor([0]))
    for _ in range(3):
        scores = torch.full((1, tree.frontier, 3), -1.0)
        scores[..., certain] = 0.0
        tree = grow(tree, scores, torch.arange(3), 2, 2)
    for nodes in range(1, 6):
        check_pruned(tree, prune(tree, nodes), nodes)
    small = prune(tree, 2)
    assert paths_of(small.tokens[0], small.parents[0]) == [(certain,), (certain, certain)]


def test_a_vocabulary_smaller_than_the_tree_is_wide() -> None:
    """Two candidates where four are wanted: the level has two nodes, and says so."""
    tree = grow(
        Growth.start(torch.tensor([0])), log_probs(torch.Generator(), 1, 1, 2, ties=False), torch.arange(2), 2, 4
    )
    check_growth(tree)


def test_a_tree_of_few_nodes_is_not_called_deep() -> None:
    """A step commits rows up to the tree's depth bound; room is reserved for its nodes."""
    tree = Growth.start(torch.tensor([0]))
    for _ in range(4):
        tree = grow(tree, torch.zeros(1, 1, 1), torch.arange(1), 1, 1)
    assert finish(tree, 2, torch.tensor([True])).max_depth <= 2
