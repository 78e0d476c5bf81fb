"""The distillation loss: its kernel against its twin, and the twin against autograd."""

import pytest
import torch
import torch.nn.functional as F

from mtp_engine.kernels.distill import distill
from mtp_engine.kernels.distill_reference import distill as twin

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def logits(rows: int, vocab: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    draft, target = (3 * torch.randn(n, vocab, generator=generator) for n in (rows, rows + 2))
    weights = torch.rand(rows, generator=generator)
    weights[1] = 0
    return draft.to(DEVICE), target.to(DEVICE), weights.to(DEVICE)


@pytest.mark.parametrize("temperature", [1.0, 0.5])
@pytest.mark.parametrize("acceptance", [0.0, 0.7])
def test_the_gradient_is_that_of_the_loss(temperature: float, acceptance: float) -> None:
    draft, target, weights = logits(5, 37, seed=1)
    p, leaf = (target[2:] / temperature).softmax(-1), draft.clone().requires_grad_()
    q = leaf.softmax(-1)
    expected = F.kl_div(q.log(), p, reduction="none").sum(-1) - acceptance * torch.minimum(p, q).sum(-1).log()
    (expected * weights).sum().backward()
    loss, accept, match = twin(draft, target, weights, 2, temperature=temperature, acceptance=acceptance)
    kept = weights > 0
    torch.testing.assert_close(draft, leaf.grad, atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(loss[kept], expected[kept])
    torch.testing.assert_close(accept[kept], torch.minimum(p, q).sum(-1)[kept])
    assert (match[kept] == (p.argmax(-1) == q.argmax(-1))[kept]).all()
    assert loss[1] == accept[1] == match[1] == 0


@pytest.mark.parametrize(("vocab", "dtype"), [(37, torch.float32), (5000, torch.float32), (9001, torch.bfloat16)])
@pytest.mark.parametrize("acceptance", [0.0, 0.7])
def test_the_kernel_equals_its_twin(vocab: int, dtype: torch.dtype, acceptance: float) -> None:
    draft, target, weights = logits(4, vocab, seed=2)
    draft, target = draft.to(dtype), target.to(dtype)
    draft[0] = target[1]  # the same law: nothing to learn
    ours, theirs = draft.clone(), draft.clone()
    found = distill(ours, target, weights, 1, temperature=0.8, acceptance=acceptance)
    expected = twin(theirs, target, weights, 1, temperature=0.8, acceptance=acceptance)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(ours.float(), theirs.float(), atol=1e-6, rtol=1e-2 if dtype == torch.bfloat16 else 1e-3)
