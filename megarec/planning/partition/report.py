"""What a partition leaves: towers.json, its pictures beside it and in TensorBoard; each file whole or not at all.

The pictures are the plane coloured by tower, and the interactions sorted by tower.
"""

import io
from pathlib import Path

import numpy as np
from matplotlib import colormaps
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch.utils.tensorboard import SummaryWriter

from megarec.errors import UserError
from megarec.files import write_whole
from megarec.planning.partition.partition import Partition, Picture

MOST_NAMES = 60  # beyond them names hide what they name
DOTS_PER_INCH = 120


def plane_figure(partition: Partition, picture: Picture) -> Figure:
    """The features in the plane; a colour for each tower."""
    figure = Figure(figsize=(8, 7), dpi=DOTS_PER_INCH, layout="constrained")
    axes = figure.add_subplot()
    tower_of = partition.tower_of_features()
    for tower, names in enumerate(partition.towers.features):
        x, y = picture.points[tower_of == tower].T
        axes.scatter(x, y, s=40, color=_colour(tower, len(partition.towers)), label=f"tower {tower} ({len(names)})")
    if len(tower_of) <= MOST_NAMES:
        for feature, (x, y) in zip(partition.layout.features, picture.points, strict=True):
            axes.annotate(feature.name, (x, y), xytext=(4, 4), textcoords="offset points", fontsize=8)
    axes.set_aspect("equal", adjustable="datalim")
    axes.set_title(f"{_title(partition)}, stress {picture.stress:.3f}")
    if len(partition.towers) <= 20:
        axes.legend(loc="best", fontsize=8)
    return figure


def matrix_figure(partition: Partition, picture: Picture) -> Figure:
    """How strongly every pair of features interacts, tower after tower."""
    figure = Figure(figsize=(8, 7), dpi=DOTS_PER_INCH, layout="constrained")
    axes = figure.add_subplot()
    tower_of = partition.tower_of_features()
    order = np.argsort(tower_of, kind="stable")
    shown = picture.interactions[np.ix_(order, order)].copy()
    np.fill_diagonal(shown, np.nan)  # no pair; it would take up the scale
    image = axes.imshow(shown, cmap="viridis", interpolation="nearest")
    for edge in np.flatnonzero(np.diff(tower_of[order])) + 0.5:
        axes.axhline(edge, color="white", linewidth=1)
        axes.axvline(edge, color="white", linewidth=1)
    if len(order) <= MOST_NAMES:
        names = [partition.layout.features[place].name for place in order]
        axes.set_xticks(range(len(order)), names, rotation=90, fontsize=8)
        axes.set_yticks(range(len(order)), names, fontsize=8)
    else:
        axes.set_xticks([])
        axes.set_yticks([])
    figure.colorbar(image, ax=axes, label="interaction")
    axes.set_title(_title(partition))
    return figure


def as_png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def show_in_tensorboard(figures: dict[str, Figure], towers: int, strategy: str, directory: Path) -> None:
    """Images `towers/<strategy>/<name>` at step T, so that the slider goes through numbers of towers."""
    with SummaryWriter(str(directory)) as writer:
        for name, figure in figures.items():
            canvas = FigureCanvasAgg(figure)
            canvas.draw()
            pixels = np.asarray(canvas.buffer_rgba())[..., :3]
            writer.add_image(f"towers/{strategy}/{name}", pixels, global_step=towers, dataformats="HWC")


def _colour(tower: int, towers: int) -> tuple[float, float, float, float]:
    if towers <= 20:
        return colormaps["tab10" if towers <= 10 else "tab20"](tower)
    return colormaps["hsv"](tower / towers)


def _title(partition: Partition) -> str:
    return f"{len(partition.layout.features)} features in {len(partition.towers)} towers, {partition.strategy}"


def write_partition(partition: Partition, output: Path, tensorboard: Path) -> list[Path]:
    """Write towers.json last, after the pictures and the interactions of a probe; returns the files.

    Args:
        tensorboard: the directory of the run's events.

    Raises:
        UserError: a file cannot be written.
    """
    files = {}
    if partition.picture is not None:
        # matplotlib and TensorBoard, which a baseline does without

        figures = {
            "plane": plane_figure(partition, partition.picture),
            "interactions": matrix_figure(partition, partition.picture),
        }
        show_in_tensorboard(figures, len(partition.towers), partition.strategy, tensorboard)
        files[output.with_suffix(".png")] = as_png(figures["plane"])
        files[output.with_name(f"{output.stem}-matrix.png")] = as_png(figures["interactions"])
        if partition.picture.probed:
            buffer = io.BytesIO()
            np.save(buffer, partition.picture.interactions)
            files[output.with_name(f"{output.stem}-interactions.npy")] = buffer.getvalue()
    files[output] = (partition.file().model_dump_json(indent=2) + "\n").encode()
    for path, content in files.items():
        try:
            write_whole(path, content)
        except OSError as error:
            raise UserError(f"{path}: cannot be written ({error.strerror or error})") from error
    return list(files)
