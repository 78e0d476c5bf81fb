"""The distillation loss: its kernel against its twin, and the twin against autograd."""

import pytest
import torch

from mtp_engine.kernels.distill import distill, survey
from mtp_engine.kernels.distill_reference import distill as twin
from mtp_engine.kernels.distill_reference import survey as survey_twin

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def logits(rows: int, vocab: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    draft, target = (3 * torch.randn(n, vocab, generator=generator) for n in (rows, rows + 2))
    weights = torch.rand(rows, generator=generator)
    weights[1] = 0
    return draft.to(DEVICE), target.to(DEVICE), weights.to(DEVICE)


@pytest.mark.parametrize("drafted", [37, 20])
@pytest.mark.parametrize("temperature", [1.0, 0.5])
@pytest.mark.parametrize(("acceptance", "breadth"), [(0.0, 1.0), (0.7, 1.0), (0.7, 3.0)])
def test_the_gradient_is_that_of_the_loss(drafted: int, temperature: float, acceptance: float, breadth: float) -> None:
    draft, target, weights = logits(5, 37, seed=1)
    draft = draft[:, :drafted].contiguous()
    whole, leaf = (target[2:] / temperature).softmax(-1), draft.clone().requires_grad_()
    p, q = whole[:, :drafted], leaf.softmax(-1)
    accepted = torch.minimum(p, breadth * q).sum(-1)
    expected = (p * (p / q).log()).sum(-1) - acceptance * accepted.log()
    (expected * weights).sum().backward()
    settings = {"temperature": temperature, "acceptance": acceptance, "breadth": breadth}
    loss, accept, match = twin(draft, target, survey_twin(target, temperature), weights, 2, **settings)
    kept = weights > 0
    torch.testing.assert_close(draft, leaf.grad, atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(loss[kept], expected[kept])
    torch.testing.assert_close(accept[kept], accepted[kept])
    assert (match[kept] == (whole.argmax(-1) == q.argmax(-1))[kept]).all()
    assert loss[1] == accept[1] == match[1] == 0


@pytest.mark.parametrize("drafted", [1.0, 0.5], ids=["all tokens", "some"])
@pytest.mark.parametrize(("vocab", "dtype"), [(37, torch.float32), (2048, torch.float32), (9001, torch.bfloat16)])
@pytest.mark.parametrize(("acceptance", "breadth"), [(0.0, 1.0), (0.7, 2.0)])
def test_the_kernel_equals_its_twin(
    vocab: int, dtype: torch.dtype, drafted: float, acceptance: float, breadth: float
) -> None:
    draft, target, weights = logits(4, vocab, seed=2)
    draft, target = draft[:, : int(drafted * vocab)].contiguous().to(dtype), target.to(dtype)
    draft[0] = target[1, : draft.shape[1]]  # the same distribution: nothing to learn
    ours, theirs = draft.clone(), draft.clone()
    settings = {"temperature": 0.8, "acceptance": acceptance, "breadth": breadth}
    known = survey(target, 0.8)
    for a, b in zip(known, survey_twin(target, 0.8), strict=True):
        torch.testing.assert_close(a, b)
    found = distill(ours, target, known, weights, 1, **settings)
    expected = twin(theirs, target, known, weights, 1, **settings)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(ours.float(), theirs.float(), atol=1e-6, rtol=1e-2 if dtype == torch.bfloat16 else 1e-3)


@pytest.mark.cuda
def test_more_rows_than_are_worked_on_at_once() -> None:
    draft, target, weights = logits(3000, 1000, seed=3)
    ours, theirs = draft.clone(), draft.clone()
    known = survey(target)
    for a, b in zip(distill(ours, target, known, weights, 1), twin(theirs, target, known, weights, 1), strict=True):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-3)
