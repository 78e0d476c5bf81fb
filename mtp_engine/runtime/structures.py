"""What the host adds to recorded steps for requests with a structure: drafts that must come, and what may follow each."""

from collections.abc import Callable, Mapping
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


def _truncates(params: SamplingParams) -> bool:
    return params.temperature > 0 and bool(params.top_k or params.top_p < 1 or params.min_p)


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
    table: Tensor  # [B, 2 N + 1] int64: tokens, parents and size of each tree
    done: Mark
    depth: int  # of the trees, at most
    forced: dict[int, list[int]] = field(default_factory=dict)  # by row, chains in place of trees

    def wait(self) -> tuple[list[list[int]], list[list[int]], list[int]]:
        """Tokens, parents and sizes, by row."""
        self.done.synchronize()
        nodes = self.table.shape[1] // 2
        columns = self.table[:, :nodes], self.table[:, nodes:-1]
        (tokens, parents), sizes = (part.tolist() for part in columns), self.table[:, -1].tolist()
        for row, chain in self.forced.items():
            tokens[row], parents[row], sizes[row] = [0, *chain], list(range(-1, len(chain))), 1 + len(chain)
        return tokens, parents, sizes


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
            return None if guide is None else Drafted(guide, torch.tensor([[0, -1, 1]] * count), HostMark(), 0)
        table = self._host(torch.cat([tree.tokens, tree.parents, tree.size[:, None]], 1)[:count])
        done = self._mark()
        done.record()
        return Drafted(guide, table, done, min(tree.max_depth, tree.nodes - 1))

    def force(self, drafted: Drafted, members: Members, said: Said) -> bool:
        """Tell the guide of another step, for which what steps in flight say is waited for, and put chains that are forced in
        place of trees. False where there are none, as nothing is drafted."""
        guide = drafted.guide
        guide.begin(members.requests, said)
        if not drafted.depth:
            return False
        params = [request.params for request in members.requests]
        free = [row for row in guide.rows if params[row].speculate and params[row].tree is None]
        drafted.forced.update(guide.forced(free, drafted.depth))
        self._force(drafted.forced)
        return True

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

    def allow(
        self, given: Given, drafted: Drafted, members: Members, peek: Callable[[], Tensor] | None
    ) -> Mapping[tuple[int, tuple[int, ...]], str]:
        """Write what may follow the nodes where that decides. Returns Guide.failed.

        peek: what would be chosen without structures (ModelStep.peek). The likeliest of all tokens is the likeliest of those
        that are allowed, if it is one of them: then no mask is needed. Elsewhere one is, for that node and those behind it. But
        what is truncated (top-p) depends on what is allowed; there, without `peek`, and where there are few, all nodes have
        one, made while the model runs.
        """
        guide, params = drafted.guide, [request.params for request in members.requests]
        many = len(guide.rows) * given.mask.shape[1] > _HIDDEN
        late = [row for row in guide.rows if peek and many and not _truncates(params[row])]
        looked = self._looked(peek, len(params)) if peek and late else None
        trees = drafted.wait()
        self._settle()
        if self._masked:
            self._masks.fill_(-1)
        written = self._written[: given.mask.numel()].view(given.mask.shape)
        begins = {row: 0 for row in guide.rows if row not in late}
        written.numpy()[list(begins)] = -1
        guide.fill(written, *trees, begins)
        if looked:
            unfit = guide.unfit(late, looked())
            written.numpy()[list(unfit)] = -1
            guide.fill(written, *trees, unfit)
            begins |= unfit
        self._masked = bool(begins)
        if begins:
            first, last = min(begins), max(begins) + 1
            written.numpy()[[row for row in late if first < row < last and row not in begins]] = -1
            given.mask[first:last].copy_(written[first:last], non_blocking=True)
            self._copied = self._mark()
            self._copied.record()
        return guide.failed

    def _looked(self, peek: Callable[[], Tensor], count: int) -> Callable[[], list[list[int]]]:
        """Launch it; what is returned waits for it."""
        table, done = self._host(peek()[:count]), self._mark()
        done.record()

        def wait() -> list[list[int]]:
            done.synchronize()
            return table.tolist()  # type: ignore[no-any-return]

        return wait

    def _settle(self) -> None:
        """Wait until what was written last has been read."""
        if self._copied:
            self._copied.synchronize()

    def _host(self, tensor: Tensor) -> Tensor:
        """A copy on the host, complete once what is queued on the device by now is done."""
        copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=self._cuda)
        return copy.copy_(tensor, non_blocking=True)
