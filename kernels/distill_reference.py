"""The distillation loss in torch: the twin of kernels/distill.py."""

import torch
from torch import Tensor


def distill(
    draft: Tensor, target: Tensor, weights: Tensor, shift: int, *, temperature: float = 1.0, acceptance: float = 0.0
) -> tuple[Tensor, Tensor, Tensor]:
    """Per row KL(p || q) - acceptance * log sum(min(p, q)); draft becomes the loss's gradient times the row's weight.

    draft, target: [R, V] logits; row r of draft is compared with row r + shift of target, whose softmax at `temperature`
    is p. weights: [R] fp32; a row of weight 0 is skipped: its gradient and figures are 0. Returns fp32 [R] each: the
    loss, the acceptance sum(min(p, q)) (Leviathan et al. 2023, section 3.2), and 1 where both prefer the same token.
    """
    figures = torch.zeros(3, len(draft), device=draft.device)
    rows = weights.nonzero()[:, 0]
    p = (target[rows + shift].float() / temperature).log_softmax(-1)
    q = draft[rows].float().log_softmax(-1)
    smaller, accepted = q < p, torch.minimum(p, q).exp().sum(-1)
    figures[0, rows] = (p.exp() * (p - q)).sum(-1) - acceptance * accepted.log()
    figures[1, rows] = accepted
    figures[2, rows] = (p.argmax(-1) == q.argmax(-1)).float()
    below = (q.exp() * smaller).sum(-1, keepdim=True)
    pull = q.exp() * (smaller.float() - below) / accepted[:, None]
    draft.zero_()
    draft[rows] = (weights[rows, None] * (q.exp() - p.exp() - acceptance * pull)).to(draft.dtype)
    loss, accept, match = figures
    return loss, accept, match
