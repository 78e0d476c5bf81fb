"""The main model's choice at every node, with noise keyed by (seed, position, token).

choice = argmax(logits + temperature * gumbel), which samples softmax(logits / temperature) exactly (the Gumbel-max
trick; Maddison et al. 2014, "A* Sampling"). The noise depends on nothing but the request's seed, the position and the
token, so any tree and any batch choose what plain decoding chooses (Daliri et al. 2024, "Coupling without
communication"). Temperature 0 needs no branch: the noise is multiplied away.
"""

import torch
from torch import Tensor

from mtp_engine.sampling.batch import SamplingBatch

_MASK32 = 0xFFFFFFFF
# any numbers do, as long as kernels/arrival.py has the same: the primes of xxHash32, then digits of pi
_SEED_ROUNDS = (0x9E3779B1, 0x85EBCA77, 0xC2B2AE3D, 0x27D4EB2F)
_POSITION_ROUNDS = (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344)
_TOP_P_CANDIDATES = 512  # a nucleus rarely holds more; when it does, the whole row is sorted


def _mix(x: Tensor) -> Tensor:
    """A 32-bit integer hash with full avalanche (the "lowbias32" constants, C. Wellons 2018), in int64 arithmetic.

    Works in place, so `x` must be the caller's own.
    """
    x ^= x >> 16
    x *= 0x7FEB352D
    x &= _MASK32
    x ^= x >> 15
    x *= 0x846CA68B
    x &= _MASK32
    x ^= x >> 16
    return x


def _halves(x: Tensor) -> tuple[Tensor, Tensor]:
    """The low and the high 32 bits of int64 values."""
    return x & _MASK32, (x >> 32) & _MASK32


def _feistel(left: Tensor, right: Tensor, constants: tuple[int, int, int, int]) -> tuple[Tensor, Tensor]:
    """Four rounds of a Feistel network: it scrambles 64 bits, in two halves, and no two inputs have the same output.

    Each round can be undone, since it changes one half by what the other, which it leaves alone, determines.
    """
    first, second, third, fourth = constants
    left = left ^ _mix(right ^ first)
    right = right ^ _mix(left ^ second)
    left = left ^ _mix(right ^ third)
    return left, right ^ _mix(left ^ fourth)


def noise_key(seed: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """The noise of a (seed, position) as a key of 64 bits, in two halves of 32: [B], [B, P] int64 -> 2 x [B, P] int64.

    All bits of both count. At one position different seeds have different keys, always; so have the positions of a seed.
    """
    left, right = _feistel(*_halves(seed), _SEED_ROUNDS)
    low, high = _halves(positions)
    return _feistel(left[:, None] ^ low, right[:, None] ^ high, _POSITION_ROUNDS)


def _bits(seed: Tensor, positions: Tensor, tokens: Tensor) -> Tensor:
    """32 random bits per (seed, position, token), as int64; shapes as in `gumbel`."""
    first, second = noise_key(seed, positions)
    bits = _mix((tokens & _MASK32) ^ first[..., None])
    bits ^= second[..., None]
    return _mix(bits)


def _open_unit(bits: Tensor) -> Tensor:
    """32-bit integers -> fp32 in (0, 1)."""
    return ((bits.float() + 0.5) * 2.0**-32).clamp_(max=1 - 2.0**-24)


def gumbel(seed: Tensor, positions: Tensor, tokens: Tensor) -> Tensor:
    """Standard Gumbel noise, the same for the same (seed, position, token) on every device.

    seed: [B] int64; positions: [B, P] int64, of the token being chosen; tokens: [V] int64. Returns [B, P, V] fp32.
    """
    # v = 1 - u keeps 32 bits of resolution where u nears 1, which is where large noise comes from
    v = _open_unit(_bits(seed, positions, tokens))
    return v.neg_().log1p_().neg_().log_().neg_()


def uniform(seed: Tensor, numbers: Tensor) -> Tensor:
    """Uniform noise in (0, 1). seed: [B] int64; numbers: [B, K] int64, which draw of that seed. Returns [B, K] fp32."""
    return _open_unit(_bits(seed, numbers, torch.zeros(1, dtype=torch.int64, device=seed.device))[..., 0])


def step_seed(seed: Tensor, lengths: Tensor, purpose: int) -> Tensor:
    """A seed per request, step and purpose, for noise that must not come twice: [B], [B] int64 -> [B] int64.

    No two steps of a request begin at the same length. Rules that reject need it: a token drafted anew at a position
    must not depend on noise that a rejection there has already used.
    """
    left, right = (half[:, 0] for half in noise_key(seed, lengths[:, None]))
    left, right = _feistel(left ^ purpose, right, _SEED_ROUNDS)
    return left | ((right & 0x7FFFFFFF) << 32)


def truncate(logits: Tensor, batch: SamplingBatch) -> Tensor:
    """Set what min-p, top-k and top-p remove to -inf, in that order, each on what the one before left (vLLM's order).

    logits: [B, N, V] fp32, before temperature. Returns a tensor of the same shape; see SamplingParams for definitions.
    """
    if not batch.truncated:
        return logits
    return logits.masked_fill(logits < floors(logits, batch), -float("inf"))


def floors(logits: Tensor, batch: SamplingBatch) -> Tensor:
    """The smallest logit that `truncate` leaves: [B, N, 1] fp32. Tokens that tie with it stay, too."""
    temperature = batch.temperature.clamp(min=1e-6).view(-1, 1, 1)
    top_p, min_p, top_k = (value.view(-1, 1, 1) for value in (batch.top_p, batch.min_p, batch.top_k))
    vocab = logits.shape[-1]
    # a GPU sorts it all: looking whether that is needed would wait for it
    wanted = vocab if logits.is_cuda else min(vocab, max(_TOP_P_CANDIDATES, batch.widest_top_k))
    best = logits.topk(wanted, dim=-1).values  # [B, N, wanted], falling
    kth = best.gather(-1, (top_k - 1).clamp(0, wanted - 1).expand(*best.shape[:2], 1))
    floor = best[..., :1] + temperature * min_p.log()
    floor = torch.maximum(floor, kth.masked_fill(top_k == 0, -float("inf")))
    total = (logits.masked_fill(logits < floor, -float("inf")) / temperature).logsumexp(-1, keepdim=True)
    while True:
        probability = (best / temperature - total).exp()
        above = probability.cumsum(-1) - probability  # mass of the tokens sorted before this one
        if wanted == vocab or bool(((above[..., -1:] >= top_p) | (top_p >= 1)).all()):
            break
        wanted = vocab
        best = logits.topk(wanted, dim=-1).values
    kept = (above < top_p) | (top_p >= 1)
    kept[..., 0] = True
    last = best.masked_fill(~kept, float("inf")).amin(-1, keepdim=True)
    return torch.where(top_p < 1, torch.maximum(floor, last), floor)


def choose(logits: Tensor, depths: Tensor, max_depth: int, lengths: Tensor, batch: SamplingBatch) -> Tensor:
    """The main model's token at every node. logits: [B, N, V] fp32; depths: [B, N]; lengths: [B] -> [B, N] int64."""
    return choose_scores(logits, depths, max_depth, lengths, batch).argmax(-1)


def choose_scores(
    logits: Tensor, depths: Tensor, max_depth: int, lengths: Tensor, batch: SamplingBatch, first: int = 0
) -> Tensor:
    """What `choose` maximises: truncated logits plus temperature times noise, [B, N, V] fp32. first: token of the first
    logit, where those of a part of the vocabulary are given; of these nothing may be truncated.

    A node at depth d sits at position length + d and chooses the token at position length + d + 1.
    """
    if batch.greedy:
        return logits
    positions = lengths[:, None] + 1 + torch.arange(max_depth + 1, device=logits.device)
    noise = gumbel(batch.seed, positions, torch.arange(first, first + logits.shape[-1], device=logits.device))
    noise = noise * batch.temperature.view(-1, 1, 1)
    noise = noise.gather(1, depths[..., None].expand(-1, -1, logits.shape[-1]))
    return truncate(logits, batch) + noise
