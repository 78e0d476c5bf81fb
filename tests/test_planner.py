"""Trees that are planned step by step: whatever is decided, the text is plain decoding's and the drafts are the right ones."""

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny import write_llama, write_mtp

from mtp_engine.assemble import costs as costs_module
from mtp_engine.assemble import decode_loop
from mtp_engine.attention.native import NativeAttention
from mtp_engine.attention.torch import TorchAttention
from mtp_engine.cache import HybridKV, Pages
from mtp_engine.config import DEFAULT_MODEL, EngineConfig, SamplingParams, TreeShape
from mtp_engine.drafters import LazyMTPDrafter, MTPDrafter, RootDrafter, TorchLevels, lazy
from mtp_engine.drafters.lazy import Levels
from mtp_engine.drafters.native import NativeLevels
from mtp_engine.engine import Engine
from mtp_engine.errors import EngineError
from mtp_engine.hub import hub
from mtp_engine.kernels.cpu.calls import PackedLinear, Team
from mtp_engine.models import loader
from mtp_engine.models.decoder import Decoder
from mtp_engine.models.mtp import MTPModule
from mtp_engine.models.native import NativeMTP, fuse, fuse_mtp
from mtp_engine.models.weights import Makers
from mtp_engine.protocols import Drafter
from mtp_engine.runtime import kept
from mtp_engine.runtime.loop import DecodeLoop
from mtp_engine.runtime.planner import Costs, Planner
from mtp_engine.tree import DraftTree
from mtp_engine.verifiers import MatchVerifier

CPU = torch.device("cpu")
AUTO = TreeShape.parse("auto")
FEW = settings(max_examples=3, deadline=None, suppress_health_check=list(HealthCheck))
HEADS = {
    "heads": 4,
    "kv_heads": 2,
    "qk_dim": 16,
    "v_dim": 16,
    "rope_dim": 8,
    "rope_theta": 1e4,
    "window": 7,
    "sink": False,
}
KINDS: dict[str, dict[str, Any]] = {
    "chained": {}, "unchained": {"chained": False}, "reused": {"reused": True, "chained": False},
    "post norm": {"hidden": "post_norm", "chained": False},
    "no window": {"attention": {**HEADS, "window": None}},
}  # fmt: skip


class Dice:
    """A TreePlanner that decides at random."""

    def __init__(self, seed: int, plain: float = 0.5) -> None:
        self._random, self._plain, self._most = random.Random(seed), plain, 0

    def drafts(self, slots: Sequence[int]) -> bool:
        self._most = 0
        return self._random.random() > self._plain

    def grown(self, promises: Sequence[Sequence[float]]) -> int:
        keep = self._random.randint(1, len(promises[0]))
        self._most += keep
        return keep

    def deeper(self) -> bool:
        return self._random.random() < 0.6

    def nodes(self) -> int:
        return self._random.randint(1, self._most)

    def late(self, rows: int) -> None:
        pass

    def learn(self, slots: Sequence[int], accepted: Sequence[int]) -> None:
        pass

    def timed(self, nodes: int, batch: int, draft_s: float, verify_s: float) -> None:
        pass

    def release(self, slot: int) -> None:
        pass


class Everything(Dice):
    """Draws nothing and cuts nothing."""

    def __init__(self) -> None:
        super().__init__(0)

    def drafts(self, slots: Sequence[int]) -> bool:
        self._most = 0
        return True

    def grown(self, promises: Sequence[Sequence[float]]) -> int:
        self._most += len(promises[0])
        return len(promises[0])

    def deeper(self) -> bool:
        return True

    def nodes(self) -> int:
        return self._most


@pytest.fixture(scope="module", params=["native", "torch"])
def team(request: pytest.FixtureRequest, library: Path) -> Team | None:
    return Team(1, library) if request.param == "native" else None


@pytest.fixture(scope="module", params=list(KINDS))
def models(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, team: Team | None
) -> tuple[Decoder, MTPModule]:
    folder = tmp_path_factory.mktemp("planned")
    write_llama(folder / "m", head_dim=16, intermediate_size=64)
    write_mtp(folder / "d", **{"attention": HEADS, "intermediate_size": 64, **KINDS[request.param]})
    make = Makers(lambda weight, bias: PackedLinear(team, weight, bias)) if team else Makers()
    model = loader.load_main(folder / "m", torch.float32, CPU, lambda *_: None, make=make)
    module = loader.load_mtp(folder / "d", model, 0, lambda *_: None, make=make)
    return (fuse(model, team), fuse_mtp(module, team)) if team else (model, module)


def new_drafter(module: MTPModule, team: Team | None, planner: Any, shape: TreeShape = AUTO) -> LazyMTPDrafter:
    def levels(module: MTPModule) -> Levels:
        return NativeLevels(cast(NativeMTP, module), team) if team else TorchLevels(module, TorchAttention)

    return LazyMTPDrafter(module, shape, levels, slots=4, planner=planner)


def new_loop(
    model: Decoder, drafter: Drafter, team: Team | None, *, tokens: int = 1200, chunk: int = 16, prefix: int = 0
) -> DecodeLoop:
    layers = [layer.attention for layer in model.config.layers]
    cache = HybridKV(
        layers, Pages(slots=4, tokens=tokens, page_size=16, device=CPU), max_nodes=drafter.max_nodes,
        behind=drafter.depth + 1, dtype=torch.float32,
    )  # fmt: skip
    return decode_loop(
        model, cache, drafter, MatchVerifier(), slots=3, max_context=300, eos_token_ids=(), prefill_chunk=chunk, device=CPU,
        attention=NativeAttention if team else TorchAttention, packs=not team, prefix_bytes=prefix,
    )  # fmt: skip


def prompts_of(seed: int) -> list[list[int]]:
    generator = random.Random(seed)
    return [[generator.randrange(1, 61) for _ in range(generator.randint(1, 40))] for _ in range(2)]


PARAMS = [
    SamplingParams(max_tokens=45), SamplingParams(max_tokens=40, temperature=0.9, seed=5),
    SamplingParams(max_tokens=30, temperature=0.7, seed=6, frequency_penalty=0.4, logprobs=1),
    SamplingParams(max_tokens=25, speculate=False), SamplingParams(max_tokens=35, tree="chain:1"),
]  # fmt: skip


def answers(loop: DecodeLoop, prompts: list[list[int]]) -> list[list[int]]:
    requests = [loop.add(prompt, params) for params in PARAMS for prompt in prompts]
    while loop.requests:
        loop.step()
    assert all(request.finish_reason == "length" for request in requests), [request.error for request in requests]
    return [request.output for request in requests]


@FEW
@given(
    st.integers(0, 10**6),
    st.floats(0.0, 0.95),
    st.sampled_from([(1200, 16, 0), (300, 5, 1 << 20), (1200, 64, 1 << 20)]),
)
def test_whatever_is_planned_the_text_is_plain_decodings(
    models: tuple[Decoder, MTPModule], team: Team | None, seed: int, plain: float, room: tuple[int, int, int]
) -> None:
    """Requests join and leave, share beginnings, and are preempted where there is little room."""
    (model, module), (tokens, chunk, prefix) = models, room
    prompts = prompts_of(seed)
    prompts.append([*prompts[0], 7, 8, 9])
    wanted = answers(new_loop(model, RootDrafter(), team), prompts)
    drafter = new_drafter(module, team, Dice(seed, plain))
    loop = new_loop(model, drafter, team, tokens=tokens, chunk=chunk, prefix=prefix)
    for _ in range(2 if prefix else 1):
        assert answers(loop, prompts) == wanted


@pytest.fixture(params=[None, (5, 20, 2)], ids=["pieces as they are", "small pieces"])
def pieces(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """How many rows a layer runs at a time, has to come at most, and runs beside other requests' rows."""
    if request.param:
        for name, value in zip(("_PIECE", "_PENDING", "_TOGETHER"), request.param, strict=True):
            monkeypatch.setattr(lazy, name, value)


@pytest.mark.usefixtures("pieces")
@FEW
@given(st.integers(0, 10**6), st.floats(0.0, 0.97), st.integers(1, 220))
def test_drafts_do_not_depend_on_what_was_planned_before(
    models: tuple[Decoder, MTPModule], team: Team | None, seed: int, plain: float, steps: int
) -> None:
    """After any history a whole tree is the one that MTPDrafter grows, all of whose layers run in every step, if it has read
    all of it as a prompt."""
    model, module = models
    prompt = prompts_of(seed)[0]
    dice = Dice(seed, plain)
    drafter = new_drafter(module, team, dice)
    loop = new_loop(model, drafter, team)
    request = loop.add(prompt, SamplingParams(max_tokens=250))
    while not request.decoding or len(request.output) < steps:
        loop.step()
    other = MTPDrafter(module, AUTO, slots=4, attention=NativeAttention if team else TorchAttention)
    fresh = new_loop(model, other, team, chunk=300)
    again = fresh.add([*prompt, *request.output], SamplingParams(max_tokens=5))
    while not again.decoding:
        fresh.step()
    trees = []
    for each, work, one in ((drafter, loop.work, request), (other, fresh.work, again)):
        if isinstance(each, LazyMTPDrafter):
            each.planner = Everything()
        batch = work.state.batch(torch.tensor([one.slot]), loop._members[0].sampling, one.length, None)
        with torch.inference_mode():
            trees.append(each.draft(batch))
    assert by_path(trees[0]).keys() == by_path(trees[1]).keys()
    assert by_path(trees[0]) == pytest.approx(by_path(trees[1]), abs=1e-4)


def by_path(tree: DraftTree, b: int = 0) -> dict[tuple[int, ...], float]:
    """Score of each drafted node by the tokens on its way from the root, since drafters number nodes differently."""
    assert tree.scores is not None
    paths: list[tuple[int, ...]] = [()]
    for token, parent in zip(tree.tokens[b, 1:].tolist(), tree.parents[b, 1:].tolist(), strict=True):
        paths.append((*paths[parent], token))
    return dict(zip(paths[1:], tree.scores[b, 1:].tolist(), strict=True))


COSTS = {"draft": [0.0, 1.0, 2.0, 3.0], "verify": {1: 5.0, 2: 5.2, 4: 5.6, 8: 6.4, 16: 9.0}}


def simulate(planner: Planner, promise: float, chance: float, steps: int, costs: Costs, seed: int = 0) -> float:
    """Tokens per second of a request whose drafter promises `promise` for each next token, which is right with `chance`."""
    generator, tokens, seconds = random.Random(seed), 0, 0.0
    for _ in range(steps):
        levels, nodes = 0, 0
        if planner.drafts([0]):
            levels = 1
            while True:
                planner.grown([[promise**levels, 0.05 * promise ** (levels - 1)]])
                if levels == 3 or not planner.deeper():
                    break
                levels += 1
            nodes = planner.nodes()
        accepted = 0
        while accepted < min(levels, nodes) and generator.random() < chance:
            accepted += 1
        planner.learn([0], [accepted])
        spent = costs.draft[levels], costs.verifying(nodes + 1)
        planner.timed(nodes + 1, 1, *spent)
        tokens, seconds = tokens + accepted + 1, seconds + sum(spent)
    return tokens / seconds


@pytest.mark.parametrize(
    ("promise", "chance"), [(0.9, 0.9), (0.6, 0.6), (0.9, 0.2), (0.9, 0.0), (0.3, 0.8), (0.2, 0.1)]
)
def test_it_never_loses_much_and_wins_where_there_is_something_to_win(promise: float, chance: float) -> None:
    """Whether the drafter knows itself or not."""

    def fresh() -> Costs:
        return Costs(list(COSTS["draft"]), dict(COSTS["verify"]))  # type: ignore[call-overload]

    rate, plain = simulate(Planner(fresh()), promise, chance, 600, fresh()), 1 / 5.0
    best = max(
        [plain]
        + [sum(chance**i for i in range(k + 1)) / (fresh().draft[k] + fresh().verifying(k + 1)) for k in (1, 2, 3)]
    )
    assert rate > 0.97 * plain
    assert rate > 0.9 * best


def test_costs_follow_what_steps_take() -> None:
    costs = Costs([0.0, 1.0], {1: 5.0, 4: 6.0})
    assert costs.verifying(2) == pytest.approx(5.0 + 1 / 3)
    assert costs.verifying(7) == pytest.approx(7.0)
    for _ in range(60):
        costs.note(0, 0, 1, 0.0, 10.0)
    assert costs.verifying(1) == pytest.approx(10.0, rel=0.05)
    assert costs.verifying(4) == pytest.approx(12.0, rel=0.3)
    costs.note(0, 0, 1, 0.0, 1e9)  # the machine slept
    assert costs.verifying(1) < 20


@pytest.mark.parametrize("rows", [(1, 2, 3, 4), (2, 3, 4, 5, 7)])
def test_costs_follow_rows_that_cost_more_than_when_they_were_timed(rows: tuple[int, ...]) -> None:
    """The table of a slow minute makes rows look cheap and plain steps dear; trees alone have to show that they are not."""
    costs = Costs([0.0, 0.7], {1: 3.95, 4: 4.4, 8: 5.0})
    generator = random.Random(0)
    for _ in range(100):
        count = generator.choice(rows)
        costs.note(1, 0, count, 0.7, (3.2 + 0.3 * (count - 1)) * generator.gauss(1.0, 0.02))
    assert costs.verifying(1) == pytest.approx(3.2, rel=0.06)
    assert costs.verifying(5) == pytest.approx(4.4, rel=0.06)


def test_where_no_draft_can_pay_nothing_is_drafted() -> None:
    assert Costs([0.0, 2.0, 4.0, 6.0], {1: 1.0, 4: 1.5}).hopeless
    assert not Costs([0.0, 1.0, 2.0, 3.0], {1: 5.0, 4: 5.5}).hopeless


def test_a_collapse_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    planner = Planner(Costs([0.0, 1.0], {1: 5.0, 4: 6.0}))
    for seconds in (5.0, 50.0):
        for _ in range(80):
            planner.drafts([0])
            planner.timed(1, 1, 0.0, seconds)
        assert len(caplog.records) == (seconds > 5.0)
    assert "other processes may need the cores" in caplog.text


def test_costs_are_kept_and_damaged_files_are_not_read(tmp_path: Path) -> None:
    costs, path = Costs([0.0, 1.5], {1: 5.0, 4: 6.0}), tmp_path / "plans" / "a.json"
    assert kept.read(Costs, path) is None
    kept.write(costs, path)
    assert kept.read(Costs, path) == costs
    for damaged in ("", "{", "[]", '{"draft": [1], "verify": {"x": 1}}', '{"draft": [], "verify": {"1": 1, "2": 2}}'):
        path.write_text(damaged)
        assert kept.read(Costs, path) is None
    kept.write(costs, tmp_path / "plans")  # a folder: nothing happens


def test_costs_belong_to_what_was_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of what a draft costs is its head, which another draft vocabulary has of another size."""
    timed = []

    def measure(model: Any, module: MTPModule, *_: Any) -> Costs:
        timed.append(len(module.draft_ids))
        return Costs([0.0, 2.0, 4.0, 6.0], {1: 1.0, 4: 1.5})

    monkeypatch.setattr(costs_module, "cache_root", lambda: tmp_path)
    monkeypatch.setattr(costs_module, "measured_costs", measure)
    for vocab in (1024, 1024, 512):
        Engine.load(DEFAULT_MODEL, EngineConfig(device="cpu", threads=1, draft_vocab=vocab)).close()
    assert timed == [1024, 512]


def test_auto_is_the_default_on_a_cpu_and_for_the_match_rule_only() -> None:
    with Engine.load(hub.NANO, EngineConfig(device="cpu", threads=1)) as engine:
        assert (str(engine.config.tree), engine.config.dtype, engine.config.draft_vocab) == ("auto", "int8", 8192)
        [answer] = engine.generate(["Once upon a time"], SamplingParams(max_tokens=30, ignore_eos=True))
        [plain] = engine.undrafted().generate(["Once upon a time"], SamplingParams(max_tokens=30, ignore_eos=True))
        assert answer.token_ids == plain.token_ids
        assert (engine.loop.work.planner is None) == isinstance(engine.loop.work.drafter, RootDrafter)
    with Engine.load(hub.NANO, EngineConfig(device="cpu", threads=1, verifier="rrs")) as engine:
        assert str(engine.config.tree) == "4x2x2"
    with pytest.raises(EngineError, match="for the match rule"):
        EngineConfig(tree="auto", verifier="rrs")  # type: ignore[arg-type]
    with pytest.raises(EngineError, match="drafts chains"):
        EngineConfig(tree="auto", drafter="ngram")  # type: ignore[arg-type]
