"""What a run leaves for people: a page with its curves, and a model card. Both come from the log and the settings."""

import html
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mtp_engine.hub.files import atomically
from mtp_engine.training.trainer import LOG

RECIPE = "recipe.toml"
_WIDTH, _HEIGHT, _MARGIN = 640, 260, 44
_COLOURS = ("#2a6fdb", "#d9480f", "#2b8a3e", "#862e9c", "#5c4400", "#087f8c")
_Line = tuple[str, list[tuple[float, float]]]  # label, points


def read_log(out: Path) -> list[dict[str, Any]]:
    """The reports of a run, oldest first; of a step that was run twice after a kill, the later one."""
    path = out / LOG
    if not path.is_file():
        return []
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    return [row for _, row in sorted({row["step"]: row for row in rows}.items())]


def write_report(out: Path, title: str) -> Path:
    """out/report.html from out/log.jsonl: loss and accepted length per depth, measured accepted length, tokens/s."""
    rows = read_log(out)
    depth = len(rows[0]["loss"]) if rows else 0

    def lines(key: str, label: str) -> list[_Line]:
        return [(f"{label} {k + 1}", [(row["step"], row[key][k]) for row in rows]) for k in range(depth)]

    measured = [(row["step"], row["measured"]) for row in rows if row["measured"] is not None]
    charts = [
        ("Loss per depth (KL to the main model)", lines("loss", "layer")),
        ("Expected accepted length on training rows, greedy", lines("lengths", "chain of")),
        ("Accepted length of decoding held-out prompts, loops left out", [("measured", measured)]),
        ("Tokens per second", [("training", [(row["step"], row["tokens_per_s"]) for row in rows])]),
    ]
    body = "".join(f"<h2>{html.escape(name)}</h2>{_chart(each)}" for name, each in charts if any(p for _, p in each))
    page = (
        f'<!doctype html><meta charset="utf-8"><title>{html.escape(title)}</title><style>body{{font:15px system-ui;'
        f"max-width:{_WIDTH}px;margin:2em auto}}h2{{font-size:1em}}</style><h1>{html.escape(title)}</h1>{body}"
    )
    atomically(out / "report.html", lambda path: path.write_text(page, encoding="utf-8"))
    return out / "report.html"


def _chart(lines: Sequence[_Line]) -> str:
    """An SVG of lines over steps, with the range of both axes written beside them."""
    xs = [x for _, points in lines for x, _ in points]
    ys = [y for _, points in lines for _, y in points]
    low, high, last = min(ys), max(ys), max(xs)
    span = (high - low) or 1.0

    def place(x: float, y: float) -> str:
        across = _MARGIN + x / last * (_WIDTH - 2 * _MARGIN)
        return f"{across:.1f},{_HEIGHT - _MARGIN - (y - low) / span * (_HEIGHT - 2 * _MARGIN):.1f}"

    parts = [f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" font-size="12">']
    for text, x, y in (
        (f"{high:.3g}", 2, _MARGIN), (f"{low:.3g}", 2, _HEIGHT - _MARGIN), ("0", _MARGIN, _HEIGHT - 24),
        (f"step {last:g}", _WIDTH - 2 * _MARGIN, _HEIGHT - 24),
    ):  # fmt: skip
        parts.append(f'<text x="{x}" y="{y}">{text}</text>')
    for index, (label, points) in enumerate(lines):
        colour = _COLOURS[index % len(_COLOURS)]
        path = " ".join(place(x, y) for x, y in points)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.5"/>')
        parts.append(f'<text x="{_MARGIN + 130 * index}" y="16" fill="{colour}">{html.escape(label)}</text>')
    return "".join([*parts, "</svg>"])


def write_card(out: Path, name: str, command: str, facts: Mapping[str, Any], *, recipe: bool) -> None:
    """out/README.md: what the layers are, the exact command, the data, and what was measured. recipe: there is one."""
    again = f"`mtp-engine train --recipe {RECIPE} --out AGAIN` does the same again.\n\n" if recipe else ""
    rows = read_log(out)
    table = "".join(f"| {key} | {value} |\n" for key, value in facts.items())
    figures = "".join(
        f"| {row['step']} | {sum(row['loss']):.3f} | {row['lengths'][-1]:.2f} | {row['measured']:.2f} |\n"
        for row in rows
        if row["measured"] is not None
    )
    text = (
        f"# MTP layers for {name}\n\nTrained with mtp-engine:\n\n```\n{command}\n```\n\n{again}"
        f"Use them: `mtp-engine generate --model {name} --mtp {out.name} \"...\"`\n\n| | |\n|---|---|\n{table}\n"
        "Accepted length: tokens per verification step of the main model, bonus token included, temperature 0, steps in "
        f"repetition loops left out.\n\n| step | loss, all depths | expected on training rows | measured, held out |\n"
        f"|---|---|---|---|\n{figures}\nCurves: report.html. The layers never change what the model says: every draft is "
        "checked by it.\n"
    )  # fmt: skip
    atomically(out / "README.md", lambda path: path.write_text(text, encoding="utf-8"))
