"""The figure of a scaling study: runs, laws with their bands, and the efficiency frontier, both axes logarithmic."""

import io
import re
from collections.abc import Callable

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator

from megarec.scaling.law import Law, size_means
from megarec.scaling.points import UNIT, Quality
from megarec.scaling.study import Study

# Okabe and Ito's colours, distinct with any colour vision; markers distinguish families without colour.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = "osD^vPXp"  # one more than colours: pairs repeat after 56 families
BEYOND = 2.0  # laws are drawn this far beyond the points
LABEL: dict[Quality, str] = {
    "relative_logloss_percent": "LogLoss relative to the baseline, %",
    "logloss": "LogLoss",
    "ne": "normalized entropy",
    "excess_logloss": "LogLoss above the optimum",
}


def draw(result: Study) -> Figure:
    """One axes; a colour and a marker a family, in the table's order."""
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot()
    axes.set_xscale("log")
    axes.set_yscale("log")
    for place, name in enumerate(result.points.families):
        _draw_family(axes, result, name, COLOURS[place % len(COLOURS)], MARKERS[place % len(MARKERS)])
    costs, losses = zip(*((cost, loss) for _, cost, loss in result.frontier), strict=True)
    axes.step(costs, losses, where="post", color="0.55", linewidth=1, linestyle=":", label="efficiency frontier")
    if result.points.optimum is not None:
        axes.axhline(result.points.optimum, color="0.3", linewidth=1, label=f"optimum {result.points.optimum:.4f}")
    axes.set_xlabel(f"training {UNIT['gflop']}" if result.points.axis == "gflop" else "parameters")
    axes.set_ylabel(LABEL[result.points.quality])
    # The decades of a log axis hold no tick where losses differ by per cents.
    axes.yaxis.set_major_locator(MaxNLocator(7))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(_tick(result.points.quality)))
    axes.grid(color="0.9")
    axes.legend(fontsize=9)
    return figure


def as_png(figure: Figure) -> bytes:
    return _saved(figure, "png")


def as_svg(figure: Figure) -> str:
    """An `<svg>` element that names no other document; the same figure gives the same text."""
    text = _saved(figure, "svg").decode()
    return re.sub(r"<metadata>.*?</metadata>\s*", "", text[text.index("<svg") :], flags=re.DOTALL)


def pixels(figure: Figure) -> "np.ndarray[tuple[int, int, int], np.dtype[np.uint8]]":
    """[height, width, 3], for TensorBoard."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3]


def _draw_family(axes: Axes, result: Study, name: str, colour: str, marker: str) -> None:
    cost, loss = np.array(result.points.families[name], dtype=np.float64).T
    law = result.laws[name]
    sizes, means = size_means(cost, loss)
    axes.plot(sizes, means, marker, color=colour, label=name, zorder=3)
    if len(sizes) < len(cost):
        ends = np.array([[loss[cost == size].min(), loss[cost == size].max()] for size in sizes]).T
        axes.errorbar(sizes, means, np.abs(ends - means), fmt="none", ecolor=colour, capsize=3)
    if not isinstance(law, Law):
        axes.plot(sizes, means, "--", color=colour, linewidth=1, alpha=0.6)
        return
    grid = np.geomspace(law.span[0], law.span[1] * BEYOND, 100)
    low_band, high_band = law.bootstrap.band(grid)
    text = f"{name}: exponent {law.curve.exponent:.3g} [{law.exponent_interval[0]:.3g}, {law.exponent_interval[1]:.3g}]"
    axes.plot(grid, law.curve(grid), color=colour, linewidth=1.5, label=text)
    axes.fill_between(grid, low_band, high_band, color=colour, alpha=0.15, linewidth=0)


def _tick(quality: Quality) -> Callable[[float, int | None], str]:
    if quality == "relative_logloss_percent":
        return lambda value, _: f"{100 * (value - 1):.2f}"
    return lambda value, _: f"{value:.4g}"


def _saved(figure: Figure, kind: str) -> bytes:
    buffer = io.BytesIO()
    with rc_context({"svg.hashsalt": "megarec"}):
        figure.savefig(buffer, format=kind, dpi=110, metadata={"Date": None} if kind == "svg" else {"Software": None})
    return buffer.getvalue()
