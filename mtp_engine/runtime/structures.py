"""What the host adds to recorded steps for requests with a structure: drafts that must come, and what may follow each."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import final

import torch
from torch import Tensor

from mtp_engine.config import SamplingParams
from mtp_engine.runtime.flight import HostMark, Mark
from mtp_engine.runtime.request import Members
from mtp_engine.runtime.step import Said
from mtp_engine.sampling.masks import Guide
from mtp_engine.tree import DraftTree

_HIDDEN = 8  # masks that take the host no longer than the model runs

Trees = tuple[list[list[int]], list[list[int]], list[int]]
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
    forced: Tensor | None  # [B, 1 + D] int64, see DraftTree.forced; None where there are no drafts


@final
@dataclass(frozen=True)
class Drafted:
    """A step that has drafted, on its way to the host."""

    guide: Guide
    table: Tensor | None  # [B, 2 N + 1] int64: tokens, parents and size of each tree; None where all are roots
    done: Mark
    nodes: int  # of each tree's room
    depth: int  # of the trees, at most
    forced: dict[int, list[int]] = field(default_factory=dict)  # by row, chains in place of trees

    def wait(self) -> Trees:
        if self.table is None:
            count = self.guide.size
            return [[0]] * count, [[-1]] * count, [1] * count
        self.done.synchronize()
        rows, nodes = self.table.tolist(), self.nodes
        tokens, parents, sizes = (
            [row[:nodes] for row in rows],
            [row[nodes:-1] for row in rows],
            [row[-1] for row in rows],
        )
        for row, chain in self.forced.items():
            tokens[row], parents[row], sizes[row] = [0, *chain], list(range(-1, len(chain))), 1 + len(chain)
        return tokens, parents, sizes


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
        self._words, self._cuda, self._mark = -(-vocab // 32), device.type == "cuda", mark
        self._masks = torch.full((batch * nodes * self._words,), -1, dtype=torch.int32, device=device)
        self._written = self._host(self._masks)
        self._forced = torch.zeros(batch, 1 + depth, dtype=torch.int64, device=device)
        self._chains = self._host(self._forced)
        self._any = False  # whether something is forced at present
        self._masked = False  # whether the masks are not all ones
        self._copied: Mark | None = None

    def given(self, batch: int, nodes: int) -> Given:
        mask = self._masks[: batch * nodes * self._words].view(batch, nodes, self._words)
        return Given(mask, self._forced[:batch] if nodes > 1 else None)

    def begin(self, tree: DraftTree, members: Members) -> Drafted | None:
        """A step is drafting, and its model does not run yet. None where nobody has a structure."""
        guide, count = members.guide, len(members.slots)
        if guide is None or tree.nodes == 1:
            self._force({})
            return None if guide is None else Drafted(guide, None, HostMark(), 1, 0)
        table = self._host(torch.cat([tree.tokens, tree.parents, tree.size[:, None]], 1)[:count])
        done = self._mark()
        done.record()
        return Drafted(guide, table, done, tree.nodes, min(tree.max_depth, tree.nodes - 1))

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
        self._settle()
        self._any = bool(chains)
        written = self._chains.numpy()
        written[:] = 0
        for row, chain in chains.items():
            written[row, : 1 + len(chain)] = len(chain), *chain
        self._forced.copy_(self._chains, non_blocking=True)
        self._copied = self._mark()
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
        table, done = self._host(peek()[: len(members.slots)]), self._mark()
        done.record()
        return Looked(rows, table, done)

    def allow(
        self, given: Given, drafted: Drafted, looked: "Looked | None"
    ) -> Mapping[tuple[int, tuple[int, ...]], str]:
        """Write what may follow the nodes where that decides. Returns Guide.failed. looked: from `look`."""
        guide = drafted.guide
        self._settle()
        if self._masked:
            self._masks.fill_(-1)
        begins = dict.fromkeys(guide.rows if looked is None else sorted({*guide.rows} - {*looked.rows}), 0)
        unfit = dict[int, int]()
        self._write(given, drafted, begins)
        if looked:
            unfit = guide.unfit(looked.rows, looked.wait())
            self._write(given, drafted, unfit)
        self._masked = bool(begins or unfit)
        return guide.failed

    def _write(self, given: Given, drafted: Drafted, begins: Mapping[int, int]) -> None:
        """What may follow in these rows, which are in ascending order, from these nodes on."""
        if not begins:
            return
        written = self._written[: given.mask.numel()].view(given.mask.shape)
        written.numpy()[list(begins)] = -1
        drafted.guide.fill(written, *drafted.wait(), begins)
        for first, last in _runs(list(begins)):
            given.mask[first:last].copy_(written[first:last], non_blocking=True)
        self._copied = self._mark()
        self._copied.record()

    def _settle(self) -> None:
        """Wait until what was written last has been read."""
        if self._copied:
            self._copied.synchronize()

    def _host(self, tensor: Tensor) -> Tensor:
        """A copy on the host, complete once what is queued on the device by now is done."""
        copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=self._cuda)
        return copy.copy_(tensor, non_blocking=True)
