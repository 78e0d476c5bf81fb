"""The cache of layers with full attention: fixed-size pages, handed to slots as they are reserved."""

from typing import final

import numpy as np
import torch
from torch import Tensor

from mtp_engine.kernels.reference import move_rows, write_rows


def _zeros(layers: int, rows: int, heads: int, dim: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """[layers, rows, heads, dim] of zeros: a key that a mask hides must still be finite, since 0 * NaN is NaN.

    On a CPU it comes from numpy, whose zeros are the system's untouched pages: they cost memory only once written.
    """
    if device.type != "cpu":
        return torch.zeros(layers, rows, heads, dim, dtype=dtype, device=device)
    return (
        torch.from_numpy(np.zeros(layers * rows * heads * dim * dtype.itemsize, np.uint8))
        .view(dtype)
        .view(layers, rows, heads, dim)
    )


@final
class PagedKV:
    """Keys and values of `layers` layers, all with the same head shapes, in `pages` pages of `page_size` tokens.

    Row r of the storage is token r % page_size of page r // page_size. Slot s's token t lies in page
    table[s][t // page_size]. Pages are taken in one contiguous run where there is one: then a slot's keys are a view.
    `device_pages` is the same table as a tensor, [slots, pages] int32.
    """

    def __init__(
        self,
        *,
        layers: int,
        kv_heads: int,
        qk_dim: int,
        v_dim: int,
        slots: int,
        pages: int,
        page_size: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.page_size, self.pages, self.device = page_size, pages, device
        self.k = _zeros(layers, pages * page_size, kv_heads, qk_dim, dtype, device)
        self.v = _zeros(layers, pages * page_size, kv_heads, v_dim, dtype, device)
        self.table: list[list[int]] = [[] for _ in range(slots)]
        self.device_pages = torch.zeros(slots, pages, dtype=torch.int32, device=device)
        self._free = [True] * pages

    @property
    def room(self) -> int:
        """Tokens for which pages are free."""
        return sum(self._free) * self.page_size

    def reserve(self, slot: int, tokens: int) -> bool:
        """Give `slot` pages for `tokens` tokens in all. False, with nothing changed, if too few are free."""
        missing = -(-tokens // self.page_size) - len(self.table[slot])
        if missing <= 0:
            return True
        if missing * self.page_size > self.room:
            return False
        taken = self._run(missing) or [page for page in range(self.pages) if self._free[page]][:missing]
        for page in taken:
            self._free[page] = False
        self.table[slot].extend(taken)
        table = torch.tensor(self.table[slot], dtype=torch.int32)
        if self.device.type != "cpu":
            table = table.pin_memory()  # a copy from other memory would wait for all that is queued
        self.device_pages[slot, : len(table)].copy_(table, non_blocking=True)
        return True

    def _run(self, count: int) -> list[int] | None:
        start = 0
        for page in range(self.pages):
            if not self._free[page]:
                start = page + 1
            elif page - start + 1 == count:
                return list(range(start, page + 1))
        return None

    def release(self, slot: int) -> None:
        for page in self.table[slot]:
            self._free[page] = True
        self.table[slot] = []

    def rows(self, slots: Tensor, positions: Tensor) -> Tensor:
        """Storage rows of cache slots `positions` [B, N] of the requests in `slots` [B] -> [B, N] int64."""
        pages = self.device_pages[slots].gather(1, positions // self.page_size).long()
        return pages * self.page_size + positions % self.page_size

    def write(self, layer: int, rows: Tensor, k: Tensor, v: Tensor) -> None:
        """rows: [B, N]; k: [B, N, Hkv, Dk]; v: [B, N, Hkv, Dv]."""
        write_rows(self.k[layer], rows, k)
        write_rows(self.v[layer], rows, v)

    def read(self, layer: int, slot: int, tokens: int) -> tuple[Tensor, Tensor]:
        """Keys and values of the slot's first `tokens` tokens: [tokens, Hkv, Dk], [tokens, Hkv, Dv]."""
        pages = self.table[slot][: -(-tokens // self.page_size)]
        if pages[-1] - pages[0] == len(pages) - 1 and pages == list(range(pages[0], pages[0] + len(pages))):
            start = pages[0] * self.page_size
            return self.k[layer, start : start + tokens], self.v[layer, start : start + tokens]
        offsets = torch.arange(self.page_size, device=self.device)
        rows = (torch.tensor(pages, device=self.device)[:, None] * self.page_size + offsets).flatten()[:tokens]
        return self.k[layer][rows], self.v[layer][rows]

    def move(self, source: Tensor, target: Tensor) -> None:
        """Copy storage rows source [M] to target [M] in every layer."""
        move_rows(self.k, source, target)
        move_rows(self.v, source, target)

    def check(self) -> None:
        taken = [page for pages in self.table for page in pages]
        assert len(taken) == len(set(taken)), "a page belongs to two slots"
        assert all(not self._free[page] for page in taken), "a page in use is marked free"
        assert len(taken) + sum(self._free) == self.pages, "a page has leaked"
