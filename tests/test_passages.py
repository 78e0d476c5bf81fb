"""Prompts over passages: pieces of real text and code, none that shares a run of words with a held-out prompt."""

import json
import lzma
import random
from pathlib import Path

import pytest
from click.testing import CliRunner

from mtp_engine.training.passages import functions, grams, main, passages
from mtp_engine.training.prompts import read_prompts

WORDS = (
    "river", "bridge", "people", "houses", "hill", "town", "winter", "market", "horse", "ship", "harbour", "corn", "miller",
    "daughter", "stone", "gate",
)  # fmt: skip
CODE = """def add_{0}(first: int, second: int) -> int:
    # two numbers and {0}, and what they are together
    total = first + second + {0}
    print("the total of the three numbers is", total)
    return total
"""


def sentence(number: int) -> str:
    return f"In year {number} the {' and the '.join(random.Random(number).sample(WORDS, 8))} were gone."


def folder(root: Path) -> Path:
    root.mkdir()
    story = "\n\n".join(" ".join(sentence(10 * part + i) for i in range(6)) for part in range(8))
    (root / "story.txt").write_text("# A heading\n\n" + story)
    (root / "facts.json").write_text(
        json.dumps({"land": {"text": " ".join(f"<p>{sentence(i)}</p>" for i in range(200, 206))}})
    )
    (root / "code.py").write_text("import os\n\n" + "\n\n".join(CODE.format(i) for i in range(4)) + "\nbroken = 1\n")
    return root


def test_pieces(tmp_path: Path) -> None:
    root = folder(tmp_path / "source")
    found = list(passages((root / "story.txt").read_text()))
    assert len(found) == 8
    assert all(90 <= len(each.split()) <= 380 and "#" not in each for each in found)
    code = list(functions(root))
    assert [each.splitlines()[0] for each in code] == [CODE.format(i).splitlines()[0] for i in range(4)]


def test_held_out_prompts_stay_held_out(tmp_path: Path) -> None:
    root, out = folder(tmp_path / "source"), tmp_path / "prompts.jsonl.xz"
    held, beside = tmp_path / "held.jsonl", tmp_path / "beside.jsonl"
    held.write_text(json.dumps({"turns": [f"Summarize: {sentence(33)} Be short."]}) + "\n")
    lines = [{"source": f"old-{i % 2}", "licence": "MIT", "prompt": f"Question {i}?", "ref": "x"} for i in range(30)]
    beside.write_text("".join(json.dumps(line) + "\n" for line in lines))
    options = ["--text", f"CC0:{root}", "--code", f"MIT:{root}", "--held-out", held, "--beside", beside, "--out", out]
    done = CliRunner().invoke(main, [str(each) for each in options], catch_exceptions=False)
    said = json.loads(done.stdout)
    with lzma.open(out, "rt") as file:
        rows = [json.loads(line) for line in file]
    assert said["prompts"] == len(rows)
    assert said["left out"] >= 1
    forbidden = grams(sentence(33))
    assert not [row for row in rows if "In year 33 " in row["prompt"] or forbidden & grams(row["prompt"])]
    assert {row["licence"] for row in rows} == {"CC0", "MIT"}
    kinds = {row["source"] for row in rows}
    assert {"source/summary", "source/code", "old-0", "old-1"} <= kinds
    assert sorted(read_prompts(out)) == sorted(row["prompt"].strip() for row in rows)


def test_long_passages_and_sentences_of_german(tmp_path: Path) -> None:
    """Each text is cut twice; of a German one only sentences are taken."""
    root, german, out = folder(tmp_path / "source"), tmp_path / "buch", tmp_path / "prompts.jsonl"
    paragraphs = [" ".join(sentence(100 * part + i) for i in range(6)) for part in range(8)]
    (root / "story.txt").write_text("\n\n".join(paragraphs))
    german.mkdir()
    (german / "text.md").write_text(
        " ".join(f"Im Jahr {i} waren der Fluss und die alte Mühle fort." for i in range(12))
    )
    held = tmp_path / "held.jsonl"
    held.write_text('{"turns": ["Hi"]}\n')
    options = ["--text", f"CC0:{root}", "--german", f"CC0:{german}", "--held-out", held, "--out", out]
    CliRunner().invoke(main, [str(each) for each in options], catch_exceptions=False)
    with lzma.open(out, "rt") as file:
        rows = [json.loads(line) for line in file]
    long = [row["prompt"] for row in rows if row["source"] in ("source-long/summary", "source-long/asked")]
    assert long
    assert all(330 <= len(each.split()) <= 650 for each in long)
    translated = [row["prompt"] for row in rows if row["source"] == "buch/translation"]
    assert len(translated) == 12
    assert all("Fluss" in each and "English" in each for each in translated)
    assert not [row for row in rows if "Fluss" in row["prompt"] and row["source"] != "buch/translation"]


@pytest.mark.parametrize(
    ("held", "given", "words"),
    [
        ('{"turns": ["Hi"]}', ["--text", "CC0"], "LICENCE:FOLDER"),
        ('{"turns": ["Hi"]}', ["--code", "CC0:none"], "LICENCE:FOLDER"),
        ('{"prompt": "Hi"}', [], "with `turns`"),
        ("Hi", [], "not lines of JSON"),
    ],
)
def test_bad_input_is_one_line(tmp_path: Path, held: str, given: list[str], words: str) -> None:
    path = tmp_path / "held.jsonl"
    path.write_text(held + "\n")
    done = CliRunner().invoke(main, [*given, "--held-out", str(path), "--out", str(tmp_path / "x.xz")])
    assert done.exit_code == 2
    assert words in done.stderr
