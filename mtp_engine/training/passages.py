"""Prompts over passages, sentences and code: summaries, questions about a text, translations, explanations; for training.

    python -m mtp_engine.training.passages --text "public domain:FACTBOOK" --text "MIT OR Apache-2.0:BOOK/src" \\
        --code MIT:ALGORITHMS --german "MIT OR Apache-2.0:BUCH/src" --beside prompts-permissive.jsonl.xz \\
        --held-out bench_core.jsonl --held-out spec-bench.jsonl --out prompts.jsonl.xz

A source is LICENCE:FOLDER, whose .md, .txt, .rst and .json files (of the latter the strings) are read as text, or .py files as
code. Every text gives short passages, and again long ones; a German one gives sentences to be translated. What shares a run
of 13 words with a held-out prompt is left out. --beside: prompts that are there already, of which as many are taken as
--share says; the file is what `mtp-engine train --prompts` reads.
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

_GRAM = 13  # words
_SHORT, _LONG = (90, 380), (330, 620)  # words of a passage
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
_TOPICS = (
    "{0}\n\nWhat does the text say about {1}?", "{0}\nExplain what is meant by {1} here.",
    "Question: What is said of {1}?\n\nContext: {0}", "{0}\n\nAnswer with the help of the text above: why does {1} matter?",
)  # fmt: skip
_LANGUAGES = ("German", "German", "French", "Spanish", "Italian", "Portuguese", "Dutch")
_TRANSLATION = (
    "Translate English to {}: {}",
    "Translate the following sentence into {}.\n\n{}",
    "How do you say this in {}?\n{}",
)
_GERMAN = (
    "Translate German to English: {}", "Translate the following sentence into English.\n\n{}",
    "What does this mean in English?\n{}",
)  # fmt: skip
_CODE = (
    "Explain what this Python code does.\n\n```python\n{}\n```", "Add comments to this function.\n\n```python\n{}\n```",
    "Write unit tests for the following code.\n\n```python\n{}\n```", "Rewrite this in JavaScript.\n\n```python\n{}\n```",
    "Find possible mistakes in this code and write an improved version.\n\n{}",
)  # fmt: skip


def passages(text: str, words: tuple[int, int] = _SHORT) -> Iterator[str]:
    """Paragraphs that follow each other, as many as make a passage of so many words."""
    least, most = words
    kept: list[str] = []
    for part in re.split(r"\n\s*\n", text):
        paragraph = " ".join(part.split())
        if len(paragraph) < 40 or paragraph[0] in "#|<`{-*=":
            continue
        kept.append(paragraph)
        count = sum(len(each.split()) for each in kept)
        if count >= least:
            if count <= most:
                yield "\n\n".join(kept)
            kept = []


def texts(folder: Path) -> Iterator[str]:
    """Of its files, in the order of their names."""
    for path in sorted(folder.rglob("*")):
        if path.suffix in (".md", ".txt", ".rst"):
            yield path.read_text(encoding="utf-8", errors="ignore")
        elif path.suffix == ".json":
            yield "\n\n".join(_strings(json.loads(path.read_text(encoding="utf-8"))))


def _strings(value: Any) -> Iterator[str]:
    for each in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from [re.sub(r"<[^>]+>", " ", each)] if isinstance(each, str) else _strings(each)


def functions(folder: Path) -> Iterator[str]:
    """Functions and classes at the top of its Python files, neither tiny nor long."""
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
    """All runs of 13 words."""
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
        kinds = (("summary", _SUMMARY), ("summary", _SUMMARY), ("asked", _ASKED), ("asked", _TOPICS))
        (kind, forms), topics = rng.choice(kinds), re.findall(r"\b[A-Za-z][a-z]{6,}\b", piece)
        prompt = rng.choice(forms).format(piece, rng.choice(topics or ["that"]))
        yield {"source": f"{source}/{kind}", "licence": licence, "prompt": prompt}
        if (found_here := sentences(piece)) and rng.random() < 0.5:
            prompt = rng.choice(_TRANSLATION).format(rng.choice(_LANGUAGES), rng.choice(found_here))
            yield {"source": f"{source}/translation", "licence": licence, "prompt": prompt}


def sentences(piece: str) -> list[str]:
    """Those that are neither tiny nor long."""
    return [each for each in re.split(r"(?<=[.!?])\s+", piece) if 30 < len(each) < 220]


def _rows(folder: Path, licence: str, kind: str, rng: random.Random) -> Iterator[list[dict[str, str]]]:
    """Prompts over a source, in groups of which none is to crowd out another. kind: "text", "code" or "german"."""
    if kind == "code":
        yield list(asked(folder.name, licence, functions(folder), rng, code=True))
    elif kind == "german":
        every = [each for text in texts(folder) for piece in passages(text) for each in sentences(piece)]
        source = f"{folder.name}/translation"
        yield [{"source": source, "licence": licence, "prompt": rng.choice(_GERMAN).format(each)} for each in every]
    else:
        yield list(asked(folder.name, licence, _pieces(folder, _SHORT), rng, code=False))
        long = list(_pieces(folder, _LONG))
        yield list(asked(f"{folder.name}-long", licence, [*long, *long], rng, code=False))  # each asked about twice


def _pieces(folder: Path, words: tuple[int, int]) -> Iterator[str]:
    return (piece for text in texts(folder) for piece in passages(text, words))


def _lines(path: Path, name: str) -> list[dict[str, Any]]:
    """Objects that have `name`."""
    try:
        with (lzma.open if path.suffix == ".xz" else open)(path, "rt", encoding="utf-8") as file:
            rows = [json.loads(line) for line in file if line.strip()]
    except (OSError, ValueError, lzma.LZMAError, EOFError) as error:
        raise click.UsageError(f"{path}: not lines of JSON ({error})") from error
    if not all(isinstance(row, dict) and name in row for row in rows):
        raise click.UsageError(f"{path}: not lines of JSON with `{name}`")
    return rows


def _sources(given: tuple[str, ...]) -> Iterator[tuple[str, Path]]:
    for each in given:
        licence, _, folder = each.partition(":")
        if not folder or not Path(folder).is_dir():
            raise click.UsageError(f"{each!r} is not LICENCE:FOLDER with a folder that is there")
        yield licence, Path(folder)


_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)


@click.command()
@click.option("--text", "texts_of", multiple=True, metavar="LICENCE:FOLDER")
@click.option("--code", "code_of", multiple=True, metavar="LICENCE:FOLDER")
@click.option(
    "--german", "german_of", multiple=True, metavar="LICENCE:FOLDER", help="Texts whose sentences to translate."
)
@click.option("--held-out", multiple=True, type=_FILE, required=True)
@click.option("--beside", type=_FILE)
@click.option(
    "--share", default=0.6, type=click.FloatRange(0, 0.99), show_default=True, help="Of the prompts that are beside."
)
@click.option("--per-source", default=4000, type=click.IntRange(1), show_default=True)
@click.option("--out", required=True, type=click.Path(dir_okay=False, path_type=Path))
def main(
    texts_of: tuple[str, ...], code_of: tuple[str, ...], german_of: tuple[str, ...], held_out: tuple[Path, ...],
    beside: Path | None, share: float, per_source: int, out: Path,
) -> None:  # fmt: skip
    """Make prompts of texts and code, and put them among others."""
    rng, rows = random.Random(0), list[dict[str, Any]]()
    forbidden = {
        gram for path in held_out for row in _lines(path, "turns") for turn in row["turns"] for gram in grams(turn)
    }
    for kind, given in (("text", texts_of), ("code", code_of), ("german", german_of)):
        for licence, folder in _sources(given):
            for found in _rows(folder, licence, kind, rng):
                rows += rng.sample(found, min(len(found), per_source))
    clean = [row for row in rows if not grams(row["prompt"]) & forbidden]
    others = _lines(beside, "prompt") if beside else []
    rng.shuffle(others)
    taken: dict[str, int] = {}
    kept: list[dict[str, Any]] = []
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
    main()
