"""What layers would have drafted, by one pass over whole texts: a recording of real decoding says the same."""

from collections.abc import Iterator

import numpy as np
import pytest
import torch

from mtp_engine import Engine, EngineConfig, TreeShape
from mtp_engine.experiments.grid import Case
from mtp_engine.experiments.prompts import encode, read_prompts
from mtp_engine.experiments.record import record
from mtp_engine.training.held_out import Ranks, rank, write_answers

TOKENS = 24


@pytest.fixture(scope="module")
def unfused() -> Iterator[Engine]:
    config = EngineConfig(
        device="cpu", dtype="fp32", drafter="mtp", tree=TreeShape.parse("chain:3"), attention="torch", draft_int8=False,
        threads=1,
    )  # fmt: skip
    with Engine.load("mimo-nano", config) as engine:
        yield engine


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_ranks_are_those_of_a_recording(unfused: Engine, temperature: float) -> None:
    case = Case(model="mimo-nano", mode="record", dtype="fp32", temperature=temperature, max_tokens=TOKENS, batch=4)
    prompts = encode(unfused.encode, read_prompts("builtin:mt_bench", 4), 300)
    answers = write_answers(
        unfused.model, unfused.tokenizer, [each.tokens for each in prompts], temperature, max_tokens=TOKENS,
        progress=lambda *_: None,
    )  # fmt: skip
    module = unfused.loop.work.drafter.module  # type: ignore[attr-defined]
    vocab = unfused.model.vocab_size
    [found] = rank(unfused.model, [module], answers, torch.arange(vocab), [vocab // 4, vocab])
    assert isinstance(found, Ranks)
    lengths, start, seen = answers.lengths.tolist(), 0, 0
    recorded = {row["prompt"]: (row, notes) for row, notes in record(unfused, case, prompts)}
    for index, length in enumerate(lengths):
        row, notes = recorded[prompts[index].index]
        text = answers.tokens[index, answers.begins[index] : answers.ends[index]].tolist()
        assert row["token_ids"][:length] == text
        for position in range(length):
            for name, ours in (("rank", found.noise), ("rank_best", found.best)):
                theirs = np.reshape(notes[position][name], (3, -1))[:, -1]
                assert ours[start + position, :, -1].tolist() == theirs.tolist()
        start, seen = start + length, seen + length
    assert seen > 2 * TOKENS
    few = found.best[..., 0]
    tokens = torch.cat([answers.tokens[i, answers.begins[i] : answers.ends[i]] for i in range(len(lengths))])
    assert ((few >= 0) == (tokens < vocab // 4)[:, None]).all()
