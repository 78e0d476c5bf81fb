"""The cache of layers with full attention: fixed-size pages, which an allocator hands to slots."""

import mmap
import sys
from typing import final

import torch
from torch import Tensor

from mtp_engine.cache.pages import Pages
from mtp_engine.kernels.reference import move_rows, write_rows


def _zeros(layers: int, rows: int, heads: int, dim: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """[layers, rows, heads, dim] of zeros: a key that a mask hides must still be finite, since 0 * NaN is NaN.

    On a CPU it is untouched pages of the system, which cost memory only once written. Small ones: numpy asks for pages of
    2 MB, of which the first tokens of a request would touch one per layer.
    """
    if device.type != "cpu" or sys.platform == "win32":
        return torch.zeros(layers, rows, heads, dim, dtype=dtype, device=device)
    try:
        pages = mmap.mmap(-1, layers * rows * heads * dim * dtype.itemsize, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        raise MemoryError(str(error)) from error
    return torch.frombuffer(pages, dtype=dtype).view(layers, rows, heads, dim)


@final
class PagedKV:
    """Keys and values of `layers` layers, all with the same head shapes, in the pages of `owner`.

    Row r of the storage is token r % page_size of page r // page_size. Where a slot's pages are one contiguous run, its
    keys are a view.
    """

    def __init__(
        self, owner: Pages, *, layers: int, kv_heads: int, qk_dim: int, v_dim: int, dtype: torch.dtype
    ) -> None:
        self.owner, self.page_size, self.device = owner, owner.page_size, owner.device
        rows = owner.count * owner.page_size
        self.k = _zeros(layers, rows, kv_heads, qk_dim, dtype, owner.device)
        self.v = _zeros(layers, rows, kv_heads, v_dim, dtype, owner.device)
        self.token_bytes = layers * kv_heads * (qk_dim + v_dim) * dtype.itemsize  # of one token in all layers

    @property
    def table(self) -> list[list[int]]:
        return self.owner.table

    @property
    def device_pages(self) -> Tensor:
        """[slots, pages] int32."""
        return self.owner.on_device

    def rows(self, slots: Tensor, positions: Tensor) -> Tensor:
        """Storage rows of cache slots `positions` [B, N] of the requests in `slots` [B] -> [B, N] int64."""
        pages = self.device_pages[slots].gather(1, positions // self.page_size).long()
        return pages * self.page_size + positions % self.page_size

    def spans(self, slot: int, start: int, stop: int) -> list[slice]:
        """Storage rows of a slot's tokens start..stop-1, as few runs as possible. Never empty."""
        spans: list[slice] = []
        for page in range(start // self.page_size, max(start // self.page_size + 1, -(-stop // self.page_size))):
            first = self.table[slot][page] * self.page_size
            low, high = max(start - page * self.page_size, 0), min(stop - page * self.page_size, self.page_size)
            if spans and spans[-1].stop == first:
                spans[-1] = slice(spans[-1].start, first + high)
            else:
                spans.append(slice(first + low, first + max(low, high)))
        return spans

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
