"""mimo-nano's text: from the dialogues that another model wrote to a tokenizer and rows of its tokens."""

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import final

import numpy as np
import tokenizers
import torch
from safetensors.numpy import load_file, save_file
from tokenizers import decoders, models, pre_tokenizers, trainers
from torch import Tensor

from mtp_engine.errors import EngineError
from mtp_engine.hub.files import atomically
from mtp_engine.models.export import MARKS, SPECIAL, add_marks, write_tokenizer
from mtp_engine.text.tokenizer import Tokenizer
from mtp_engine.training import data
from mtp_engine.training.nano.prompts import is_held_out
from mtp_engine.training.prompts import Template

Dialogue = tuple[str, str]
"""A user's prompt and its answer."""

TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_TOKENS, _HELD_OUT = "corpus.safetensors", "held_out.json"
_SAMPLE = 40_000  # dialogues that the tokenizer is trained on
_BATCH = 16_384  # dialogues that are encoded or decoded at a time
_SHORTEST = 40  # characters of an answer
_RUN = 5  # words: an answer ends before the sentence that says so many again
_VARIED = 0.35  # share of an answer's words that differ
_ASCII = str.maketrans(
    {
        "\u201c": '"',
        "\u201d": '"',
        "\u2018": "'",
        "\u2019": "'",
        "\u2013": "-",
        "\u2014": "-",
        "\u2026": "...",
        "\xa0": " ",
    }
)
_SENTENCE = re.compile(r"[^.!?\s][^.!?]*[.!?]")
_SENTENCES = re.compile(r".*[a-z][.!?][\"')*]*(?=\s|\Z)", re.DOTALL)


def read_dialogues(folder: Path, tokenizer: Tokenizer) -> Iterator[Dialogue]:
    """The first turn of every row of a corpus that `tokenizer`'s model wrote (training.dialogues).

    An answer that was cut off ends with its last whole sentence, and one that begins to repeat itself before that. Answers
    that are short, monotonous or not plain ASCII are left out, and those in which the model speaks of itself.
    """
    corpus = data.Corpus.load(folder, tokenizer_sha=data.tokenizer_sha(tokenizer.folder))
    template, ends = Template.cut(tokenizer), torch.tensor(tokenizer.eos_ids)
    position = torch.arange(corpus.tokens.shape[1])
    answer = corpus.kinds >= data.ANSWER
    start = answer.int().argmax(1)
    over = (~answer | (corpus.kinds == data.LOOP)) & (position > start[:, None])
    end = torch.where(over.any(1), over.int().argmax(1), len(position))
    looped = (corpus.kinds.gather(1, end.clamp(max=len(position) - 1)[:, None])[:, 0] == data.LOOP) & over.any(1)
    last = corpus.tokens.gather(1, (end - 1)[:, None])
    whole = torch.isin(last, ends)[:, 0] & ~looped
    end = torch.where(looped, end - data.LOOP_GRAM + 1, end)
    first, before = len(template.open), len(template.head)
    backend = tokenizers.Tokenizer.from_file(str(tokenizer.folder / "tokenizer.json"))
    rows = zip(corpus.tokens.numpy(), start.tolist(), end.tolist(), whole.tolist(), answer.any(1).tolist(), strict=True)
    chosen = [(row[first : a - before], row[a:b], ended) for row, a, b, ended, any_answer in rows if any_answer]
    for index in range(0, len(chosen), _BATCH):
        part = chosen[index : index + _BATCH]
        prompts, answers = (backend.decode_batch([each[i].tolist() for each in part]) for i in (0, 1))
        for prompt, text, (_, _, ended) in zip(prompts, answers, part, strict=True):
            if (tidy := _tidy(text, ended)) and prompt.strip():
                yield prompt.strip(), tidy


def _tidy(text: str, ended: bool) -> str:
    """An answer as it is learnt; empty if it is not. ended: it came to its end by itself."""
    text = (text if text.isascii() else text.translate(_ASCII)).strip()
    said: set[str] = set()
    for sentence in _SENTENCE.finditer(text):
        runs = _runs(sentence[0])
        if said.intersection(runs) or len(set(runs)) < len(runs):
            text, ended = text[: sentence.start()], False
            break
        said.update(runs)
    if not ended:
        match = _SENTENCES.match(text)
        text = match[0] if match else ""
    words = text.split()
    varied = len(set(words)) > _VARIED * len(words)
    return text if varied and len(text) >= _SHORTEST and text.isascii() and "SmolLM" not in text else ""


def _runs(sentence: str) -> list[str]:
    """All runs of so many words; of a shorter sentence itself."""
    words = re.findall(r"[\w']+", sentence.lower())
    return [" ".join(words[i : i + _RUN]) for i in range(max(1, len(words) - _RUN + 1))]


def repeated(text: str) -> tuple[int, int]:
    """How many of a text's runs of five words stood in it before, and how many runs it has."""
    runs = _runs(text)
    return len(runs) - len(set(runs)), len(runs)


def train_tokenizer(texts: Iterable[str], vocab: int) -> tokenizers.Tokenizer:
    """Byte-level BPE of `vocab` entries with ChatML's tokens, fewer if the texts do not hold so many."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    size = vocab - len(SPECIAL) - len(MARKS)
    tokenizer.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False)
    )
    add_marks(tokenizer)
    return tokenizer


@final
@dataclass(frozen=True)
class NanoCorpus:
    """Dialogues as tokens, one after the other, each from <|im_start|> to <|endoftext|>."""

    tokens: Tensor  # [N] int32
    starts: Tensor  # [D + 1] int64, where each begins, and the end
    held_out: Sequence[Dialogue]  # never trained on

    @classmethod
    def load(cls, folder: Path) -> "NanoCorpus | None":
        """What build_corpus wrote there, if it did."""
        if not (folder / _TOKENS).is_file():
            return None
        arrays = load_file(folder / _TOKENS)
        tokens = torch.from_numpy(arrays["tokens"].astype(np.int32))
        return cls(tokens, torch.from_numpy(arrays["starts"]), read_held_out(folder))

    def to(self, device: torch.device) -> "NanoCorpus":
        return replace(self, tokens=self.tokens.to(device), starts=self.starts.to(device))

    def rows(self, length: int, seed: int) -> Tensor:
        """Every dialogue once, in random order -> [R, length] int32, on the tokens' device. A row begins with a dialogue
        and is full: the end of its last one is left out."""
        device, sizes = self.tokens.device, self.starts.diff().cpu()
        order = torch.randperm(len(sizes), generator=torch.Generator().manual_seed(seed))
        taken, room = [], length
        for size in sizes[order].tolist():
            taken.append(min(size, room))
            room = room - taken[-1] or length
        count = torch.tensor(taken, device=device)
        ends = count.cumsum(0)
        source = torch.repeat_interleave(self.starts[:-1][order.to(device)] - (ends - count), count)
        source += torch.arange(len(source), device=device)
        whole = len(source) // length * length
        return self.tokens[source[:whole]].view(-1, length)


def read_held_out(folder: Path) -> list[Dialogue]:
    """The dialogues that build_corpus put aside. Raises EngineError if there are none."""
    path = folder / _HELD_OUT
    held_out = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []
    if not held_out:
        raise EngineError(f"{path} holds no dialogue: write more text (one prompt in 64 is held out), and train anew")
    return [(prompt, answer) for prompt, answer in held_out]


def build_corpus(dialogues: Iterable[Dialogue], folder: Path, vocab: int = 8192) -> NanoCorpus:
    """Train a tokenizer on the dialogues and encode them, on all cores; both are kept in `folder`."""
    learnt: list[Dialogue] = []
    held_out: list[Dialogue] = []
    for dialogue in dialogues:
        (held_out if is_held_out(dialogue[0]) else learnt).append(dialogue)
    tokenizer = train_tokenizer((text for pair in learnt[:_SAMPLE] for text in pair), vocab)
    write_tokenizer(folder, tokenizer, TEMPLATE)
    tokenizer.encode_special_tokens = True  # as the engine reads text
    parts, sizes = [np.zeros(0, np.uint16)], [0]
    for ids, lengths in _encoded(tokenizer, learnt):
        parts.append(ids)
        sizes += lengths
    tokens, starts = np.concatenate(parts), np.cumsum(sizes)
    atomically(
        folder / _HELD_OUT, lambda path: path.write_text(json.dumps(held_out, indent=0) + "\n", encoding="utf-8")
    )
    atomically(folder / _TOKENS, lambda path: save_file({"tokens": tokens, "starts": starts}, path))
    return NanoCorpus(torch.from_numpy(tokens.astype(np.int32)), torch.from_numpy(starts), held_out)


def _encoded(tokenizer: tokenizers.Tokenizer, dialogues: Sequence[Dialogue]) -> Iterator[tuple[np.ndarray, list[int]]]:
    """Tokens of some dialogues at a time, as the chat template has them, and the length of each."""

    def encode(texts: list[str]) -> list[list[int]]:
        return [each.ids for each in tokenizer.encode_batch_fast(texts, add_special_tokens=False)]

    stop, begin, end = (tokenizer.token_to_id(text) for text in SPECIAL)
    between, role = encode(["\n", "assistant\n"])
    head = [end, *between, begin, *role]
    for start in range(0, len(dialogues), _BATCH):
        part = dialogues[start : start + _BATCH]
        prompts = encode([f"user\n{prompt}" for prompt, _ in part])
        answers = encode([answer for _, answer in part])
        texts = [[begin, *p, *head, *a, end, stop] for p, a in zip(prompts, answers, strict=True)]
        yield np.array([token for text in texts for token in text], np.uint16), [len(text) for text in texts]
