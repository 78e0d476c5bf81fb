"""Masks from constraints on the text, for every node of a tree. Constraints live on the host, so this waits for the tree."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any, Protocol, TypeVar, final

import torch
from torch import Tensor

_NEVER = -float("inf")
T = TypeVar("T")
ByRow = Sequence[T] | Mapping[int, T]


class Constraint(Protocol):
    """What one answer must match (structure.GrammarState)."""

    def forced(self, path: tuple[int, ...]) -> list[int]:
        """Tokens that must follow the answer so far and then `path`, as far as that is quickly known: good drafts."""

    def mask(self, path: tuple[int, ...]) -> Tensor:
        """Which tokens may follow the answer so far and then `path`: [W] int32 on the CPU, one bit per token."""

    def fits(self, path: tuple[int, ...], tokens: Sequence[int]) -> int:
        """How many of the tokens may follow the answer so far and then `path`, one after the other: as `mask` has it."""

    def expect(self, tokens: Sequence[int]) -> None:
        """`tokens` will belong to the answer: those of steps that are in flight or have landed, all that it was not told of by
        `advance` yet. From now on everything is asked behind them."""

    def advance(self, tokens: Sequence[int]) -> None:
        """`tokens` now belong to the answer."""

    @property
    def complete(self) -> bool:
        """Whether the answer so far is all that it must be, and may end here."""


@final
class Guide:
    """The constraints of a batch; None where a request has none. rows: of the requests that have one.

    A constraint that raises after a path leaves no token to choose there: the request ends if its answer takes that path,
    as it would without drafts. The messages of the last step stand in `failed`, by the request's row and the path.
    """

    def __init__(self, constraints: Sequence[Constraint | None]) -> None:
        self._constraints = constraints
        self.rows = [row for row, each in enumerate(constraints) if each is not None]
        self.failed: dict[tuple[int, tuple[int, ...]], str] = {}

    @classmethod
    def build(cls, constraints: Sequence[Constraint | None]) -> "Guide | None":
        return cls(constraints) if any(constraints) else None

    def begin(self, requests: Sequence[T], said: Callable[[Sequence[T]], Sequence[Sequence[int]]]) -> None:
        """Another step. said: what steps in flight emit for requests, which their constraints have not been told yet."""
        self.failed = {}
        for row, tokens in zip(self.rows, said([requests[row] for row in self.rows]), strict=True):
            constraint = self._constraints[row]
            assert constraint is not None
            if tokens:
                with suppress(Exception):  # `advance` will meet it, too
                    constraint.expect(tokens)

    def forced(self, rows: Sequence[int], most: int) -> dict[int, list[int]]:
        """Of these requests, which have a constraint: the tokens that must come next, `most` at most, where there are any."""
        found = dict[int, list[int]]()
        for row in rows:
            constraint = self._constraints[row]
            assert constraint is not None
            with suppress(Exception):  # `fill` will meet it, too
                if chain := constraint.forced(())[:most]:
                    found[row] = chain
        return found

    def unfit(self, rows: Sequence[int], chosen: Sequence[Sequence[int]]) -> dict[int, int]:
        """Of these requests, which have a constraint: behind which node one chose what may not follow there. chosen: by row a
        number of tokens, the tokens, and the nodes."""
        found = dict[int, int]()
        for row in rows:
            constraint, (count, *rest) = self._constraints[row], chosen[row]
            assert constraint is not None
            tokens, nodes = rest[:count], rest[len(rest) // 2 :]
            try:
                fit = constraint.fits((), tokens)
            except Exception:  # `fill` will meet it, too
                fit = 0
            if fit < count:
                found[row] = nodes[fit]
        return found

    def fill(
        self, masks: Tensor, tokens: ByRow[Sequence[int]], parents: ByRow[Sequence[int]], sizes: ByRow[int],
        begins: Mapping[int, int] | None = None, touched: list[Any] | None = None,
    ) -> None:  # fmt: skip
        """For the main model: write into masks, [B, N, W] int32 on the CPU, what may follow the first sizes[b] nodes of a tree.

        tokens, parents: [B, N]. None may where the constraint raised. begins: by row, the node behind which, and behind whose
        descendants; otherwise it is all nodes of all requests that have a constraint. touched: gets each node's words, an
        array, before they are written.
        """
        if begins is None:
            begins, self.failed = dict.fromkeys(self.rows, 0), {}
        written = masks.numpy()
        for row, begin in begins.items():
            paths, behind = list[tuple[int, ...]]([()]), {begin}
            for node in range(sizes[row]):
                if node:
                    paths.append((*paths[parents[row][node]], tokens[row][node]))
                if node == begin or parents[row][node] in behind:
                    behind.add(node)
                    mask = self._mask(row, paths[node])
                    words = written[row, node]
                    if touched is not None:
                        touched.append(words)
                    words[:] = 0 if mask is None else mask.numpy()

    def narrow(self, tokens: Tensor, parents: Tensor, logits: Tensor, ids: Tensor) -> Tensor:
        """For a drafter: -inf for what may not follow. tokens, parents: [B, n] of a growing tree; logits: [B, F, len(ids)] of
        its last F nodes. A node after which none of the `ids` may follow keeps its own; so does one whose constraint raises.
        """
        names, up, logits = tokens.tolist(), parents.tolist(), logits.clone()
        word, bit = ids // 32, (ids % 32).int()
        frontier = range(tokens.shape[1] - logits.shape[1], tokens.shape[1])
        for row in self.rows:
            found = [self._mask(row, _path(names[row], up[row], node)) for node in frontier]
            if masks := [mask for mask in found if mask is not None]:
                words = torch.stack([torch.zeros_like(masks[0]) if mask is None else mask for mask in found])
                allowed = ((words.to(logits.device)[:, word] >> bit) & 1).bool()
                logits[row].masked_fill_(~allowed & allowed.any(1, keepdim=True), _NEVER)
        return logits

    def _mask(self, row: int, path: tuple[int, ...]) -> Tensor | None:
        """None where the constraint raised."""
        constraint = self._constraints[row]
        assert constraint is not None
        try:
            return constraint.mask(path)
        except Exception as error:
            self.failed[row, path] = str(error)
            return None


def unpack(words: Tensor) -> Tensor:
    """[..., W] int32 -> [..., 32 W] bool."""
    bits = torch.arange(32, dtype=torch.int32, device=words.device)
    return ((words[..., None] >> bits) & 1).bool().flatten(-2)


def _path(tokens: Sequence[int], parents: Sequence[int], node: int) -> tuple[int, ...]:
    """The drafts from the root's child to `node`."""
    path: list[int] = []
    while parents[node] >= 0:
        path.append(tokens[node])
        node = parents[node]
    return tuple(path[::-1])
