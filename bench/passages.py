"""Prompts over passages, sentences and code: summaries, questions about a text, translations, explanations; for training.

    python bench/passages.py --text "public domain:FACTBOOK" --text "MIT OR Apache-2.0:BOOK/src" --code MIT:ALGORITHMS \\
        --out passages.jsonl.xz --beside prompts-permissive.jsonl.xz --held-out bench_core.jsonl --held-out spec-bench.jsonl

A source is LICENCE:FOLDER, whose .md, .txt, .rst and .json files (of the latter the strings) are read as text, or .py files as
code. What shares a run of 13 words with a held-out prompt is left out. --beside: prompts that are there already, of which as
many are taken as --share says; the file is what `mtp-engine train --prompts` reads.
"""

import ast
import json
import lzma
import random
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import click
from common import run

_GRAM = 13  # words
_WORDS = (90, 380)  # of a passage
_SUMMARY = (
    "Summarize: {}", "Summarize the following text.\n\n{}", "{}\n\nSummarize the text above in three sentences.",
    "Write a short summary of this passage:\n\n{}", "{}\n\nTL;DR", "What are the main points of the following text?\n\n{}",
)  # fmt: skip
_ASKED = (
    "{}\n\nAnswer with the help of the text above: what is it about, and what does it say about that?",
    "Use this passage to answer the question.\n\n{}\n\nQuestion: Which facts does the passage give?",
    "Context: {}\n\nWrite three questions that the context answers, and their answers.",
    "{}\n\nRewrite the text above in simpler words.", "Continue the following text.\n\n{}",
    "List the names and numbers in this text, each with what is said of it:\n\n{}",
)  # fmt: skip
_LANGUAGES = ("German", "German", "French", "Spanish", "Italian", "Portuguese", "Dutch")
_TRANSLATION = (
    "Translate English to {}: {}",
    "Translate the following sentence into {}.\n\n{}",
    "How do you say this in {}?\n{}",
)
_CODE = (
    "Explain what this Python code does.\n\n```python\n{}\n```", "Add comments to this function.\n\n```python\n{}\n```",
    "Write unit tests for the following code.\n\n```python\n{}\n```", "Rewrite this in JavaScript.\n\n```python\n{}\n```",
    "Find possible mistakes in this code and write an improved version.\n\n{}",
)  # fmt: skip


def passages(text: str) -> Iterator[str]:
    """Paragraphs that follow each other, as many as make a passage."""
    kept: list[str] = []
    for part in re.split(r"\n\s*\n", text):
        words = " ".join(part.split())
        if len(words) < 40 or words[0] in "#|<`{-*=" or words.count("  "):
            continue
        kept.append(words)
        count = sum(len(each.split()) for each in kept)
        if count >= _WORDS[0]:
            if count <= _WORDS[1]:
                yield "\n\n".join(kept)
            kept = []


def texts(folder: Path) -> Iterator[str]:
    for path in sorted(folder.rglob("*")):
        if path.suffix in (".md", ".txt", ".rst"):
            yield path.read_text(encoding="utf-8", errors="ignore")
        elif path.suffix == ".json":
            yield "\n\n".join(_strings(json.loads(path.read_text(encoding="utf-8"))))


def _strings(value: Any) -> Iterator[str]:
    for each in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from [re.sub(r"<[^>]+>", " ", each)] if isinstance(each, str) else _strings(each)


def functions(folder: Path) -> Iterator[str]:
    for path in sorted(folder.rglob("*.py")):
        source = path.read_text(encoding="utf-8", errors="ignore")
        try:
            nodes = ast.parse(source).body
        except SyntaxError:
            continue
        for node in nodes:
            code = ast.get_source_segment(source, node) if isinstance(node, ast.FunctionDef | ast.ClassDef) else None
            if code and 120 < len(code) < 1600:
                yield code


def grams(text: str) -> set[str]:
    words = re.findall(r"\w+", text.lower())
    return {" ".join(words[i : i + _GRAM]) for i in range(len(words) - _GRAM + 1)}


def asked(
    source: str, licence: str, found: Iterable[str], rng: random.Random, *, code: bool
) -> Iterator[dict[str, str]]:
    """Prompts over pieces of a source. Kinds are sources of their own, so that no kind crowds out another."""
    for piece in found:
        if code:
            yield {"source": f"{source}/code", "licence": licence, "prompt": rng.choice(_CODE).format(piece)}
            continue
        kind, forms = rng.choice((("summary", _SUMMARY), ("summary", _SUMMARY), ("asked", _ASKED)))
        yield {"source": f"{source}/{kind}", "licence": licence, "prompt": rng.choice(forms).format(piece)}
        sentences = [each for each in re.split(r"(?<=[.!?])\s+", piece) if 30 < len(each) < 220]
        if sentences and rng.random() < 0.5:
            prompt = rng.choice(_TRANSLATION).format(rng.choice(_LANGUAGES), rng.choice(sentences))
            yield {"source": f"{source}/translation", "licence": licence, "prompt": prompt}


def _lines(path: Path) -> list[dict[str, Any]]:
    with (lzma.open if path.suffix == ".xz" else open)(path, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file if line.strip()]


_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)


@click.command()
@click.option("--text", "texts_of", multiple=True, metavar="LICENCE:FOLDER")
@click.option("--code", "code_of", multiple=True, metavar="LICENCE:FOLDER")
@click.option("--held-out", multiple=True, type=_FILE, required=True)
@click.option("--beside", type=_FILE)
@click.option("--share", default=0.6, show_default=True, help="Of the prompts that are beside.")
@click.option("--per-source", default=4000, show_default=True)
@click.option("--out", required=True, type=click.Path(dir_okay=False, path_type=Path))
def main(
    texts_of: tuple[str, ...], code_of: tuple[str, ...], held_out: tuple[Path, ...], beside: Path | None, share: float,
    per_source: int, out: Path,
) -> None:  # fmt: skip
    rng, rows = random.Random(0), list[dict[str, Any]]()
    forbidden = {gram for path in held_out for row in _lines(path) for turn in row["turns"] for gram in grams(turn)}
    for code, given in ((False, texts_of), (True, code_of)):
        for licence, folder in (each.split(":", 1) for each in given):
            pieces = functions(Path(folder)) if code else (p for text in texts(Path(folder)) for p in passages(text))
            found = list(asked(Path(folder).name, licence, pieces, rng, code=code))
            rows += rng.sample(found, min(len(found), per_source))
    clean = [row for row in rows if not grams(row["prompt"]) & forbidden]
    others = _lines(beside) if beside else []
    rng.shuffle(others)
    taken: dict[str, int] = {}
    kept = []
    for row in others:
        taken[row["source"]] = taken.get(row["source"], 0) + 1
        if len(kept) < len(clean) * share / (1 - share) and taken[row["source"]] <= per_source:
            kept.append({name: row[name] for name in ("source", "licence", "prompt")})
    every = [*clean, *kept]
    rng.shuffle(every)
    with lzma.open(out, "wt", encoding="utf-8", preset=9) as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in every)
    click.echo(
        json.dumps(
            {"prompts": len(every), "new": len(clean), "left out": len(rows) - len(clean), "bytes": out.stat().st_size}
        )
    )


if __name__ == "__main__":
    run(main)
