"""The corpus: rows of tokens, each token with its kind, in shards that are written once and never changed.

A folder holds `shard-00000.safetensors`, ... (`tokens` [R, L] uint16 or uint32, `kinds` [R, L] uint8) and corpus.json,
which says what they were made of. A file is there whole or not at all, so a run that was killed goes on with the
shards that are missing.
"""

import errno
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.numpy import load, save
from torch import Tensor

from mtp_engine.errors import EngineError
from mtp_engine.hub.files import write_whole
from mtp_engine.text.tokenizer import Tokenizer

PADDING, GIVEN, ANSWER, LOOP = range(4)
"""Kinds of tokens: none; prompt, template or user turn; written by the model; that, and the 16-gram that ends there
stood earlier in the same answer."""

LOOP_GRAM = 16
_KEYED = 64  # answer tokens that say whether two rows are the same
INFO = "corpus.json"
_REMAKE = "delete it and run the command that made it again: only this shard is remade"
_FULL = (errno.ENOSPC, errno.EDQUOT)
_PIECE = 1 << 18  # characters of a text that are tokenised at a time


def shard_path(folder: Path, index: int) -> Path:
    return folder / f"shard-{index:05}.safetensors"


def has_shard(folder: Path, index: int) -> bool:
    return shard_path(folder, index).is_file()


def write_shard(folder: Path, index: int, tokens: Tensor, kinds: Tensor) -> None:
    """Write a shard whole or not at all. tokens: [R, L] integers, stored in 16 bits if they fit; kinds: [R, L] uint8.

    Raises EngineError where the disk is full.
    """
    assert tokens.shape == kinds.shape
    stored = tokens.cpu().numpy()
    stored = stored.astype(np.uint16 if stored.max(initial=0) < 1 << 16 else np.uint32)
    kinds_array = kinds.cpu().numpy().astype(np.uint8)
    _write(shard_path(folder, index), save({"tokens": stored, "kinds": kinds_array}))


def read_shard(path: Path) -> tuple[Tensor, Tensor]:
    """Tokens [R, L] int32 and kinds [R, L] uint8. Raises EngineError for a damaged file."""
    try:
        arrays = load(path.read_bytes())
        tokens, kinds = arrays["tokens"].astype(np.int32), arrays["kinds"]
        if tokens.ndim != 2 or tokens.shape != kinds.shape or kinds.dtype != np.uint8 or kinds.max(initial=0) > LOOP:
            raise ValueError("its tensors do not fit together")
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise EngineError(f"{path}: damaged ({error}); {_REMAKE}") from error
    return torch.from_numpy(tokens), torch.from_numpy(kinds)


def begin_corpus(folder: Path, info: Mapping[str, Any]) -> None:
    """Make the folder, or go on with it. info: what decides the shards, row_length, vocab_size and tokenizer among it.

    Raises EngineError if the folder holds a corpus that was made of something else.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise EngineError(f"{folder}: cannot be made ({error.strerror}); name another folder") from error
    wanted = json.loads(json.dumps(dict(info)))
    if (folder / INFO).is_file():
        there = _read_info(folder)
        if other := [key for key in wanted if there.get(key) != wanted[key]]:
            raise EngineError(
                f"{folder} was begun with another {' and '.join(other)}; use the same settings, or another folder"
            )
    else:
        _write_info(folder, wanted)


def finish_corpus(folder: Path) -> None:
    """Note in corpus.json how much there is now."""
    counts, shards, rows = np.zeros(LOOP + 1, np.int64), 0, 0
    for shards, path in enumerate(_shards(folder), 1):  # noqa: B007
        kinds = read_shard(path)[1]
        rows += len(kinds)
        counts += np.bincount(kinds.numpy().ravel(), minlength=LOOP + 1)
    names = ("padding", "given", "answer", "loop")
    found = {"shards": shards, "rows": rows, **dict(zip(names, counts.tolist(), strict=True))}
    _write_info(folder, {**_read_info(folder), "counts": found})


@final
@dataclass(frozen=True)
class Corpus:
    """All rows of a folder, in memory."""

    tokens: Tensor  # [R, L] int32
    kinds: Tensor  # [R, L] uint8
    info: Mapping[str, Any]  # corpus.json

    @classmethod
    def load(cls, folder: Path, *, tokenizer_sha: str | None = None) -> "Corpus":
        """Read all shards; rows that repeat another's answers are left out (several processes may have written them).

        tokenizer_sha: the model's. Raises EngineError for a folder without shards, a damaged one, rows of another length
        than corpus.json says, and a tokenizer that is not the model's.
        """
        if not (paths := list(_shards(folder))) or not (folder / INFO).is_file():
            raise EngineError(f"{folder}: no corpus is there; write one first, or name its folder")
        info = _read_info(folder)
        if tokenizer_sha is not None and info.get("tokenizer") != tokenizer_sha:
            raise EngineError(
                f"{folder} was written with another tokenizer, that of {info.get('model')}; write a corpus for this model"
            )
        seen: set[int] = set()
        parts = []
        for path in paths:
            tokens, kinds = read_shard(path)
            if tokens.shape[1] != info.get("row_length"):
                raise EngineError(
                    f"{path}: rows of {tokens.shape[1]} tokens, {INFO} says {info.get('row_length')}; delete the shard"
                )
            if ((tokens < 0) | (tokens >= info.get("vocab_size", 0))).any():
                raise EngineError(f"{path}: damaged (tokens outside the vocabulary); {_REMAKE}")
            kept = deduplicate(tokens, kinds, seen)
            parts.append((tokens[kept], kinds[kept]))
        return cls(torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts]), info)


def by_frequency(corpus: Corpus, vocab: int) -> Tensor:
    """All tokens, those first that stand most often in the answers. [V] int64."""
    counts = torch.bincount(corpus.tokens[corpus.kinds >= ANSWER].long(), minlength=vocab)
    return counts.argsort(descending=True, stable=True)


def tokenizer_sha(folder: Path) -> str:
    """The sha256 of a model folder's tokenizer.json."""
    return hashlib.sha256((folder / "tokenizer.json").read_bytes()).hexdigest()


def in_loop(tokens: Sequence[int]) -> list[bool]:
    """Per token of an answer: does the 16-gram that ends here stand earlier in it already?"""
    if not tokens:
        return []
    row = torch.tensor([list(tokens)])
    flags: list[bool] = (mark_loops(row, torch.full_like(row, ANSWER, dtype=torch.uint8)) == LOOP)[0].tolist()
    return flags


def mark_loops(tokens: Tensor, kinds: Tensor) -> Tensor:
    """kinds, with LOOP where the 16-gram that ends there stood earlier in the same answer. Both [R, L] -> [R, L] uint8.

    An answer is a run of ANSWER tokens. Grams are compared by 64-bit hashes.
    """
    position = torch.arange(tokens.shape[1], device=tokens.device)
    answer = kinds >= ANSWER
    begin = torch.where(answer, 0, position + 1).cummax(1).values  # of the run a token is in
    gram = _mix(tokens.long())
    for reach in (1, 2, 4, 8):  # hashes of 1, 2, 4, 8 and then 16 tokens
        gram = _mix(gram * 3 + gram.roll(reach, 1))
    whole = answer & (position - begin >= LOOP_GRAM - 1)
    keys = torch.where(whole, _mix(gram + begin) & (2**63 - 1), -1 - position)  # those of no gram all differ
    ordered, order = keys.sort(dim=1, stable=True)
    again = torch.zeros_like(answer)
    again[:, 1:] = ordered[:, 1:] == ordered[:, :-1]
    marked = kinds.clamp(max=ANSWER)
    return marked.masked_fill(torch.zeros_like(answer).scatter_(1, order, again), LOOP)


def answer_keys(tokens: Tensor, kinds: Tensor) -> list[int]:
    """A 64-bit hash of each row's first 64 answer tokens. Both [R, L]."""
    answer = kinds >= ANSWER
    rank = answer.cumsum(1)
    row, column = (answer & (rank <= _KEYED)).nonzero(as_tuple=True)
    mixed = _mix(_mix(tokens[row, column].long()) + rank[row, column])
    keys: list[int] = mixed.new_zeros(len(tokens)).index_add_(0, row, mixed).tolist()
    return keys


def deduplicate(tokens: Tensor, kinds: Tensor, seen: set[int]) -> Tensor:
    """[R] bool: rows whose answers repeat none of the rows before, nor any of `seen`, which then has them, too."""
    kept = []
    for key in answer_keys(tokens, kinds):
        kept.append(key not in seen)
        seen.add(key)
    return torch.tensor(kept, dtype=torch.bool)


def pack_text(tokenizer: Tokenizer, files: Sequence[Path], length: int) -> tuple[Tensor, Tensor]:
    """Plain text as rows: tokens [R, L] int32, kinds [R, L] uint8, all ANSWER but for padding at the very end.

    Each file is a document; an end-of-text token follows it. Raises EngineError for a file that is no UTF-8 text.
    """
    if not tokenizer.eos_ids:
        raise EngineError("the model's tokenizer names no end-of-text token; add eos_token to tokenizer_config.json")
    bos, ids = len(tokenizer.encode("")), []
    for file in files:
        for index, piece in enumerate(_pieces(file)):
            ids += tokenizer.encode(piece)[bos if index else 0 :]
        ids.append(tokenizer.eos_ids[0])
    rows = -(-len(ids) // length)
    tokens, kinds = np.zeros(rows * length, np.int32), np.zeros(rows * length, np.uint8)
    tokens[: len(ids)], kinds[: len(ids)] = ids, ANSWER
    return torch.from_numpy(tokens.reshape(rows, length)), torch.from_numpy(kinds.reshape(rows, length))


def _pieces(file: Path) -> Iterator[str]:
    """A text cut at line ends, so that memory stays bounded."""
    try:
        with file.open(encoding="utf-8") as lines:
            while piece := lines.readlines(_PIECE):
                yield "".join(piece)
    except (OSError, ValueError) as error:
        raise EngineError(f"{file}: cannot be read as UTF-8 text ({error}); convert it or leave it out") from error


def _mix(x: Tensor) -> Tensor:
    """A 64-bit hash of int64 (two rounds of multiply and xor-shift; products wrap around)."""
    for _ in range(2):
        x = (x ^ (x >> 32)) * -0x61C8864680B583EB + 0x1234567
    return x ^ (x >> 29)


def _shards(folder: Path) -> Iterator[Path]:
    yield from sorted(folder.glob("shard-*.safetensors"))


def _read_info(folder: Path) -> dict[str, Any]:
    path = folder / INFO
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise EngineError(
            f"{path}: cannot be read ({error}); delete it and run the command that made it again"
        ) from error


def _write_info(folder: Path, info: Mapping[str, Any]) -> None:
    _write(folder / INFO, (json.dumps(info, indent=1) + "\n").encode())


def _write(path: Path, content: bytes) -> None:
    """All of a file or nothing of it."""
    try:
        write_whole(path, lambda fresh: fresh.write_bytes(content))
    except OSError as error:
        done = len(list(_shards(path.parent)))
        problem = f"disk full after {done} shards" if error.errno in _FULL else f"cannot be written ({error.strerror})"
        raise EngineError(
            f"{path.parent}: {problem}; free space and run the same command again: finished shards are kept"
        ) from error
