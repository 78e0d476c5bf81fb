"""The kit passes a right engine, and fails each of nine planted bugs."""

import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from scipy import stats
from test_decode_loop import CPU, make_loop
from test_rules import HORIZON, Toy
from test_stops import Letters
from tiny import write_llama, write_mtp
from torch import Tensor

from mtp_engine import conformance as kit
from mtp_engine.attention.rows import StepRows
from mtp_engine.cli.main import main
from mtp_engine.config import EngineConfig, SamplingParams, TreeShape
from mtp_engine.conformance.distribution import chi_square_p, detectable
from mtp_engine.conformance.engines import ours, plain
from mtp_engine.drafters import MTPDrafter, Ranking, RootDrafter, TorchDraftOps
from mtp_engine.engine import Engine
from mtp_engine.models import loader
from mtp_engine.models.decoder import Decoder
from mtp_engine.models.make_tiny import make_tiny
from mtp_engine.protocols import Drafter, Verifier
from mtp_engine.runtime.loop import DecodeLoop
from mtp_engine.runtime.step import ModelStep
from mtp_engine.sampling import sampler
from mtp_engine.sampling.batch import Batch
from mtp_engine.sampling.processors import Processors
from mtp_engine.sampling.stops import Ends
from mtp_engine.tree import DraftTree, VerifyResult
from mtp_engine.verifiers import BlockVerifier, MatchVerifier, RRSVerifier, TraversalVerifier, match, rrs

SLOTS, VOCAB = 4, 8
PROMPTS = [tuple(random.Random(seed).choices(range(VOCAB), k=5 + seed)) for seed in range(4)]


class Models:
    """Eight tokens only, so that even random MTP layers are often right and trees are accepted to their leaves."""

    def __init__(self, root: Path) -> None:
        main = write_llama(root / "main", vocab_size=VOCAB)
        self.main = loader.load_main(main, torch.float32, CPU, lambda *_: None)
        self.mtp = loader.load_mtp(write_mtp(root / "mtp"), self.main, 0, lambda *_: None)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    return Models(tmp_path_factory.mktemp("conformance"))


def mtp(models: Models, shape: str, ranking: Ranking = "noise") -> MTPDrafter:
    return MTPDrafter(models.mtp, TreeShape.parse(shape), slots=SLOTS, ops=TorchDraftOps(ranking))


def engine(models: Models, drafter: Drafter, rule: Verifier | None = None) -> kit.Generate:
    """The tiny loop as the kit's callable; prompts join as slots come free."""
    loop = make_loop(models.main, drafter, text=Letters, prefix=40)
    loop.work.verifier = rule or MatchVerifier()
    return lambda cases: answers(loop, cases)


def answers(loop: DecodeLoop, cases: Sequence[kit.Case]) -> list[kit.Sample]:
    waiting, running, steps = list(enumerate(cases))[::-1], {}, {}
    done: list[Any] = [None] * len(cases)
    while waiting or running:
        while waiting and loop.scheduler.has_room:
            number, case = waiting.pop()
            request = loop.add(case.prompt, case.params)
            running[request], steps[request] = number, []
        for out in loop.step():
            request = out.request
            steps[request].append(len(out.tokens))
            if request.finish_reason:
                done[running.pop(request)] = kit.Sample(
                    tuple(request.output),
                    request.text,
                    request.finish_reason,
                    tuple(request.logprobs),
                    tuple(steps[request]),
                )
    return done


@pytest.fixture(scope="module")
def baseline(models: Models) -> kit.Generate:
    """Says a case once: it does not draft, no bug is planted while it answers, and the tests ask it the same."""
    asked, known = engine(models, RootDrafter()), dict[str, kit.Sample]()

    def remembered(cases: Sequence[kit.Case]) -> list[kit.Sample]:
        new = {repr(case): case for case in cases if repr(case) not in known}
        known.update(zip(new, asked(list(new.values())), strict=True))
        return [known[repr(case)] for case in cases]

    return remembered


def suite(baseline: kit.Generate, candidate: kit.Generate, **changes: Any) -> list[kit.Verdict]:
    wanted = {"depths": 2, "tokens": 12, "draws": 60, "slack": 0.02, **changes}
    return list(kit.run_suite(baseline, candidate, PROMPTS, **wanted))


def failed(verdicts: Sequence[kit.Verdict]) -> list[str]:
    return [verdict.check for verdict in verdicts if verdict.passed is False]


def test_a_right_engine_passes(models: Models, baseline: kit.Generate) -> None:
    verdicts = suite(baseline, engine(models, mtp(models, "4x2x2")))
    assert all(verdict.passed for verdict in verdicts), "\n".join(map(str, verdicts))
    assert len(verdicts) == 17


@pytest.mark.parametrize(("rule", "shape"), [(BlockVerifier, "chain:3"), (TraversalVerifier, "3x2")])
def test_a_rule_that_keeps_the_distribution_passes(
    models: Models, baseline: kit.Generate, rule: Callable[[], Verifier], shape: str
) -> None:
    verdicts = suite(baseline, engine(models, mtp(models, shape, "drawn"), rule()), exact=False, depths=0)
    assert not failed(verdicts), "\n".join(map(str, verdicts))


# ---- planted bugs --------------------------------------------------------------------------------------------------


def penalty_once_per_window(patch: pytest.MonkeyPatch) -> None:
    """Every node is penalised for the committed answer only."""
    right = Processors._penalise

    def wrong(self: Processors, tree: DraftTree, logits: Tensor, slots: Tensor) -> Tensor:
        root = DraftTree.root(tree.tokens[:, 0])
        return torch.cat([right(self, root, row, slots) for row in logits.split(1, 1)], 1)

    patch.setattr(Processors, "_penalise", wrong)


def top_p_at_the_root_only(patch: pytest.MonkeyPatch) -> None:
    right = sampler.truncate
    patch.setattr(sampler, "truncate", lambda x, batch: torch.cat([right(x[:, :1], batch), x[:, 1:]], 1))


def noise_used_again_at_other_positions(patch: pytest.MonkeyPatch) -> None:
    right = match.choose
    patch.setattr(match, "choose", lambda x, depths, *rest: right(x, torch.zeros_like(depths), *rest))


def bonus_from_the_wrong_row(patch: pytest.MonkeyPatch) -> None:
    """The main model's own token is taken from the row before the last accepted one."""
    right = match.longest_match

    def wrong(tree: DraftTree, choices: Tensor) -> VerifyResult:
        result = right(tree, choices)
        before = result.path.gather(1, (result.counts[:, None] - 2).clamp(min=0))
        return replace(result, tokens=result.tokens.scatter(1, result.counts[:, None] - 1, choices.gather(1, before)))

    patch.setattr(match, "longest_match", wrong)


def stale_mtp_rows(patch: pytest.MonkeyPatch) -> None:
    """Of an accepted path only the last token's rows are computed anew; the others stay as they were drafted."""

    def wrong(self: MTPDrafter, batch: Batch, result: VerifyResult, hidden: Tensor) -> None:
        last = result.counts[:, None] - 1
        self._tokens[batch.slots, :1] = result.tokens.gather(1, last)
        node = result.path.gather(1, last)
        self._hidden[batch.slots, :1] = hidden.gather(1, node[..., None].expand(-1, 1, hidden.shape[2]))
        self._counts[batch.slots] = 1

    patch.setattr(MTPDrafter, "observe", wrong)


def stop_within_a_step_only(patch: pytest.MonkeyPatch) -> None:
    right = Ends.cut

    def wrong(self: Ends, tokens: Sequence[int]) -> Any:
        if self.strings is not None:
            self.strings._first = len(self.strings.text)
        return right(self, tokens)

    patch.setattr(Ends, "cut", wrong)


def rope_by_node_index(patch: pytest.MonkeyPatch) -> None:
    right = ModelStep.rows

    def wrong(self: ModelStep, batch: Any, tree: DraftTree) -> StepRows:
        return replace(right(self, batch, tree), positions=batch.lengths[:, None] + torch.arange(tree.nodes))

    patch.setattr(ModelStep, "rows", wrong)


Plant = Callable[[pytest.MonkeyPatch], None]
BUGS: dict[Plant, set[str]] = {
    penalty_once_per_window: {f"honesty of {name}_penalty" for name in ("frequency", "presence", "repetition")},
    top_p_at_the_root_only: {f"honesty of {name}" for name in ("top_p", "top_k", "min_p")},
    noise_used_again_at_other_positions: {"equality"},
    bonus_from_the_wrong_row: {"equality"},
    stale_mtp_rows: {"resume"},
    stop_within_a_step_only: {"stops"},
    rope_by_node_index: {"equality", "logprobs"},
}


@pytest.mark.parametrize("plant", BUGS, ids=lambda plant: plant.__name__)
def test_a_planted_bug_is_caught(
    models: Models, baseline: kit.Generate, monkeypatch: pytest.MonkeyPatch, plant: Plant
) -> None:
    """By the check that is about it. The baseline does not draft, and answers before the bug is there."""
    candidate = engine(models, mtp(models, "4x2x2"))

    def buggy(cases: Sequence[kit.Case]) -> list[kit.Sample]:
        with monkeypatch.context() as patch:
            plant(patch)
            return candidate(cases)

    verdicts = suite(baseline, buggy)
    assert BUGS[plant] <= set(failed(verdicts)), "\n".join(map(str, verdicts))
    if plant in (top_p_at_the_root_only, stale_mtp_rows, stop_within_a_step_only, penalty_once_per_window):
        assert BUGS[plant] == set(failed(verdicts)), "nothing else is blamed"


def test_the_eighth_bug_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """A residual that is not renormalised. No rule with a residual promises a text, so it takes the distribution."""
    toy, params = Toy.draw(3), SamplingParams(temperature=0.9)
    texts = torch.cartesian_prod(*[torch.arange(4)] * HORIZON).tolist()
    exact = {tuple(text): p for text, p in zip(texts, toy.law(0.9).tolist(), strict=True)}

    def generate(cases: Sequence[kit.Case]) -> list[kit.Sample]:
        seeds = torch.tensor([case.params.seed for case in cases])
        found, _ = toy.run(RRSVerifier(), TreeShape.parse("3x2"), "drawn", params, seeds)
        return [kit.Sample(tuple(text)) for text in found.tolist()]

    case = kit.Case((0, 1), params)
    assert kit.fits(generate, case, exact, draws=30_000, horizon=HORIZON).passed
    monkeypatch.setattr(rrs, "residual", rrs.rest)
    assert not kit.fits(generate, case, exact, draws=30_000, horizon=HORIZON).passed


class WrongInWideSteps:
    """A model that errs in every step of several rows per request, in all of its rows alike, and in no other."""

    def __init__(self, model: Decoder) -> None:
        self._model = model

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def forward(self, tokens: Tensor, *rest: Any) -> Tensor:
        hidden = self._model.forward(tokens, *rest)
        return hidden.flip(-1) if tokens.shape[1] > 1 else hidden


def test_the_ninth_bug_is_caught(tmp_path: Path) -> None:
    """A forward that is wrong wherever a step has several rows. The baseline used to share the loop, whose steps had the
    tree's rows even for requests that do not draft: it said the same wrong thing, and the kit passed."""
    config = EngineConfig(tree=TreeShape.parse("2x2"), max_context=64, max_batch=4, threads=1, prefill_chunk=1)
    engine = Engine.load(str(make_tiny(tmp_path / "model")), config)
    params = SamplingParams(max_tokens=12, seed=0, ignore_eos=True)
    cases = [kit.Case(prompt, replace(params, temperature=t)) for prompt in PROMPTS for t in (0.0, 0.8)]

    assert kit.equality(plain(engine), ours(engine), cases).passed
    engine.model = engine.loop.work.model = WrongInWideSteps(engine.model)  # type: ignore[assignment]
    assert kit.equality(plain(engine), ours(engine), cases).passed is False
    assert kit.logprobs(plain(engine), ours(engine), cases).passed is None, "no token in common, so nothing compared"


def test_the_baseline_has_one_row_per_request(tmp_path: Path) -> None:
    """And a loop of its own, so that nothing of the engine under test is in it but the weights."""
    config = EngineConfig(tree=TreeShape.parse("chain:3"), verifier="block", max_context=64, max_batch=3, threads=1)
    engine = Engine.load(str(make_tiny(tmp_path / "model")), config)
    undrafted = engine.undrafted()
    assert undrafted.loop is not engine.loop
    assert undrafted.loop.work.cache is not engine.loop.work.cache
    assert undrafted.loop.work.drafter.max_nodes == 1
    assert (undrafted.config.drafter, undrafted.config.tree, undrafted.config.verifier) == ("root", None, "match")
    assert undrafted.config.max_batch == 3
    samples = plain(engine)([kit.Case(prompt, SamplingParams(max_tokens=5, ignore_eos=True)) for prompt in PROMPTS])
    assert [sample.steps for sample in samples] == [(1,) * 5] * len(PROMPTS)


# ---- the statistics ------------------------------------------------------------------------------------------------


def test_chi_square_is_scipys() -> None:
    for freedom in (1, 7, 400):
        for x in (0.1 * freedom, freedom, 2.0 * freedom):
            assert chi_square_p(x, freedom) == pytest.approx(stats.chi2.sf(x, freedom), rel=1e-6)


@pytest.mark.parametrize(("freedom", "weight"), [(9, 1000.0), (63, 500.0), (300, 20000.0)])
def test_the_stated_power_is_right(freedom: int, weight: float) -> None:
    shift = weight * (2 * detectable(freedom, weight, 1e-4)) ** 2
    power = stats.ncx2.sf(stats.chi2.isf(1e-4, freedom), freedom, shift)
    assert 0.85 < power < 0.95


def test_an_exact_distribution_is_tested_with_its_power() -> None:
    """Draws from known distributions: the right one passes nearly always, one at the stated distance hardly ever does."""
    rng = random.Random(1)
    exact = {(token,): 1 / 16 for token in range(16)}
    far = detectable(15, 1000, 1e-2)
    tilted = [1 / 16 * (1 + 2 * far * (-1) ** token) for token in range(16)]

    def passes(weights: list[float]) -> int:
        engine = lambda cases: [kit.Sample((rng.choices(range(16), weights)[0],)) for _ in cases]  # noqa: E731
        case = kit.Case((1,), SamplingParams())
        return sum(bool(kit.fits(engine, case, exact, draws=1000, horizon=1, level=1e-2).passed) for _ in range(20))

    assert passes([1 / 16] * 16) >= 18
    assert passes(tilted) <= 6


def test_an_engine_that_refuses_is_not_blamed(baseline: kit.Generate) -> None:
    def honest(cases: Sequence[kit.Case]) -> list[kit.Sample]:
        if any(case.params.min_p for case in cases):
            raise kit.Unsupported("min_p is not supported")
        return baseline(cases)

    verdicts = {verdict.check: verdict for verdict in suite(baseline, honest, depths=0)}
    assert verdicts["honesty of min_p"].passed is None
    assert "not supported" in str(verdicts["honesty of min_p"])


def test_a_parameter_that_is_ignored_is_found(baseline: kit.Generate) -> None:
    def deaf(cases: Sequence[kit.Case]) -> list[kit.Sample]:
        return baseline([replace(case, params=replace(case.params, min_p=0.0, seed=1)) for case in cases])

    assert {"honesty of min_p", "seeds"} <= set(failed(suite(baseline, deaf, depths=0)))


@pytest.mark.model
def test_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    result = CliRunner().invoke(main, ["conformance", "--prompts", "1", "--draws", "20", "--engine", "nobody"])
    assert result.exit_code == 2
    assert "nobody" in result.stderr
