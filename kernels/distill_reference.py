"""The distillation loss in torch: the twin of kernels/distill.py."""

import torch
from torch import Tensor


def survey(target: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """target: [R, V] logits -> the logs of their sums of exponentials at `temperature`, [R] fp32, and the largest ones' places,
    [R] int32."""
    return (target.float() / temperature).logsumexp(-1), target.argmax(-1).int()


def distill(
    draft: Tensor, target: Tensor, known: tuple[Tensor, Tensor], weights: Tensor, shift: int, *, temperature: float = 1.0,
    acceptance: float = 0.0, breadth: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Per row KL(p || q) - acceptance * log sum(min(p, breadth q)); draft becomes the loss's gradient times the row's weight.

    draft: [R, n] logits, whose softmax is q; target: [R, V], the first n of which are of the same tokens; known: its `survey`.
    Row r of draft is compared with row r + shift of target, whose softmax over all V at `temperature` is p. Where n < V both
    sums run over the n tokens, and the first is p log(p / q) all the same: least where q is p over the n, scaled to 1.
    weights: [R] fp32; a row of weight 0 is skipped: its gradient and figures are 0. Returns fp32 [R] each: the loss, the
    acceptance sum(min(p, breadth q)) (Leviathan et al. 2023, section 3.2, for one candidate; of `breadth` candidates at least
    one is accepted about as often), and 1 where both prefer the same token.
    """
    figures = torch.zeros(3, len(draft), device=draft.device)
    rows, n = weights.nonzero()[:, 0], draft.shape[1]
    total, best = (each[rows + shift] for each in known)
    wanted = target[rows + shift, :n].float() / temperature - total[:, None]
    p, q = wanted.exp(), draft[rows].float().log_softmax(-1)
    wide = breadth * q.exp()
    smaller, accepted = wide < p, torch.minimum(p, wide).sum(-1)
    figures[0, rows] = (p * (wanted - q)).sum(-1) - acceptance * accepted.log()
    figures[1, rows] = accepted
    preferred = draft[rows].gather(1, best.long().clamp(max=n - 1)[:, None])[:, 0]
    figures[2, rows] = ((best < n) & (preferred == draft[rows].amax(-1))).float()
    below = (q.exp() * smaller).sum(-1, keepdim=True)
    pull = wide * (smaller.float() - below) / accepted[:, None]
    draft.zero_()
    draft[rows] = (weights[rows, None] * (p.sum(-1, keepdim=True) * q.exp() - p - acceptance * pull)).to(draft.dtype)
    loss, accept, match = figures
    return loss, accept, match
