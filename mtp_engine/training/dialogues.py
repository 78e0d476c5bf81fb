"""The model writes its own training data: dialogues, in shards of many rows (lockstep.py writes them)."""

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, final

import numpy as np
import torch
from torch import Tensor

from mtp_engine.errors import EngineError
from mtp_engine.models.decoder import Decoder
from mtp_engine.protocols import Progress
from mtp_engine.text.tokenizer import Tokenizer
from mtp_engine.training import data
from mtp_engine.training.lockstep import ANSWER, FOLLOW, MID, USER, LockStep, most_answers
from mtp_engine.training.prompts import Template, encode_prompts, read_prompts


@final
@dataclass(frozen=True)
class DialogueSettings:
    """What is written. Any change but of `shards` and `batch` makes another corpus.

    temperatures: pairs (temperature, share of the answers). follow_up: share of later user turns that are given and not
    sampled. prompts: a file for read_prompts, whose prompts begin `prompt_share` of the rows. batch: rows that are
    decoded together, 0 is what fits the memory, at most 2048.
    """

    shards: int
    rows: int = 4096  # per shard
    length: int = 768  # tokens per row
    seed: int = 0
    temperatures: tuple[tuple[float, float], ...] = ((0.0, 0.5), (0.7, 0.25), (1.0, 0.25))
    max_answer: int = 512
    max_user: int = 256
    follow_up: float = 0.5
    prompts: Path | None = None
    prompt_share: float = 0.6
    per_source: int = 8000
    batch: int = 0

    def __post_init__(self) -> None:
        least = {"shards": 1, "rows": 1, "length": 2, "max_answer": 1, "max_user": 1, "batch": 0, "seed": 0}
        for name, value in least.items():
            if getattr(self, name) < value:
                raise EngineError(f"{name} is {getattr(self, name)}; it must be at least {value}")
        if not all(0 <= share <= 1 for share in (self.follow_up, self.prompt_share)):
            raise EngineError("follow_up and prompt_share are shares: from 0 to 1")
        if any(t < 0 for t, _ in self.temperatures) or abs(sum(share for _, share in self.temperatures) - 1) > 1e-6:
            raise EngineError("temperatures are pairs (temperature, share): none below 0, and shares that sum to 1")


def shares(text: str) -> tuple[tuple[float, float], ...]:
    """`DialogueSettings.temperatures` as an option gives them, T:SHARE,... Raises EngineError."""
    try:
        pairs = [part.split(":") for part in text.split(",")]
        return tuple((float(temperature), float(share)) for temperature, share in pairs)
    except ValueError:
        raise EngineError(f"--temperatures {text!r} is no list of T:SHARE, as in 0:0.5,1:0.5") from None


@final
@dataclass(frozen=True)
class DialogueStats:
    """What one process wrote in one run."""

    tokens: int
    answer_tokens: int  # those in loops included
    loop_tokens: int
    seconds: float
    duplicates: int  # rows that were dropped

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / max(self.seconds, 1e-9)


@torch.no_grad()
def write_dialogues(
    model: Decoder, tokenizer: Tokenizer, settings: DialogueSettings, folder: Path, *, rank: int = 0, world: int = 1,
    progress: Progress,
) -> DialogueStats:  # fmt: skip
    """Write shards rank, rank + world, ... of settings.shards; those that are there are kept.

    Ranks that share the model write together, and the first of them keeps it. A shard depends on the settings, its number and
    the shards of this rank before it (whose answers it does not repeat). Raises EngineError for a full disk, a folder with
    another corpus, prompts that cannot be read, a template that cannot be cut.
    """
    template = Template.cut(tokenizer)
    if len(template.open) + len(template.head) >= settings.length:
        raise EngineError(f"rows of {settings.length} tokens have no room after the chat template; make them longer")
    if settings.length > model.config.max_context:
        raise EngineError(
            f"rows of {settings.length} tokens, the model takes {model.config.max_context}; make them shorter"
        )
    prompts = _prompts(tokenizer, template, settings)
    keeps = not model.group.shard.rank
    if keeps:
        data.begin_corpus(folder, _info(tokenizer, model.vocab_size, settings))
    seen: set[int] = set()
    writer: LockStep | None = None
    tokens = answers = loops = duplicates = 0
    start = time.perf_counter()
    mine = range(rank, settings.shards, world)
    for done, index in enumerate(mine):
        if data.has_shard(folder, index):
            seen.update(data.answer_keys(*data.read_shard(data.shard_path(folder, index))))
            continue
        writer = writer or LockStep(model, tokenizer, template, settings)
        report = _reporter(progress, settings, done, len(mine), tokens / (time.perf_counter() - start))
        rows, kinds = writer.write(plan_shard(settings, template, prompts, index), report)
        kept = data.deduplicate(rows, kinds, seen)
        if keeps:
            data.write_shard(folder, index, rows[kept], kinds[kept])
        counts = torch.bincount(kinds[kept].flatten(), minlength=data.LOOP + 1).tolist()
        tokens += sum(counts)
        answers, loops = answers + counts[data.ANSWER] + counts[data.LOOP], loops + counts[data.LOOP]
        duplicates += int((~kept).sum())
    seconds = time.perf_counter() - start
    if keeps:
        data.finish_corpus(folder)
    return DialogueStats(tokens, answers, loops, seconds, duplicates)


def _reporter(
    progress: Progress, settings: DialogueSettings, done: int, shards: int, speed: float
) -> Callable[[int], None]:
    """What LockStep.write calls for the shard after `done` others. speed: tokens/s so far, 0 if none are written."""
    size = settings.rows * settings.length
    what = "writing dialogues" + (f", {speed / 1000:,.0f}k tokens/s" if speed else "")
    return lambda count: progress(what, done * size + count, shards * size)


def _prompts(tokenizer: Tokenizer, template: Template, settings: DialogueSettings) -> list[list[int]]:
    if settings.prompts is None or settings.prompt_share == 0:
        return []
    texts = read_prompts(settings.prompts, per_source=settings.per_source, seed=settings.seed)
    if not (prompts := encode_prompts(tokenizer, template, texts, settings.length - 128)):
        raise EngineError(
            f"{settings.prompts}: no prompt of at most {settings.length - 128} tokens; make the rows longer"
        )
    return prompts


def _info(tokenizer: Tokenizer, vocab_size: int, settings: DialogueSettings) -> dict[str, Any]:
    """What corpus.json says."""
    chosen = {name: value for name, value in asdict(settings).items() if name not in ("shards", "batch", "seed")}
    chosen["prompts"] = (
        sha256(settings.prompts.read_bytes()).hexdigest() if settings.prompts and settings.prompt_share else None
    )
    return {
        "model": tokenizer.folder.name, "tokenizer": data.tokenizer_sha(tokenizer.folder), "vocab_size": vocab_size,
        "row_length": settings.length, "seed": settings.seed, "settings": chosen,
    }  # fmt: skip


# ---- what a shard is made of ------------------------------------------------------------------------------------------


@final
@dataclass(frozen=True)
class ShardPlan:
    """All that chance decides about a shard's rows, but for the noise of their tokens, which `seeds` key."""

    openings: Sequence[Sequence[int]]  # the given tokens that a row begins with, shortest rows first
    writing: Tensor  # [R] int64, what follows them
    seeds: Tensor  # [R] int64
    temperature: Tensor  # [R, A] fp32, the temperature of a row's n-th answer
    pieces: Tensor  # [R, A] int64, which piece is given after the n-th answer


def plan_shard(
    settings: DialogueSettings, template: Template, prompts: Sequence[Sequence[int]], index: int
) -> ShardPlan:
    """Prompts are taken in their order, each once before any comes again."""
    rng, rows = np.random.default_rng([settings.seed, index]), settings.rows
    given = round(rows * settings.prompt_share) if prompts else 0
    chosen = [prompts[(index * given + i) % len(prompts)] for i in range(given)]
    openings = [template.open] * (rows - given) + sorted(chosen, key=len)
    answers = most_answers(settings.length)
    values, shares = zip(*settings.temperatures, strict=True)
    temperature = rng.choice(np.array(values, np.float32), (rows, answers), p=np.array(shares) / sum(shares))
    follow_ups = FOLLOW + rng.integers(len(template.follow_ups), size=(rows, answers))
    pieces = np.where(rng.random((rows, answers)) < settings.follow_up, follow_ups, MID)
    writing = torch.tensor([USER] * (rows - given) + [ANSWER] * given)
    seeds = torch.from_numpy(rng.integers(1 << 62, size=rows))
    return ShardPlan(openings, writing, seeds, torch.from_numpy(temperature), torch.from_numpy(pieces))
