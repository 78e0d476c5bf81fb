"""The training objective: its rows are the drafter's rows, and its gradients those of the loss written down plainly."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny import MTP, DenseMTP, write_llama, write_mtp
from torch import Tensor

from mtp_engine.config import MTPConfig
from mtp_engine.kernels.reference import attend, visible_bias
from mtp_engine.models import loader
from mtp_engine.models.checkpoint import Checkpoint
from mtp_engine.models.decoder import Decoder
from mtp_engine.models.mtp import MTPModule
from mtp_engine.training import objective
from mtp_engine.training.attention import SequenceAttention
from mtp_engine.training.heads import FirstValues, build_heads
from mtp_engine.training.objective import Measures, Objective, distill_step, teach
from mtp_engine.training.trainable import TrainableWeights

CPU = torch.device("cpu")
SINK = {**MTP["attention"], "sink": True, "value_scale": 0.707, "rope_dim": 4}


def models(root: Path, **changes: object) -> tuple[Decoder, MTPModule, TrainableWeights, MTPConfig]:
    folder, heads = write_llama(root / "main"), write_mtp(root / "mtp", **changes)
    main = loader.load_main(folder, torch.float32, CPU, lambda *_: None)
    config = loader.read_mtp_config(heads)
    weights = TrainableWeights(FirstValues(Checkpoint(folder), 1, 1.0, earlier=Checkpoint(heads)), torch.float32, CPU)
    return main, build_heads(config, main, weights), weights, config


def one_step(
    main: Decoder, module: MTPModule, tokens: Tensor, kinds: Tensor, settings: Objective, drafted: Tensor | None = None,
    *, keep: bool = False,
) -> Measures:  # fmt: skip
    head = main.head_weight
    if drafted is not None:
        others = [token for token in range(main.vocab_size) if token not in drafted.tolist()]
        head, settings = head[[*drafted.tolist(), *others]], replace(settings, drafted=len(drafted))
    return distill_step(module, teach(main, tokens, kinds, head, module.config.features, keep=keep), settings)


@pytest.mark.parametrize("window", [None, 5, 50])
@pytest.mark.parametrize("sink", [False, True])
@pytest.mark.parametrize("v_dim", [8, 4])
def test_attention_over_sequences(window: int | None, sink: bool, v_dim: int) -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 11, heads, dim, generator=generator) for heads, dim in ((6, 8), (2, 8), (2, v_dim)))
    logits = torch.randn(6, generator=generator) if sink else None
    distance = torch.arange(11)[:, None] - torch.arange(11)
    seen = (distance >= 0) & (distance < (window or 11))
    expected = attend(q, k, v, visible_bias(seen.expand(2, -1, -1), 3), 0.3, logits)
    found = SequenceAttention([window])(0, q, k, v, scale=0.3, sink=logits)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("changes", [{}, {"chained": False, "attention": SINK}], ids=["chained", "mimo"])
def test_rows_are_those_of_drafting(tmp_path: Path, changes: dict[str, object]) -> None:
    main, module, _, config = models(tmp_path, **changes)
    tokens = torch.randint(61, (1, 25), generator=torch.Generator().manual_seed(3))
    positions = torch.arange(25)[None]
    hidden = main.forward(tokens, positions, SequenceAttention([None, None]))
    outputs = objective.layer_outputs(module, tokens, module.main_hidden(hidden), positions)
    dense = DenseMTP.load(tmp_path / "main", tmp_path / "mtp")
    for k in range(config.depth):
        # a row predicts token row + k + 2 from tokens up to row + k + 1, of which k + 1 are drafts
        for row in (0, 6, 25 - 2 - k):
            path = tokens[0, : row + k + 2]
            found = outputs[k][0, row] @ main.head_weight.T
            torch.testing.assert_close(found, dense.next_logits(path, hidden[0, : row + 1]), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("chunk", [1, 1 << 30], ids=["one sequence at a time", "all at once"])
@pytest.mark.parametrize("changes", [{}, {"chained": False, "attention": SINK}], ids=["chained", "mimo"])
@pytest.mark.parametrize(
    ("drafted", "keep"), [(None, False), ([7, 3, 60, 11, 20, 0, 41], True)], ids=["all tokens", "some, kept"]
)
def test_gradients(
    tmp_path: Path, changes: dict[str, object], chunk: int, drafted: list[int] | None, keep: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(objective, "_LOGIT_BYTES", chunk)
    main, module, weights, config = models(tmp_path, **changes)
    generator = torch.Generator().manual_seed(4)
    tokens = torch.randint(61, (3, 20), generator=generator)
    kinds = torch.randint(4, (3, 20), generator=generator, dtype=torch.uint8)
    settings = Objective(acceptance=0.3, reach=0.7, temperature=0.9, breadth=2.0)
    some = None if drafted is None else torch.tensor(drafted)
    measures = one_step(main, module, tokens, kinds, settings, some, keep=keep)
    found = {name: grad for each in weights.parameters for name, _, grad in each.gradients()}
    for each in weights.parameters:
        each.leaf.grad = None
    expected = plain_loss(main, module, tokens, kinds, settings, config.depth, some)
    expected.sum().backward()
    for each in weights.parameters:
        for name, _, grad in each.gradients():
            torch.testing.assert_close(found[name], grad, atol=1e-5, rtol=1e-3)
    total = settings.token_weights(kinds)[:, 2:].sum()
    torch.testing.assert_close(measures.sums[:, 0] / total, expected)


def test_a_lesson_serves_layers_with_other_features(tmp_path: Path) -> None:
    """What is read of a lesson of more features is what a lesson of one's own would have said."""
    main = loader.load_main(write_llama(tmp_path / "main"), torch.float32, CPU, lambda *_: None)
    tokens = torch.randint(61, (2, 9), generator=torch.Generator().manual_seed(6))
    kinds, head = torch.full((2, 9), 2, dtype=torch.uint8), main.head_weight
    shared, alone = teach(main, tokens, kinds, head, (0,)), teach(main, tokens, kinds, head)
    assert shared.hidden.shape[-1] == 2 * alone.hidden.shape[-1]
    assert torch.equal(shared.states(()), alone.hidden)
    assert torch.equal(shared.states((0,)), shared.hidden)
    assert torch.equal(shared.normed, alone.normed)


def plain_loss(
    main: Decoder, module: MTPModule, tokens: Tensor, kinds: Tensor, settings: Objective, depth: int,
    drafted: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """[depth], one row at a time, by the definition."""
    length = tokens.shape[1]
    positions = torch.arange(length).expand(len(tokens), -1)
    with torch.no_grad():
        hidden = main.forward(tokens, positions, SequenceAttention([None, None]))
        target = (main.logits(hidden) / settings.temperature).softmax(-1)
    outputs = objective.layer_outputs(module, tokens, hidden, positions)
    weights = settings.token_weights(kinds)
    kept = torch.arange(main.vocab_size) if drafted is None else drafted
    losses = [torch.zeros(()) for _ in range(depth)]
    for b in range(len(tokens)):
        for j in range(length):
            reached = 1.0
            for k in range(depth):
                if j + k + 2 >= length or not (counted := float(weights[b, j + k + 2])):
                    reached = 0.0  # what is behind a token that does not count is not reached
                    continue
                p, q = target[b, j + k + 1, kept], (outputs[k][b, j] @ main.head_weight[kept].T).softmax(-1)
                common = torch.minimum(p, settings.breadth * q).sum()
                loss = (p * (p / q).log()).sum() - settings.acceptance * common.log()
                share = counted * settings.decay**k * (1 - settings.reach + settings.reach * reached)
                losses[k] = losses[k] + share * loss
                reached *= float(common.detach())
    return torch.stack(losses) / weights[:, 2:].sum()


def test_measures_count_answers_only(tmp_path: Path) -> None:
    """Layers that copy the main model: with p = q everywhere the greedy length is that of a perfect chain."""
    main, module, _, _ = models(tmp_path)
    tokens = torch.randint(61, (2, 16), generator=torch.Generator().manual_seed(5))
    kinds = torch.full((2, 16), 1, dtype=torch.uint8)
    kinds[:, 8:] = 2
    measures = one_step(main, module, tokens, kinds, replace(Objective(), given=0.0))
    assert (measures.sums[:, 1] == 16).all()
    assert (measures.length(greedy=False) >= 1).all()
    assert (measures.length(greedy=True) <= 4).all()
