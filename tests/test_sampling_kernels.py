"""What requests want of their logits, on the device: kernels against their torch twins, and rows against themselves alone."""

import random
from dataclasses import replace
from typing import Any

import pytest
import test_rules
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_processors import EOS, parameters
from test_tree import random_tree
from torch import Tensor

from mtp_engine.config import SamplingParams, TreeShape
from mtp_engine.drafters.candidates import Ranking
from mtp_engine.kernels import accept
from mtp_engine.kernels.floors import floors
from mtp_engine.kernels.logprobs import emitted_logprobs
from mtp_engine.sampling import logprobs as twin
from mtp_engine.sampling import sampler
from mtp_engine.sampling.batch import SamplingBatch
from mtp_engine.sampling.processors import Processors
from mtp_engine.tree import DraftTree, VerifyResult
from mtp_engine.verifiers import DeviceRRSVerifier, RejectionVerifier, RRSVerifier
from mtp_engine.verifiers.distributions import keep

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
GPU = DEVICE.type == "cuda"
VOCAB = 61
FEW = settings(max_examples=60 if GPU else 6, deadline=None)


def randn(*shape: int, seed: int, spread: float = 4.0) -> Tensor:
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * spread).to(DEVICE)


def moved(tree: DraftTree) -> DraftTree:
    return DraftTree(*(x.to(DEVICE) for x in (tree.tokens, tree.parents, tree.depths, tree.size)), tree.max_depth)


class Given:
    """As much of a batch as the processors look at."""

    def __init__(self, slots: list[int], lengths: list[int], params: list[SamplingParams]) -> None:
        self.slots, self.lengths = (torch.tensor(each, device=DEVICE) for each in (slots, lengths))
        self.sampling = SamplingBatch.build(params, [0] * len(params), DEVICE)


@FEW
@given(first=parameters(False), second=parameters(False), nodes=st.integers(1, 7), seed=st.integers(0, 2**32))
def test_processing(first: SamplingParams, second: SamplingParams, nodes: int, seed: int) -> None:
    """Two requests in slots that others have used; answers grow by several tokens; one of them has a structure."""
    rng = random.Random(seed)
    both = [Processors(slots=3, vocab=VOCAB, eos_token_ids=[EOS], device=DEVICE, kernels=on) for on in (False, True)]
    answers: dict[int, tuple[list[int], list[int], SamplingParams]] = {}
    for slot, params in ((2, second), (1, first), (2, first)):
        prompt = [rng.randrange(VOCAB) for _ in range(rng.randrange(1, 9))]
        said = [rng.randrange(VOCAB) for _ in range(rng.randrange(4))]
        answers[slot] = prompt, said, params
        for each in both:
            each.start(slot, prompt, params, said)
        for _ in range(2):
            tree = random_tree(rng, [rng.randint(1, nodes) for _ in answers], nodes, vocab=VOCAB)
            lengths = [len(p) + len(a) - 1 for p, a, _ in answers.values()]
            batch: Any = Given(list(answers), lengths, [p for *_, p in answers.values()])
            batch.sampling.masked[0] = 1
            logits = randn(len(answers), nodes, VOCAB, seed=rng.randrange(2**32))
            mask = torch.randint(-(2**31), 2**31, (len(answers), nodes, 2), dtype=torch.int32).to(DEVICE)
            given_mask = mask if rng.random() < 0.5 else None
            ours, theirs = (each.apply(moved(tree), logits, batch, given_mask) for each in both)
            for b, size in enumerate(tree.size.tolist()):
                torch.testing.assert_close(ours[b, :size], theirs[b, :size], rtol=1e-6, atol=1e-5)
            last = torch.tensor([rng.randrange(size) for size in tree.size.tolist()], device=DEVICE)
            result = keep(moved(tree), last, torch.tensor([rng.randrange(VOCAB) for _ in answers], device=DEVICE))
            for each in both:
                each.observe(batch, result)
            for b, (_, said, _) in enumerate(answers.values()):
                said += result.tokens[b, : int(result.counts[b])].tolist()
            check_tables(both, answers)


def check_tables(both: list[Processors], answers: dict[int, tuple[list[int], list[int], SamplingParams]]) -> None:
    """What both keep of the answers is the same, where it is asked for."""
    ours, theirs = (each.tables for each in both)
    for slot, (_, said, params) in answers.items():
        if params.repetition_penalty != 1 or params.frequency_penalty or params.presence_penalty:
            assert torch.equal(ours.counts[slot], theirs.counts[slot])
            assert int(ours.counts[slot].sum()) == len(said)
        if any(len(word) > 1 for word in params.bad_words):
            width = ours.recent.shape[1]
            assert theirs.recent[slot, -width:].tolist() == ours.recent[slot].tolist()


@FEW
@given(
    vocab=st.sampled_from([5, 61, 1000, 5000]),
    spread=st.sampled_from([0.0, 0.5, 4.0]),
    coarse=st.booleans(),
    k=st.integers(0, 70),
    p=st.sampled_from([0.01, 0.3, 0.9, 0.99, 1.0]),
    m=st.sampled_from([0.0, 0.02, 0.5]),
    seed=st.integers(0, 2**32),
)
def test_floors(vocab: int, spread: float, coarse: bool, k: int, p: float, m: float, seed: int) -> None:
    """The same tokens stay, but for one at the edge of the nucleus, where sums round differently."""
    logits = randn(2, 2, vocab, seed=seed, spread=spread)
    logits = logits.round() if coarse else logits
    logits[0, 1, ::3] = -float("inf")
    wanted = SamplingParams(temperature=0.8, top_k=k, top_p=p, min_p=m)
    batch = SamplingBatch.build([wanted, SamplingParams(temperature=1.3, top_p=p)], [0, 0], DEVICE)
    if not batch.truncated:
        return
    ours = floors(logits, batch.temperature, batch.top_k, batch.top_p, batch.min_p)[..., None]
    theirs = sampler.floors(logits, batch)
    kept, expected = logits >= ours, logits >= theirs
    edge = (logits / batch.temperature[:, None, None]).softmax(-1) * (kept != expected)
    values = torch.where(kept != expected, logits, -float("inf")).amax(-1, keepdim=True)
    assert bool(((kept != expected) <= (logits == values)).all()), "one value may differ"
    assert float(edge.amax()) < (1e-4 if not coarse and spread else 1.0)


def test_floors_cut_where_they_must() -> None:
    """Greedy requests, and those that want nothing cut, have none; a floor does not depend on other rows."""
    logits = randn(3, 4, 5000, seed=1)
    params = [SamplingParams(top_p=0.5), SamplingParams(temperature=1.0), SamplingParams(temperature=1.0, top_k=3)]
    batch = SamplingBatch.build(params, [0] * 3, DEVICE)
    found = floors(logits, batch.temperature, batch.top_k, batch.top_p, batch.min_p)
    assert bool((found[:2] == -float("inf")).all())
    assert torch.equal(found[2], logits[2].topk(3, -1).values[:, -1])
    one = SamplingBatch.build(params[2:], [0], DEVICE)
    alone = floors(logits[2:, 1:2], one.temperature, one.top_k, one.top_p, one.min_p)
    assert torch.equal(alone[0], found[2, 1:2])


def test_floors_act_on_the_choice() -> None:
    logits, rng = randn(2, 3, 700, seed=3), random.Random(1)
    tree = moved(random_tree(rng, [3, 2], 3, vocab=700))
    batch = SamplingBatch.build(
        [SamplingParams(temperature=5.0, top_k=2), SamplingParams(temperature=5.0)], [3, 4], DEVICE
    )
    least = floors(logits, batch.temperature, batch.top_k, batch.top_p, batch.min_p)
    lengths, arrivals = torch.tensor([4, 9], device=DEVICE), torch.zeros(8, dtype=torch.int32, device=DEVICE)
    given: Any = (lengths, batch.seed, batch.temperature, arrivals, tree)
    cut = accept.verify(logits.masked_fill(logits < least[..., None], -float("inf")), *given, ahead=1)
    for ours, theirs in zip(accept.verify(logits, *given, ahead=1, floors=least), cut, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize(("shape", "ranking"), [("3x2x1", "drawn"), ("2x2", "best"), ("chain:3", "drawn")])
@pytest.mark.parametrize("many", [4, pytest.param(2000, marks=pytest.mark.cuda)])
def test_recursive_rejection(shape: str, ranking: Ranking, many: int) -> None:
    """Choice for choice the twin's, or both twins' on chains: random drafts of four tokens, which often are accepted. Hot, cold
    and cut off requests together; some have smaller trees."""
    toy = test_rules.Toy.draw(3, (0, 1, 3) if ranking == "best" else (0, 1, 2, 3))
    params = [SamplingParams(temperature=0.9), SamplingParams(), SamplingParams(temperature=1.3, top_p=0.8)]
    sampling = SamplingBatch.build(params * many, [7919 * seed for seed in range(3 * many)], torch.device("cpu"))
    lengths = torch.arange(3 * many) + 5
    roots, before = torch.randint(4, (2, 3 * many), generator=torch.Generator().manual_seed(1)).unbind(0)
    batch: Any = test_rules.Batch(lengths, roots, sampling)
    tree = toy.draft(batch, before, TreeShape.parse(shape), ranking)
    tree = replace(tree, size=torch.where(lengths % 5 == 0, 2, tree.size))
    logits = toy.main[toy.pairs(tree.tokens, tree.parents, before)]
    there: Any = Given([], [], params * many)
    there.lengths, there.sampling = (
        lengths.to(DEVICE),
        SamplingBatch.build(params * many, sampling.seed.tolist(), DEVICE),
    )
    draft = None if tree.draft is None else tree.draft.to(DEVICE)
    ours = DeviceRRSVerifier().verify(replace(moved(tree), draft=draft), logits.to(DEVICE), there)
    rules = [RRSVerifier(), RejectionVerifier()] if shape.startswith("chain") else [RRSVerifier()]
    for rule in rules:
        theirs = rule.verify(tree, logits, batch)
        same = (ours.path.cpu() == theirs.path).all(1) & (ours.counts.cpu() == theirs.counts)
        kept = torch.arange(tree.max_depth + 1) < theirs.counts[:, None]
        same &= (ours.tokens.cpu() == theirs.tokens).where(kept, True).all(1)
        assert int(same.sum()) >= 0.999 * len(same)  # among thousands a rounding may decide
        assert len(theirs.counts.unique()) > 1


@pytest.mark.parametrize("vocab", [20_000, pytest.param(151_936, marks=pytest.mark.cuda)])
def test_recursive_rejection_of_many_tokens(vocab: int) -> None:
    """Several tiles; a request of a batch is what it is alone; where nothing may follow, nothing is accepted or chosen."""
    rng, params = random.Random(2), [SamplingParams(temperature=heat) for heat in (0.7, 1.0, 1.5)]
    tree = moved(random_tree(rng, [5, 5, 5], 5, vocab=vocab))
    draft = randn(3, 5, vocab, seed=1).softmax(-1)
    logits = draft.log() + randn(3, 5, vocab, seed=2, spread=0.5)
    logits[2] = -float("inf")
    given: Any = Given([0, 1, 2], [7, 9, 4], params)
    tree = replace(tree, draft=draft)
    ours, theirs = (rule.verify(tree, logits, given) for rule in (DeviceRRSVerifier(), RRSVerifier()))
    for name in ("path", "tokens", "counts"):
        assert torch.equal(getattr(ours, name)[:2], getattr(theirs, name)[:2]), name
    assert (ours.counts[2], ours.tokens[2, 0]) == (1, 0)
    one: Any = Given([1], [9], params[1:2])
    parts = (x[1:2] for x in (tree.tokens, tree.parents, tree.depths, tree.size))
    alone = DeviceRRSVerifier().verify(DraftTree(*parts, tree.max_depth, draft=draft[1:2]), logits[1:2], one)
    assert torch.equal(alone.tokens[0], ours.tokens[1])


@pytest.mark.parametrize(("vocab", "most"), [(61, 3), (2500, 20), pytest.param(151_936, 64, marks=pytest.mark.cuda)])
def test_logprobs(vocab: int, most: int) -> None:
    """What is asked for is the twin's; rows that want none are left alone."""
    logits = randn(3, 4, vocab, seed=5).round(decimals=2)
    path = torch.tensor([[0, 2, 3], [0, 0, 0], [0, 1, 1]], device=DEVICE)
    tokens = torch.tensor([[3, 60, 7], [9, 9, 9], [0, 1, 2]], device=DEVICE)
    wanted = torch.tensor([most, -1, 0], device=DEVICE)
    ours = emitted_logprobs(logits, path, tokens, wanted, most).cpu()
    result = VerifyResult(path, tokens, torch.tensor([3, 1, 2], device=DEVICE))
    theirs = twin.emitted_logprobs(logits, result, most).cpu()
    for row in (0, 2):
        asked, said = int(wanted[row]), tokens[row].tolist()
        found, expected = (twin.Notes(notes).read(row, said, asked) for notes in (ours, theirs))
        for a, b in zip(found, expected, strict=True):
            assert (a.token, a.rank, len(a.top)) == (b.token, b.rank, asked)
            assert a.logprob == pytest.approx(b.logprob, abs=1e-4)
            assert [value for _, value in a.top] == pytest.approx([value for _, value in b.top], abs=1e-4)
            node = int(path[row, found.index(a)])
            assert all(
                float(logits[row, node, id]) - float(logits[row, node, a.token])
                == pytest.approx(v - a.logprob, abs=1e-3)
                for id, v in a.top
            )
            assert len({id for id, _ in a.top}) == asked
