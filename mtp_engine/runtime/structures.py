"""What the host adds to recorded steps for requests with a structure: drafts that must come, and what may follow each."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, final

import torch
from torch import Tensor

from mtp_engine.config import SamplingParams
from mtp_engine.runtime.flight import HostMark, HostRoom, Mark
from mtp_engine.runtime.request import Members
from mtp_engine.runtime.step import Said
from mtp_engine.sampling.masks import Guide
from mtp_engine.tree import DraftTree

_HIDDEN = 8  # masks that take the host no longer than the model runs

Trees = tuple[dict[int, list[int]], dict[int, list[int]], dict[int, int]]
"""Tokens, parents and sizes, by row."""


def _truncates(params: SamplingParams) -> bool:
    return params.temperature > 0 and bool(params.top_k or params.top_p < 1 or params.min_p)


def _runs(rows: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Where rows, in ascending order, begin and end to follow one another."""
    first = rows[0]
    for row, after in zip(rows, [*rows[1:], -1], strict=True):
        if after != row + 1:
            yield first, row + 1
            first = after


@final
@dataclass(frozen=True)
class Given:
    """The tensors that a recorded step reads of it."""

    mask: Tensor  # [B, N, W] int32, see Processors.apply
    written: Tensor  # as the mask, on the host: all ones, but while a step is on its way
    forced: Tensor | None  # [B, 1 + D] int64, see DraftTree.forced; None where there are no drafts


@final
@dataclass(frozen=True)
class Drafted:
    """A step that has drafted, on its way to the host."""

    guide: Guide
    table: Tensor | None  # [B, 2 N + 1] int64, see Recorded.outline; None where all are roots
    done: Mark
    nodes: int  # of each tree's room
    depth: int  # of the trees, at most
    forced: dict[int, list[int]] = field(default_factory=dict)  # by row, chains in place of trees

    def wait(self, rows: Iterable[int]) -> Trees:
        """The trees of these."""
        self.done.synchronize()
        drafted, nodes = [] if self.table is None else self.table.tolist(), self.nodes
        tokens, parents, sizes = trees = dict[int, list[int]](), dict[int, list[int]](), dict[int, int]()
        for row in rows:
            if self.table is None or row in self.forced:
                chain = self.forced.get(row, [])
                tokens[row], parents[row], sizes[row] = [0, *chain], list(range(-1, len(chain))), 1 + len(chain)
            else:
                *tree, sizes[row] = drafted[row]
                tokens[row], parents[row] = tree[:nodes], tree[nodes:]
        return trees


@final
@dataclass(frozen=True)
class Looked:
    """What would be chosen without structures, on its way to the host. rows: of the requests that go by it."""

    rows: list[int]
    table: Tensor  # see ModelStep.peek
    done: Mark

    def wait(self) -> list[list[int]]:
        self.done.synchronize()
        return self.table.tolist()  # type: ignore[no-any-return]


@final
class Structures:
    """All recorded steps read the same tensors, so one is over before the next one's are written."""

    def __init__(
        self, *, batch: int, nodes: int, depth: int, vocab: int, device: torch.device, mark: Callable[[], Mark]
    ) -> None:
        """batch, nodes, depth: at most."""
        pinned = device.type == "cuda"
        self._words = -(-vocab // 32)
        masks = batch * nodes * self._words
        self._masks = torch.full((masks,), -1, dtype=torch.int32, device=device)
        self._written = torch.full((masks,), -1, dtype=torch.int32, pin_memory=pinned)
        self._forced = torch.zeros(batch, 1 + depth, dtype=torch.int64, device=device)
        self._chains = torch.zeros(batch, 1 + depth, dtype=torch.int64, pin_memory=pinned)
        self._any = False  # whether something is forced at present
        self._touched: list[Any] = []  # arrays: what is not all ones any more in `_written`, and in the masks
        self._drafts, self._looks = HostRoom(pinned=pinned), HostRoom(pinned=pinned)
        self._drafted, self._peeked, self._copied, self._masked = mark(), mark(), mark(), mark()

    def given(self, batch: int, nodes: int) -> Given:
        masks = (each[: batch * nodes * self._words] for each in (self._masks, self._written))
        mask, written = (each.view(batch, nodes, self._words) for each in masks)
        return Given(mask, written, self._forced[:batch] if nodes > 1 else None)

    def begin(self, tree: DraftTree, outline: Callable[[], Tensor], members: Members) -> Drafted | None:
        """A step is drafting, and its model does not run yet. None where nobody has a structure. outline: Recorded's."""
        guide, count = members.guide, len(members.slots)
        if guide is None or tree.nodes == 1:
            self._force({})
            return None if guide is None else Drafted(guide, None, HostMark(), 1, 0)
        table = self._drafts.copy(outline()[:count])
        self._drafted.record()
        return Drafted(guide, table, self._drafted, tree.nodes, min(tree.max_depth, tree.nodes - 1))

    def force(self, drafted: Drafted, members: Members, said: Said) -> None:
        """Tell the guide of another step, for which what steps in flight say is waited for, and put chains that are forced in
        place of trees."""
        guide = drafted.guide
        guide.begin(members.requests, said)
        params = [request.params for request in members.requests]
        free = [row for row in guide.rows if params[row].speculate and params[row].tree is None]
        drafted.forced.update(guide.forced(free, drafted.depth))
        self._force(drafted.forced)

    def _force(self, chains: Mapping[int, list[int]]) -> None:
        if not (chains or self._any):
            return
        self._copied.synchronize()  # what was written last has been read
        self._any = bool(chains)
        written = self._chains.numpy()
        written[:] = 0
        for row, chain in chains.items():
            written[row, : 1 + len(chain)] = len(chain), *chain
        self._forced.copy_(self._chains, non_blocking=True)
        self._copied.record()

    def look(self, drafted: Drafted, members: Members, peek: Callable[[], Tensor]) -> "Looked | None":
        """Launch a look at what would be chosen without structures (ModelStep.peek), where that is worth it. The likeliest of all
        tokens is the likeliest of those that are allowed, if it is one of them: then no mask is needed. Elsewhere one is, for
        that node and those behind it. But what is truncated (top-p) depends on what is allowed; there, and where there are few,
        all nodes have a mask, made while the model runs."""
        guide = drafted.guide
        if len(guide.rows) * drafted.nodes <= _HIDDEN:
            return None
        rows = [row for row in guide.rows if not _truncates(members.requests[row].params)]
        if not rows:
            return None
        table = self._looks.copy(peek()[: len(members.slots)])
        self._peeked.record()
        return Looked(rows, table, self._peeked)

    def clear(self) -> None:
        """All may follow everywhere. The step before has chosen by its masks, or is about to; the host has time now, as the model
        was launched."""
        if self._touched:
            self._masked.synchronize()
            self._masks.fill_(-1)
            for words in self._touched:
                words.fill(-1)
            self._touched.clear()

    def allow(
        self, given: Given, drafted: Drafted, looked: "Looked | None"
    ) -> Mapping[tuple[int, tuple[int, ...]], str]:
        """Write what may follow the nodes where that decides. Returns Guide.failed. looked: from `look`."""
        guide = drafted.guide
        begins = dict.fromkeys(guide.rows if looked is None else sorted({*guide.rows} - {*looked.rows}), 0)
        self._write(given, drafted, begins)
        if looked:
            self._write(given, drafted, guide.unfit(looked.rows, looked.wait()))
        return guide.failed

    def _write(self, given: Given, drafted: Drafted, begins: Mapping[int, int]) -> None:
        """What may follow in these rows, which are in ascending order, from these nodes on."""
        if not begins:
            return
        drafted.guide.fill(given.written, *drafted.wait(begins), begins, self._touched)
        for first, last in _runs(list(begins)):
            given.mask[first:last].copy_(given.written[first:last], non_blocking=True)
        self._masked.record()
