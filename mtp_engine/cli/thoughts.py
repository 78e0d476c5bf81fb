"""Telling a model's thoughts from its answer while the text comes in."""

from typing import final

from mtp_engine.text.tool_calls import END_THINK, THINK


@final
class ThoughtSplitter:
    """Cuts a stream of text at `<think>` and `</think>`; the tags belong to the thoughts. Loses and adds nothing."""

    def __init__(self, *, inside: bool = False) -> None:
        self._inside, self._held = inside, ""

    def push(self, text: str) -> list[tuple[str, bool]]:
        """Pieces, and whether each is a thought. What may be the beginning of a tag is held back."""
        text, self._held = self._held + text, ""
        pieces: list[tuple[str, bool]] = []
        while text:
            tag = END_THINK if self._inside else THINK
            before, found, rest = text.partition(tag)
            if not found:
                kept = next((n for n in range(len(tag) - 1, 0, -1) if text.endswith(tag[:n])), 0)
                text, self._held = text[: len(text) - kept], text[len(text) - kept :]
                pieces.append((text, self._inside))
                break
            pieces += [(before, self._inside), (tag, True)]
            self._inside, text = not self._inside, rest
        return [(piece, thought) for piece, thought in pieces if piece]

    def flush(self) -> list[tuple[str, bool]]:
        """What was held back."""
        held, self._held = self._held, ""
        return [(held, self._inside)] if held else []
