"""The rows of `bench.py towers` as one picture: step and exchange over the links, a line for each variant.

Crosses, on some of the links, are messages of 16 bits.
"""

from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

WHAT = {"step_ms": "whole step", "exchange_ms": "exchange alone"}


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Write a PNG or SVG, by the ending: a line of panels for each model.

    Args:
        rows: as `towers.run` returns them.
    """
    models = list(dict.fromkeys(row["model"] for row in rows))
    figure = Figure(figsize=(10, 4 * len(models)), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(models), len(WHAT), squeeze=False)
    for line, model in zip(panels, models, strict=True):
        for axes, (key, title) in zip(line, WHAT.items(), strict=True):
            _panel(axes, [row for row in rows if row["model"] == model], key)
            axes.set_title(f"{model}: {title}")
        line[-1].legend(fontsize=8)
    figure.savefig(path)


def _panel(axes: Axes, rows: list[dict[str, Any]], key: str) -> None:
    links = sorted({row["link_gbit"] for row in rows}, key=lambda link: link or float("inf"))
    for variant in dict.fromkeys(row["variant"] for row in rows):
        found = {row["link_gbit"]: row[key] for row in rows if row["variant"] == variant}
        style = "--" if variant.startswith("torchrec") else "-"
        bits = {"marker": "x", "alpha": 0.6} if "16-bit" in variant else {"marker": "o"}
        measured = [place for place, link in enumerate(links) if link in found]
        axes.plot(measured, [found[links[p]] for p in measured], style, markersize=4, label=variant, **bits)
    axes.set_xticks(range(len(links)), [f"{link:g}" if link else "unshaped" for link in links])
    axes.set_xlabel("link between the hosts, Gbit/s")
    axes.set_ylabel("ms, median of the slowest rank")
    axes.set_yscale("log")
    axes.grid(which="both", alpha=0.3)
