"""Who has which pages: one allocator for all paged layers of a loop, those of the MTP layers too.

Page p is the same rows p * page_size ... of every paged layer's storage, so that one table per slot says where all of
its keys and values lie. A page may belong to several slots and to entries of the prefix cache; it is free once nobody
counts on it. Nothing here waits for a GPU.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import final

import numpy as np
import torch
from numpy.typing import NDArray


@final
class Pages:
    """table[slot][t // page_size] is the page of the slot's token t; `on_device` says the same, [slots, pages] int32.

    A slot may hold more pages than it needs now, to have them in one run; they are taken back when others need them.
    short: called with a number of pages that are missing, and may make some free by `unhold`.
    """

    def __init__(self, *, slots: int, tokens: int, page_size: int, device: torch.device) -> None:
        """tokens: capacity over all slots, rounded up to whole pages."""
        self.slots, self.page_size, self.device = slots, page_size, device
        self.count = self.for_tokens(tokens)
        self.free = self.count
        self.given_back = 0  # pages, ever
        self.table: list[list[int]] = [[] for _ in range(slots)]
        self.on_device = torch.zeros(slots, self.count, dtype=torch.int32, device=device)
        self.short: Callable[[int], None] | None = None
        self._uses: NDArray[np.int32] = np.zeros(self.count, dtype=np.int32)
        self._needed = [0] * slots  # pages

    def for_tokens(self, tokens: int) -> int:
        return -(-tokens // self.page_size)

    @property
    def unreserved(self) -> int:
        """Tokens for which pages are free."""
        return self.free * self.page_size

    def reserve(self, slot: int, tokens: int, wish: int = 0) -> bool:
        """Give `slot` pages for `tokens` tokens in all, and for up to `wish` if they are free and lie in one run.

        False, with nothing changed for any slot's tokens, if there are too few even without what others hold in advance
        and what `short` gives up.
        """
        table = self.table[slot]
        needed = self.for_tokens(tokens)
        missing = needed - len(table)
        if missing > self.free:
            self._trim()
            missing = needed - len(table)
        if missing > self.free and self.short:
            self.short(missing - self.free)
        if missing > self.free:
            return False
        self._needed[slot] = needed
        if missing > 0:
            self._extend(slot, self._choose(table, missing, self.for_tokens(wish) - len(table)))
        return True

    def share(self, slot: int, pages: Sequence[int]) -> None:
        """Begin an empty slot's table with pages that others hold, too; they are only read from now on."""
        assert not self.table[slot], "the slot is not empty"
        self.hold(pages)
        self._needed[slot] = len(pages)
        self._list(slot, pages)

    def release(self, slot: int) -> None:
        self.unhold(self.table[slot])
        self.table[slot], self._needed[slot] = [], 0

    def hold(self, pages: Sequence[int]) -> None:
        """Count on pages that somebody has: they stay when those release them."""
        for page in pages:
            assert self._uses[page] > 0, "only what is in use can be shared"
            self._uses[page] += 1

    def unhold(self, pages: Sequence[int]) -> None:
        for page in pages:
            self._uses[page] -= 1
            assert self._uses[page] >= 0, "a page was given back twice"
            self.free += int(self._uses[page] == 0)
        self.given_back += len(pages)

    def _extend(self, slot: int, pages: Sequence[int]) -> None:
        for page in pages:
            self._uses[page] += 1
        self.free -= len(pages)
        self._list(slot, pages)

    def _list(self, slot: int, pages: Sequence[int]) -> None:
        start = len(self.table[slot])
        self.table[slot].extend(pages)
        new = torch.tensor(pages, dtype=torch.int32)
        if self.device.type != "cpu":
            new = new.pin_memory()  # a copy from other memory would wait for all that is queued
        self.on_device[slot, start : start + len(pages)].copy_(new, non_blocking=True)

    def _trim(self) -> None:
        """Take back what slots hold in advance."""
        for slot, needed in enumerate(self._needed):
            self.unhold(self.table[slot][needed:])
            del self.table[slot][needed:]

    def _choose(self, table: Sequence[int], missing: int, wish: int) -> list[int]:
        """Free pages: behind the table's last one if possible, a run for an empty table if there is one, else any."""
        free: NDArray[np.int64] = np.flatnonzero(self._uses == 0)
        for count in dict.fromkeys((max(wish, missing), missing)):
            if count > len(free):
                continue
            last = free[count - 1 :] - free[: len(free) - count + 1] == count - 1  # a run of `count` begins here
            if table:
                last &= free[: len(last)] == table[-1] + 1
            if last.any():
                start = int(last.argmax())
                return [int(page) for page in free[start : start + count]]
        return [int(page) for page in free[:missing]]

    def check(self, held: Sequence[int] = ()) -> None:
        """Assert that the counts are those of the tables, and of `held`, the pages that others hold."""
        uses = Counter(page for table in self.table for page in table) + Counter(held)
        assert all(uses[page] == self._uses[page] for page in range(self.count)), "a page has leaked or is used unseen"
        assert self.free == sum(self._uses == 0)
        for slot, table in enumerate(self.table):
            assert len(table) == len(set(table)), "a slot has a page twice"
            assert len(table) >= self._needed[slot]
            assert self.on_device[slot, : len(table)].tolist() == table
