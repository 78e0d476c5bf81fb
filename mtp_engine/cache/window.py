"""The cache of sliding-window layers: one ring per slot that never rolls back.

A query sees `window` keys, itself included, and a step appends at most `max_nodes` rows that may be rejected. A ring of
window + max_nodes - 1 rows holds both: the oldest key still needed, at length - window + 1, and the newest row, at
length + max_nodes - 1, are that many apart. One row less would overwrite a needed key. Rejecting a row costs nothing.
The CUDA kernels see a ring as pages that repeat, so there it is a whole number of pages.
"""

from typing import final

import torch
from torch import Tensor

from mtp_engine.kernels.reference import move_rows, write_rows


def ring_spans(base: int, size: int, start: int, stop: int) -> list[slice]:
    """Rows of positions start..stop-1 in a ring of `size` rows from row `base` on: one run, or two where it turns."""
    low, count = start % size, stop - start
    before = min(count, size - low)
    spans = [slice(base + low, base + low + before)]
    return spans if before == count else [*spans, slice(base, base + count - before)]


def write_ring(ring: Tensor, start: int, values: Tensor) -> None:
    """values [C, ...] of positions start..start+C-1 into a ring [R, ...]: position p in row p % R."""
    done = 0
    for span in ring_spans(0, len(ring), start, start + len(values)):
        done, begin = done + span.stop - span.start, done
        ring[span] = values[begin:done]


@final
class WindowKV:
    """Keys and values of `layers` layers with the same head shapes and window. Position p lies in ring row p % size."""

    def __init__(
        self,
        *,
        layers: int,
        kv_heads: int,
        qk_dim: int,
        v_dim: int,
        slots: int,
        window: int,
        max_nodes: int,
        page_size: int = 1,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.window, self.page_size, self.device = window, page_size, device
        ring = -(-(window + max_nodes - 1) // page_size)  # pages
        self.size = ring * page_size
        self.device_pages = torch.arange(slots * ring, dtype=torch.int32, device=device).view(slots, ring)
        # zeros: rows never written are masked, but NaN from uninitialised memory would survive a mask (0 * NaN)
        self.k = torch.zeros(layers, slots * self.size, kv_heads, qk_dim, dtype=dtype, device=device)
        self.v = torch.zeros(layers, slots * self.size, kv_heads, v_dim, dtype=dtype, device=device)
        self.token_bytes = layers * kv_heads * (qk_dim + v_dim) * dtype.itemsize  # of one row in all layers

    def rows(self, slots: Tensor, positions: Tensor) -> Tensor:
        """Storage rows of `positions` [B, N] of the requests in `slots` [B] -> [B, N] int64."""
        return slots[:, None] * self.size + positions % self.size

    def spans(self, slot: int, start: int, stop: int) -> list[slice]:
        """Storage rows of positions start..stop-1 in a slot's ring."""
        return ring_spans(slot * self.size, self.size, start, stop)

    def prefix_positions(self, lengths: Tensor) -> Tensor:
        """The window - 1 positions before each length, oldest first: [B, window - 1]; negative ones do not exist."""
        return lengths[:, None] - self.window + 1 + torch.arange(self.window - 1, device=self.device)

    def write(self, layer: int, rows: Tensor, k: Tensor, v: Tensor) -> None:
        """rows: [B, N]; k: [B, N, Hkv, Dk]; v: [B, N, Hkv, Dv]. Of a chunk longer than the ring only the end is kept."""
        rows, k, v = (x[:, -self.size :] for x in (rows, k, v))
        write_rows(self.k[layer], rows, k)
        write_rows(self.v[layer], rows, v)

    def read(self, layer: int, rows: Tensor) -> tuple[Tensor, Tensor]:
        """rows: [B, S] -> keys [B, S, Hkv, Dk] and values [B, S, Hkv, Dv]."""
        return self.k[layer][rows], self.v[layer][rows]

    def move(self, source: Tensor, target: Tensor) -> None:
        """Copy storage rows source [M] to target [M] in every layer."""
        move_rows(self.k, source, target)
        move_rows(self.v, source, target)
