"""The published rules: whatever is drafted, the law of what they emit is the main model's, exactly known here."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from scipy import stats
from torch import Tensor

from mtp_engine.config import EngineConfig, SamplingParams, TreeShape
from mtp_engine.drafters.candidates import Candidates, Ranking
from mtp_engine.drafters.expand import Growth, finish, grow, level_sizes
from mtp_engine.errors import EngineError
from mtp_engine.protocols import Verifier
from mtp_engine.runtime.request import TreeLimits
from mtp_engine.sampling.batch import SamplingBatch
from mtp_engine.sampling.sampler import step_seed, uniform
from mtp_engine.tree import DraftTree
from mtp_engine.verifiers import (
    BlockVerifier,
    MatchVerifier,
    RejectionVerifier,
    RRSVerifier,
    TraversalVerifier,
    TypicalVerifier,
)

VOCAB, HORIZON = 4, 5
CPU = torch.device("cpu")
RULES: dict[str, Callable[[], Verifier]] = {
    "match": MatchVerifier, "rejection": RejectionVerifier, "block": BlockVerifier, "rrs": RRSVerifier,
    "traversal": TraversalVerifier, "typical": TypicalVerifier,
}  # fmt: skip


@dataclass(frozen=True)
class Batch:
    lengths: Tensor
    tokens: Tensor
    sampling: SamplingBatch
    guide: None = None
    biases: Any = None

    @property
    def slots(self) -> Tensor:
        return torch.arange(len(self.lengths))


@dataclass
class Toy:
    """Two random Markov chains of order 2: the main model and a drafter that is like it, over VOCAB tokens."""

    main: Tensor  # [V, V, V] logits after two tokens
    drafter: Tensor
    ids: Tensor  # the drafter's vocabulary
    favoured: Tensor | None = None  # [V], added to the drafter's logits

    @classmethod
    def draw(cls, seed: int, ids: tuple[int, ...] = (0, 1, 2, 3)) -> "Toy":
        generator = torch.Generator().manual_seed(seed)
        main = torch.randn(VOCAB, VOCAB, VOCAB, generator=generator)
        return cls(main, main + 0.8 * torch.randn(main.shape, generator=generator), torch.tensor(ids))

    def draft(self, batch: Batch, before: Tensor, shape: TreeShape, ranking: Ranking) -> DraftTree:
        """before: [B] the token in front of the root's."""
        tree, depth = Growth.start(batch.tokens), 3 if shape.best else len(shape.widths)
        if self.favoured is not None:
            batch = replace(batch, biases=SimpleNamespace(bias=self.favoured.expand(len(batch.lengths), -1)))
        candidates = Candidates(ranking, batch, self.ids, VOCAB)  # type: ignore[arg-type]
        for width, keep in level_sizes(shape, depth, 4):
            first = tree.tokens.shape[1] - tree.frontier
            one, two = self.pairs(tree.tokens, tree.parents, before)
            logits = self.drafter[one, two][:, first:, self.ids]
            tree = grow(tree, candidates.rank(logits, tree), self.ids, width, keep)
        done = finish(tree, shape.best, torch.ones_like(batch.tokens, dtype=torch.bool))
        return replace(done, draft=candidates.distribution(done.nodes))

    def pairs(self, tokens: Tensor, parents: Tensor, before: Tensor) -> tuple[Tensor, Tensor]:
        """The last two tokens at every node."""
        up = tokens.gather(1, parents.clamp(min=0))
        return torch.where(parents < 0, before[:, None], up), tokens

    def run(
        self,
        rule: Verifier,
        shape: TreeShape,
        ranking: Ranking,
        params: SamplingParams,
        seeds: Tensor,
        horizon: int = HORIZON,
    ) -> tuple[Tensor, float]:
        """`horizon` tokens for every seed after the text (0, 1), [B, horizon], and the mean accepted length.

        shape: the engine's tree; params.tree may ask for less of it.
        """
        sampling = SamplingBatch.build([params], [0], CPU)
        seeds = step_seed(seeds, torch.zeros_like(seeds), 5)
        text = torch.zeros(len(seeds), 2 + horizon + 4, dtype=torch.int64)
        text[:, 1] = 1
        length = torch.full_like(seeds, 1)  # position of the last token
        steps = emitted = 0
        while len(going := (length < 1 + horizon).nonzero()[:, 0]):
            at, rows = length[going, None], text[going]
            tokens, before = rows.gather(1, at)[:, 0], rows.gather(1, at - 1)[:, 0]
            numbers = sampling.numbers.repeat(1, len(going))
            numbers[1] = seeds[going]
            batch = Batch(length[going], tokens, replace(sampling, numbers=numbers))
            tree = self.draft(batch, before, shape, ranking)
            limits = TreeLimits.build([params] * len(going), CPU)
            tree = limits.apply(tree) if limits else tree
            one, two = self.pairs(tree.tokens, tree.parents, before)
            result = rule.verify(tree, self.main[one, two], batch)  # type: ignore[arg-type]
            text[going] = rows.scatter(1, at + 1 + torch.arange(tree.max_depth + 1), result.tokens)
            length[going] += result.counts
            steps, emitted = steps + len(going), emitted + int(result.counts.sum())
        return text[:, 2 : 2 + horizon], emitted / steps

    def law(self, temperature: float, depth: int = HORIZON) -> Tensor:
        """The exact probability of every text of `depth` tokens after (0, 1), as a flat tensor."""
        step = (self.main.double() / temperature).softmax(-1)
        texts = torch.cartesian_prod(*[torch.arange(VOCAB)] * depth)
        whole = torch.cat([torch.tensor([[0, 1]]).expand(len(texts), 2), texts], 1)
        law = torch.ones(len(texts), dtype=torch.float64)
        for i in range(depth):
            law *= step[whole[:, i], whole[:, i + 1], whole[:, i + 2]]
        return law


def p_value(texts: Tensor, law: Tensor) -> float:
    """Chi-square of texts [B, n] against the exact law; cells expected less than 5 times are one cell."""
    code = (texts * VOCAB ** torch.arange(texts.shape[1] - 1, -1, -1)).sum(1)
    seen, expected = torch.bincount(code, minlength=len(law)).double(), law * len(texts)
    rare = expected < 5
    seen, expected = (torch.cat([x[~rare], x[rare].sum()[None]]) for x in (seen, expected))
    seen, expected = seen[expected > 0], expected[expected > 0]
    return float(stats.chisquare(seen.numpy(), expected.numpy() * float(seen.sum() / expected.sum())).pvalue)


CASES = [
    ("match", "2x2x1", "noise"), ("match", "tree:5", "noise"), ("match", "2x2x1", "best"),
    ("rejection", "chain:3", "drawn"), ("rejection", "chain:3", "best"), ("rejection", "chain:3", "noise"),
    ("block", "chain:3", "drawn"), ("block", "chain:3", "noise"),
    ("rrs", "3x2x1", "drawn"), ("rrs", "2x2x2", "best"), ("rrs", "tree:6", "noise"),
    ("traversal", "3x2x1", "drawn"), ("traversal", "2x2x1", "drawn"), ("traversal", "tree:6", "noise"),
    ("traversal", "2x2x1", "best"),
]  # fmt: skip
PARAMS = SamplingParams(temperature=0.9)


@pytest.mark.parametrize(("rule", "shape", "ranking"), CASES)
def test_the_law_is_the_main_models(rule: str, shape: str, ranking: Ranking) -> None:
    """60,000 texts of five tokens, in steps of a tree of depth 3: all of them, and p-values of 12 parts."""
    toy = Toy.draw(3, (0, 1, 3) if shape == "2x2x2" else (0, 1, 2, 3))
    texts, _ = toy.run(RULES[rule](), TreeShape.parse(shape), ranking, PARAMS, torch.arange(60_000))
    law = toy.law(0.9)
    assert float(law.sum()) == pytest.approx(1)
    assert p_value(texts, law) > 1e-4
    assert stats.kstest([p_value(part, law) for part in texts.split(5_000)], "uniform").pvalue > 1e-3


@pytest.mark.parametrize(("rule", "shape"), [("rejection", "chain:3"), ("rrs", "3x2x1"), ("traversal", "2x2x1")])
def test_the_law_holds_where_drafts_are_favoured(rule: str, shape: str) -> None:
    """What is added to the drafter's logits changes what candidates are drawn from, and not what is said."""
    toy = Toy.draw(3)
    favouring = replace(toy, favoured=torch.tensor([1.5, -1.0, 0.0, -float("inf")]))
    lengths = []
    for each in (toy, favouring):
        texts, length = each.run(RULES[rule](), TreeShape.parse(shape), "drawn", PARAMS, torch.arange(60_000))
        lengths.append(length)
        assert p_value(texts, toy.law(0.9)) > 1e-4
    assert lengths[1] < 0.95 * lengths[0]


@pytest.mark.parametrize("rule", ["rrs", "traversal"])
@pytest.mark.parametrize(("shape", "limit"), [("2x1", "tree:2"), ("2x2", "tree:3")])
def test_a_request_that_wants_a_smaller_tree(rule: str, shape: str, limit: str) -> None:
    """Which of the drawn candidates are left out must not depend on what was drawn. Two tokens of 200,000 texts tell:
    with the best-scored candidates kept, p is below 1e-10; five tokens of 120,000 do not."""
    toy, params = Toy.draw(4), replace(PARAMS, tree=TreeShape.parse(limit))
    texts, length = toy.run(RULES[rule](), TreeShape.parse(shape), "drawn", params, torch.arange(200_000), horizon=2)
    assert length > 1.2
    assert p_value(texts, toy.law(0.9, 2)) > 1e-4


def test_the_test_sees_a_wrong_law() -> None:
    """Typical acceptance is lossy; and one at a temperature that is off by 0.05 is told from the right one."""
    toy = Toy.draw(3)
    texts, _ = toy.run(TypicalVerifier(), TreeShape.parse("2x2x1"), "best", PARAMS, torch.arange(60_000))
    assert p_value(texts, toy.law(0.9)) < 1e-9
    right, _ = toy.run(MatchVerifier(), TreeShape.parse("chain:2"), "best", PARAMS, torch.arange(60_000))
    near = toy.law(0.95)
    assert 0.5 * float((near - toy.law(0.9)).abs().sum()) < 0.04
    assert p_value(right, near) < 1e-9


@pytest.mark.parametrize("rule", RULES)
def test_greedy_is_greedy(rule: str) -> None:
    """At temperature 0 every rule, the lossy one too, says what plain decoding says."""
    toy = Toy.draw(8)
    shape = TreeShape.parse("chain:3" if rule in ("rejection", "block") else "3x2x1")
    greedy = SamplingParams(temperature=0.0)
    plain, _ = toy.run(MatchVerifier(), TreeShape.parse("chain:1"), "best", greedy, torch.arange(20))
    for ranking in ("drawn", "best", "noise"):
        texts, length = toy.run(RULES[rule](), shape, ranking, greedy, torch.arange(20))  # type: ignore[arg-type]
        assert torch.equal(texts, plain)
        assert length > 1


def test_rules_that_agree_on_chains() -> None:
    """One child: recursive rejection is chain rejection. One path: traversal is block verification."""
    toy, chain = Toy.draw(4), TreeShape.parse("chain:3")
    for tree_rule, chain_rule in ((RRSVerifier(), RejectionVerifier()), (TraversalVerifier(), BlockVerifier())):
        one, a = toy.run(tree_rule, chain, "drawn", PARAMS, torch.arange(20_000))
        two, b = toy.run(chain_rule, chain, "drawn", PARAMS, torch.arange(20_000))
        assert float((one == two).float().mean()) > 0.9999  # but for rounding
        assert a == pytest.approx(b, abs=1e-3)


def test_joint_rules_accept_more() -> None:
    toy = Toy.draw(3)

    def length(rule: str, shape: str) -> float:
        return toy.run(RULES[rule](), TreeShape.parse(shape), "drawn", PARAMS, torch.arange(50_000))[1]

    assert length("block", "chain:3") > length("rejection", "chain:3") + 0.01
    assert length("traversal", "2x2x2") > length("rrs", "2x2x2") + 0.01


@pytest.mark.parametrize("rule", ["rejection", "block", "rrs", "traversal", "typical"])
def test_padded_requests_are_those_without_padding(rule: str) -> None:
    """Trees of fewer nodes in a batch of larger ones."""
    toy = Toy.draw(6)
    seeds = torch.arange(64)
    sampling = SamplingBatch.build([PARAMS] * 64, seeds.tolist(), torch.device("cpu"))
    batch = Batch(torch.full((64,), 9), torch.randint(0, VOCAB, (64,)), sampling)
    before = torch.zeros(64, dtype=torch.int64)
    long, short = (toy.draft(batch, before, TreeShape.parse(f"chain:{n}"), "drawn") for n in (3, 1))
    cut = replace(long, size=torch.full_like(long.size, 2))
    results = []
    for tree in (cut, short):
        one, two = toy.pairs(tree.tokens, tree.parents, before)
        results.append(RULES[rule]().verify(tree, toy.main[one, two], batch))  # type: ignore[arg-type]
    assert torch.equal(results[0].counts, results[1].counts)
    assert 0 < int((results[0].counts == 2).sum()) < 64
    for b, count in enumerate(results[0].counts.tolist()):
        assert results[0].tokens[b, :count].tolist() == results[1].tokens[b, :count].tolist()


def test_step_seeds_and_uniform_noise() -> None:
    seeds = torch.tensor([0, 1, 2**62 + 7])
    drawn = {
        int(step_seed(seeds, torch.full((3,), length), purpose)[b])
        for length in range(200) for purpose in (1, 2) for b in range(3)
    }  # fmt: skip
    assert len(drawn) == 1200
    assert all(0 <= seed < 2**63 for seed in drawn)
    long = torch.tensor([3, 3 + 2**32, 3 + 2**62])
    assert len(step_seed(torch.zeros_like(long), long, 1).unique()) == 3
    u = uniform(torch.arange(3000), torch.arange(20).expand(3000, 20))
    assert stats.kstest(u.flatten().numpy(), "uniform").pvalue > 1e-3
    assert abs(float(torch.corrcoef(u.T).fill_diagonal_(0).abs().max())) < 0.1


@pytest.mark.parametrize(
    ("given", "ranking"),
    [
        ({}, "noise"), ({"tree": "4x2"}, "noise"), ({"verifier": "rrs", "tree": "4x2"}, "drawn"),
        ({"verifier": "rrs", "tree": "tree:7"}, "best"), ({"verifier": "block", "tree": "chain:3"}, "drawn"),
        ({"verifier": "typical", "allow_lossy": True, "tree": "4x2"}, "best"),
        ({"verifier": "rrs", "tree": "4x2", "candidates": "best"}, "best"),
    ],
)  # fmt: skip
def test_candidates_suit_the_rule(given: dict[str, object], ranking: str) -> None:
    tree = TreeShape.parse(str(given.pop("tree"))) if "tree" in given else None
    assert EngineConfig(tree=tree, **given).ranking == ranking  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "wrong",
    [
        {"verifier": "typical"}, {"verifier": "block", "tree": "2x2"}, {"verifier": "rejection", "tree": "tree:3"},
        {"candidates": "drawn"}, {"verifier": "rrs", "candidates": "drawn", "tree": "tree:7"},
    ],
)  # fmt: skip
def test_rules_that_cannot_be_are_refused(wrong: dict[str, object]) -> None:
    tree = TreeShape.parse(str(wrong.pop("tree"))) if "tree" in wrong else None
    with pytest.raises(EngineError):
        EngineConfig(tree=tree, **wrong)  # type: ignore[arg-type]
