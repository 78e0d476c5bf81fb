"""The main model's states of rows that come again: what is kept is what would be computed."""

import pytest
import torch
from torch import Tensor

from mtp_engine.training.memory import Memory


@pytest.mark.parametrize("most", [0, 3, 7, 100])
def test_rows_that_come_again(most: int) -> None:
    corpus = torch.arange(10)[:, None] * 100 + torch.arange(4)
    computed: list[int] = []

    def states(tokens: Tensor) -> Tensor:
        computed.extend((tokens[:, 0] // 100).tolist())
        return torch.stack([tokens.float(), tokens.float() ** 0.5], -1)

    memory = Memory(states, len(corpus), most)
    generator = torch.Generator().manual_seed(0)
    for epoch in range(3):
        for rows in torch.randperm(10, generator=generator).split(4):
            expected = torch.stack([corpus[rows].float(), corpus[rows].float() ** 0.5], -1)
            assert torch.equal(memory.states(rows, corpus[rows]), expected)
        assert len(computed) == 10 + epoch * (10 - min(most, 10))
    assert memory.used == min(most, 10)


def test_without_a_gpu_nothing_is_kept() -> None:
    calls: list[int] = []
    memory = Memory(lambda tokens: tokens[..., None].float().add(calls.append(len(tokens)) or 0), 4)
    for _ in range(3):
        memory.states(torch.arange(4), torch.zeros(4, 2, dtype=torch.int64))
    assert calls == [4, 4, 4]
    assert memory.used == 0
