"""Noise, truncation and choice, each against its definition; and the law of what the whole loop samples."""

import itertools
import random
from bisect import bisect_right
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from test_attention import CPU, tree_rows
from test_decode_loop import Scripted
from test_tree import draft_trees
from tiny import write_llama, write_mtp
from torch import Tensor

from mtp_engine.assemble import decode_loop
from mtp_engine.attention.torch import TorchAttention
from mtp_engine.cache import HybridKV, Pages
from mtp_engine.config import AttentionConfig, SamplingParams, TreeShape
from mtp_engine.drafters import MTPDrafter, RootDrafter
from mtp_engine.models import loader
from mtp_engine.models.decoder import Decoder
from mtp_engine.models.mtp import MTPModule
from mtp_engine.protocols import Drafter
from mtp_engine.sampling.batch import SamplingBatch
from mtp_engine.sampling.sampler import choose, gumbel, noise_key, truncate
from mtp_engine.tree import DraftTree
from mtp_engine.verifiers import MatchVerifier

EULER = 0.5772156649


def batch_of(params: Sequence[SamplingParams]) -> SamplingBatch:
    return SamplingBatch.build(params, [p.seed or 0 for p in params], CPU)


# ---- noise --------------------------------------------------------------------------------------------------------


def noise(seeds: Sequence[int], positions: int, tokens: int) -> Tensor:
    where = torch.arange(positions).expand(len(seeds), -1)
    return gumbel(torch.tensor(seeds), where, torch.arange(tokens))


NOISES = {
    "over tokens": ([12345], 1, 60000),
    "over positions": ([2**62 + 5], 60000, 1),
    "over one seed's tokens": ([2**62 + 5], 20, 3000),
    "over seeds": (range(60000), 1, 1),
    "over high seeds": (range(2**61, 2**61 + 60000 * 2**33, 2**33), 1, 1),
    "over all": (range(7, 47), 30, 50),
}


@pytest.mark.parametrize("name", NOISES)
def test_noise_is_standard_gumbel(name: str) -> None:
    seeds, positions, tokens = NOISES[name]
    x = noise(list(seeds), positions, tokens).flatten().double()
    assert stats.kstest(x.numpy(), "gumbel_r").pvalue > 1e-3
    spread = torch.pi / 6**0.5
    assert abs(float(x.mean()) - EULER) < 4 * spread / len(x) ** 0.5
    assert abs(float(x.std()) - spread) < 0.02
    assert abs(stats.skew(x.numpy()) - 1.1395) < 0.1


def test_the_upper_tail_is_fine_grained() -> None:
    """Large noise decides among unlikely tokens: P(g > 11) = 1 - exp(-exp(-11)), and no two such values are alike."""
    x = noise([3, 2**40 + 3], 1, 2_000_000).flatten()
    tail = x[x > 11]
    expected = len(x) * 1.67e-5
    assert 0.5 * expected < len(tail) < 1.6 * expected
    assert len(tail.unique()) == len(tail)
    assert bool(x.isfinite().all())


def test_noise_does_not_depend_on_company() -> None:
    """Any batch, any chunk of positions or tokens, any order: the same bits."""
    seeds, positions, tokens = (
        torch.tensor([5, 2**63 - 1, 0, 2**40]),
        torch.arange(90, 97).expand(4, -1),
        torch.arange(1003),
    )
    whole = gumbel(seeds, positions, tokens)
    for b, p in itertools.product(range(4), range(7)):
        assert torch.equal(gumbel(seeds[b : b + 1], positions[b : b + 1, p : p + 1], tokens)[0, 0], whole[b, p])
    shuffled = torch.randperm(1003, generator=torch.Generator().manual_seed(0))
    assert torch.equal(gumbel(seeds, positions, shuffled), whole[..., shuffled])
    for start, stop in ((0, 1), (1, 9), (500, 517), (17, 1003)):
        assert torch.equal(gumbel(seeds, positions, tokens[start:stop]), whole[..., start:stop])
    for token in (0, 1, 255, 1002):
        assert torch.equal(gumbel(seeds[2:], positions[2:], torch.tensor([token]))[..., 0], whole[2:, :, token])


def test_every_part_of_the_key_counts() -> None:
    """Seeds that differ in one bit, of either half; positions; tokens: all different, and uncorrelated."""
    seeds = [0, *(1 << bit for bit in range(63)), 2**63 - 1]
    x = noise(seeds, 4, 4000)
    rows = x.flatten(0, 1)
    assert len({tuple(row[:4].tolist()) for row in rows}) == len(rows)
    centred = (rows - rows.mean(1, keepdim=True)) / rows.std(1, keepdim=True)
    correlation = (centred @ centred.T / 4000).fill_diagonal_(0)
    assert float(correlation.abs().max()) < 6 / 4000**0.5
    columns = noise(list(range(4000)), 1, 40)[:, 0].T
    centred = (columns - columns.mean(1, keepdim=True)) / columns.std(1, keepdim=True)
    assert float((centred @ centred.T / 4000).fill_diagonal_(0).abs().max()) < 6 / 4000**0.5


def test_seeds_that_once_gave_the_same_text_differ() -> None:
    """Keys of 32 bits collided for these two, and so for one pair of seeds in 2**32."""
    x = noise([2119480, 4298689857], 50, 100)
    assert not bool((x[0] == x[1]).all(-1).any())
    assert abs(float(torch.corrcoef(x.flatten(1))[0, 1])) < 0.06


def test_seeds_and_positions_count_with_all_their_bits() -> None:
    """Keys of many seeds at a position, and of many positions of a seed: no two are alike, wherever they differ."""
    bits = [0, *(1 << bit for bit in range(63))]
    random_seeds = torch.randint(0, 2**63 - 1, (100_000,), generator=torch.Generator().manual_seed(1)).unique()
    for seeds in (torch.arange(100_000), torch.arange(100_000) << 40, torch.tensor(bits), random_seeds):
        for position in (0, 1, 2**32, 2**63 - 1):
            first, second = noise_key(seeds, torch.tensor([[position]]))
            assert len(((second << 32) | first).unique()) == len(seeds)
        first, second = noise_key(torch.tensor([5]), seeds[None])
        assert len(((second << 32) | first).unique()) == len(seeds)
    first, second = noise_key(torch.tensor(bits), torch.tensor(bits).expand(64, -1))
    assert len(((second << 32) | first).unique()) == 64 * 64
    # one bit of either changes half of the key's
    flipped = [int(x).bit_count() for half in (first, second) for x in (half ^ half[0, 0]).flatten()[1:]]
    assert 15.5 < sum(flipped) / len(flipped) < 16.5


WORDS = st.integers(0, 2**63 - 1) | st.integers(0, 99) | st.sampled_from([1 << bit for bit in range(63)])


@settings(max_examples=200, deadline=None)
@given(pairs=st.sets(st.tuples(WORDS, WORDS), min_size=2, max_size=50))
def test_different_seeds_and_positions_have_different_keys(pairs: set[tuple[int, int]]) -> None:
    seeds, positions = torch.tensor(sorted(pairs)).T
    first, second = noise_key(seeds, positions[:, None])
    assert len(set(zip(first[:, 0].tolist(), second[:, 0].tolist(), strict=True))) == len(pairs)


@pytest.mark.parametrize("first", [0, 2**31, 2**62])
def test_winners_are_uniform_and_independent(first: int) -> None:
    """With equal logits the noise alone chooses: pairs of choices at neighbouring positions, or seeds, are uniform."""
    winners = noise(list(range(first, first + 20001)), 2, 6).argmax(-1)
    for pairs in (winners[:, 0] * 6 + winners[:, 1], winners[:-1, 0] * 6 + winners[1:, 0]):
        assert 1e-3 < stats.chisquare(torch.bincount(pairs, minlength=36).numpy()).pvalue < 1 - 1e-3


# ---- truncation ---------------------------------------------------------------------------------------------------


def survivors(logits: list[float], params: SamplingParams) -> tuple[dict[int, float], float]:
    """Tokens left with their probabilities, in fp64, and how near a decision was to going the other way."""
    top = max(logits)
    weights = [2.718281828459045 ** ((x - top) / params.temperature) for x in logits]
    left = {t: w for t, w in enumerate(weights) if w >= params.min_p}
    margins = [abs(w - params.min_p) / w for w in weights if 0 < params.min_p < 1]
    if params.top_k:
        rising = sorted(logits[t] for t in left)
        left = {t: w for t, w in left.items() if len(rising) - bisect_right(rising, logits[t]) < params.top_k}
    if params.top_p < 1:
        total = sum(left.values())
        falling = sorted(left, key=lambda t: -logits[t])
        sums = dict(zip(falling, itertools.accumulate((left[t] for t in falling), initial=0.0), strict=False))
        first = {
            logits[t]: t for t in reversed(falling)
        }  # of those that tie, the one with nothing but better before it
        above = {t: sums[first[logits[t]]] / total for t in left}
        margins += [abs(mass - params.top_p) for mass in above.values()]
        left = {t: w for t, w in left.items() if above[t] < params.top_p}
    total = sum(left.values())
    return {t: w / total for t, w in left.items()}, min(margins, default=1.0)


def check_truncation(logits: Tensor, params: Sequence[SamplingParams]) -> None:
    """logits: [B, N, V]. What is left is left as it was."""
    result = truncate(logits, batch_of(params))
    for b, wanted in enumerate(params):
        for row, original in zip(result[b], logits[b], strict=True):
            expected, margin = survivors(original.tolist(), wanted)
            if margin <= 1e-5:
                continue  # fp32 may decide otherwise
            kept = row > -float("inf")
            assert set(kept.nonzero().flatten().tolist()) == set(expected)
            assert torch.equal(row[kept], original[kept])


PARAMS = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.3, 0.7, 1.0, 2.0]),
    top_k=st.sampled_from([0, 0, 1, 2, 3, 5, 17, 1000]),
    top_p=st.sampled_from([1.0, 1.0, 1e-7, 0.1, 0.37, 0.5, 0.83, 0.99, 0.9999]),
    min_p=st.sampled_from([0.0, 0.0, 1e-6, 0.013, 0.11, 0.47, 1.0]),
)


@settings(max_examples=300, deadline=None)
@given(
    params=st.lists(PARAMS, min_size=1, max_size=3),
    vocab=st.integers(1, 30),
    steps=st.sampled_from([1, 4, 1000]),
    seed=st.integers(0, 2**32),
)
def test_truncation_by_definition(params: list[SamplingParams], vocab: int, steps: int, seed: int) -> None:
    """Logits on a grid of 1/steps: the coarser, the more ties."""
    logits = torch.randn(len(params), 2, vocab, generator=torch.Generator().manual_seed(seed)) * 2
    check_truncation((logits * steps).round() / steps, params)


def test_a_nucleus_of_thousands() -> None:
    """Far more tokens than the fast path looks at, beside rows for which it suffices."""
    g = torch.Generator().manual_seed(1)
    spread = torch.tensor([0.1, 0.1, 5.0, 0.1, 0.1, 0.1])[:, None, None]
    logits = torch.randn(6, 1, 2500, generator=g) * spread
    settings = [{"top_p": 0.97}, {"top_p": 0.4}, {"top_p": 0.9}, {"top_k": 700}, {"top_k": 900, "top_p": 0.8}, {}]
    params = [SamplingParams(temperature=1.0, **each) for each in settings]
    sizes = (truncate(logits, batch_of(params)) > -float("inf")).sum(-1).flatten().tolist()
    assert min(sizes[0], sizes[1], sizes[4]) > 512
    assert sizes[2] < 200
    assert sizes[3] == 700
    assert sizes[5] == 2500
    check_truncation(logits, params)


def test_ties_stay_together() -> None:
    logits = torch.tensor([[[2.0, 1.0, 2.0, 1.0, 2.0, 0.0, 1.0]]])
    for wanted, kept in (
        ({"top_k": 1}, {0, 2, 4}), ({"top_k": 3}, {0, 2, 4}), ({"top_k": 4}, {0, 1, 2, 3, 4, 6}),
        ({"top_p": 1e-6}, {0, 2, 4}), ({"top_p": 0.85}, {0, 1, 2, 3, 4, 6}), ({"min_p": 1.0}, {0, 2, 4}),
        ({"min_p": 0.36}, {0, 1, 2, 3, 4, 6}), ({"min_p": 0.37}, {0, 2, 4}),
    ):  # fmt: skip
        left = truncate(logits, batch_of([SamplingParams(temperature=1.0, **wanted)]))
        assert set((left > -float("inf")).flatten().nonzero().flatten().tolist()) == kept, wanted


def test_nothing_to_truncate_is_left_alone() -> None:
    logits = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0))
    params = [SamplingParams(temperature=0.7), SamplingParams(temperature=0.0, top_k=2, top_p=0.1)]
    assert truncate(logits, batch_of(params)) is logits


# ---- choice -------------------------------------------------------------------------------------------------------

MIXED = [
    SamplingParams(),
    SamplingParams(temperature=1.0, seed=5),
    SamplingParams(temperature=0.0, top_k=3, top_p=0.5, min_p=0.2),
    SamplingParams(temperature=0.6, top_p=0.8, seed=2**63 - 1),
    SamplingParams(temperature=1.7, top_k=9, seed=2**40),
    SamplingParams(temperature=1.0, min_p=0.1, seed=0),
]


@pytest.mark.parametrize("vocab", [2, 61, 3000])
def test_a_mixed_batch_is_each_alone(vocab: int) -> None:
    logits = torch.randn(6, 9, vocab, generator=torch.Generator().manual_seed(vocab)) * 2
    depths, lengths = torch.tensor([0, 1, 1, 2, 2, 3, 3, 3, 4]).expand(6, -1), torch.arange(6) * 17
    together = choose(logits, depths, 4, lengths, batch_of(MIXED))
    for b, params in enumerate(MIXED):
        alone = choose(logits[b : b + 1], depths[b : b + 1], 4, lengths[b : b + 1], batch_of([params]))
        assert torch.equal(alone[0], together[b])
        if params.temperature == 0:
            assert torch.equal(together[b], logits[b].argmax(-1))
    if vocab > 2:
        assert not torch.equal(together, logits.argmax(-1))


@settings(max_examples=50, deadline=None)
@given(tree=draft_trees(), seed=st.integers(0, 2**32))
def test_a_node_chooses_as_a_root_does_at_its_position(tree: DraftTree, seed: int) -> None:
    """The heart of it: the choice at depth d behind n tokens is plain decoding's behind n + d."""
    g = torch.Generator().manual_seed(seed)
    params = [SamplingParams(temperature=1.0, top_p=0.9, seed=seed + b) for b in range(len(tree.size))]
    logits = torch.randn(*tree.tokens.shape, 23, generator=g)
    lengths, batch = torch.randint(0, 1000, tree.size.shape, generator=g), batch_of(params)
    choices = choose(logits, tree.depths, tree.max_depth, lengths, batch)
    for node in range(tree.nodes):
        depth, zero = tree.depths[:, node], torch.zeros_like(tree.depths[:, :1])
        plain = choose(logits[:, node : node + 1], zero, 0, lengths + depth, batch)
        assert torch.equal(plain[:, 0], choices[:, node])


# ---- the law of whole answers -------------------------------------------------------------------------------------

VOCAB, TOKENS, ROOT, DRAWS = 5, 3, 2, 6700
SEEDS = {
    "counted": range(DRAWS),
    "high words": range(2**33, 2**33 + DRAWS * 2**40, 2**40),
    "random": random.Random(1).sample(range(2**62, 2**63 - 2**21), DRAWS),
}


class Sampled:
    """A model with five tokens, and the exact law of the three tokens after `ROOT`."""

    def __init__(self, root: Path) -> None:
        small = write_llama(root / "main", seed=3, vocab_size=VOCAB)
        self.main: Decoder = loader.load_main(small, torch.float32, CPU, lambda *_: None)
        self.mtp: MTPModule = loader.load_mtp(write_mtp(root / "mtp"), self.main, 0, lambda *_: None)

    def layers(self) -> list[AttentionConfig]:
        """Rings that hold everything: their attention is one call for the whole batch."""
        return [replace(layer.attention, window=16) for layer in self.main.config.layers]

    def law(self, params: SamplingParams) -> dict[tuple[int, ...], float]:
        paths = list(itertools.product(range(VOCAB), repeat=TOKENS))
        cache = HybridKV(
            self.layers(), Pages(slots=len(paths), tokens=8, page_size=8, device=CPU), max_nodes=3, dtype=torch.float32
        )
        tokens = torch.tensor([[ROOT, *path[:-1]] for path in paths])
        chains = DraftTree.chain(tokens, torch.full((len(paths),), TOKENS))
        rows = tree_rows(chains, list(range(len(paths))), [0] * len(paths))
        logits = self.main.logits(self.main.forward(tokens, rows.positions, TorchAttention(cache, rows)))
        law = {}
        for path, row in zip(paths, logits.tolist(), strict=True):
            law[path] = 1.0
            for token, each in zip(path, row, strict=True):
                law[path] *= survivors(each, params)[0].get(token, 0.0)
        return law

    def sample(self, drafter: Drafter, params: SamplingParams, seeds: Sequence[int]) -> dict[int, list[int]]:
        """The text, ROOT included, of each seed; hundreds at once. The MTP layers start to draft at the second token."""
        cache = HybridKV(
            self.layers(),
            Pages(slots=len(seeds), tokens=8 * len(seeds) + 64, page_size=8, device=CPU),
            max_nodes=drafter.max_nodes,
            dtype=torch.float32,
        )
        loop = decode_loop(self.main, cache, drafter, MatchVerifier(), slots=len(seeds), max_context=64,
                          eos_token_ids=[], prefill_chunk=8, device=CPU)  # fmt: skip
        requests = [loop.add([ROOT], replace(params, seed=seed)) for seed in seeds]
        while loop.requests:
            loop.step()
        return {request.seed: request.prompt + request.output for request in requests}


@pytest.fixture(scope="module")
def sampled(tmp_path_factory: pytest.TempPathFactory) -> Sampled:
    return Sampled(tmp_path_factory.mktemp("sampled"))


def fit(texts: Sequence[Sequence[int]], law: dict[tuple[int, ...], float]) -> float:
    """p-value of the chi-square test, outcomes expected fewer than 8 times put together."""
    found = Counter(tuple(text[1:]) for text in texts)
    assert found.keys() <= {path for path, p in law.items() if p > 0}
    common = [path for path, p in law.items() if p * len(texts) >= 8]
    observed, expected = [found[path] for path in common], [law[path] * len(texts) for path in common]
    rare = len(texts) - sum(expected)
    if rare > 1e-6 * len(texts):
        observed, expected = [*observed, len(texts) - sum(observed)], [*expected, rare]
    assert len(observed) >= 12, "the law is spread enough to tell"
    return float(stats.chisquare(observed, expected).pvalue)


LAWS: dict[str, dict[str, Any]] = {
    "plain": {"temperature": 1.5},
    "cut": {"temperature": 1.5, "top_k": 4, "top_p": 0.93},
}


def parts(family: str, first: int = 0) -> list[list[int]]:
    """A family's seeds by the thousand, each plus `first`."""
    seeds = [seed + first for seed in SEEDS[family]]
    return [seeds[start : start + 1000] for start in range(0, DRAWS, 1000)]


@pytest.fixture(scope="module")
def known(sampled: Sampled) -> dict[int, list[int]]:
    """What plain decoding says: an oracle that knows the noise, by having seen what it does."""
    params, texts = SamplingParams(max_tokens=TOKENS, **LAWS["plain"]), {}
    for family in SEEDS:
        for seeds in parts(family):
            texts |= sampled.sample(RootDrafter(), params, seeds)
    return texts


@pytest.mark.parametrize(("name", "cut"), [("root", "plain"), ("mtp", "cut")])
def test_what_is_sampled_has_the_models_law(sampled: Sampled, known: dict[int, list[int]], name: str, cut: str) -> None:
    """20,000 answers without drafts, and as many others drafted, of three kinds of seeds."""
    params = SamplingParams(max_tokens=TOKENS, **LAWS[cut])
    law, everything = sampled.law(params), []
    assert sum(law.values()) == pytest.approx(1)
    for family in SEEDS:
        texts = [known[seed] for seed in SEEDS[family]] if name == "root" else []
        for seeds in parts(family, 1_000_003) if name == "mtp" else []:
            drafter = MTPDrafter(sampled.mtp, TreeShape.parse("2x2"), slots=len(seeds))
            texts += sampled.sample(drafter, params, seeds).values()
        assert 2e-3 < fit(texts, law) < 1 - 2e-3
        everything += texts
    assert len(everything) == 3 * DRAWS
    assert 2e-3 < fit(everything, law) < 1 - 2e-3


@pytest.mark.parametrize("name", ["right", "wrong", "random"])
def test_drafts_change_no_answer(sampled: Sampled, known: dict[int, list[int]], name: str) -> None:
    """Not one in a thousand of each kind of seeds, so that its law is that of the answers above, whatever is proposed."""
    params = SamplingParams(max_tokens=TOKENS, **LAWS["plain"])
    for family in SEEDS:
        seeds = parts(family)[0]
        texts = sampled.sample(Scripted(name, known, vocab=VOCAB, nodes=4), params, seeds)
        assert texts == {seed: known[seed] for seed in seeds}


def test_the_chi_square_test_is_sharp(sampled: Sampled) -> None:
    """A sampler at temperature 1.4 in place of 1.5 would be noticed in 20,000 answers (by one kind of seeds alone only in
    one case of five)."""
    params = SamplingParams(max_tokens=TOKENS, temperature=1.4)
    texts = [text for seeds in SEEDS.values() for text in sampled.sample(RootDrafter(), params, list(seeds)).values()]
    assert fit(texts, sampled.law(params)) > 2e-3
    assert fit(texts, sampled.law(replace(params, temperature=1.5))) < 1e-3
