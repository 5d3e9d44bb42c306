"""What a partition leaves: towers.json, its pictures beside it and in TensorBoard; each file whole or not at all."""

import io
import os
from pathlib import Path

import numpy as np

from megarec.errors import UserError
from megarec.towers.partition import Partition


def check_output(output: Path) -> None:
    """Make the directory of the file to write; call it before long work.

    Raises:
        UserError: it is no .json, or nothing can be written there.
    """
    if output.suffix != ".json":
        raise UserError(f"--output {output}: expected the name of a JSON file, such as towers.json")
    if output.is_dir():
        raise UserError(f"--output {output}: is a directory; name a file, such as {output / 'towers.json'}")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output {output}: {output.parent} cannot be made ({error.strerror})") from error
    if not os.access(output.parent, os.W_OK):
        raise UserError(f"--output {output}: {output.parent} cannot be written; choose another directory")


def write_partition(partition: Partition, output: Path, tensorboard: Path) -> list[Path]:
    """Write towers.json last, after the pictures and the interactions of a probe; returns the files.

    Args:
        tensorboard: the directory of the run's events.

    Raises:
        UserError: a file cannot be written.
    """
    files = {}
    if partition.picture is not None:
        from megarec.towers import picture  # matplotlib and TensorBoard, which a baseline does without

        figures = {
            "plane": picture.plane_figure(partition, partition.picture),
            "interactions": picture.matrix_figure(partition, partition.picture),
        }
        picture.show_in_tensorboard(figures, len(partition.towers), partition.strategy, tensorboard)
        files[output.with_suffix(".png")] = picture.as_png(figures["plane"])
        files[output.with_name(f"{output.stem}-matrix.png")] = picture.as_png(figures["interactions"])
        if partition.picture.probed:
            buffer = io.BytesIO()
            np.save(buffer, partition.picture.interactions)
            files[output.with_name(f"{output.stem}-interactions.npy")] = buffer.getvalue()
    files[output] = (partition.file().model_dump_json(indent=2) + "\n").encode()
    for path, content in files.items():
        write_whole(path, content)
    return list(files)


def write_whole(path: Path, content: bytes) -> None:
    """Write a file by way of another, so that readers find the old one or the new one.

    Raises:
        UserError: it cannot be written; nothing is left of it.
    """
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        partial.write_bytes(content)
        partial.replace(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror or error})") from error
    finally:
        partial.unlink(missing_ok=True)
