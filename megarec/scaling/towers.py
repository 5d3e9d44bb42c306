"""What towers cost in quality: every model of a study with towers beside the flat one of its family.

Models are named `<family>-flat` and `<family>-<partition>-x<compression>`: dcn-flat, dcn-coherent-x4. A difference is
the mean over a model's seeds less that of flat's, and counts in the sample deviation of flat's seeds.
"""

import re
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from megarec.errors import UserError
from megarec.files import write_whole
from megarec.scaling.tables import Split, chosen_rows, values

_FLAT = "-flat"
_TOWERS = re.compile(r"(?P<family>.+)-(?P<partition>[^-]+)-x(?P<compression>\d+(\.\d+)?)")
METRICS = ("auc", "logloss")


@dataclass(frozen=True)
class Quality:
    """A metric of a model over its seeds.

    Attributes:
        deviation: of a sample; None: of a single seed.
    """

    mean: float
    deviation: float | None
    seeds: int


@dataclass(frozen=True)
class Cost:
    """A model with towers beside the flat one.

    Attributes:
        flat, towers: by metric.
    """

    family: str
    partition: str
    compression: float
    flat: dict[str, Quality]
    towers: dict[str, Quality]

    def difference(self, metric: str) -> float:
        return self.towers[metric].mean - self.flat[metric].mean

    def in_deviations(self, metric: str) -> float | None:
        """The difference over the deviation of flat's seeds; None where that is 0 or unknown."""
        deviation = self.flat[metric].deviation
        return self.difference(metric) / deviation if deviation else None


def costs(path: Path, split: Split = "test") -> list[Cost]:
    """By family, compression and partition, in this order.

    Raises:
        UserError: the file is not a table of a sweep, or no family of it has both a flat model and one with towers.
    """
    rows: dict[str, list[dict[str, object]]] = {}
    for row in chosen_rows(path):
        rows.setdefault(row["model"], []).append(row)
    found = {}
    for model, own in rows.items():
        of_metric = {metric: values(own, metric if split == "test" else f"valid_{metric}") for metric in METRICS}
        if all(of_metric.values()):
            found[model] = {metric: _quality(seeds) for metric, seeds in of_metric.items()}
    named = [(match, quality) for model, quality in found.items() if (match := _TOWERS.fullmatch(model))]
    pairs = [
        Cost(match["family"], match["partition"], float(match["compression"]), flat, quality)
        for match, quality in named
        if (flat := found.get(match["family"] + _FLAT))
    ]
    if not pairs:
        raise UserError(
            f"{path}: no family has both <family>-flat and <family>-<partition>-x<compression>; there are "
            f"{', '.join(rows) or 'no runs'}"
        )
    return sorted(pairs, key=lambda cost: (cost.family, cost.compression, cost.partition))


def _quality(seeds: list[float]) -> Quality:
    return Quality(statistics.mean(seeds), statistics.stdev(seeds) if len(seeds) > 1 else None, len(seeds))


def cost_table(found: list[Cost]) -> Iterator[str]:
    """Markdown; the flat model of a family comes before those with towers."""
    less = "difference | in deviations"
    yield f"| family | partition | compression | seeds | AUC | {less} | LogLoss | {less} |"
    yield "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |"
    family = None
    for cost in found:
        if cost.family != family:
            family = cost.family
            flat = " | ".join(f"{_absolute(cost.flat[metric])} | |" for metric in METRICS)
            yield f"| {family} | flat | 1 | {cost.flat['auc'].seeds} | {flat} |"
        towers = " | ".join(_beside_flat(cost, metric) for metric in METRICS)
        yield f"| {family} | {cost.partition} | {cost.compression:g} | {cost.towers['auc'].seeds} | {towers} |"


def _absolute(quality: Quality) -> str:
    return f"{quality.mean:.4f}" + (f" ± {quality.deviation:.4f}" if quality.deviation is not None else "")


def _beside_flat(cost: Cost, metric: str) -> str:
    deviations = cost.in_deviations(metric)
    share = "unknown" if deviations is None else f"{deviations:+.1f}"
    return f"{_absolute(cost.towers[metric])} | {cost.difference(metric):+.4f} | {share}"


def plot_costs(found: list[Cost], output: Path) -> None:
    """Draw AUC and LogLoss less flat's against the compression; a row a family, a line a partition.

    Args:
        output: .png or .svg, written whole.

    Raises:
        UserError: another ending, or it cannot be written.
    """
    if output.suffix not in (".png", ".svg"):
        raise UserError(f"--plot {output}: expected a name that ends in .png or .svg")
    from matplotlib.figure import Figure  # which a table does without

    from megarec.scaling.plot import COLOURS, MARKERS, as_png, as_svg

    families = sorted({cost.family for cost in found})
    partitions = sorted({cost.partition for cost in found})
    figure = Figure(figsize=(9, 3.2 * len(families)), layout="constrained")
    grid = figure.subplots(len(families), 2, squeeze=False)
    for family, row in zip(families, grid, strict=True):
        own = [cost for cost in found if cost.family == family]
        for metric, title, axes in zip(METRICS, ("AUC", "LogLoss"), row, strict=True):
            deviation = own[0].flat[metric].deviation or 0.0
            axes.axhspan(-deviation, deviation, color="0.9", label="one deviation of flat's seeds")
            for place, partition in enumerate(partitions):
                points = [(c.compression, c.difference(metric)) for c in own if c.partition == partition]
                if points:
                    style = {"color": COLOURS[place % len(COLOURS)], "marker": MARKERS[place % len(MARKERS)]}
                    axes.plot(*zip(*points, strict=True), label=partition, **style)
            axes.set_xscale("log", base=2)
            ticks = sorted({cost.compression for cost in own})
            axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
            axes.set_xlabel("compression")
            axes.set_title(f"{family}: {title} less flat's")
            axes.grid(color="0.9")
    drawn = {text: handle for axes in grid.flat for handle, text in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(drawn.values(), drawn.keys(), loc="outside lower center", ncols=4, fontsize=8)
    content = as_png(figure) if output.suffix == ".png" else as_svg(figure).encode()
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        write_whole(output, content)
    except OSError as error:
        raise UserError(f"--plot {output}: cannot be written ({error.strerror or error})") from error
