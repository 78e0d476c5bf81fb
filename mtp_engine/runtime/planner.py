"""Which tree pays now: how deep to draft, how many nodes to verify, or not to draft at all. Knows nothing of tensors.

What a node is worth is the chance that it is accepted: the drafter's own probability of its path, corrected by how often
such nodes were accepted. What it costs is measured: seconds of drafting by levels and of verifying by rows, at first
once on this machine and from then on in every step. The tree with the most tokens per second is the one to take; a tree of
one node, which is plain decoding, is among them. The text cannot change: the rule keeps what plain decoding would say.
"""

import bisect
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, final

_LOG = logging.getLogger("mtp_engine")
_MEMORY = 0.98  # how much of the evidence for a correction is left after a step
_OWN = 0.95  # and for what a request gains
_PRIOR = 4.0  # steps' worth of belief that the drafter's probabilities are right
_BELIEF = 6.0  # steps' worth of belief that a new request is like those before it
_TRIALS = 0.015  # of the time of a request that drafting does not pay for, to try it again
_SHORTEST_REST, _LONGEST_REST = 4, 500  # plain steps between two trials
_LEAST_GAIN = 1.75  # by drafts that are all accepted: half of them are, and watching costs every step something
_DRIFT = 0.15  # weight of the newest measurement of what drafting costs
_FADE = 0.97  # how much of what steps took is left after a step
_TIED = 0.02  # steps' worth of belief that what further rows add changes as the first row's time does
_COLLAPSE = 6.0  # times as long as a step took at first: it is said once


@final
@dataclass
class _Drift:
    """How long verification takes now, against what was measured first: a factor for the first row, and one for what all
    others add to it. Contexts grow, machines get busy, and above T = 0 every row draws its noise. A fit by least squares
    over the newest steps, drawn towards what was measured. Times are in units of the measured time of one row."""

    one: float = 1.0
    more: float = 1.0
    _sums: tuple[float, ...] = (0.0,) * 5  # over steps, the newest count most: of 1, x, x * x, t and t * x

    def note(self, x: float, t: float) -> None:
        """A step took t, to which its other rows would have added x when they were measured."""
        new = (1.0, x, x * x, t, t * x)
        self._sums = tuple(_FADE * total + each for total, each in zip(self._sums, new, strict=True))
        n, sx, sxx, st, stx = self._sums
        # least where (t - one - more * x)^2, summed, and (one - 1)^2 and _TIED * (more - one)^2 have no slope
        a, b, c, right, lower = n + 1 + _TIED, sx - _TIED, sxx + _TIED, st + 1, stx
        whole = a * c - b * b
        self.one, self.more = (right * c - b * lower) / whole, max(0.0, (a * lower - b * right) / whole)


@final
@dataclass
class Costs:
    """Seconds by measurement. draft: by levels of the tree, 0 to the deepest, of a chain. verify: by rows, some of them measured.
    widen: for each further node that is drafted from."""

    draft: list[float]
    verify: dict[int, float]
    widen: float = 0.0
    draft_drift: float = 1.0  # of drafting, against what was measured first
    verify_drift: _Drift = field(default_factory=_Drift)
    _lines: dict[int, float] = field(default_factory=dict, repr=False, compare=False)  # what `_measured` has said

    @classmethod
    def parse(cls, text: str) -> "Costs":
        """What `text` gave. Raises ValueError for anything else."""
        try:
            raw = json.loads(text)
            found = cls(
                [float(each) for each in raw["draft"]], {int(n): float(each) for n, each in raw["verify"].items()},
                float(raw["widen"]),
            )  # fmt: skip
        except (LookupError, TypeError, AttributeError) as error:
            raise ValueError("these are no costs") from error
        if not found.draft or len(found.verify) < 2:
            raise ValueError("these are too few costs")
        return found

    def text(self) -> str:
        return json.dumps({"draft": self.draft, "verify": self.verify, "widen": self.widen})

    def verifying(self, rows: int) -> float:
        """Seconds, as they are now."""
        one, drift = self._measured(1), self.verify_drift
        return max(one * drift.one + (self._measured(rows) - one) * drift.more, 1e-9)

    def _measured(self, rows: int) -> float:
        """Between and beyond measured numbers of rows on straight lines."""
        if rows not in self._lines:
            known = sorted(self.verify)
            at = min(max(bisect.bisect_left(known, rows), 1), len(known) - 1)
            low, high = known[at - 1], known[at]
            slope = (self.verify[high] - self.verify[low]) / (high - low) if high > low else 0.0
            self._lines[rows] = max(self.verify[low] + slope * (rows - low), 1e-9)
        return self._lines[rows]

    @property
    def hopeless(self) -> bool:
        """Whether drafting cannot be expected to pay for one request: even if every draft is accepted it gains too little."""
        plain = 1 / (self.draft[0] + self.verifying(1))
        return all(
            (level + 1) / (self.draft[level] + self.verifying(level + 1)) < _LEAST_GAIN * plain
            for level in range(1, len(self.draft))
        )

    @classmethod
    def best_of(cls, steps: Sequence[tuple[int, int, int, float, float]]) -> "Costs":
        """From steps: levels, further nodes that were drafted from, rows, and seconds of drafting and verifying."""
        draft, verify = dict[int, float](), dict[int, float]()
        for levels, further, rows, draft_s, verify_s in steps:
            verify[rows] = min(verify_s, verify.get(rows, verify_s))
            if not further:
                draft[levels] = min(draft_s, draft.get(levels, draft_s))
        known = sorted(verify)
        for fewer, more in zip(known[-2::-1], known[:0:-1], strict=True):
            verify[fewer] = min(verify[fewer], verify[more])  # what is longer was disturbed
        widest = max(further for _, further, _, _, _ in steps)
        wide = [
            (draft_s - draft[levels]) / further for levels, further, _, draft_s, _ in steps if further == widest > 0
        ]
        return cls([draft[levels] for levels in sorted(draft)], verify, max(0.0, min(wide, default=0.0)))

    def drafting(self, levels: int, further: int) -> float:
        """further: nodes that are drafted from, besides one of each level."""
        return (self.draft[levels] + self.widen * further) * self.draft_drift

    def note(self, levels: int, further: int, rows: int, draft_s: float, verify_s: float) -> None:
        """A step took so long. One that took several times as long was disturbed by something else, and counts a little."""
        one = self._measured(1)
        self.verify_drift.note(self._measured(rows) / one - 1, min(verify_s, 3 * self.verifying(rows)) / one)
        if levels:
            self.draft_drift = _follow(self.draft_drift, draft_s / (self.drafting(levels, further) / self.draft_drift))


def _follow(drift: float, ratio: float) -> float:
    return drift + _DRIFT * (min(ratio, 3 * drift) - drift)


@final
@dataclass
class _Own:
    """What is known of one request. lost: seconds that steps with drafts lately took longer than plain decoding would have
    taken for their tokens. rest: plain steps to come before it is drafted for again."""

    steps: float
    lost: float
    rest: int


@final
@dataclass
class _Depth:
    """Nodes of one depth: what the drafter promised and what was accepted; and of steps that went there, how many did."""

    promised: float = _PRIOR
    accepted: float = _PRIOR
    tried: float = 0.0
    reached: float = 0.0


@final
class _Node(NamedTuple):
    """promise: the drafter's joint probability. worth: what is made of it."""

    worth: float
    promise: float
    depth: int


@final
@dataclass
class Planner:
    """Decides for all requests of a step together; one for a loop."""

    costs: Costs
    forced: tuple[int, int, int] | None = None  # to measure costs: levels, the most nodes of each, nodes to verify
    tried: list[tuple[int, int, int, float, float]] = field(default_factory=list)  # what that took, see Costs.best_of
    _depths: list[_Depth] = field(default_factory=list)
    _own: dict[int, _Own] = field(default_factory=dict)  # by slot
    _grown: list[list[_Node]] = field(default_factory=list)  # the drafted nodes of each request's tree, best first
    _levels: int = 0  # of that tree
    _further: int = 0  # nodes that it was grown from, besides one of each level
    _frontier: int = 0  # nodes of its newest level, over all requests
    _best: int | None = None  # what `nodes` said of the tree so far
    _late: int = 0  # rows that its levels had to come, and that cost about what a further node does
    _told: bool = False

    def __post_init__(self) -> None:
        self._depths = [_Depth() for _ in self.costs.draft[1:]]

    def drafts(self, slots: Sequence[int]) -> bool:
        """Whether to draft in this step, for the requests in `slots`."""
        self._grown, self._levels, self._further, self._frontier = [[] for _ in slots], 0, 0, len(slots)
        self._late, self._best = 0, None
        if self.forced:
            return self.forced[0] > 0
        own = [self._of(slot) for slot in slots]
        if any(each.rest == 0 for each in own):
            return True
        for each in own:
            each.rest -= 1
        return False

    def grown(self, promises: Sequence[Sequence[float]]) -> int:
        """A level was grown; promises: joint probabilities of its nodes by request. Returns how many nodes of it to keep, the
        best ones of each request: those that may be worth a row."""
        self._levels, self._best = self._levels + 1, None
        batch, at = len(promises), self._depths[self._levels - 1]
        rows = [[_Node(min(1.0, p * at.accepted / at.promised), p, self._levels) for p in row] for row in promises]
        self._further += self._frontier - 1
        if self.forced:
            keep = self.forced[1]
        else:
            best = sum(max(node.worth for node in row) for row in rows)
            rate = self._rate(self._levels, batch, self._gain(len(self._grown[0])) + best, len(self._grown[0]) + 1)
            row_s = (self.costs.verifying(batch * 4) - self.costs.verifying(batch * 3)) / batch
            floor = rate * (row_s + (self.costs.widen if self._levels < len(self._depths) else 0.0))
            keep = max(sum(node.worth > floor for node in row) for row in rows)
        keep = min(max(keep, 1), len(rows[0]))
        self._frontier = keep * batch
        self._grown = [
            sorted([*nodes, *sorted(row, key=_worth, reverse=True)[:keep]], key=_worth, reverse=True)
            for nodes, row in zip(self._grown, rows, strict=True)
        ]
        return keep

    def deeper(self) -> bool:
        """Whether to grow another level."""
        if self.forced:
            return self._levels < self.forced[0]
        nodes = self.nodes()
        newest = [max(node.worth for node in row if node.depth == self._levels) for row in self._grown]
        hoped = sum(newest) * self._chances()[self._levels]
        further = self._further + self._frontier - 1
        return self._rate(self._levels + 1, len(newest), self._gain(nodes) + hoped, nodes + 1, further) > self._rate(
            self._levels, len(newest), self._gain(nodes), nodes
        )

    def nodes(self) -> int:
        """How many drafted nodes to verify, the best ones of each request."""
        most = min(map(len, self._grown))
        if self.forced:
            return min(self.forced[2], most)
        if self._best is None:
            batch, levels = len(self._grown), self._levels
            self._best = max(range(1, most + 1), key=lambda n: self._rate(levels, batch, self._gain(n), n))
        return self._best

    def late(self, rows: int) -> None:
        """Drafting ran so many rows that earlier steps had left out."""
        self._late += rows

    def learn(self, slots: Sequence[int], accepted: Sequence[int]) -> None:
        """How many drafts of each request's tree were accepted."""
        if self.forced or not self._levels:
            return
        count, batch = self.nodes(), len(slots)
        plain_s = self._seconds(0, batch, 0, 0)
        for slot, nodes, reached in zip(slots, self._grown, accepted, strict=True):
            for depth in range(min(reached + 1, self._levels)):
                at, promised = (
                    self._depths[depth],
                    sum(node.promise for node in nodes[:count] if node.depth == depth + 1),
                )
                if promised:
                    at.promised = _MEMORY * at.promised + promised
                    at.accepted = _MEMORY * at.accepted + (reached > depth)
                    at.tried, at.reached = _MEMORY * at.tried + 1, _MEMORY * at.reached + (reached > depth)
            own = self._of(slot)
            lost = (self._seconds(self._levels, batch, count, self._further) - (reached + 1) * plain_s) / batch
            own.steps, own.lost = _OWN * own.steps + 1, _OWN * own.lost + lost
            own.rest = self._rest(own.lost / own.steps, plain_s / batch)

    def timed(self, nodes: int, batch: int, draft_s: float, verify_s: float) -> None:
        """A step with trees of so many nodes, roots included, took so long."""
        if self.forced:
            self.tried.append((self._levels, self._further, nodes * batch, draft_s, verify_s))
            return
        self.costs.note(self._levels, self._further + self._late, nodes * batch, draft_s, verify_s)
        if self.costs.verify_drift.one > _COLLAPSE and not self._told:
            self._told = True
            _LOG.warning(
                "steps take %.0f times as long as they did when they were first timed here: other processes may need the cores "
                "(--threads takes fewer of them), or contexts are long", self.costs.verify_drift.one,
            )  # fmt: skip

    def release(self, slot: int) -> None:
        """Another request may take it."""
        self._own.pop(slot, None)

    def _of(self, slot: int) -> _Own:
        """New ones are taken to be as those before them were."""
        if slot not in self._own:
            plain_s, tokens, chance, losses = self._seconds(0, 1, 0, 0), 1.0, 1.0, list[float]()
            for levels, further in enumerate(self._chances(), 1):
                chance *= further
                tokens += chance
                losses.append(self._seconds(levels, 1, levels, 0) - tokens * plain_s)
            self._own[slot] = _Own(_BELIEF, _BELIEF * min(losses), self._rest(min(losses), plain_s))
        return self._own[slot]

    def _chances(self) -> list[float]:
        """For each depth, how often a step that has come to it goes one further. A depth that was not tried is taken to be as
        the one above."""
        chances, chance = [], 0.5
        for at in self._depths:
            chance = (at.reached + _PRIOR * chance) / (at.tried + _PRIOR)
            chances.append(chance)
        return chances

    def _rest(self, lost: float, plain_s: float) -> int:
        """0 where drafting pays; else as many plain steps as make what a trial loses a small part of the time."""
        return 0 if lost <= 0 else min(_LONGEST_REST, max(_SHORTEST_REST, int(lost / (_TRIALS * plain_s))))

    def _gain(self, count: int) -> float:
        return sum(node.worth for row in self._grown for node in row[:count])

    def _rate(self, levels: int, batch: int, gain: float, nodes: int, further: int | None = None) -> float:
        """Tokens per second of a step. gain: accepted drafts that are hoped for. nodes: drafted ones of each request. further:
        see Costs.drafting; None: of the tree so far."""
        return (batch + gain) / self._seconds(levels, batch, nodes, self._further if further is None else further)

    def _seconds(self, levels: int, batch: int, nodes: int, further: int) -> float:
        """Of a step with trees so deep, and so many drafted nodes each."""
        return self.costs.drafting(levels, further) + self.costs.verifying(batch * (nodes + 1))


def _worth(node: _Node) -> float:
    return node.worth
