"""Every sampling parameter, at every node: trees say what plain decoding says, and plain decoding what the text says."""

import itertools
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_decode_loop import (
    CPU,
    SLOTS,
    VOCAB,
    Models,
    Scripted,
    decode,
    make_loop,
    prompts,
)
from test_tree import draft_trees, lineage, random_tree
from torch import Tensor

from mtp_engine.config import SamplingParams, TreeShape
from mtp_engine.drafters import MTPDrafter, NgramDrafter, RootDrafter
from mtp_engine.errors import EngineError
from mtp_engine.protocols import Drafter
from mtp_engine.runtime.request import Request, TreeLimits
from mtp_engine.sampling.batch import Batch, SamplingBatch
from mtp_engine.sampling.processors import Processors
from mtp_engine.tree import DraftTree, VerifyResult
from mtp_engine.verifiers import MatchVerifier
from mtp_engine.verifiers.distributions import keep

LONG, EOS = 40, 3


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    return Models(tmp_path_factory.mktemp("processors"))


def drafter(name: str, models: Models, texts: dict[int, list[int]]) -> Drafter:
    if name in ("right", "wrong", "random"):
        return Scripted(name, texts)
    if name == "ngram":
        return NgramDrafter(4, slots=SLOTS, max_context=192, device=CPU)
    return MTPDrafter(models.mtp, TreeShape.parse(name), slots=SLOTS)


def run(models: Models, drafts: Drafter, params: Sequence[SamplingParams], **changes: Any) -> list[Request]:
    return decode(make_loop(models.main, drafts, eos_token_ids=[EOS], **changes), prompts(), params)


# ---- plain decoding against the definitions, one position at a time ------------------------------------------------


def processed(logits: list[float], prompt: list[int], answer: list[int], params: SamplingParams) -> list[float]:
    """vLLM's order, by hand, in fp64."""
    values = list(logits)
    for token in range(len(values)):
        if params.allowed_token_ids is not None and token not in params.allowed_token_ids:
            values[token] = -math.inf
        values[token] += params.logit_bias.get(token, 0.0)
    for word in params.bad_words:
        *before, last = word
        if not before or answer[-len(before) :] == before:
            values[last] = -math.inf
    if len(answer) < params.min_tokens:
        for token in (*params.stop_token_ids, EOS):
            values[token] = -math.inf
    for token, value in enumerate(values):
        count = answer.count(token)
        if count or token in prompt:
            value = value / params.repetition_penalty if value > 0 else value * params.repetition_penalty
        values[token] = value - params.frequency_penalty * count - params.presence_penalty * (count > 0)
    return values


def bad_words(draw: Any) -> tuple[tuple[int, ...], ...]:
    token = st.integers(0, VOCAB - 1)
    return tuple(draw(st.lists(st.lists(token, min_size=1, max_size=3).map(tuple), max_size=60)))


@st.composite
def parameters(draw: Any, temperature: bool = True) -> SamplingParams:
    """Random combinations, each parameter off half the time."""

    def maybe(strategy: Any, off: Any) -> Any:
        return draw(strategy) if draw(st.booleans()) else off

    token = st.integers(0, VOCAB - 1)
    warm = {
        "temperature": maybe(st.floats(0.3, 2), 0.0),
        "top_k": maybe(st.integers(1, 30), 0),
        "top_p": maybe(st.floats(0.3, 0.99), 1.0),
        "min_p": maybe(st.floats(0.01, 0.3), 0.0),
    }
    return SamplingParams(
        max_tokens=LONG,
        seed=draw(st.integers(0, 2**63 - 1)),
        repetition_penalty=maybe(st.floats(0.5, 2), 1.0),
        frequency_penalty=maybe(st.floats(-1, 2), 0.0),
        presence_penalty=maybe(st.floats(-1, 2), 0.0),
        logit_bias=maybe(st.dictionaries(token, st.floats(-8, 8), max_size=5), {}),
        allowed_token_ids=maybe(st.sets(token, min_size=VOCAB // 2).map(sorted).map(tuple), None),
        bad_words=bad_words(draw) if draw(st.booleans()) else (),
        min_tokens=maybe(st.integers(0, LONG), 0),
        stop_token_ids=maybe(st.lists(token, max_size=3).map(tuple), ()),
        **(warm if temperature else {}),
    )


@dataclass
class Step:
    """As much of a batch as the processors look at."""

    slots: Tensor
    lengths: Tensor
    sampling: SamplingBatch


@settings(max_examples=80, deadline=None)
@given(first=parameters(False), second=parameters(False), nodes=st.integers(1, 9), seed=st.integers(0, 2**32))
def test_every_node_is_processed_by_definition(
    first: SamplingParams, second: SamplingParams, nodes: int, seed: int
) -> None:
    """Two requests in slots that others have used, answers that grow by several tokens, trees of any shape."""
    rng = random.Random(seed)
    processors = Processors(slots=3, vocab=VOCAB, eos_token_ids=[EOS], device=CPU)
    texts: list[tuple[int, list[int], list[int], SamplingParams]] = []
    for slot, params in ((2, second), (1, first), (2, second)):
        prompt = [rng.randrange(VOCAB) for _ in range(rng.randrange(1, 9))]
        texts = [text for text in texts if text[0] != slot] + [(slot, prompt, [], params)]
        processors.start(slot, prompt, params)
        for _ in range(4):
            check_step(processors, texts, nodes, rng)


def check_step(processors: Processors, texts: Sequence[tuple[int, list[int], list[int], SamplingParams]], nodes: int,
               rng: random.Random) -> None:  # fmt: skip
    tree = random_tree(rng, [rng.randint(1, nodes) for _ in texts], nodes, vocab=VOCAB)
    tree.tokens[:, 0] = torch.tensor([(answer or prompt)[-1] for _, prompt, answer, _ in texts])
    logits = torch.tensor([[[rng.gauss(0, 3) for _ in range(VOCAB)] for _ in range(nodes)] for _ in texts])
    lengths = torch.tensor([len(prompt) + len(answer) - 1 for _, prompt, answer, _ in texts])
    sampling = SamplingBatch.build([params for *_, params in texts], [0] * len(texts), CPU)
    batch: Any = Step(torch.tensor([slot for slot, *_ in texts]), lengths, sampling)
    found = processors.apply(tree, logits, batch)
    last = []
    for b, (_, prompt, answer, params) in enumerate(texts):
        last.append(rng.randrange(int(tree.size[b])))
        for node in range(int(tree.size[b])):
            path = tokens_on(tree, b, node)[1:]
            wanted = torch.tensor(processed(logits[b, node].tolist(), prompt, answer + path, params))
            torch.testing.assert_close(found[b, node], wanted.float(), rtol=1e-5, atol=1e-5)
    result = keep(tree, torch.tensor(last), torch.tensor([rng.randrange(VOCAB) for _ in texts]))
    processors.observe(batch, result)
    for b, (_, _, answer, _) in enumerate(texts):
        answer += result.tokens[b, : int(result.counts[b])].tolist()


# ---- the loop: any drafter says what plain decoding says -----------------------------------------------------------


@pytest.mark.parametrize("name", ["4x2x2", "tree:16", "right", "random", "ngram"])
@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(params=st.lists(parameters(), min_size=SLOTS, max_size=SLOTS))
def test_any_parameters_give_the_plain_tokens(models: Models, name: str, params: list[SamplingParams]) -> None:
    params = [replace(each, seed=70 + index) for index, each in enumerate(params)]
    plain = run(models, RootDrafter(), params)
    texts = {request.seed: request.prompt + request.output for request in plain}
    drafted = run(models, drafter(name, models, texts), params)
    assert [request.output for request in drafted] == [request.output for request in plain]
    assert [request.finish_reason for request in drafted] == [request.finish_reason for request in plain]


SETTINGS: dict[str, dict[str, Any]] = {
    "repetition_penalty": {"repetition_penalty": 1.5},
    "frequency_penalty": {"frequency_penalty": 1.5},
    "presence_penalty": {"presence_penalty": 2.0},
    "logit_bias": {"logit_bias": {5: 6.0, 9: 6.0}},
    "allowed_token_ids": {"allowed_token_ids": tuple(range(1, VOCAB, 2))},
    "top_k": {"top_k": 3},
    "top_p": {"top_p": 0.5},
    "min_p": {"min_p": 0.2},
    "temperature": {"temperature": 0.5},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_a_parameter_makes_a_difference(models: Models, name: str) -> None:
    """At temperature 1: the tokens differ from those without it, so that the equality above says something."""
    off = [SamplingParams(max_tokens=LONG, temperature=1.0, seed=70 + index) for index in range(SLOTS)]
    on = [replace(params, **SETTINGS[name]) for params in off]
    outputs = [[r.output for r in run(models, RootDrafter(), params, slots=SLOTS)] for params in (off, on)]
    assert sum(a != b for a, b in zip(*outputs, strict=True)) >= SLOTS - 1


def test_bad_words_and_min_tokens_act(models: Models) -> None:
    [plain, *_] = run(models, RootDrafter(), [SamplingParams(max_tokens=LONG, ignore_eos=True)] * SLOTS)
    word = tuple(plain.output[10:13])
    params = SamplingParams(max_tokens=LONG, ignore_eos=True, bad_words=(word,))
    [other, *_] = run(models, drafter("4x2x2", models, {}), [params] * SLOTS)
    at = next(i for i in range(len(other.output)) if plain.output[i] != other.output[i])
    assert tuple(plain.output[at - 2 : at + 1]) == word
    assert all(tuple(other.output[i : i + 3]) != word for i in range(LONG))
    stop = SamplingParams(max_tokens=LONG, stop_token_ids=(plain.output[4],), min_tokens=9)
    [late, *_] = run(models, drafter("4x2x2", models, {}), [stop] * SLOTS)
    assert stop.stop_token_ids[0] not in late.output[:9]


def test_slots_do_not_inherit(models: Models) -> None:
    """A request without wishes, in a slot that had some, beside one that has."""
    loop = make_loop(models.main, RootDrafter(), slots=2)
    plain = SamplingParams(max_tokens=20, temperature=1.0, seed=5)
    wishes = replace(plain, frequency_penalty=2.0, logit_bias={7: 5.0}, bad_words=((4, 5), (6,)), min_tokens=20)
    [alone] = decode(loop, prompts()[2:3], [plain])
    decode(loop, prompts()[:2], [wishes, wishes])
    for pair in ([plain, wishes], [wishes, plain]):
        found = decode(loop, [prompts()[2]] * 2, pair)
        assert found[pair.index(plain)].output == alone.output
        assert found[pair.index(wishes)].output != alone.output


def test_a_slot_forgets_how_long_prompts_were() -> None:
    """A short prompt in a slot that had long ones, beside a request with min_tokens: nothing is too early in it."""
    processors = Processors(slots=2, vocab=VOCAB, eos_token_ids=[EOS], device=CPU)
    late, plain = SamplingParams(min_tokens=9), SamplingParams()
    for prompt, params in (([1] * 60, late), ([1] * 60, plain), ([1], plain)):
        processors.start(0, prompt, params)
    processors.start(1, [1], late)
    sampling = SamplingBatch.build([plain, late], [0, 0], CPU)
    batch: Any = Step(torch.tensor([0, 1]), torch.tensor([0, 0]), sampling)
    found = processors.apply(DraftTree.root(torch.tensor([1, 1])), torch.zeros(2, 1, VOCAB), batch)
    assert found[:, 0, EOS].tolist() == [0, -math.inf]


@pytest.mark.parametrize(
    "wrong", [{"logit_bias": {VOCAB: 1.0}}, {"bad_words": ("text",)}, {"allowed_token_ids": (-1,)}]
)
def test_what_cannot_be_done_is_refused(models: Models, wrong: dict[str, Any]) -> None:
    loop = make_loop(models.main, RootDrafter())
    with pytest.raises(EngineError):
        loop.add([1, 2], SamplingParams(**wrong))
    assert not loop.requests
    assert not loop.requests


# ---- logprobs ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["4x2x2", "random"])
def test_logprobs_are_those_of_the_raw_model(models: Models, name: str) -> None:
    """The same with and without drafting, and those of a forward pass over the text."""
    params = [
        SamplingParams(max_tokens=LONG, temperature=1.2, seed=70 + i, frequency_penalty=0.5, logprobs=i, top_k=9)
        for i in range(SLOTS)
    ]
    plain = run(models, RootDrafter(), params)
    texts = {request.seed: request.prompt + request.output for request in plain}
    for mine, theirs in zip(run(models, drafter(name, models, texts), params), plain, strict=True):
        assert [each.token for each in mine.logprobs] == mine.output == theirs.output
        for a, b in zip(mine.logprobs, theirs.logprobs, strict=True):
            assert (a.token, a.rank, len(a.top)) == (b.token, b.rank, mine.params.logprobs)
            assert a.logprob == pytest.approx(b.logprob, abs=1e-4)
            assert [token for token, _ in a.top] == [token for token, _ in b.top]
            assert [value for _, value in a.top] == pytest.approx([value for _, value in b.top], abs=1e-4)
            assert all(x >= y for (_, x), (_, y) in itertools.pairwise(a.top))
            if 0 < a.rank <= len(a.top):
                assert a.top[a.rank - 1][1] == pytest.approx(a.logprob)
    assert any(each.rank > 1 for request in plain for each in request.logprobs)


# ---- trees of single requests --------------------------------------------------------------------------------------


def test_requests_choose_their_own_tree(models: Models) -> None:
    base = SamplingParams(max_tokens=LONG, temperature=1.0, ignore_eos=True)
    plain = run(models, RootDrafter(), [replace(base, seed=70 + i) for i in range(SLOTS)])
    wanted = ({}, {"speculate": False}, {"tree": TreeShape.parse("chain:2")}, {"tree": TreeShape.parse("tree:5")})
    params = [replace(base, seed=70 + i, **each) for i, each in enumerate(wanted)]
    found = run(models, drafter("4x2x2", models, {}), params)
    assert [request.output for request in found] == [request.output for request in plain]
    per_step = [request.stats.nodes / request.stats.steps for request in found]
    assert per_step[0] > 27
    assert per_step[1:] == [1, 3, 6]
    assert len(found[1].stats.proposed_per_depth) == 0
    assert len(found[2].stats.proposed_per_depth) == 2


@settings(max_examples=100, deadline=None)
@given(tree=draft_trees(vocab=50), seed=st.integers(0, 2**32), data=st.data())
def test_limits_keep_a_subtree(tree: DraftTree, seed: int, data: st.DataObject) -> None:
    """What is left is the first children, then the best nodes, with the same tokens and paths."""
    shapes = [data.draw(st.sampled_from(["", "none", "2x1", "3", "chain:2", "tree:1", "tree:3"])) for _ in tree.size]
    params = [
        SamplingParams(speculate=s != "none", tree=TreeShape.parse(s) if s not in ("", "none") else None)
        for s in shapes
    ]
    limits = TreeLimits.build(params, CPU)
    left = limits.apply(tree) if limits else tree
    if limits:
        assert left.nodes == left.tokens.shape[1] == min(tree.nodes, limits.most)
        assert int(torch.where(left.real, left.depths, 0).max()) <= left.max_depth <= tree.max_depth
        assert limits.most == max(1 if s == "none" else 64 if s == "" else TreeShape.parse(s).max_nodes for s in shapes)
    for b, (wanted, p) in enumerate(zip(shapes, params, strict=True)):
        before, after = ({tuple(tokens_on(t, b, i)) for i in range(int(t.size[b]))} for t in (tree, left))
        assert after <= before
        assert all(path[:-1] in after for path in after if len(path) > 1)
        if wanted == "":
            assert after == before
        elif p.tree is None:
            assert len(after) == 1
        else:
            assert len(after) <= p.tree.max_nodes
            if p.tree.widths:
                assert after == {path for path in before if fits(tree, b, path, p.tree.widths)}
            else:
                assert len(after) == min(len(before), p.tree.max_nodes)


@dataclass
class Recording:
    """MatchVerifier, and the largest trees it was given: their nodes and depths."""

    seen: set[tuple[int, int]]
    picks = False

    def verify(self, tree: DraftTree, logits: Tensor, batch: Batch) -> VerifyResult:
        assert logits.shape[1] == tree.nodes
        self.seen.add((tree.nodes, tree.max_depth))
        return MatchVerifier().verify(tree, logits, batch)


@pytest.mark.parametrize(
    ("given", "nodes", "depth"),
    [({"speculate": False}, 1, 0), ({"tree": "tree:2"}, 3, 2), ({"tree": "2x1"}, 5, 3), ({}, 29, 3)],
)
def test_a_batch_of_small_trees_verifies_no_padding(models: Models, given: Any, nodes: int, depth: int) -> None:
    """The main model sees as many nodes per request as some request may have."""
    asked = {**given, "tree": TreeShape.parse(given["tree"])} if "tree" in given else given
    params = [SamplingParams(max_tokens=9, temperature=1.0, seed=70 + i, **asked) for i in range(SLOTS)]
    loop = make_loop(models.main, drafter("4x2x2", models, {}), eos_token_ids=[EOS])
    loop.work.verifier = recording = Recording(set())
    outputs = [request.output for request in decode(loop, prompts(), params)]
    assert recording.seen == {(nodes, depth)}
    assert outputs == [request.output for request in run(models, RootDrafter(), params)]


def tokens_on(tree: DraftTree, b: int, node: int) -> list[int]:
    return [int(tree.tokens[b, i]) for i in lineage(tree.parents[b].tolist(), node)[::-1]]


def fits(tree: DraftTree, b: int, path: tuple[int, ...], widths: tuple[int, ...]) -> bool:
    """Whether every step of the path is among the first widths[d] children."""
    node = 0
    for depth, token in enumerate(path[1:]):
        children = [i for i in range(1, int(tree.size[b])) if int(tree.parents[b, i]) == node]
        names = [int(tree.tokens[b, i]) for i in children]
        if depth >= len(widths) or token not in names[: widths[depth]]:
            return False
        node = children[names.index(token)]
    return True
