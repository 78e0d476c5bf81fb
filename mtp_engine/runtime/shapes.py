"""Which shape pays where steps are recorded ahead (a GPU): one of a few for all requests of a step, plain decoding among them.

A shape is chosen when a step is launched, so nothing is known yet of its drafts, nor of the steps in flight. What it
costs was timed at load by batch and context, on the recorded steps themselves; every step in earnest tells where between
the contexts that were timed the present ones lie. What it gives is how many drafts are accepted over such a shape, times
how much better or worse this request has done than was to be expected. The shape with the most tokens per second over the
batch is taken; now and then one that was seldom seen gets credit, and is tried. The text cannot change: the rule keeps what
plain decoding says.
"""

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import inf, log2
from typing import NamedTuple, final

from mtp_engine.config import TreeShape
from mtp_engine.runtime.request import Landed, Launched, Request
from mtp_engine.sampling.batch import Plan

_LIKELY = 0.62  # of the drafter's first candidate, before anything is known
_WIDER = 0.07  # more for each doubling of a tree's nodes
_OWN = 0.95  # of what is known of a request that is left after a step of it
_BELIEF = 4.0  # steps' worth of belief that a new request is like those before it
_MEMORY = 0.9995  # of what is known of each shape that is left after a request's step with any, as texts change
_PRIOR = 8.0  # requests' steps' worth of belief that a shape gives what is likely
_CREDIT = 1.0  # accepted drafts that a shape of which nothing is known gets for that
_TRIALS = 16  # one step of so many gives credit: so a shape is seen in many texts, beside others of the same text
_HYSTERESIS = 1.03  # by which drafting must be better than not drafting, or the other way round, to change
_DRIFT = 0.1  # weight of the newest measurement
_LEAST_SPAN = 0.1  # of a step's time that depends on contexts, at least
_FURTHEST = 3.0  # place (see Span) that one step may tell of; beyond it was disturbed
_FREE = 1.2  # times as long as reading the fewest rows may take, whatever a step takes
READING = "reading"  # in place of a plan: rows of prompts
_WATCHED = 8  # requests of a step from which is learned


@final
class Span(NamedTuple):
    """Seconds of a step in the midst of a bound, and what it takes less, or more, in the midst of the one before, or next."""

    middle: float
    span: float

    def at(self, place: float) -> float:
        """place: 0 in the midst of the bound, -1 in that of the one before."""
        return max(self.middle + place * self.span, self.middle / 10)


@final
@dataclass
class ShapeCosts:
    """Seconds of a step, drafting and verifying, by the batch and the bound of contexts that it was recorded for and the plan's
    name; and of reading so many rows of prompts, with 0 for a bound."""

    seconds: dict[tuple[int, int, str], float] = field(default_factory=dict)

    @classmethod
    def parse(cls, text: str) -> "ShapeCosts":
        """What `text` gave. Raises ValueError for anything else."""
        try:
            return cls({(int(n), int(bound), str(plan)): float(each) for n, bound, plan, each in json.loads(text)})
        except TypeError as error:
            raise ValueError("these are no costs") from error

    def text(self) -> str:
        return json.dumps([[*key, each] for key, each in self.seconds.items()])

    def note(self, batch: int, bound: int, plan: Plan | str, seconds: float) -> None:
        """A step took so long; the shortest of several counts, as the others were disturbed."""
        key = batch, bound, str(plan)
        self.seconds[key] = min(seconds, self.seconds.get(key, seconds))

    def of(self, batch: int, bound: int, plan: Plan) -> Span:
        """Of the longest bound up to this one that was timed; infinite where none was."""
        timed = sorted((at, s) for (n, at, what), s in self.seconds.items() if (n, what) == (batch, str(plan)))
        upto, beyond = [s for at, s in timed if at <= bound], [s for at, s in timed if at > bound]
        if not upto:
            return Span(inf, 0.0)
        seconds = upto[-1]
        further = seconds - upto[-2] if len(upto) > 1 else beyond[0] - seconds if beyond else 0.0
        return Span(seconds, max(further, _LEAST_SPAN * seconds))


@final
@dataclass
class _Shape:
    """likely: see `likely`. accepted: drafts, of requests' steps with it; hoped: for how many steps of a usual request these
    count. known: requests' steps. All three of late; so what was found long ago, in other texts, gives way to what is likely."""

    likely: float
    accepted: float = 0.0
    hoped: float = 0.0
    known: float = 0.0

    @property
    def gain(self) -> float:
        """Accepted drafts of a step of a usual request."""
        return (self.likely * _PRIOR + self.accepted) / (_PRIOR + self.hoped)

    def fade(self, left: float) -> None:
        self.accepted, self.hoped, self.known = self.accepted * left, self.hoped * left, self.known * left

    def note(self, accepted: int, usual: float) -> None:
        """usual: for how many steps of a usual request this one counts."""
        self.accepted, self.hoped, self.known = self.accepted + accepted, self.hoped + usual, self.known + 1


@final
@dataclass
class _Own:
    """What is known of one request: accepted drafts, those that a usual one would have had, and their ratio. behind: rows that
    the drafter may have to run for it, at most."""

    ratio: float
    accepted: float = 0.0
    hoped: float = 0.0
    behind: int = 1


@final
@dataclass(frozen=True)
class _Table:
    """What steps of a recorded batch and bound take. drafted: plans with drafts, and what is known of their shapes."""

    spans: dict[Plan, Span]
    plain: Span
    drafted: list[tuple[Plan, _Shape, Span]]


@final
@dataclass(frozen=True)
class Offer:
    """A shape that steps of least..most requests may take. nodes: of its trees, root included."""

    shape: TreeShape
    nodes: int
    least: int = 1
    most: int = 1 << 30


def likely(shape: TreeShape, depth: int) -> float:
    """Accepted drafts that are expected of a shape before anything is known. depth: of the drafter."""
    chance = _LIKELY * (1 + _WIDER * log2(max(shape.max_nodes - 1, 1))) if shape.best else _LIKELY
    levels = min(depth, shape.best) if shape.best else len(shape.widths)
    return sum(min(chance, 0.95) ** level for level in range(1, levels + 1))


@final
class ShapePlanner:
    """Chooses a step's shape (a StepPlanner)."""

    def __init__(
        self, offers: Sequence[Offer], *, depth: int, room: int, costs: ShapeCosts, bucket: Callable[[int], int]
    ) -> None:
        """offers: in ascending order of nodes; one of them, a chain as deep as the drafter, is for every batch. depth: of
        the drafter; room: rows that may wait to be drafted from. costs: empty where nothing was measured, and then the
        largest tree on offer is taken. bucket: the batch that is recorded for so many requests."""
        self._plain, self._offers = Plan(), offers
        self._late = next(Plan(o.shape, o.nodes, late=True) for o in offers if len(o.shape.widths) == depth)
        self.costs, self.forced = costs, list[Plan]()  # forced: the plan that is taken whatever it costs, to time it
        self._depth, self._room, self._bucket = depth, room, bucket
        self._shapes = {o.shape: _Shape(likely(o.shape, depth)) for o in offers}
        self._tables: dict[tuple[int, int], _Table] = {}  # by recorded batch and bound
        chains = [o.shape for o in offers if set(o.shape.widths) == {1}]
        self._parts = {chain: [each for each in chains if len(each.widths) <= len(chain.widths)] for chain in chains}
        self._own: dict[int, _Own] = {}  # by slot
        self._ratio = 1.0  # of requests lately, on average: what all have in common is the shapes' own
        self._places: dict[tuple[int, int], float] = {}  # see Span: where contexts lie, by recorded batch and bound
        self._host: dict[int, float] = {}  # seconds that the host is busy with a step, by recorded batch
        self._reading: list[tuple[int, float]] = []  # rows of prompts, and seconds that they take
        self._step_s = 0.0  # of the last step
        self._drafting = True  # in the last step
        self._turn = 0

    def _offered(self, batch: int) -> list[Plan]:
        return [Plan(o.shape, o.nodes) for o in self._offers if o.least <= batch <= o.most]

    def plans(self, batch: int) -> list[Plan]:
        """See StepPlanner."""
        return [self._plain, *self._offered(batch), self._late]

    def choose(self, slots: Sequence[int], bound: int, *, limited: bool, speculates: bool) -> Plan:
        """See StepPlanner."""
        own = [self._of(slot) for slot in slots]
        plan, behind = self._best(own, bound, limited=limited, speculates=speculates), max(each.behind for each in own)
        if plan.shape is None:
            if speculates and behind >= self._room:
                plan = self._late
        elif behind > self._depth + 1:
            plan = self._late
        for each in own:
            each.behind = min(each.behind + 1, self._room) if plan.shape is None else self._depth + 1
        return plan

    def _of(self, slot: int) -> _Own:
        own = self._own.get(slot)
        if own is None:
            own = self._own[slot] = _Own(1.0)
        return own

    def _best(self, own: Sequence[_Own], bound: int, *, limited: bool, speculates: bool) -> Plan:
        if self.forced:
            return self.forced[0]
        if not speculates:
            return self._plain
        batch = self._bucket(len(own))
        table = self._table(batch, bound)
        if limited or table.plain.middle == inf:
            return table.drafted[-1][0]
        self._turn += 1
        hopes, place = sum(each.ratio for each in own), self._places.get((batch, bound), 0.0)
        best, most, host = (self._plain, inf), 0.0, self._host.get(batch, 0.0)
        credit = 0.0 if self._turn % _TRIALS else _CREDIT
        for plan, shape, span in table.drafted:
            gain, seconds = shape.gain + credit / (1 + shape.known) ** 0.5, max(span.at(place), host)
            rate = (len(own) + hopes * gain) / seconds
            best, most = ((plan, seconds), rate) if rate > most else (best, most)
        plain_s = max(table.plain.at(place), host)
        self._drafting = most * plain_s > len(own) * (1 / _HYSTERESIS if self._drafting else _HYSTERESIS)
        plan, self._step_s = best if self._drafting else (self._plain, plain_s)
        return plan

    def know(self, costs: ShapeCosts) -> None:
        """These are the costs from now on."""
        self.costs = costs
        self._tables.clear()
        self._reading = sorted((rows, each) for (rows, _, what), each in costs.seconds.items() if what == READING)

    def _table(self, batch: int, bound: int) -> _Table:
        table = self._tables.get((batch, bound))
        if table is None:
            spans = {plan: self.costs.of(batch, bound, plan) for plan in self.plans(batch)}
            drafted = [(plan, self._shapes[plan.shape], spans[plan]) for plan in self._offered(batch) if plan.shape]
            table = self._tables[batch, bound] = _Table(spans, spans[self._plain], drafted)
        return table

    def learn(self, plan: Plan, slots: Sequence[int], accepted: Sequence[int]) -> None:
        """See StepPlanner. Of a large batch some requests must do, and others in the next step, to spare the host."""
        if plan.shape is None or self.forced or not slots:
            return
        stride = -(-len(slots) // _WATCHED)
        begin = self._turn % stride
        parts = self._parts.get(plan.shape, [plan.shape])
        for slot, count in zip(slots[begin::stride], accepted[begin::stride], strict=True):
            own = self._own.get(slot)
            if own is None:
                continue  # it has ended since
            gain = self._shapes[plan.shape].gain
            for each in self._shapes.values():
                each.fade(_MEMORY)
            for part in parts:
                self._shapes[part].note(min(count, len(part.widths) or self._depth), own.ratio / self._ratio)
            self._ratio += (1 - _MEMORY) * (own.ratio - self._ratio)
            own.accepted, own.hoped = _OWN * own.accepted + count, _OWN * own.hoped + gain
            own.ratio = (own.accepted + _BELIEF) / (own.hoped + _BELIEF)

    def timed(self, plan: Plan, batch: int, bound: int, step_s: float, host_s: float | None) -> None:
        """See StepPlanner."""
        batch = self._bucket(batch)
        if self.forced:
            self.costs.note(batch, bound, plan, step_s)
            return
        span = self._table(batch, bound).spans.get(plan)
        if span is None or span.middle == inf:
            return
        place = self._places.get((batch, bound), 0.0)
        found = min(max((step_s - span.middle) / span.span, -1.0), _FURTHEST)
        self._places[batch, bound] = place + _DRIFT * (found - place)
        if host_s is not None:
            busy = self._host.get(batch, 0.0)
            self._host[batch] = busy + _DRIFT * (min(host_s, 3 * busy + span.middle) - busy)

    def rows(self) -> int | None:
        """See StepPlanner. Few rows take about what some more take, which are then read with them."""
        if not self._reading:
            return None
        limit = max(self._step_s, _FREE * min(seconds for _, seconds in self._reading))
        return max(rows for rows, seconds in self._reading if seconds <= limit)

    def release(self, slot: int) -> None:
        self._own.pop(slot, None)


@final
class Watched:
    """A step in flight of which a planner learns (a Launched)."""

    def __init__(
        self, flight: Launched, requests: Sequence[Request], slots: Sequence[int],
        learn: Callable[[Landed, float, list[int], list[int]], None],
    ) -> None:  # fmt: skip
        """slots: the requests', when it was launched. learn: is given what landed, when the host began to wait for it, and
        of requests that go on the slots and how many drafts were accepted."""
        self._flight, self._requests, self._slots, self._learn = flight, requests, slots, learn
        self._landed: Landed | None = None

    def wait(self) -> Landed:
        if self._landed is None:
            begin = time.perf_counter()
            landed = self._landed = self._flight.wait()
            going = [
                (slot, row[0] - 1)
                for slot, row, request in zip(self._slots, landed.rows, self._requests, strict=True)
                if not request.finish_reason
            ]
            self._learn(landed, begin, [slot for slot, _ in going], [count for _, count in going])
        return self._landed
