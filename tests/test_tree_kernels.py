"""The small kernels around the model against their torch twins: in Triton's interpreter where there is no GPU."""

import random
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st
from test_tree import draft_trees, random_tree
from torch import Tensor

from mtp_engine.drafters import expand
from mtp_engine.kernels import accept as accepting
from mtp_engine.kernels import arrival
from mtp_engine.kernels import grow as growing
from mtp_engine.kernels.grow import Finish, Nodes, Roots
from mtp_engine.kernels.kv import move_kept, storage_rows
from mtp_engine.sampling import sampler
from mtp_engine.sampling.sampler import gumbel, noise_key
from mtp_engine.tree import DraftTree, VerifyResult, ancestor_mask
from mtp_engine.verifiers.match import longest_match

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FEW = settings(max_examples=15, deadline=None)


# ---- twins ----------------------------------------------------------------------------------------------------------


def choose_scores(logits: Tensor, positions: Tensor, seed: Tensor, temperature: Tensor) -> Tensor:
    """sampler.choose_scores with a position per node: [B, N, V] fp32."""
    noise = gumbel(seed, positions, torch.arange(logits.shape[2], device=logits.device))
    noise *= temperature.view(-1, 1, 1)
    return torch.where(temperature.view(-1, 1, 1) > 0, logits.float() + noise, logits.float())


def draft_scores(logits: Tensor, positions: Tensor, ids: Tensor, seed: Tensor, temperature: Tensor) -> Tensor:
    """The scores by which TorchDraftOps grows: [B, F, n] fp32."""
    temperature = temperature.view(-1, 1, 1)
    noisy = logits.float() / temperature.clamp(min=1e-6) + gumbel(seed, positions[:, None], ids)
    return torch.where(temperature > 0, noisy, logits.float()).log_softmax(-1)


def twin_storage_rows(pages: Tensor, slots: Tensor, page_size: int, wrap: int) -> Tensor:
    return pages.long().gather(1, (slots // page_size) % wrap) * page_size + slots % page_size


# ---- inputs ---------------------------------------------------------------------------------------------------------


def arrivals(count: int = 1024) -> Tensor:
    return torch.zeros(count, dtype=torch.int32, device=DEVICE)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def moved(tree: DraftTree) -> DraftTree:
    return DraftTree(*(x.to(DEVICE) for x in (tree.tokens, tree.parents, tree.depths, tree.size)), tree.max_depth)


@dataclass
class Noise:
    seed: Tensor
    temperature: Tensor

    @classmethod
    def draw(cls, batch: int, number: int) -> "Noise":
        """Any 64-bit seeds; temperatures 0, 1, ... in turn."""
        seed = torch.randint(-(2**62), 2**62, (batch,), generator=generator(number)) * 2
        return cls(seed.to(DEVICE), torch.tensor([0.0, 1.0, 0.7, 0.3])[torch.arange(batch) % 4].to(DEVICE))


def randn(*shape: int, seed: int, dtype: torch.dtype = torch.float32, coarse: bool = False) -> Tensor:
    """Normal values on the device; `coarse` ones take few values, so that many tie."""
    values = torch.randn(*shape, generator=generator(seed))
    return (values.round() if coarse else values * 4).to(DEVICE, dtype)


def check_choices(choices: Tensor, scores: Tensor) -> None:
    """Equal to the argmax, unless the score given up is within rounding of the best."""
    best = scores.amax(-1)
    lost = best - scores.gather(-1, choices[..., None])[..., 0]
    off = choices != scores.argmax(-1)
    assert bool((~off | (lost <= 1e-5 * best.abs().clamp(min=1.0))).all()), f"lost {lost.max()}"


# ---- noise, choosing, accepting -------------------------------------------------------------------------------------


@triton.jit
def _noise_kernel(seed, positions, out, count, BLOCK: tl.constexpr):
    b, token = tl.program_id(0), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    first, second = arrival.noise_key(tl.load(seed + b), tl.load(positions + b))
    noise = arrival.gumbel_of(first, second, token.to(tl.uint32))
    tl.store(out + b * count + token, noise, mask=token < count)


@triton.jit
def _bits_kernel(seed, positions, keys, bits, count, BLOCK: tl.constexpr):
    b, token = tl.program_id(0), tl.arange(0, BLOCK)
    first, second = arrival.noise_key(tl.load(seed + b), tl.load(positions + b))
    tl.store(keys + 2 * b, first.to(tl.int64))
    tl.store(keys + 2 * b + 1, second.to(tl.int64))
    tl.store(bits + b * count + token, arrival.noise_bits(first, second, token.to(tl.uint32)).to(tl.int64))


SEEDS = [2119480, 4298689857, 2**63 - 1, 2**62 + 2**31, 2**32, 0, 1, -1, 2**40 + 3, -(2**63)]
POSITIONS = [2**32 - 1, 2**32 + 5, 2**63 - 1, 7, 2**31, 0, 1, 77, 2**33, 5]


def test_noise_bits_are_the_samplers() -> None:
    """Every bit of the key, and of what it gives each token."""
    seed, positions = (torch.tensor(each, device=DEVICE) for each in (SEEDS, POSITIONS))
    keys = torch.zeros(len(SEEDS), 2, dtype=torch.int64, device=DEVICE)
    bits = torch.zeros(len(SEEDS), 256, dtype=torch.int64, device=DEVICE)
    _bits_kernel[(len(SEEDS),)](seed, positions, keys, bits, 256, BLOCK=256)
    assert torch.equal(keys, torch.cat(noise_key(seed, positions[:, None]), 1))
    assert torch.equal(bits, sampler._bits(seed, positions[:, None], torch.arange(256, device=DEVICE))[:, 0])


@pytest.mark.parametrize("count", [5000, pytest.param(1 << 20, marks=pytest.mark.cuda)])
def test_noise_is_the_samplers(count: int) -> None:
    seed, positions = (torch.tensor(each, device=DEVICE) for each in (SEEDS[-5:], POSITIONS[-5:]))
    out = torch.full((5, count), float("nan"), device=DEVICE)
    _noise_kernel[(5, -(-count // 1024))](seed, positions, out, count, BLOCK=1024)
    expected = gumbel(seed, positions[:, None], torch.arange(count, device=DEVICE))[:, 0]
    torch.testing.assert_close(out, expected, rtol=5e-7, atol=5e-7)


def test_noise_at_its_ends() -> None:
    """v from 2**-33 to 1 - 2**-24, through the same formula in float32."""
    bits = torch.tensor([0, 1, 2, 255, 2**24, 2**31, 2**32 - 2**9, 2**32 - 1])
    v = ((bits.float() + 0.5) * 2.0**-32).clamp_(max=1 - 2.0**-24)
    w = 1 - v
    t = (v - (1 - w)) - w.log()
    exact = -torch.log1p(-v.double())
    assert bool(((t.double() - exact).abs() <= 2e-7 * exact).all())


@FEW
@given(data=st.data(), coarse=st.booleans(), dtype=st.sampled_from([torch.float32, torch.bfloat16]))
def test_choose(data: st.DataObject, coarse: bool, dtype: torch.dtype) -> None:
    batch, nodes = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 5))
    vocab, number = data.draw(st.sampled_from([1, 7, 1024, 2500])), data.draw(st.integers(0, 99))
    logits = randn(batch, nodes, vocab + 3, seed=number, dtype=dtype, coarse=coarse)[..., :vocab]
    noise = Noise.draw(batch, number)
    positions = torch.randint(0, 5000, (batch, nodes), generator=generator(number)).to(DEVICE)
    counters = arrivals()
    choices = accepting.choose(logits, positions, noise.seed, noise.temperature, counters)
    check_choices(choices, choose_scores(logits, positions, noise.seed, noise.temperature))
    assert not counters.any(), "counters are left zero"


def test_choose_takes_the_lowest_of_equals_and_skips_what_is_cut() -> None:
    logits = torch.full((1, 3, 3000), -float("inf"), device=DEVICE)
    logits[0, 0, 5::7] = -0.0
    logits[0, 0, 12] = 0.0
    logits[0, 1, [2999, 1500]] = 3.0
    logits[0, 2] = 1.0
    positions, seed = (
        torch.zeros(1, 3, dtype=torch.int64, device=DEVICE),
        torch.zeros(1, dtype=torch.int64, device=DEVICE),
    )
    assert accepting.choose(logits, positions, seed, seed.float(), arrivals()).tolist() == [[5, 1500, 0]]


def check_result(result: tuple[Tensor, Tensor, Tensor], expected: VerifyResult) -> None:
    path, tokens, counts = result
    assert torch.equal(counts, expected.counts)
    assert torch.equal(path, expected.path)
    assert torch.equal(tokens, expected.tokens)


@FEW
@given(tree=draft_trees(vocab=3), seed=st.integers(0, 2**32))
def test_accept(tree: DraftTree, seed: int) -> None:
    """Choices that follow the tree, padding's children too, as in test_match."""
    rng = random.Random(seed)
    choices = torch.randint(0, 3, tree.tokens.shape, generator=generator(seed))
    for b, parents in enumerate(tree.parents.tolist()):
        for node in range(tree.nodes):
            children = [i for i in range(1, tree.nodes) if parents[i] == node]
            if children:
                choices[b, node] = int(tree.tokens[b, rng.choice(children)])
    tree, choices = moved(tree), choices.to(DEVICE)
    check_result(accepting.accept(tree, choices), longest_match(tree, choices))


@settings(max_examples=6, deadline=None)
@given(tree=draft_trees(vocab=3, max_nodes=7), seed=st.integers(0, 2**32))
def test_verify_is_choose_and_accept(tree: DraftTree, seed: int) -> None:
    tree = moved(tree)
    batch = len(tree.size)
    logits, noise = randn(batch, tree.nodes, 30, seed=seed % 1000), Noise.draw(batch, seed % 1000)
    logits[..., 3:] -= 20  # one of the three tokens the tree is made of
    nodes = torch.arange(batch, device=DEVICE)[:, None] * 7 + tree.depths
    choices = accepting.choose(logits, nodes + 1, noise.seed, noise.temperature, arrivals())
    expected = longest_match(tree, choices)
    for positions in (nodes, nodes[:, 0].contiguous()):
        result = accepting.verify(logits, positions, noise.seed, noise.temperature, arrivals(), tree, ahead=1)
        check_result(result, expected)


def check_invariance(batch: int, nodes: int, vocab: int) -> None:
    """A node chooses the same alone as in a tree and a batch."""
    logits, noise = randn(batch, nodes, vocab, seed=1), Noise.draw(batch, 2)
    positions = torch.arange(batch * nodes, device=DEVICE).view(batch, nodes)
    whole = accepting.choose(logits, positions, noise.seed, noise.temperature, arrivals())
    for b in range(batch):
        one = slice(b, b + 1)
        alone = accepting.choose(
            logits[one, -1:], positions[one, -1:].contiguous(), noise.seed[one], noise.temperature[one], arrivals()
        )
        assert torch.equal(alone, whole[one, -1:])


def test_choose_is_invariant() -> None:
    check_invariance(3, 4, 2100)


# ---- candidates, growth, pruning ------------------------------------------------------------------------------------


def check_candidates(logp: Tensor, ids: Tensor, scores: Tensor, tokens: Tensor) -> None:
    """Best first, right values, and nothing left out that is better by more than rounding."""
    width = logp.shape[2]
    best = scores.topk(width, dim=-1).values
    torch.testing.assert_close(logp, best, rtol=2e-6, atol=2e-5)
    index = torch.searchsorted(tokens, ids)
    assert torch.equal(tokens[index], ids)
    torch.testing.assert_close(logp, scores.gather(-1, index), rtol=2e-6, atol=2e-5)
    assert bool((index.sort(-1).values.diff(dim=-1) > 0).all()), "a candidate came twice"
    tie = logp[..., 1:] == logp[..., :-1]
    assert bool((~tie | (index[..., 1:] > index[..., :-1])).all()), "equal candidates come in index order"


@FEW
@given(data=st.data(), coarse=st.booleans(), dtype=st.sampled_from([torch.float32, torch.bfloat16]))
def test_candidates(data: st.DataObject, coarse: bool, dtype: torch.dtype) -> None:
    batch, frontier = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 3))
    n, number = data.draw(st.sampled_from([1, 5, 515, 1030])), data.draw(st.integers(0, 99))
    width = data.draw(st.integers(1, min(n, 9)))
    logits = randn(batch, frontier, n, seed=number, dtype=dtype, coarse=coarse)
    noise = Noise.draw(batch, number)
    positions = torch.arange(batch, device=DEVICE) * 3 + number
    ids = torch.randperm(3 * n, generator=generator(number))[:n].sort().values.to(DEVICE)
    counters = arrivals()
    logp, chosen = growing.candidates(
        logits, positions - 1, ids, noise.seed, noise.temperature, counters, width, ahead=1
    )
    check_candidates(logp, chosen, draft_scores(logits, positions, ids, noise.seed, noise.temperature), ids)
    assert not counters.any()
    last = slice(batch - 1, batch)
    alone = growing.candidates(
        logits[last, -1:], positions[last], ids, noise.seed[last], noise.temperature[last], arrivals(), width
    )
    assert torch.equal(alone[0], logp[last, -1:])
    assert torch.equal(alone[1], chosen[last, -1:])


def empty_nodes(batch: int, cap: int) -> Nodes:
    nodes = Nodes.empty(batch, cap, torch.device(DEVICE))
    for value in (nodes.tokens, nodes.parents, nodes.depths, nodes.scores):
        value.fill_(-99)
    return nodes


def all_of(nodes: Nodes) -> dict[str, Tensor]:
    return {name: getattr(nodes, name) for name in ("tokens", "parents", "depths", "scores")}


def twin_level(
    growth: expand.Growth, logits: Tensor, positions: Tensor, ids: Tensor, noise: Noise, width: int, keep: int
) -> expand.Growth:
    """expand.grow on the scores that `candidates` gives, so that no rounding is between the two."""
    logp, chosen = growing.candidates(logits, positions, ids, noise.seed, noise.temperature, arrivals(4096), width)
    scores = torch.full(logits.shape, -float("inf"), device=DEVICE)
    return expand.grow(growth, scores.scatter(-1, torch.searchsorted(ids, chosen), logp), ids, width, keep)


def check_draft_level(batch: int, n: int, levels: list[tuple[int, int]], best: int, number: int = 3) -> None:
    """A whole tree, level by level, and what is left of it: bit for bit expand.grow and expand.finish.

    levels: width and keep of each.
    """
    noise, counters = Noise.draw(batch, number), arrivals(batch * 65)
    ids, ready = torch.arange(n, device=DEVICE) * 2, torch.arange(batch, device=DEVICE)
    last, slots = torch.arange(batch, device=DEVICE) + 7, torch.arange(batch, device=DEVICE).flip(0)
    growth, nodes, first, finished = expand.Growth.start(last[slots]), empty_nodes(batch, 200), 0, None
    for level, (width, keep) in enumerate(levels):
        width, frontier = min(width, n), growth.frontier
        logits = randn(batch, frontier, n, seed=number + level)
        positions = torch.arange(batch, device=DEVICE) + level
        finished = growing.draft_level(
            logits, positions, ids, noise.seed, noise.temperature, counters, nodes, first, width, keep,
            roots=None if level else Roots(slots, last),
            finish=Finish(best, ready) if level == len(levels) - 1 else None,
        )  # fmt: skip
        growth = twin_level(growth, logits, positions, ids, noise, width, keep)
        first += frontier
        count = growth.tokens.shape[1]
        for name, value in all_of(nodes).items():
            assert torch.equal(value[:, :count], getattr(growth, name)), name
            assert bool((value[:, count:] == -99).all()), "nothing is written behind the new nodes"
    assert finished is not None
    expected = expand.finish(growth, best, ready > 0)
    for name in ("tokens", "parents", "depths", "scores", "size"):
        assert torch.equal(getattr(finished, name), getattr(expected, name)), name
    assert not counters.any()
    ancestor_mask(finished.parents, finished.size, len(levels))  # parents stand before their children


@FEW
@given(
    batch=st.integers(1, 3),
    levels=st.lists(st.tuples(st.integers(1, 5), st.integers(1, 9)), min_size=1, max_size=3),
    best=st.integers(0, 20),
    number=st.integers(0, 99),
)
def test_draft_level(batch: int, levels: list[tuple[int, int]], best: int, number: int) -> None:
    check_draft_level(batch, 12, levels, best, number)


@pytest.mark.parametrize(("keep", "best"), [(4, 5), (4, 0), (16, 0)])
def test_draft_level_of_several_splits(keep: int, best: int) -> None:
    check_draft_level(2, 700, [(4, keep)] * 2, best)


def level_of(logits: list[list[float]], nodes: Nodes, first: int, keep: int, **changes: Finish | Roots) -> Any:
    """`draft_level` for one greedy request; a frontier node's tokens are 0, 1, ..."""
    rows, zeros = torch.tensor([logits], device=DEVICE), torch.zeros(1, dtype=torch.int64, device=DEVICE)
    ids, width = torch.arange(rows.shape[2], device=DEVICE), min(16, rows.shape[2])
    return growing.draft_level(
        rows, zeros, ids, zeros, zeros.float(), arrivals(), nodes, first, width, keep, **changes
    )  # fmt: skip


def test_growing_breaks_ties_by_index() -> None:
    nodes, zeros = empty_nodes(1, 8), torch.zeros(1, dtype=torch.int64, device=DEVICE)
    level_of([[-2.0, -2.0, -1.0, -2.0]], nodes, 0, 3, roots=Roots(zeros, zeros))
    assert nodes.tokens.tolist() == [[0, 2, 0, 1, -99, -99, -99, -99]]


@pytest.mark.filterwarnings("ignore:invalid value")
@pytest.mark.parametrize("best", [0, 2])
def test_scores_that_are_no_numbers_hurt_nobody_else(best: int) -> None:
    """As many nodes are kept as there is room for."""
    logits = torch.zeros(2, 1, 16, device=DEVICE)
    logits[1] = float("nan")
    tables = torch.full((3, 4, 5), -9, device=DEVICE)
    nodes = growing.Nodes(*tables[:, :2].unbind(0), torch.zeros(2, 5, device=DEVICE))
    numbers = torch.tensor([5, 5], device=DEVICE)
    growing.draft_level(
        logits, numbers, torch.arange(16, device=DEVICE), numbers, torch.zeros(2, device=DEVICE),
        torch.zeros(4, dtype=torch.int32, device=DEVICE), nodes, 0, 8, 4, ahead=1,
        roots=growing.Roots(numbers - 5, numbers), finish=growing.Finish(best, numbers),
    )  # fmt: skip
    assert (tables[:, 2:] == -9).all()
    assert nodes.parents[:, 1:].tolist() == [[0] * 4] * 2


def test_pruning_is_stable() -> None:
    """A certain child scores as its parent, 0.0 as -0.0: the lower index stays."""
    nodes, zeros = empty_nodes(1, 7), torch.zeros(1, dtype=torch.int64, device=DEVICE)
    nodes.scores[0, :4] = torch.tensor([0.0, -1.0, -1.0, -0.0])
    nodes.tokens[0, :4] = torch.arange(4) + 10
    nodes.parents[0, :4] = torch.tensor([-1, 0, 0, 0])
    nodes.depths[0, :4] = torch.tensor([0, 1, 1, 1])
    finished = level_of([[5.0]] * 3, nodes, 1, 3, finish=Finish(3, zeros + 1))
    assert nodes.scores.tolist() == [[0.0, -1.0, -1.0, 0.0, -1.0, -1.0, 0.0]]
    assert finished.tokens.tolist() == [[10, 11, 13, 0]]
    assert finished.parents.tolist() == [[-1, 0, 0, 2]]
    assert finished.scores.tolist() == [[0.0, -1.0, 0.0, 0.0]]
    assert finished.size.tolist() == [4]


# ---- rows -----------------------------------------------------------------------------------------------------------


@FEW
@given(
    tree=draft_trees(vocab=3),
    seed=st.integers(0, 99),
    wrap=st.sampled_from([3, 4, 99]),
    page=st.sampled_from([1, 4, 16]),
)
def test_moves(tree: DraftTree, seed: int, wrap: int, page: int) -> None:
    """Against reference.move_rows' rule, over a shuffled page table that may wrap and whose rows have any order."""
    result = longest_match(tree, torch.randint(0, 3, tree.tokens.shape, generator=generator(seed)))
    batch, moves = result.path.shape
    if wrap * page < tree.nodes:
        wrap = -(-tree.nodes // page)
    count = min(wrap, 64 // page)
    pages = torch.randperm(batch * count, generator=generator(seed)).view(batch, count).int()
    lengths = torch.randint(0, max(1, 64 - tree.nodes), (batch,), generator=generator(seed))
    if wrap == 99:
        lengths = lengths.clamp(max=max(0, count * page - tree.nodes))
    wrap = min(wrap, count)
    steps = torch.arange(moves)
    target = twin_storage_rows(pages, lengths[:, None] + steps, page, wrap)
    source = twin_storage_rows(pages, lengths[:, None] + result.path, page, wrap)
    source = torch.where(steps < result.counts[:, None], source, target)
    k, v = (torch.randn(2, batch * count * page, 2, dim, generator=generator(seed)) for dim in (8, 6))
    expected = [x.clone().index_copy_(1, target.flatten(), x[:, source.flatten()]) for x in (k, v)]
    pages, lengths, path, counts = (x.to(DEVICE) for x in (pages, lengths, result.path, result.counts))
    strided = torch.stack([lengths, lengths], 1)[:, 0]
    order = torch.randperm(batch, generator=generator(seed)).to(DEVICE)
    for table, requests in ((pages, None), (pages[order], order.argsort())):
        got = [x.clone().to(DEVICE) for x in (k, v)]
        move_kept(*got, table, strided, path, counts, page, wrap, requests=requests)
        assert all(torch.equal(a.cpu(), b) for a, b in zip(got, expected, strict=True))
    slots = lengths[:, None] + torch.arange(3, device=DEVICE)
    expected_rows = twin_storage_rows(pages, slots, page, count)
    got_rows = storage_rows(pages[order], lengths, 3, page, requests=order.argsort())
    assert torch.equal(got_rows, expected_rows)


def test_moves_in_several_pieces() -> None:
    """Rows wider than a program's share, k and v of different widths, a long chain of overlapping moves."""
    k, v = (torch.randn(2, 40, 2, dim, generator=generator(dim)) for dim in (96, 40))
    path = torch.tensor([[0, *range(2, 34)]], device=DEVICE)
    pages, zeros = torch.arange(5, device=DEVICE, dtype=torch.int32)[None], torch.zeros_like(path[0, :1])
    expected = [torch.cat([x[:, :1], x[:, 2:34], x[:, 33:]], 1) for x in (k, v)]
    got = [x.to(DEVICE) for x in (k, v)]
    move_kept(*got, pages, zeros, path, zeros + 33, 8, 5)
    assert all(torch.equal(a.cpu(), b) for a, b in zip(got, expected, strict=True))


# ---- real shapes ----------------------------------------------------------------------------------------------------


@pytest.mark.cuda
@pytest.mark.parametrize("vocab", [49152, 152576])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_choose_real_shapes(vocab: int, dtype: torch.dtype) -> None:
    for batch, nodes in ((1, 1), (1, 64), (4, 16)):
        logits, noise = randn(batch, nodes, vocab, seed=nodes, dtype=dtype), Noise.draw(batch, nodes)
        positions = torch.arange(batch * nodes, device=DEVICE).view(batch, nodes)
        choices = accepting.choose(logits, positions, noise.seed, noise.temperature, arrivals())
        check_choices(choices, choose_scores(logits, positions, noise.seed, noise.temperature))
    check_invariance(4, 64, vocab)


@pytest.mark.cuda
@pytest.mark.parametrize("nodes", [1, 16, 64])
def test_verify_real_shapes(nodes: int) -> None:
    rng = random.Random(nodes)
    tree = moved(random_tree(rng, [nodes, max(1, nodes // 2), nodes], nodes, 5))
    logits, noise = randn(3, nodes, 49152, seed=nodes), Noise.draw(3, nodes)
    logits[..., 5:] -= 50
    positions = torch.arange(3, device=DEVICE)[:, None] + tree.depths
    counters = arrivals()
    for _ in range(20):
        choices = accepting.choose(logits, positions, noise.seed, noise.temperature, counters)
        result = accepting.verify(logits, positions, noise.seed, noise.temperature, counters, tree)
        check_result(result, longest_match(tree, choices))


@pytest.mark.cuda
@pytest.mark.parametrize("n", [16384, 49152, 152576])
def test_candidates_real_shapes(n: int) -> None:
    for batch, frontier, width in ((1, 1, 8), (1, 8, 8), (16, 8, 16)):
        logits, noise = randn(batch, frontier, n, seed=frontier), Noise.draw(batch, 1)
        positions, ids = torch.arange(batch, device=DEVICE), torch.arange(n, device=DEVICE) * 2
        logp, chosen = growing.candidates(logits, positions, ids, noise.seed, noise.temperature, arrivals(), width)
        check_candidates(logp, chosen, draft_scores(logits, positions, ids, noise.seed, noise.temperature), ids)
        alone = growing.candidates(
            logits[:1, -1:], positions[:1], ids, noise.seed[:1], noise.temperature[:1], arrivals(), width
        )
        assert torch.equal(alone[0], logp[:1, -1:])
        assert torch.equal(alone[1], chosen[:1, -1:])


@pytest.mark.cuda
@pytest.mark.parametrize("n", [16384, 152576])
def test_draft_level_real_shapes(n: int) -> None:
    for batch in (1, 16):
        for _ in range(10):
            check_draft_level(batch, n, [(8, 8)] * 3, 15)
        check_draft_level(batch, n, [(16, 16), (16, 24), (16, 24)], 63)


@pytest.mark.cuda
def test_large_growth_and_pruning() -> None:
    """All of 1024 candidates ranked, 255 nodes pruned to 63."""
    nodes, ready = empty_nodes(2, 64 + 1 + 256), torch.ones(2, dtype=torch.int64, device=DEVICE)
    nodes.tokens[:, :65] = torch.arange(65, device=DEVICE)
    nodes.parents[:, :65], nodes.depths[:, :65], nodes.scores[:, :65] = 0, 1, 0
    nodes.parents[:, 0], nodes.depths[:, 0] = -1, 0
    growth = expand.Growth(*(x[:, :65].clone() for x in all_of(nodes).values()), 64, 1)
    logits, noise = randn(2, 64, 500, seed=3), Noise.draw(2, 5)
    positions, ids = torch.arange(2, device=DEVICE), torch.arange(500, device=DEVICE) * 2
    finished = growing.draft_level(
        logits, positions, ids, noise.seed, noise.temperature, arrivals(), nodes, 1, 16, 191, finish=Finish(63, ready)
    )
    growth = twin_level(growth, logits, positions, ids, noise, 16, 191)
    assert finished is not None
    for name, value in all_of(nodes).items():
        assert torch.equal(value[:, :256], getattr(growth, name)), name
    expected = expand.finish(growth, 63, ready > 0)
    for name in ("tokens", "parents", "depths", "scores", "size"):
        assert torch.equal(getattr(finished, name), getattr(expected, name)), name


@pytest.mark.cuda
def test_moves_real_shapes() -> None:
    for heads, dim, v_dim, moves in ((3, 64, 64, 4), (4, 192, 128, 16), (8, 192, 128, 64)):
        k, v = (randn(4, 2048, heads, d, seed=d, dtype=torch.bfloat16) for d in (dim, v_dim))
        path = torch.arange(moves, device=DEVICE).repeat(2, 1)
        path[:, 1:] += torch.tensor([[1], [3]], device=DEVICE)
        pages = torch.arange(128, device=DEVICE, dtype=torch.int32).view(2, 64)  # slot t of request b: row 1024 b + t
        lengths = torch.tensor([100, 200], device=DEVICE)
        root = (lengths + torch.tensor([0, 1024], device=DEVICE))[:, None]
        target, source = root + torch.arange(moves, device=DEVICE), root + path
        expected = [x.index_copy(1, target.flatten(), x[:, source.flatten()]) for x in (k, v)]
        move_kept(k, v, pages, lengths, path, torch.full_like(lengths, moves), 16, 64)
        assert torch.equal(k, expected[0])
        assert torch.equal(v, expected[1])


@pytest.mark.cuda
def test_one_graph_of_all() -> None:
    """Captured once, replayed with other inputs: the counters come back to zero."""
    tree = moved(random_tree(random.Random(1), [8, 5], 8, 4))
    logits, noise, counters = randn(2, 8, 49152, seed=1), Noise.draw(2, 1), arrivals()
    logits[..., 4:] -= 50
    positions = tree.depths.clone()
    k, v = (randn(2, 64, 2, 64, seed=s) for s in (1, 2))
    pages = torch.tensor([[0, 1], [3, 2]], dtype=torch.int32, device=DEVICE)

    def step() -> tuple[Tensor, Tensor, Tensor]:
        result = accepting.verify(logits, positions, noise.seed, noise.temperature, counters, tree, ahead=1)
        move_kept(k, v, pages, positions[:, 0], result[0], result[2], 16, 2)
        return result

    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = step()
    for number in range(5):
        positions.copy_(tree.depths + 3 * number)
        logits.copy_(logits.roll(1, 1))
        graph.replay()
        choices = accepting.choose(logits, positions, noise.seed, noise.temperature, counters, ahead=1)
        check_result(result, longest_match(tree, choices))
        assert not counters.any()
