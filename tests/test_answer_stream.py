"""Answers taken apart as they come are what they are as a whole, in pieces of every size."""

import json
import random
from collections.abc import Sequence

import pytest

from mtp_engine.serve.readers import CallReader, Delta, PlainReader, Reader, TaggedReader
from mtp_engine.text.answer_stream import AnswerStream, Part
from mtp_engine.text.tool_calls import parse_answer

TOOLS = [
    {"function": {"name": "f", "parameters": {"properties": {"a": {"type": "integer"}, "b": {"type": "string"}}}}},
]
CALL = "<tool_call>\n<function=f>\n<parameter=a>3</parameter>\n<parameter=b>x &lt; y</parameter>\n</function>\n</tool_call>"
ANSWERS = [
    "", "plain text ", f"<think>so\n</think>\n\nI call {CALL} and {CALL}", f"{CALL}", f"text <tool_call> no call {CALL}",
    "<think>never ended", "a <think>late</think> b", f"<tool_call><function=f>{CALL}", "<tool_call><function=f><parameter=a>1",
    "  <think></think>  x  ", "<tool", "a < b <t", f"{CALL} \n {CALL} \n tail \n", "ü\u2028<think>ü",
]  # fmt: skip
BITS = [
    "<think>", "</think>", "<tool_call>", "</tool_call>", "<function=f>", "<function=", "</function>", "<parameter=a>",
    "</parameter>", "12", " ", "\n", "hi", "<", "[1]", "<tool", CALL, ">", "=g",
]  # fmt: skip


def read(text: str, size: int, *, thinking: bool) -> tuple[str, str, list[object]]:
    stream, parts = AnswerStream(TOOLS, thinking=thinking), list[Part]()
    for start in range(0, len(text), size):
        parts += stream.push(text[start : start + size])
    parts += stream.flush()
    thoughts, content = "".join(part.thought for part in parts), "".join(part.text for part in parts)
    return thoughts, content, [part.call for part in parts if part.call]


def whole(text: str, *, thinking: bool) -> tuple[str, str, list[object]]:
    message = parse_answer(text, TOOLS, thinking=thinking)
    return message.thinking or "", message.content, list(message.tool_calls)


@pytest.mark.parametrize("thinking", [False, True])
@pytest.mark.parametrize("text", ANSWERS)
def test_pieces_of_every_size(text: str, thinking: bool) -> None:
    for size in range(1, len(text) + 2):
        assert read(text, size, thinking=thinking) == whole(text, thinking=thinking)


def test_any_mixture_of_tags() -> None:
    rng = random.Random(0)
    for _ in range(2000):
        text = "".join(rng.choice(BITS) for _ in range(rng.randrange(1, 14)))
        thinking, size = rng.random() < 0.5, rng.choice([1, 2, 3, 7])
        assert read(text, size, thinking=thinking) == whole(text, thinking=thinking), text


def test_text_comes_at_once_and_calls_when_they_are_whole() -> None:
    stream = AnswerStream(TOOLS)
    assert stream.push("I will ") == [Part(text="I will")]
    assert stream.push("call <") == [Part(text=" call")]
    assert stream.push("b> ") == [Part(text=" <b>")]
    assert stream.push(CALL[:-1]) == []
    assert [part.call.name for part in stream.push(CALL[-1]) if part.call] == ["f"]


def deltas(reader: Reader, text: str, size: int) -> list[Delta]:
    found = [delta for start in range(0, len(text), size) for delta in reader.push(text[start : start + size])]
    return found + reader.flush()


def joined(found: Sequence[Delta]) -> tuple[list[str], str, str]:
    names = [delta.name for delta in found if delta.name]
    return names, "".join(delta.arguments for delta in found), "".join(delta.content for delta in found)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [("f", {}), ('a", "arguments": "', {"x": '}"}', "y": {"z": [1, "ü}"]}}), ("g", {"arguments": {"name": 1}})],
)
def test_a_required_call_in_pieces_of_every_size(name: str, arguments: dict[str, object]) -> None:
    text = json.dumps({"name": name, "arguments": arguments})
    for size in range(1, len(text) + 1):
        assert joined(deltas(CallReader(), text, size)) == ([name], json.dumps(arguments), "")
    assert joined(deltas(CallReader(), text[:-1], 3)) == ([name], json.dumps(arguments)[:-1] or "", "")


def test_other_readers() -> None:
    assert joined(deltas(PlainReader(), "a <tool_call> b", 2)) == ([], "", "a <tool_call> b")
    names, arguments, content = joined(deltas(TaggedReader(TOOLS, thinking=False), f"So: {CALL}", 4))
    assert (names, json.loads(arguments), content) == (["f"], {"a": 3, "b": "x < y"}, "So:")
