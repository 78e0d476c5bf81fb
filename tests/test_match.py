"""The match rule: down from the root, as long as a child is what the main model chose."""

import random

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_tree import draft_trees, random_tree

from mtp_engine.tree import DraftTree
from mtp_engine.verifiers.match import longest_match


def walk(tree: DraftTree, b: int, choices: list[int]) -> tuple[list[int], list[int]]:
    """Kept nodes and emitted tokens of request b."""
    path = [0]
    while True:
        children = [i for i in range(1, int(tree.size[b])) if int(tree.parents[b, i]) == path[-1]]
        match = [i for i in children if int(tree.tokens[b, i]) == choices[path[-1]]]
        if not match:
            return path, [choices[node] for node in path]
        path += match


def check(tree: DraftTree, choices: torch.Tensor) -> None:
    result = longest_match(tree, choices)
    assert result.path.shape == result.tokens.shape == (len(tree.size), tree.max_depth + 1)
    for b, row in enumerate(choices.tolist()):
        path, tokens = walk(tree, b, row)
        count = int(result.counts[b])
        assert result.path[b, :count].tolist() == path
        assert result.tokens[b, :count].tolist() == tokens
        assert set(result.path[b, count:].tolist()) <= {path[-1]}, "entries past the end repeat the last kept node"


@settings(max_examples=300, deadline=None)
@given(tree=draft_trees(vocab=3), seed=st.integers(0, 2**32))
def test_random_choices(tree: DraftTree, seed: int) -> None:
    check(tree, torch.randint(0, 3, tree.tokens.shape, generator=torch.Generator().manual_seed(seed)))


@settings(max_examples=200, deadline=None)
@given(tree=draft_trees(vocab=3), seed=st.integers(0, 2**32))
def test_choices_that_follow_the_tree(tree: DraftTree, seed: int) -> None:
    """Choices drawn among each node's children, padding's too: long paths, and padding that looks acceptable."""
    rng = random.Random(seed)
    choices = torch.zeros_like(tree.tokens)
    for b, parents in enumerate(tree.parents.tolist()):
        for node in range(tree.nodes):
            children = [i for i in range(1, tree.nodes) if parents[i] == node]
            choices[b, node] = int(tree.tokens[b, rng.choice(children)]) if children else rng.randrange(3)
    check(tree, choices)


def test_padding_is_never_accepted() -> None:
    tokens = torch.tensor([[5, 6, 7], [5, 6, 7]])
    tree = DraftTree.chain(tokens, torch.tensor([1, 2]))
    result = longest_match(tree, torch.tensor([[6, 7, 8], [6, 7, 8]]))
    assert result.counts.tolist() == [1, 2]
    assert result.tokens[0, :1].tolist() == [6]
    assert result.tokens[1, :2].tolist() == [6, 7]


def test_the_main_model_adds_a_token_to_a_whole_path() -> None:
    tree = DraftTree.chain(torch.tensor([[5, 6, 7]]), torch.tensor([3]))
    result = longest_match(tree, torch.tensor([[6, 7, 8]]))
    assert result.tokens.tolist() == [[6, 7, 8]]
    assert result.path.tolist() == [[0, 1, 2]]
    hidden = torch.arange(12.0).view(1, 3, 4)
    assert torch.equal(result.gather(hidden), hidden)


def test_plain_decoding_emits_the_choice() -> None:
    result = longest_match(DraftTree.root(torch.tensor([5, 9])), torch.tensor([[3], [4]]))
    assert (result.path.tolist(), result.tokens.tolist(), result.counts.tolist()) == ([[0], [0]], [[3], [4]], [1, 1])


def test_gather_takes_each_requests_own_nodes() -> None:
    tree = random_tree(random.Random(4), [6, 3], 6, 3)
    choices = torch.randint(0, 3, (2, 6), generator=torch.Generator().manual_seed(4))
    result, values = longest_match(tree, choices), torch.randn(2, 6, 5, generator=torch.Generator().manual_seed(5))
    for b in range(2):
        assert torch.equal(result.gather(values)[b], values[b, result.path[b]])
