"""A study's files: the figure twice, the page, and an image for TensorBoard."""

import os
from pathlib import Path

from megarec.errors import UserError
from megarec.scaling.plot import as_png, as_svg, draw, pixels
from megarec.scaling.report import as_html
from megarec.scaling.study import Study


def write_report(result: Study, directory: Path) -> list[Path]:
    """Write scaling_law.png, scaling_law.svg and report.html, each whole or not at all.

    Raises:
        UserError: they cannot be written.
    """
    svg = as_svg(draw(result))
    contents = {
        "scaling_law.png": as_png(draw(result)),
        "scaling_law.svg": svg.encode(),
        "report.html": as_html(result, svg).encode(),
    }
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for name, content in contents.items():
            _write_whole(directory / name, content)
    except OSError as error:
        raise UserError(f"{directory}: cannot be written ({error.strerror or error})") from error
    return [directory / name for name in contents]


def log_image(result: Study, directory: Path) -> None:
    """The figure as TensorBoard's image `scaling_law/<family>`.

    Raises:
        UserError: nothing can be written there.
    """
    from torch.utils.tensorboard import SummaryWriter  # takes seconds to load

    try:
        with SummaryWriter(str(directory)) as writer:
            writer.add_image(f"scaling_law/{result.family}", pixels(draw(result)), dataformats="HWC")
    except OSError as error:
        raise UserError(f"{directory}: cannot be written ({error.strerror or error})") from error


def _write_whole(path: Path, content: bytes) -> None:
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        partial.write_bytes(content)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
