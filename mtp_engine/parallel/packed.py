"""A score and a token as one number of 64 bits, whose order is that of the scores and, among equal ones, lower tokens first.

So ranks agree on a best token by exchanging one number each.
"""

import torch
from torch import Tensor

_MASK32 = 0xFFFFFFFF


def pack(scores: Tensor, tokens: Tensor) -> Tensor:
    """fp32 scores, none of them NaN, and int64 tokens below 2**32, of one shape -> int64."""
    bits = (scores + 0.0).view(torch.int32)  # -0 becomes 0, which it equals
    ordered = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)  # as whole numbers fp32's negative ones fall
    return (ordered.long() << 32) | (_MASK32 - tokens)


def unpack(packed: Tensor) -> tuple[Tensor, Tensor]:
    """The scores and the tokens."""
    ordered = (packed >> 32).int()
    return torch.where(ordered < 0, ordered ^ 0x7FFFFFFF, ordered).view(torch.float32), _MASK32 - (packed & _MASK32)
