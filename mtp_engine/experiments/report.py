"""The report of an experiment: one HTML file that needs nothing else, and its pictures and tables as files."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any, final

from mtp_engine.config import TreeShape
from mtp_engine.errors import EngineError
from mtp_engine.experiments import charts
from mtp_engine.experiments.analyse import ALL, Result, entropy_fit, results, speed
from mtp_engine.experiments.costs import PLANNER, Costs
from mtp_engine.experiments.store import Experiment
from mtp_engine.experiments.tables import TextTable
from mtp_engine.hub.files import atomically

_SHOWN = 5  # settings in a picture; tables hold all
_FAVOURITES = ("chain:3", "tree:7", "tree:15", "4x2x2", "tree:31")
_CSS = """
:root { color-scheme: light; } * { box-sizing: border-box; }
body { font: 16px/1.5 system-ui, sans-serif; color: #1a1a1a; background: #fff; margin: 0 auto; padding: 1rem; max-width: 78rem; }
h1 { font-size: 1.6rem; margin: .5rem 0; } h2 { font-size: 1.2rem; margin: 2rem 0 .5rem; }
p, dd { max-width: 46rem; } dt { font-weight: 600; } dd { margin: 0 0 .4rem; color: #333; }
.wide { overflow-x: auto; margin: .5rem 0; } table { border-collapse: collapse; font-size: .85rem; white-space: nowrap; }
th, td { padding: .25rem .6rem; border-bottom: 1px solid #e2e2e2; text-align: right; }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0; background: #fff; }
thead th { border-bottom: 2px solid #888; } figure { margin: 0; max-width: 38rem; }
figure svg { width: 100%; height: auto; display: block; }
.pictures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)); gap: 1rem; }
summary { cursor: pointer; margin: .5rem 0; }
.small { color: #555; font-size: .85rem; overflow-wrap: anywhere; }
"""
_DEFINITIONS = (
    ("mean accepted length", "emitted tokens / verification steps: accepted drafts plus the main model's own (bonus) token. "
     "Steps in loops, whose first token ends a 16-gram that the answer already held, are left out; their share is given."),
    ("acceptance by depth", "unconditional: share of all steps that accepted a draft at that depth; these sum to accepted "
     "length - 1, loops included. Conditional: of the steps that accepted the depth before."),
    ("intervals", "95%, from 2,000 bootstrap samples of prompts."),
    ("computed", "worked out from a recording of plain decoding, step by step as real decoding would go; others were decoded."),
    ("speed-up", "measured: plain time / drafted time per token, same engine, prompts and batch, reading prompts left out. "
     "Predicted: accepted length x plain step / drafted step."),
)  # fmt: skip


@final
@dataclass(frozen=True)
class Section:
    """A heading with what stands under it: pictures (name, matplotlib figure) and tables."""

    title: str
    text: str
    pictures: tuple[tuple[str, Any], ...] = ()
    tables: tuple[TextTable, ...] = ()


def write_report(experiment: Experiment, out: Path) -> Path:
    """Write everything to the folder `out`; returns the HTML file. Raises EngineError where there is nothing to report or
    no place to write."""
    found = sorted(results(experiment), key=lambda each: (each.case.model, each.case.mtp, each.case.temperature))
    sections = [each for each in _sections(experiment, found) if each.pictures or each.tables]
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise EngineError(f"{out}: cannot be made ({error.strerror}); name another folder for --out") from error
    for section in sections:
        for name, figure in section.pictures:
            _save(out / f"{name}.png", charts.image(figure, "png"))
        for table in section.tables:
            _save(out / f"{table.name}.md", table.markdown().encode())
            _save(out / f"{table.name}.tex", table.latex().encode())
    page = out / "report.html"
    _save(page, _html(experiment, sections).encode())
    return page


def _save(path: Path, data: bytes) -> None:
    atomically(path, lambda fresh: fresh.write_bytes(data))


def _sections(experiment: Experiment, found: Sequence[Result]) -> Iterator[Section]:
    drafted = [each for each in found if not each.case.plain and len(each.rows())]
    names = Names(found)
    yield Section("All settings", "", tables=(_summary(found, names),))
    if drafted:
        shown = _favourites(drafted)
        labelled = [(names(each), each) for each in shown]
        yield Section(
            "By category", "Every setting is in the table; the picture shows a few.",
            (("by-category", charts.by_category(labelled)),), (_categories(drafted, names),),
        )  # fmt: skip
        if any(result.acceptance(conditional=True) for result in shown):
            yield Section("By depth", "", (("by-depth", charts.by_depth(labelled)),), (_depths(drafted, names),))
        yield Section("Nodes and temperature", "", tuple(_lines(drafted, names)))
    yield from _entropy(experiment, names)
    yield from _speed(experiment, found, names)


class Names:
    """What results are called: what sets them apart within the report."""

    def __init__(self, found: Sequence[Result]) -> None:
        cases = [each.case for each in found]
        decoded, computed = ({_setting(each) for each in found if each.recorded is kind} for kind in (False, True))
        self._twice = decoded & computed
        self._models = len({(case.model, case.mtp) for case in cases}) > 1
        self._varied = [name for name in ("batch", "draft_vocab", "candidates", "prompts", "dtype")
                        if len({getattr(case, name) for case in cases if case.drafter == "mtp"}) > 1]  # fmt: skip

    def model(self, result: Result) -> str:
        """Its model, and whose MTP layers, if there are several."""
        case = result.case
        return " ".join(filter(None, [Path(case.model).name, Path(case.mtp).name])) if self._models else ""

    def __call__(self, result: Result) -> str:
        case = result.case
        varied = [f"{name} {Path(str(getattr(case, name))).name}" for name in self._varied]
        twice = result.recorded and _setting(result) in self._twice
        return " ".join(filter(None, [self.model(result), result.name, *varied, "computed" if twice else ""]))


def _favourites(drafted: Sequence[Result]) -> list[Result]:
    """A few that most people ask for, at the lowest temperature; of the same setting the first."""
    coldest = min(each.case.temperature for each in drafted)
    ranked = sorted(
        (each for each in drafted if each.case.temperature == coldest),
        key=lambda each: _FAVOURITES.index(each.case.tree) if each.case.tree in _FAVOURITES else len(_FAVOURITES),
    )
    found: dict[Any, Result] = {}
    for each in ranked:
        found.setdefault(_setting(each), each)
    return list(found.values())[:_SHOWN]


def _setting(result: Result) -> Any:
    """What was asked, however it was found out."""
    return result.case.label, result.case.model, result.case.mtp


def _summary(found: Sequence[Result], names: Names) -> TextTable:
    rows = []
    for each in found:
        own, frame = speed(each, found), each.rows()
        rates = (
            f"{own.tokens_per_s:.1f}" if own else "",
            f"{own.against_plain:.2f}x" if own and own.against_plain else "",
        )
        length = (
            [str(each.accepted_length()), f"{each.accepted_length(loops=True).value:.3f}"] if len(frame) else ["", ""]
        )
        loops = f"{each.loop_share:.1%}" if len(frame) and not frame["clean_steps"].isna().any() else ""
        kind = "computed" if each.recorded else "decoded"
        rows.append(
            (names(each), str(len(each.frame)), *(["1", "1"] if each.case.plain else length), loops, kind, *rates)
        )
    columns = ("setting", "prompts", "accepted length", "with loops", "loop steps", "how", "tokens/s", "speed-up")
    return TextTable("summary", "Mean accepted length and speed", columns, tuple(rows)).without_empty_columns()


def _categories(drafted: Sequence[Result], names: Names) -> TextTable:
    categories = sorted({category for each in drafted for category in each.categories} - {ALL})
    rows = []
    for each in drafted:
        cells = [str(each.accepted_length(c)) if c in each.categories else "" for c in (ALL, *categories)]
        rows.append((names(each), *cells))
    return TextTable("by-category", "Mean accepted length by category", ("setting", ALL, *categories), tuple(rows))


def _depths(drafted: Sequence[Result], names: Names) -> TextTable:
    rows = []
    deepest = max(len(each.acceptance(conditional=True)) for each in drafted)
    for each in drafted:
        for conditional in (False, True):
            shares = [f"{e.value:.1%} [{e.low:.1%}, {e.high:.1%}]" for e in each.acceptance(conditional=conditional)]
            kind = "conditional" if conditional else "unconditional"
            rows.append((f"{names(each)}, {kind}", *shares, *[""] * (deepest - len(shares))))
    columns = ("setting", *(f"depth {depth}" for depth in range(1, deepest + 1)))
    return TextTable("by-depth", "Acceptance by depth", columns, tuple(rows))


def _lines(drafted: Sequence[Result], names: Names) -> Iterator[tuple[str, Any]]:
    ours = [each for each in drafted if each.case.tree and each.case.verifier == "match"]
    nodes: dict[str, list[Any]] = {}
    temperatures: dict[str, list[Any]] = {}
    for each in ours:
        case, length = each.case, each.accepted_length()
        kind = case.tree.split(":")[0] if ":" in case.tree else ""
        if kind:
            key = " ".join(filter(None, [names.model(each), kind, f"T={case.temperature:g}"]))
            nodes.setdefault(key, []).append((TreeShape.parse(case.tree).max_nodes, length, case.tree))
        if case.tree in _FAVOURITES:
            key = " ".join(filter(None, [names.model(each), case.tree]))
            temperatures.setdefault(key, []).append((case.temperature, length, case.tree))
    if any(len({x for x, *_ in points}) > 1 for points in nodes.values()):
        yield "nodes", charts.lines(nodes, "nodes verified per step", logarithmic=True)
    if any(len({x for x, *_ in points}) > 1 for points in temperatures.values()):
        yield "temperature", charts.lines(temperatures, "temperature")


def _entropy(experiment: Experiment, names: Names) -> Iterator[Section]:
    folders = [each for each in experiment.folders if each.case.mode == "record" and each.parts("requests")]
    if not folders:
        return
    coldest = min(each.case.temperature for each in folders)
    fits = [(Path(each.case.model).name, entropy_fit(each)) for each in folders if each.case.temperature == coldest]
    text = (
        "Accepted length of a chain as deep as the drafter, against the mean entropy of the main model's next token, a point "
        "per prompt. The published fit is that of another model, over benchmarks; its unit of entropy is not stated there."
    )
    yield Section("Entropy of the main model", text, (("entropy", charts.entropy(fits)),))


def _speed(experiment: Experiment, found: Sequence[Result], names: Names) -> Iterator[Section]:
    costs = Costs.load(experiment.path)
    coldest = min(each.case.temperature for each in found)
    series: dict[str, dict[int, float]] = {}
    measured: dict[str, dict[int, float]] = {}
    for each in found:
        if each.case.drafter != "mtp" or each.case.temperature != coldest:
            continue
        name = " ".join(filter(None, [names.model(each), each.case.tree]))
        for source in ("", PLANNER):
            length = each.accepted_length(loops=True).value
            if points := costs.speedup(each.case.model, each.case.tree, length, source):
                series[name + source] = points
        own = speed(each, found)
        if own and own.against_plain:
            measured.setdefault(name, {})[each.case.batch] = own.against_plain
    if not series:
        return
    batches = sorted({batch for points in series.values() for batch in points})
    rows = tuple(
        (name, *(f"{points[batch]:.2f}x" if batch in points else "" for batch in batches))
        for name, points in series.items()
    )
    table = TextTable("predicted", "Predicted speed-up by requests in a step", ("setting", *map(str, batches)), rows)
    timed = {name: points for name, points in series.items() if not name.endswith(PLANNER)}
    favourites = [name for name in timed if name.split()[-1] in _FAVOURITES][:_SHOWN] or list(timed)[:_SHOWN]
    planned = {name: series[name + PLANNER] for name in favourites if name + PLANNER in series}
    picture = charts.predicted({name: series[name] for name in favourites}, planned, measured)
    text = (
        "Predicted from accepted length and what steps cost here: steps that were timed, and what the engine's planner makes of "
        "its own table, which it measures for one request and carries on along straight lines."
    )
    yield Section("Speed-up", text, (("speed-up", picture),), (table,))


def _html(experiment: Experiment, sections: Sequence[Section]) -> str:
    manifest = experiment.manifest
    last = manifest["runs"][-1]
    versions = ", ".join(f"{name} {number}" for name, number in last["versions"].items())
    about = f"commit {last['commit'] or 'unknown'}; {last['processor']}; {versions}"
    parts = [
        "<!doctype html>", '<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{escape(experiment.path.name)}: acceptance</title><style>{_CSS}</style></head><body>",
        f"<h1>Acceptance: {escape(experiment.path.name)}</h1>", f'<p class="small">{escape(about)}</p>',
    ]  # fmt: skip
    for section in sections:
        parts.append(f"<h2>{escape(section.title)}</h2>")
        parts += [f"<p>{escape(section.text)}</p>"] if section.text else []
        if section.pictures:
            pictures = "".join(f"<figure>{_svg(figure, name)}</figure>" for name, figure in section.pictures)
            parts.append(f'<div class="pictures">{pictures}</div>')
        parts += [table.html() for table in section.tables]
    terms = "".join(f"<dt>{escape(term)}</dt><dd>{escape(text)}</dd>" for term, text in _DEFINITIONS)
    return "\n".join([*parts, f"<h2>What the words mean</h2><dl>{terms}</dl>", "</body></html>\n"])


def _svg(figure: Any, name: str) -> str:
    """To stand inside HTML, with identifiers that no other picture has."""
    text = charts.image(figure, "svg").decode()
    text = text[text.index("<svg") :]
    text = re.sub(r'(id="|href="#|url\(#)', rf"\g<1>{name}-", text)
    return re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
