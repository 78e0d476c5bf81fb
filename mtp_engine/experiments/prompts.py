"""Prompt sets: those that ship, and files in the forms that people have."""

import json
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, final

from mtp_engine.errors import EngineError

BUILTIN = "builtin"
_FORMS = (
    "lines of JSON with `turns` (Spec-Bench), `messages` (OpenAI), `conversations` (ShareGPT) or `prompt`, "
    "or plain text with a prompt on each line"
)
_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}


@final
@dataclass(frozen=True)
class PromptItem:
    """One prompt as chat messages. id: unique in its set."""

    id: str
    category: str
    messages: tuple[dict[str, str], ...]


@final
@dataclass(frozen=True)
class Encoded:
    """A prompt as token ids in the model's chat template. index: of the set, before any was left out."""

    index: int
    item: PromptItem
    tokens: list[int]


def read_prompts(name: str, limit: int = 0) -> list[PromptItem]:
    """The prompts of a set: `builtin`, `builtin:code,math` (its categories), or a file.

    Of several turns those up to the last one of the user count; Spec-Bench's questions are asked by their first turn.
    limit: so many, spread evenly over the set; 0 is all. Raises EngineError for sets that are empty, damaged or unknown.
    """
    if name == BUILTIN or name.startswith(f"{BUILTIN}:"):
        items = _builtin(name.removeprefix(BUILTIN).lstrip(":"))
    else:
        items = _parse(Path(name).expanduser(), name)
    if limit and limit < len(items):
        items = [items[index * len(items) // limit] for index in range(limit)]
    return items


def encode(tokens: Callable[[Any], list[int]], items: Sequence[PromptItem], longest: int) -> list[Encoded]:
    """Those of at most `longest` tokens. tokens: of chat messages. Raises EngineError if none is left."""
    encoded = [Encoded(index, item, tokens(item.messages)) for index, item in enumerate(items)]
    kept = [each for each in encoded if len(each.tokens) <= longest]
    if not kept:
        raise EngineError(f"all {len(items)} prompts have more than {longest} tokens: raise --longest")
    return kept


def _builtin(categories: str) -> list[PromptItem]:
    file = resources.files("mtp_engine") / "assets" / "prompts.jsonl"
    items = _rows([json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()], BUILTIN)
    if not categories:
        return items
    known = sorted({item.category for item in items})
    if unknown := sorted(set(categories.split(",")) - set(known)):
        raise EngineError(f"no built-in prompts of category {', '.join(unknown)}; there are: {', '.join(known)}")
    return [item for item in items if item.category in categories.split(",")]


def _parse(path: Path, name: str) -> list[PromptItem]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise EngineError(f"prompts {name}: cannot be read ({reason}); name a file, or {BUILTIN}") from error
    if not text.strip():
        raise EngineError(f"prompts {name}: the file is empty; it must hold {_FORMS}")
    if path.suffix not in (".json", ".jsonl"):
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        return [PromptItem(str(number), path.stem, _asked(line)) for number, line in enumerate(lines)]
    try:
        whole = text.lstrip().startswith("[")
        rows = json.loads(text) if whole else [json.loads(line) for line in text.splitlines() if line.strip()]
    except ValueError as error:
        raise EngineError(f"prompts {name}: is no JSON ({error}); it must hold {_FORMS}") from error
    items = _rows(rows, name)
    if not items:
        raise EngineError(f"prompts {name}: holds no prompts; it must hold {_FORMS}")
    return items


def _rows(rows: Sequence[Any], name: str) -> list[PromptItem]:
    items, seen = [], defaultdict[str, int](int)
    for number, row in enumerate(rows):
        try:
            messages = _messages(row)
            identity = next((row[key] for key in ("id", "question_id") if key in row), number)
            category = str(row.get("category") or Path(name).stem).split("/")[0]
        except (LookupError, TypeError, AttributeError) as error:
            raise EngineError(f"prompts {name}: item {number + 1} is no prompt; it must hold {_FORMS}") from error
        seen[str(identity)] += 1
        unique = f"{identity}" if seen[str(identity)] == 1 else f"{identity}#{seen[str(identity)]}"
        items.append(PromptItem(unique, category, messages))
    return items


def _messages(row: Any) -> tuple[dict[str, str], ...]:
    """The chat of a row up to a user's turn. Raises LookupError or TypeError where there is none."""
    if "turns" in row:
        return _asked(row["turns"][0])
    if "prompt" in row:
        return _asked(row["prompt"])
    if "messages" in row:
        turns = [(each["role"], each["content"]) for each in row["messages"]]
    else:
        turns = [(each["from"], each["value"]) for each in row["conversations"]]
        first = next(number for number, turn in enumerate([*turns, ("human", "")]) if _ROLES[turn[0]] == "user")
        turns = turns[: first + 1]  # what another model answered is no part of the question
    chat = [{"role": _ROLES[role], "content": _text(content)} for role, content in turns]
    last = max(number for number, each in enumerate([{"role": "user"}, *chat]) if each["role"] == "user")
    if not last:
        raise LookupError("no user's turn")
    return tuple(chat[:last])


def _asked(text: Any) -> tuple[dict[str, str], ...]:
    return ({"role": "user", "content": _text(text)},)


def _text(value: Any) -> str:
    if not isinstance(value, str) or not value.strip():
        raise TypeError("a prompt is a text")
    return value
