"""The pictures of a report, as matplotlib figures small enough to be read on a phone."""

from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from io import BytesIO
from typing import Any, ParamSpec

import numpy as np

from mtp_engine.errors import EngineError
from mtp_engine.experiments.analyse import EntropyFit, Estimate, Result

_P = ParamSpec("_P")
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")  # Okabe and Ito: for all eyes
_MARKERS = "os^Dv*P"
_STYLE: dict[Any, Any] = {
    "font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
    "grid.color": "#e6e6e6", "legend.frameon": False, "legend.fontsize": 8, "axes.titlesize": 9,
    "svg.fonttype": "path", "svg.hashsalt": "mtp",
    "figure.figsize": (4.6, 3.3),
}  # fmt: skip


def _styled(draw: Callable[_P, Any]) -> Callable[_P, Any]:
    """A chart in our style. Raises EngineError where matplotlib is missing."""

    @wraps(draw)
    def styled(*args: _P.args, **kwargs: _P.kwargs) -> Any:
        try:
            import matplotlib
        except ImportError as error:
            raise EngineError("reports need matplotlib: pip install 'mtp-engine[experiments]'") from error
        with matplotlib.rc_context(_STYLE):
            return draw(*args, **kwargs)

    return styled


def _figure(height: float = 3.3) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.6, height), layout="constrained")
    return figure, figure.subplots()


def image(figure: Any, kind: str) -> bytes:
    """svg or png, the same bytes for the same figure."""
    import matplotlib

    stream = BytesIO()
    metadata = {"Date": None} if kind == "svg" else {"Software": None}
    with matplotlib.rc_context(_STYLE):
        figure.savefig(stream, format=kind, dpi=160, metadata=metadata)
    return stream.getvalue()


def _bars(estimates: Sequence[Estimate]) -> list[list[float]]:
    low = [max(each.value - each.low, 0.0) for each in estimates]
    return [low, [max(each.high - each.value, 0.0) for each in estimates]]


@_styled
def by_category(results: Sequence[tuple[str, Result]]) -> Any:
    """Accepted length of a few settings in every category, with intervals."""
    categories = results[0][1].categories
    figure, axes = _figure(1.1 + 0.16 * len(categories) * (len(results) + 0.6))
    for number, (name, result) in enumerate(results):
        estimates = [result.accepted_length(category) for category in categories]
        places = np.arange(len(categories)) + (number - (len(results) - 1) / 2) * 0.8 / len(results)
        axes.errorbar([each.value for each in estimates], places, xerr=_bars(estimates), fmt=_MARKERS[number % 7],
                      ms=4, color=_COLOURS[number % 7], capsize=2, lw=1, label=name)  # fmt: skip
    axes.set_yticks(range(len(categories)), categories)
    axes.invert_yaxis()
    axes.set_xlabel("mean accepted length, 95% intervals")
    figure.legend(loc="outside upper center", ncols=min(len(results), 3))
    return figure


@_styled
def by_depth(results: Sequence[tuple[str, Result]]) -> Any:
    """Acceptance by depth: solid of all steps, dashed of those that accepted the depth before."""
    figure, axes = _figure()
    for number, (name, result) in enumerate(results):
        colour = _COLOURS[number % 7]
        for conditional, line in ((False, "-"), (True, "--")):
            estimates = result.acceptance(conditional=conditional)
            depths = np.arange(1, len(estimates) + 1) + 0.03 * number
            axes.errorbar(depths, [each.value for each in estimates], yerr=_bars(estimates), fmt=f"{_MARKERS[number % 7]}{line}",
                          ms=4, color=colour, capsize=2, lw=1, label=None if conditional else name)  # fmt: skip
    axes.set(xlabel="depth", ylabel="share accepted", ylim=(0, 1.02))
    axes.set_xticks(range(1, max((len(r.acceptance(conditional=True)) for _, r in results), default=1) + 1))
    axes.set_title("solid: of all steps; dashed: given the depth before")
    figure.legend(loc="outside upper center", ncols=min(len(results), 3))
    return figure


@_styled
def lines(
    series: Mapping[str, Sequence[tuple[float, Estimate, str]]], xlabel: str, *, logarithmic: bool = False
) -> Any:
    """Accepted length against something: by name of the line, (x, accepted length, what the point is)."""
    figure, axes = _figure()
    for number, (name, points) in enumerate(series.items()):
        points = sorted(points, key=lambda point: point[0])
        estimates = [point[1] for point in points]
        axes.errorbar([point[0] for point in points], [each.value for each in estimates], yerr=_bars(estimates),
                      fmt=f"{_MARKERS[number % 7]}-", ms=4, color=_COLOURS[number % 7], capsize=2, lw=1, label=name)  # fmt: skip
    if logarithmic:
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.set(xlabel=xlabel, ylabel="mean accepted length")
    figure.legend(loc="outside upper center", ncols=3)
    return figure


@_styled
def entropy(fits: Sequence[tuple[str, EntropyFit]]) -> Any:
    """A point per prompt, our fit, and the published one."""
    figure, axes = _figure()
    x = np.linspace(0.01, max(float(fit.entropy.max()) for _, fit in fits) * 1.05, 200)
    for number, (name, fit) in enumerate(fits):
        colour, top = _COLOURS[number % 7], fit.depth + 1
        axes.plot(fit.entropy, fit.lengths, ".", ms=3, color=colour, alpha=0.5)
        label = f"{name}: {top} (1 - {fit.a:.2f} x^{fit.b:.2f})"
        axes.plot(x, np.maximum(top * (1 - fit.a * x**fit.b), 1), color=colour, lw=1.5, label=label)
    axes.plot(x, np.maximum(4 * (1 - 0.58 * x**0.58), 1), color="#555555", lw=1.2, ls="--",
              label="MiMo-V2-Flash, published: 4 (1 - 0.58 x^0.58)")  # fmt: skip
    axes.set(xlabel="mean entropy of the main model, nats", ylabel="mean accepted length")
    figure.legend(loc="outside upper left")
    return figure


Curves = Mapping[str, Mapping[int, float]]
"""Speed-up by batch size, by what was drafted."""


@_styled
def predicted(timed: Curves, planned: Curves, measured: Curves) -> Any:
    """Speed-up against batch size from accepted length and step costs, timed or the planner's; measured ones as crosses."""
    figure, axes = _figure()
    for number, (name, points) in enumerate(timed.items()):
        colour, mark = _COLOURS[number % 7], _MARKERS[number % 7]
        axes.plot(list(points), list(points.values()), f"{mark}-", ms=4, lw=1, color=colour, label=name)
        for others, style in ((planned, "--"), (measured, "x")):
            if name in others:
                axes.plot(list(others[name]), list(others[name].values()), style, ms=7, lw=1, color=colour)
    axes.axhline(1, color="#555555", lw=0.8)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.set(xlabel="requests in a step", ylabel="speed-up over plain decoding")
    axes.set_title("solid: by timed steps; dashed: by the planner; crosses: measured", fontsize=8)
    figure.legend(loc="outside upper center", ncols=3)
    return figure
