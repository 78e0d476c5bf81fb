"""Steps of several shapes, chosen one by one: whatever is chosen, the text is plain decoding's and the drafts are the right
ones; and what is chosen is what pays."""

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from test_decode_loop import CONTEXT, SLOTS, Models, prompts
from test_graph_runner import KINDS, loop_of, params, solo, waves

from mtp_engine.config import SamplingParams, TreeShape
from mtp_engine.drafters import MTPDrafter, RootDrafter
from mtp_engine.models.mtp import MTPModule
from mtp_engine.runtime import kept
from mtp_engine.runtime.cuda_graph import bucket
from mtp_engine.runtime.loop import DecodeLoop
from mtp_engine.runtime.request import Landed, Request
from mtp_engine.runtime.shapes import READING, Offer, ShapeCosts, ShapePlanner, Watched, likely
from mtp_engine.runtime.timing import time_shapes
from mtp_engine.sampling.batch import Batch, Plan
from mtp_engine.tree import DraftTree

NAMES = ("chain:1", "chain:2", "tree:5")
SHAPES = [TreeShape.parse(name) for name in NAMES]
ROOM = 9


def planner_of(shapes: Sequence[TreeShape] = SHAPES, depth: int = 2, room: int = ROOM) -> ShapePlanner:
    offers = [Offer(shape, shape.max_nodes) for shape in shapes]
    return ShapePlanner(offers, depth=depth, room=room, costs=ShapeCosts(), bucket=bucket)


class Dice:
    """A StepPlanner that decides at random, but for what must be."""

    def __init__(self, seed: int, plain: float = 0.5, inner: ShapePlanner | None = None) -> None:
        self._inner, self._random, self._plain = inner or planner_of(), random.Random(seed), plain
        self._pace = random.Random(seed)
        self.chosen: list[str] = []

    def plans(self, batch: int) -> list[Plan]:
        return self._inner.plans(batch)

    def choose(self, slots: Sequence[int], bound: int, *, limited: bool, speculates: bool) -> Plan:
        plain, *others = self.plans(len(slots))
        if speculates and not limited:
            self._inner.forced[:] = [plain if self._random.random() < self._plain else self._random.choice(others)]
        plan = self._inner.choose(slots, bound, limited=limited, speculates=speculates)
        self._inner.forced.clear()
        self.chosen.append(str(plan))
        return plan

    def learn(self, plan: Plan, slots: Sequence[int], accepted: Sequence[int]) -> None:
        assert plan.shape or not any(accepted)
        self._inner.learn(plan, slots, accepted)

    def timed(self, plan: Plan, batch: int, bound: int, step_s: float, host_s: float | None) -> None:
        assert step_s > 0

    def rows(self) -> int | None:
        return self._pace.choice([1, 3, 40, None])

    def release(self, slot: int) -> None:
        self._inner.release(slot)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    return Models(tmp_path_factory.mktemp("shapes"))


@pytest.fixture(scope="module")
def alone(models: Models) -> list[Request]:
    return [solo(loop_of(models, RootDrafter(), in_flight=0), number, each) for number, each in enumerate(params())]


def drafter_of(module: MTPModule, planner: Any, shapes: Sequence[TreeShape] = SHAPES) -> MTPDrafter:
    return MTPDrafter(module, shapes[1], slots=SLOTS + 1, others=[shapes[0], *shapes[2:]], late=ROOM, planner=planner)


@pytest.mark.parametrize(("seed", "in_flight", "plain"), [(1, 1, 0.5), (2, 2, 0.3), (3, 3, 0.5)])
def test_all_kinds_together_say_what_each_says_alone(
    models: Models, alone: list[Request], seed: int, in_flight: int, plain: float, caplog: pytest.LogCaptureFixture
) -> None:
    """Shapes change from step to step while requests of all kinds join, leave, are dropped and preempted; nothing is recorded
    late, and all kinds of plans are used."""
    dice = Dice(seed, plain)
    loop = loop_of(models, drafter_of(models.mtp, dice), in_flight=in_flight, shapes=dice)
    loop.work.processors.start(0, [1], SamplingParams(bad_words=((1, 2),) * 3))  # tables for all that comes
    loop.runner.capture(SLOTS, CONTEXT, lambda *_: None)
    found, runner = waves(loop, params()), loop.runner
    for number, kind in enumerate(KINDS):
        mine, theirs = found[number], alone[number]
        assert (mine.output, mine.finish_reason, mine.error) == (theirs.output, theirs.finish_reason, theirs.error), (
            kind
        )
        assert [(p.token, p.rank) for p in mine.logprobs] == [(p.token, p.rank) for p in theirs.logprobs]
    assert runner.steps.late == 0  # type: ignore[attr-defined]
    assert "failed" not in caplog.text
    assert {"plain", "chain:1", "chain:2", "tree:5", "late chain:2"} == set(dice.chosen)


def drafts(loop: DecodeLoop, drafter: MTPDrafter, requests: Sequence[SamplingParams]) -> dict[Any, Any]:
    """What was drafted: by shape, seed and position, the tokens and parents of the tree."""
    found: dict[Any, Any] = {}
    draft = drafter.draft

    def noted(batch: Batch) -> DraftTree:
        tree = draft(batch)
        assert batch.plan
        for row, slot in enumerate(batch.slots.tolist()):
            if slot < SLOTS:
                seed = int(batch.sampling.seed[row])
                rest = [each[row].tolist() for each in (tree.tokens, tree.parents, tree.size)]
                found[str(batch.plan.shape), seed, int(batch.lengths[row])] = rest
        return tree

    drafter.draft = noted  # type: ignore[method-assign]
    for number, each in enumerate(requests):
        loop.add(prompts()[number], each)
    while loop.requests:
        loop.step()
    return found


@pytest.mark.parametrize("family", ["mtp", "deep"])
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_drafts_do_not_depend_on_the_steps_before(models: Models, family: str, seed: int) -> None:
    """A tree after plain steps and steps of other shapes is the one that a drafter grows which has always drafted so."""
    module: MTPModule = getattr(models, family)
    depth = 2 if family == "mtp" else module.config.depth
    shapes = [SHAPES[0], TreeShape(widths=(1,) * depth), SHAPES[2]]
    wanted = [SamplingParams(max_tokens=60, temperature=t, seed=number) for number, t in enumerate((0.0, 0.9, 1.3))]

    def run(plan: str) -> dict[Any, Any]:
        inner = planner_of(shapes, depth)
        dice = Dice(seed, 0.5, inner)
        drafter = drafter_of(module, dice if plan == "dice" else inner, shapes)
        if plan != "dice":
            inner.forced.append(next(each for each in inner.plans(1) if str(each) == plan))
        loop = loop_of(models, drafter, shapes=drafter.planner)
        return drafts(loop, drafter, wanted)

    mixed, steady = run("dice"), {}
    for shape in shapes:
        steady |= run(str(shape))
    both = mixed.keys() & steady.keys()
    assert {shape for shape, *_ in both} == set(map(str, shapes))
    assert len(both) > 20
    assert {key: mixed[key] for key in both} == {key: steady[key] for key in both}


def feed(
    planner: ShapePlanner, batch: int, seconds: dict[str, float], accepted: dict[str, float], steps: int
) -> list[str]:
    """Let it decide for so many steps of so many requests; what costs and gives so much."""
    rng, chosen = random.Random(0), list[str]()
    planner.know(ShapeCosts({(bucket(batch), 512, name): each for name, each in seconds.items()}))
    slots = list(range(batch))
    for _ in range(steps):
        plan = planner.choose(slots, 512, limited=False, speculates=True)
        chosen.append(str(plan))
        mean = accepted.get(str(plan.shape), 0.0) if plan.shape else 0.0
        planner.learn(plan, slots, [int(mean) + (rng.random() < mean % 1) for _ in slots])
        planner.timed(plan, batch, 512, seconds[str(plan)], None)
    return chosen


COSTS = {"plain": 1.0, "chain:1": 1.3, "chain:2": 1.5, "tree:5": 1.8, "late chain:2": 2.0}


@pytest.mark.parametrize("batch", [1, 16])
@pytest.mark.parametrize(
    ("accepted", "best"),
    [
        ({"chain:1": 0.7, "chain:2": 1.4, "tree:5": 1.5}, "chain:2"), ({"chain:1": 0.8, "chain:2": 1.2, "tree:5": 1.9}, "tree:5"),
        ({"chain:1": 0.9, "chain:2": 1.0, "tree:5": 1.1}, "chain:1"), ({"chain:1": 0.1, "chain:2": 0.1, "tree:5": 0.2}, "plain"),
    ],
)  # fmt: skip
def test_what_pays_is_taken(batch: int, accepted: dict[str, float], best: str) -> None:
    chosen = feed(planner_of(room=32), batch, COSTS, accepted, 600)
    assert chosen[200:].count(best) > 0.85 * 400
    rates = {name: (1 + accepted.get(name.removeprefix("late "), 0.0)) / cost for name, cost in COSTS.items()}
    tokens, spent = sum(rates[name] * COSTS[name] for name in chosen), sum(COSTS[name] for name in chosen)
    assert tokens / spent > 0.95 * rates[best]


@pytest.mark.parametrize(("bound", "best"), [(512, "tree:5"), (2048, "chain:1"), (8192, "plain"), (32768, "plain")])
def test_contexts_have_tables_of_their_own(bound: int, best: str) -> None:
    """Where longer contexts make trees dearer than plain decoding, others pay; beyond what was timed the longest stands."""
    planner = planner_of(room=32)
    scales = {512: {"tree:5": 1.4}, 2048: {"tree:5": 4.0, "chain:2": 3.0}, 8192: dict.fromkeys(NAMES, 9.0)}
    costs = dict[tuple[int, int, str], float]()
    for each, dearer in scales.items():
        costs |= {(1, each, name): dearer.get(name, seconds) for name, seconds in COSTS.items()}
    planner.know(ShapeCosts(costs))
    chosen = []
    for _ in range(200):
        plan = planner.choose([0], bound, limited=False, speculates=True)
        chosen.append(str(plan.shape or "plain"))
        planner.learn(plan, [0], [{1: 0, 2: 1, 3: 1, 6: 2}[plan.nodes]])
    assert chosen[50:].count(best) > 140


@pytest.mark.parametrize(("bound", "seconds"), [(2048, 1.05), (512, 1.95)])
def test_contexts_between_those_that_were_timed(bound: int, seconds: float) -> None:
    """What plain steps tell of contexts holds for trees, which longer ones cost much more. seconds: of a plain step."""
    planner = planner_of([*SHAPES[-1:], TreeShape.parse("chain:2")], room=1 << 30)
    costs = {512: (1.0, 1.8), 2048: (2.0, 5.0)}
    planner.know(ShapeCosts({
        (1, at, name): each for at, (plain, tree) in costs.items()
        for name, each in (("plain", plain), ("tree:5", tree), ("chain:2", 9.0), ("late chain:2", 9.0))
    }))  # fmt: skip
    [plain, tree, _, _] = planner.plans(1)
    for _ in range(100):
        planner.timed(plain, 1, bound, seconds, None)
    for _ in range(100):
        chosen = planner.choose([0], bound, limited=False, speculates=True)
        planner.learn(chosen, [0], [1] if chosen.shape else [0])
    pays = 2 / (1.8 + (seconds - 1) * 3.2) > 1 / seconds
    assert chosen == (tree if pays else plain)
    assert pays == (bound == 2048)


@pytest.mark.parametrize("seconds", [0.0, 1e-6, 100.0])
def test_steps_of_any_length_leave_it_sane(seconds: float) -> None:
    """However short, or disturbed, those of one shape were, what others cost stays above nothing and within reason."""
    planner = planner_of(room=1 << 30)
    costs = {
        "plain": (1.0, 1.01),
        "chain:1": (1.1, 9.0),
        "chain:2": (1.2, 9.0),
        "tree:5": (9.0, 9.1),
        "late chain:2": (9.0, 9.1),
    }
    planner.know(ShapeCosts({(1, at, name): both[at > 512] for name, both in costs.items() for at in (512, 2048)}))
    for bound in (512, 2048):
        for _ in range(200):
            planner.timed(Plan(), 1, bound, seconds, None)
        assert all(
            0.1 <= planner._table(1, bound).spans[plan].at(planner._places[1, bound]) < 50 for plan in planner.plans(1)
        )
        planner.choose([0], bound, limited=False, speculates=True)


def test_texts_that_come_in_blocks_mislead_nobody() -> None:
    """Easy and hard ones: a shape that is seldom taken is tried beside the others, and not judged by the text of one block. And
    that good requests end sooner, after as many tokens in fewer steps, makes nothing drift."""
    planner, rng, chosen, said = planner_of(room=32), random.Random(3), list[str](), 0
    given = {"chain:1": 0.45, "chain:2": 0.85, "tree:5": 1.5}
    planner.know(ShapeCosts({(1, 512, name): each for name, each in COSTS.items()}))
    for level in (1.3, 0.7) * 20:
        for _ in range(300):
            plan = planner.choose([0], 512, limited=False, speculates=True)
            chosen.append(str(plan))
            mean = level * given[str(plan.shape)] if plan.shape else 0.0
            accepted = int(mean) + (rng.random() < mean % 1)
            planner.learn(plan, [0], [accepted])
            said += 1 + accepted
            if said > 96:
                planner.release(0)
                said = 0
    assert chosen[600:].count("tree:5") > 0.9 * len(chosen[600:])  # the best at both levels
    assert 0.8 < planner._shapes[SHAPES[-1]].gain / given["tree:5"] < 1.25


def test_it_changes_its_mind() -> None:
    """Other texts come, of which other drafts are accepted: it notices, from plain decoding too."""
    planner = planner_of(room=32)
    good, bad = {"chain:1": 0.9, "chain:2": 1.7, "tree:5": 1.8}, {"chain:1": 0.1, "chain:2": 0.1, "tree:5": 0.1}
    for accepted, best in ((good, "chain:2"), (bad, "plain"), (good, "chain:2")):
        assert feed(planner, 4, COSTS, accepted, 800)[-200:].count(best) > 150


def test_where_the_host_is_the_limit_more_nodes_cost_nothing() -> None:
    planner = planner_of()
    planner.know(ShapeCosts({(1, 512, name): each for name, each in COSTS.items()}))
    plan = planner.choose([0], 512, limited=False, speculates=True)
    for _ in range(200):
        planner.timed(plan, 1, 512, 1.8, 5.0)
    for _ in range(300):
        chosen = planner.choose([0], 512, limited=False, speculates=True)
        planner.learn(chosen, [0], [1 if chosen.nodes < 6 else 2])
    assert str(chosen) == "tree:5"


def test_rows_that_wait_are_never_more_than_there_is_room_for() -> None:
    planner = planner_of()
    planner.forced[:] = [Plan()]
    plans = [planner.choose([0, 1], 512, limited=False, speculates=True) for _ in range(3 * ROOM)]
    assert [str(plan) for plan in plans[: ROOM + 1]] == ["plain"] * (ROOM - 1) + ["late chain:2"] + ["plain"]
    planner.release(1)  # a new request has one row
    for _ in range(ROOM):
        plan = planner.choose([1], 512, limited=False, speculates=False)
        assert str(plan) == "plain"
    assert str(planner.choose([1], 512, limited=False, speculates=False)) == "plain", "nobody wants drafts"
    planner.forced.clear()
    assert str(planner.choose([1], 512, limited=True, speculates=True)) == "late chain:2"
    assert str(planner.choose([1], 512, limited=True, speculates=True)) == "tree:5"


def test_prompts_are_read_in_chunks_no_longer_than_a_step() -> None:
    planner = planner_of()
    assert planner.rows() is None, "nothing was timed"
    reading = {
        (rows, 0, READING): seconds for rows, seconds in ((16, 0.38), (32, 0.4), (64, 0.6), (128, 1.1), (256, 1.9))
    }
    for scale, rows in ((0.7, 64), (1.4, 128), (9.0, 256), (0.1, 32)):  # at least what takes little more than the least
        planner.know(ShapeCosts({(4, 512, name): scale for name in COSTS} | reading))
        planner.choose([0, 1, 2, 3], 512, limited=False, speculates=True)
        assert planner.rows() == rows


def test_costs_are_kept(tmp_path: Path) -> None:
    costs, path = ShapeCosts(), tmp_path / "plans" / "a.json"
    for seconds in (0.3, 0.1, 0.2):
        costs.note(4, 512, Plan(SHAPES[2], 6), seconds)
    kept.write(costs, path)
    assert kept.read(ShapeCosts, path) == costs == ShapeCosts({(4, 512, "tree:5"): 0.1})
    for damaged in ("", "[1]", "{}x", '[["a"]]', '[[4, "tree:5", 0.1]]'):
        path.write_text(damaged)
        assert kept.read(ShapeCosts, path) is None
    assert kept.read(ShapeCosts, tmp_path / "none") is None


def test_shapes_are_timed_on_the_recorded_steps(models: Models) -> None:
    """Also in the midst of a longer bound, where memory has room for so many tokens; and nothing is left of it."""
    planner, longest = planner_of(), 960
    sizes: dict[str, Any] = {"max_context": longest, "tokens": 2500}
    loop = loop_of(models, drafter_of(models.mtp, planner), shapes=planner, prefix_bytes=1 << 20, **sizes)
    loop.runner.capture(SLOTS, longest, lambda *_: None)
    kept, forward, lengths = loop.memory.prefix, loop.work.forward, set[int]()

    def seen(batch: Batch, tree: DraftTree) -> Any:
        lengths.update(batch.lengths[: len(loop.requests)].tolist())
        return forward(batch, tree)

    loop.work.forward = seen  # type: ignore[method-assign]
    time_shapes(loop, planner, [1, 2, 4], 100, lambda *_: None)
    loop.work.forward = forward  # type: ignore[method-assign]
    timed = {(1, 512), (2, 512), (4, 512), (1, 2048), (2, 2048)}  # four have no room for so many tokens
    costs = planner.costs.seconds
    assert {(n, bound) for n, bound, _ in costs if bound} - {(3, 512)} == timed
    assert {(n, bound, str(plan)) for n, bound in timed for plan in planner.plans(n)} <= costs.keys()
    assert max(lengths) in range((512 + longest) // 2, longest)
    assert {rows for rows, _, what in costs if what == READING} == {32, 64}
    assert not loop.requests
    assert loop.memory.prefix is kept
    assert not planner.forced
    request = solo(loop, 1, params()[1])
    assert request.output == solo(loop_of(models, RootDrafter(), in_flight=0), 1, params()[1]).output
    assert loop.runner.steps.late == 0  # type: ignore[attr-defined]


def test_who_has_ended_teaches_nothing(models: Models) -> None:
    requests = [loop_of(models, RootDrafter()).add([1], SamplingParams()) for _ in range(3)]
    requests[1].finish_reason = "stop"
    told: list[Any] = []

    class Flight:
        def wait(self) -> Landed:
            return Landed([[3, 4, 2, 9, 9, 9], [1, 1, 0, 9], [2, 4, 2, 9, 9]], 0.1, 0.2)

    watched = Watched(Flight(), requests, [5, 6, 7], lambda landed, begin, *rest: told.append(rest))
    assert watched.wait() is watched.wait()
    assert told == [([5, 7], [2, 1])]


def test_what_is_likely() -> None:
    gains = [likely(TreeShape.parse(name), 3) for name in ("chain:1", "chain:2", "chain:3", "tree:7", "tree:15")]
    assert gains == sorted(gains)
    assert likely(TreeShape.parse("tree:15"), 1) < 1 > likely(TreeShape.parse("chain:1"), 1)
    assert torch.tensor(gains).isfinite().all()


def test_smaller_trees_teach_nothing(models: Models) -> None:
    """Requests that draft nothing, or less, take part in steps of others: what they accept says nothing of the shape."""
    planner = planner_of()
    loop = loop_of(models, drafter_of(models.mtp, planner), shapes=planner)
    learned: list[Any] = []
    planner.learn = lambda *given: learned.append(given)  # type: ignore[method-assign]
    loop.add(prompts()[0], SamplingParams(max_tokens=12, seed=1))
    other = loop.add(prompts()[1], SamplingParams(max_tokens=6, seed=2, speculate=False, ignore_eos=True))
    while other.finish_reason is None:
        loop.step()
    assert all(len(slots) == 1 for _, slots, _ in learned), "only while it was alone"
    while loop.requests:
        loop.step()
    assert learned


def test_a_shape_that_was_never_tried_is_not_judged_by_other_texts() -> None:
    """Small batches after large ones in which few drafts were accepted, and for which trees are not on offer: what was learned
    there of requests stands for all shapes alike, and the largest tree, which is worth it, is found."""
    offers = [
        Offer(TreeShape.parse("chain:3"), 4), Offer(TreeShape.parse("tree:7"), 8, 1, 16),
        Offer(TreeShape.parse("tree:15"), 16, 1, 2),
    ]  # fmt: skip
    costs = {
        1: {"plain": 0.58, "chain:3": 0.76, "tree:7": 0.78, "tree:15": 0.80},
        16: {"plain": 0.65, "chain:3": 1.25, "tree:7": 1.3}, 64: {"plain": 1.0, "chain:3": 1.3},
    }  # fmt: skip
    seconds = {(batch, 512, name): each for batch, table in costs.items() for name, each in table.items()}
    planner = ShapePlanner(offers, depth=3, room=ROOM, costs=ShapeCosts(seconds), bucket=bucket)
    rng = random.Random(1)

    def decode(batch: int, steps: int, chances: dict[str, float]) -> list[str]:
        chosen, slots = [], list(range(batch))
        for _ in range(steps):
            plan = planner.choose(slots, 512, limited=False, speculates=True)
            chosen.append(str(plan.shape))
            chance = chances.get(chosen[-1], 0)
            planner.learn(plan, slots, [next((n for n in range(3) if rng.random() > chance), 3) for _ in slots])
        for slot in slots:
            planner.release(slot)
        return chosen

    for _ in range(4):
        decode(64, 20, {"chain:3": 0.4})
    for _ in range(10):
        decode(16, 20, {"chain:3": 0.55, "tree:7": 0.74})
    chosen = [shape for _ in range(20) for shape in decode(1, 30, {"chain:3": 0.6, "tree:7": 0.74, "tree:15": 0.82})]
    assert chosen[200:].count("tree:15") > 0.7 * len(chosen[200:])
