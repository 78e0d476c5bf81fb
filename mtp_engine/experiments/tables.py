"""A table, as HTML, Markdown or LaTeX."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from html import escape
from typing import final

_LONG = 40  # rows
_TEX = {"&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}", "~": r"\textasciitilde{}",
        "^": r"\textasciicircum{}", "\\": r"\textbackslash{}"}  # fmt: skip


@final
@dataclass(frozen=True)
class TextTable:
    """Text cells under titles; the first column names the row, the others are figures. name: of its files."""

    name: str
    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    def without_empty_columns(self) -> "TextTable":
        """Without those in which no row has anything."""
        kept = [index for index in range(len(self.columns)) if any(row[index] for row in self.rows)]
        rows = tuple(tuple(row[index] for index in kept) for row in self.rows)
        return replace(self, columns=tuple(self.columns[index] for index in kept), rows=rows)

    def html(self) -> str:
        """In a frame that scrolls sideways where a phone is too narrow; a long table is folded up."""
        head = "".join(f"<th>{escape(column)}</th>" for column in self.columns)
        body = "\n".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in self.rows)
        table = f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>\n{body}\n</tbody></table></div>'
        if len(self.rows) <= _LONG:
            return table
        return f"<details><summary>{escape(self.title)}: {len(self.rows)} rows</summary>{table}</details>"

    def markdown(self) -> str:
        lines = [self.columns, ("---", *("---:" for _ in self.columns[1:])), *self.rows]
        body = "\n".join("| " + " | ".join(cell.replace("|", r"\|") for cell in row) + " |" for row in lines)
        return f"{self.title}\n\n{body}\n"

    def latex(self) -> str:
        """A tabular environment with booktabs' rules."""
        rows = "\n".join(_tex_row(row) for row in self.rows)
        return (
            f"% {self.title}\n\\begin{{tabular}}{{l{'r' * (len(self.columns) - 1)}}}\n\\toprule\n{_tex_row(self.columns)}\n"
            f"\\midrule\n{rows}\n\\bottomrule\n\\end{{tabular}}\n"
        )


def _tex_row(cells: Sequence[str]) -> str:
    return " & ".join("".join(_TEX.get(letter, letter) for letter in cell) for cell in cells) + r" \\"
