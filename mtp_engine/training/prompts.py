"""What is given to a model that writes dialogues: prompts, follow-ups, and the pieces of its chat template."""

import json
import lzma
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import final

import numpy as np
import tokenizers

from mtp_engine.errors import EngineError
from mtp_engine.text.tokenizer import Tokenizer

FOLLOW_UPS = (
    "Summarize your answer in two sentences.",
    "Summarize that in one short paragraph.",
    "Say that again in simpler words.",
    "Explain it to a five-year-old child.",
    "Translate that into German.",
    "Translate your answer into French.",
    "Translate that into Spanish.",
    "Rewrite it as a list.",
    "Turn that into a numbered list of steps.",
    "Rewrite your answer as a table.",
    "Rewrite your answer as a short poem.",
    "Rewrite it as an email to a colleague.",
    "Rewrite your answer in a formal tone.",
    "Rewrite that in a friendly tone.",
    "Make it shorter.",
    "Make it longer and add more details.",
    "Repeat your answer word for word.",
    "Repeat the most important sentence of your answer.",
    "Correct any mistakes in your answer and write it again.",
    "Give me a python example.",
    "Write that as a python function.",
    "Add comments to the code and show it again.",
    "Give me three more examples.",
    "Continue.",
    "Please continue where you stopped.",
    "What are the keywords of your answer?",
    "Give your answer a title, then write it again.",
    "Write the same with other names.",
    "Answer the same question again, but start with the conclusion.",
    "Convert that to JSON.",
    "Explain step by step how you got there.",
    "Which questions does your answer leave open?",
)
_TEXTS = ("Alpha beta", "7 gamma 9")  # nothing is common to their beginnings or ends, in characters or in tokens
_BATCH = 4096  # prompts that are tokenised at a time
_CHECKED = 16  # prompts that are tokenised both ways


@final
@dataclass(frozen=True)
class Template:
    """A chat template, cut. A dialogue is `open`, a user's text, `head`, an answer, `mid`, a user's text, `head`, ..."""

    open: tuple[int, ...]  # all that stands before the first user turn's text
    head: tuple[int, ...]  # the token that ends a user turn, and what stands before the answer
    mid: tuple[int, ...]  # the token that ends an answer, and what stands before the next user turn's text
    follow_ups: tuple[tuple[int, ...], ...]  # mid, a follow-up and head, tokenised together

    @classmethod
    def cut(cls, tokenizer: Tokenizer, follow_ups: Sequence[str] = FOLLOW_UPS) -> "Template":
        """Render the template around texts that differ, and keep what does not. Raises EngineError if that fails."""

        def chat(*texts: str) -> list[int]:
            roles = ("user", "assistant") * len(texts)
            return tokenizer.chat([{"role": r, "content": text} for r, text in zip(roles, texts, strict=False)])

        a, b = _TEXTS
        begin, end, texts = _around(chat(a), chat(b))
        answered = [chat(a, answer, b) for answer in _TEXTS]
        closed = [ids[len(begin) + len(texts[0]) : len(ids) - len(texts[1]) - len(end)] for ids in answered]
        _, mid, answers = _around(*closed)
        before = len(answered[0]) - len(mid) - len(texts[1]) - len(end)  # tokens up to the end of the answer
        found = [tokenizer.decode(ids).strip() for ids in (*texts, *answers)]
        if found != [a, b, a, b] or not (begin and end and mid) or mid[0] not in tokenizer.eos_ids:
            raise EngineError(
                f"{tokenizer.folder}: its chat template cannot be cut into turns; train on plain text instead"
            )
        return cls(tuple(begin), tuple(end), tuple(mid), tuple(tuple(chat(a, a, text)[before:]) for text in follow_ups))


def _around(x: list[int], y: list[int]) -> tuple[list[int], list[int], list[list[int]]]:
    """The longest common beginning and end of two lists, and what lies between them in each."""
    short = min(len(x), len(y))
    start = next((i for i in range(short) if x[i] != y[i]), short)
    stop = next((i for i in range(short - start) if x[-1 - i] != y[-1 - i]), short - start)
    return x[:start], x[len(x) - stop :], [each[start : len(each) - stop] for each in (x, y)]


def read_prompts(path: Path, *, per_source: int = 8000, seed: int = 0) -> list[str]:
    """The prompts of a .jsonl or .jsonl.xz file in random order, at most `per_source` of those that name one source.

    A line is an object with `prompt`, or with `turns`, whose first is taken, and perhaps `source`. Raises EngineError.
    """
    found: list[tuple[str, str]] = []
    try:
        with (lzma.open if path.suffix == ".xz" else open)(path, "rt", encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    found.append(_prompt(path, number, line))
    except (OSError, lzma.LZMAError, EOFError, UnicodeDecodeError) as error:
        raise EngineError(f"{path}: cannot be read ({error}); name a .jsonl or .jsonl.xz file of prompts") from error
    counts: Counter[str] = Counter()
    kept = []
    for index in np.random.default_rng(seed).permutation(len(found)).tolist():
        source, text = found[index]
        counts[source] += 1
        if text and (not source or counts[source] <= per_source):
            kept.append(text)
    return kept


def _prompt(path: Path, number: int, line: str) -> tuple[str, str]:
    """Source and text of a line."""
    try:
        row = json.loads(line)
        text = row["prompt"] if "prompt" in row else row["turns"][0]
        text.encode()  # half a surrogate pair is no text
        return str(row.get("source") or ""), text.strip()
    except (ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
        raise EngineError(f"{path}, line {number}: no object with prompt or turns; correct or remove it") from error


def encode_prompts(tokenizer: Tokenizer, template: Template, texts: Sequence[str], longest: int) -> list[list[int]]:
    """`tokenizer.chat` of each text as the first user turn, where that has at most `longest` tokens.

    The tokenizer's own threads take texts in batches: 40,000 one by one take 11 s, so a few s. Where a sample shows that
    the template does more than put the text in its place, they are taken one by one.
    """

    def special(token: int) -> bool:
        return not tokenizer.decode([token]) and bool(tokenizer.decode([token], skip_special=False))

    def one_by_one(some: Sequence[str]) -> list[list[int]]:
        return [tokenizer.chat([{"role": "user", "content": text}]) for text in some]

    # between two special tokens, text and template are tokenised together
    first = max((i + 1 for i, token in enumerate(template.open) if special(token)), default=0)
    last = next((i for i, token in enumerate(template.head) if special(token)), len(template.head))
    lead, tail = tokenizer.decode(template.open[first:]), tokenizer.decode(template.head[:last])
    backend = tokenizers.Tokenizer.from_file(str(tokenizer.folder / "tokenizer.json"))
    backend.encode_special_tokens = True
    backend.no_truncation()
    backend.no_padding()

    def batched(some: Sequence[str]) -> list[list[int]]:
        found = backend.encode_batch([lead + text + tail for text in some], add_special_tokens=False)
        return [[*template.open[:first], *each.ids, *template.head[last:]] for each in found]

    sample = texts[:_CHECKED]
    encode = batched if batched(sample) == one_by_one(sample) else one_by_one
    parts = (encode(texts[start : start + _BATCH]) for start in range(0, len(texts), _BATCH))
    return [ids for part in parts for ids in part if len(ids) <= longest]
