"""How Triton kernels are launched here."""

import os
from functools import cache

import torch

SMS = 132  # multiprocessors of an H100; on another GPU the choice of tiles is a little worse
SHARED = 220_000  # bytes of shared memory that the stages of a CTA may take (an H100 has 232,448)


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up. Triton's own is made for kernels and takes 8 us on the host; a prompt waits for hundreds."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The smallest that is not below n, which is 1 or more. As for `cdiv`."""
    return 1 << (n - 1).bit_length()


def overlap(rows: int) -> int:
    """Programmatic dependent launch of a kernel over so many rows of activations: 0 none; when it lets the next kernel start,
    1: at once, 3: when its sums are done. (2, after it has waited for the one before, is for weights that are read in no
    time.) With more rows a kernel's own work is long, and kernels that wait for it from the start only take its room."""
    return pdl() and (1 if rows <= 32 else 3)


@cache
def pdl() -> bool:
    """Whether kernels use programmatic dependent launch: a kernel starts, and fetches its weights, before the one it
    depends on has ended. Hopper and later; never in Triton's interpreter. MTP_ENGINE_PDL=0 turns it off."""
    if os.environ.get("TRITON_INTERPRET") == "1" or os.environ.get("MTP_ENGINE_PDL") == "0":
        return False
    return hopper()


@cache
def hopper() -> bool:
    """Whether there is a copy engine that fetches tiles (a GPU of Hopper or later)."""
    return torch.cuda.is_available() and torch.cuda.get_device_capability() >= (9, 0)


@cache
def warpgroups() -> bool:
    """Whether four warps multiply together (wgmma): Hopper's alone."""
    return torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9
