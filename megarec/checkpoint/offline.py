"""Inspect, reshape and export a checkpoint without a run; memory stays bounded whatever its size."""

import os
import secrets
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megarec.checkpoint.format import (
    DTYPES,
    INDEX,
    MODEL_CONFIG,
    MODEL_FILE,
    SEALED_EXPORT,
    Index,
    read_index,
    sealed,
)
from megarec.checkpoint.pointers import BEST, LATEST, pointed
from megarec.checkpoint.publish import move_in
from megarec.checkpoint.reading import Reader, verify
from megarec.checkpoint.sparse import TABLES, TOWERS
from megarec.checkpoint.writing import file_header, write_file
from megarec.dense.masters import DENSE as DENSE
from megarec.errors import UserError
from megarec.files import read_object, write_whole
from megarec.slices import Ints, TensorSlice, rectangles, share_of_range

METRICS = "metrics.json"  # of the run, two levels above its checkpoints
AVERAGES = "ema/"  # before the name of a weight: its average over the steps (train.ema)
BLOCK = 1 << 24  # bytes of a new file that are put together at a time


class Part(NamedTuple):
    """A rectangle that a new file gets: `key` in it."""

    name: str
    key: str
    dtype: torch.dtype
    start: Ints
    size: Ints


def locate(path: Path) -> Path:
    """The checkpoint that a path means: itself, what a pointer names, or a run's best one, else its latest.

    A run's metrics are those of its best model, so that is what its name means to every tool.

    Raises:
        UserError: there is none.
    """
    if (path / INDEX).is_file():
        return path
    if path.name in (LATEST, BEST) and (name := pointed(path.parent, path.name)):
        return path.parent / name
    for pointer in (BEST, LATEST):
        for directory in (path / "checkpoints", path):
            if name := pointed(directory, pointer):
                return directory / name
    raise UserError(
        f"{path}: holds no checkpoint; expected a run's train.output_dir with checkpoints/{BEST} or "
        f"checkpoints/{LATEST}, or a checkpoint with {INDEX}"
    )


def said_of(checkpoint: Path, index: Index) -> dict[str, Any]:
    """Step of a checkpoint, its place in its run, and its known metrics."""
    about: dict[str, Any] = {"step": index.step}
    roles = [pointer for pointer in (BEST, LATEST) if pointed(checkpoint.parent, pointer) == checkpoint.name]
    if roles:
        about["is"] = " and ".join(roles)
    if BEST in roles and (metric := index.position.get("best_by")) is not None:
        score = index.position.get("best")
        if isinstance(score, int | float):
            about[f"valid_{metric}"] = abs(score)
    path = checkpoint.parent.parent / METRICS
    if os.path.lexists(path):  # an unfinished run has none
        try:
            metrics = read_object(path, "the metrics of a run", nan=True)
        except UserError as error:
            return about | {"metrics": str(error)}
        test = metrics.get("test")
        if metrics.get("step") == index.step and isinstance(test, dict):
            about |= {f"test_{key}": test.get(key) for key in ("auc", "logloss")}
    return about


def inspect(directory: Path) -> dict[str, Any]:
    """Summary of a checkpoint; only its index is read."""
    index = read_index(directory)
    return {
        "step": index.step,
        "topology": index.topology,
        "tensors": {name: {"shape": list(t.shape), "dtype": t.dtype} for name, t in index.tensors.items()},
        "bytes": index.bytes,
        "optimizer": index.optimizer,
        "towers": index.towers,
        "position": index.position,
        "files": len(index.files),
    }


def reshape(source: Path, target: Path, ranks: int) -> Index:
    """Rewrite a checkpoint as `ranks` files, every tensor cut by its first dimension into nearly equal parts.

    Any number of ranks loads any checkpoint; rewriting it first lets each rank read little more than its own file.

    Raises:
        UserError: the source is damaged, or the target exists.
    """
    index = read_index(source)
    verify(source, index)
    reader = Reader(source, index)
    files: dict[str, Any] = {}
    tensors: dict[str, Any] = {name: {**t.model_dump(), "slices": []} for name, t in index.tensors.items()}
    with new_directory(target) as directory:
        for rank in range(ranks):
            name = f"rank-{rank:05d}.safetensors"
            parts = list(_parts_of(index, rank, ranks))
            for part in parts:
                stop = [first + size for first, size in zip(part.start, part.size, strict=True)]
                slices = tensors[part.name]["slices"]
                slices.append({"file": name, "key": part.key, "start": part.start, "stop": stop})
            files[name] = write_file(directory / name, _blocks(parts, reader)).model_dump()
        about = index.model_dump(exclude={"seal", "tensors", "files"}, by_alias=True)
        about["topology"] = {**index.topology, "ranks": ranks}
        write_whole(directory / INDEX, sealed({**about, "tensors": tensors, "files": files}))
    return read_index(target)


def export(source: Path, target: Path) -> dict[str, Any]:
    """Write the weights alone as one safetensors file, and config.json beside it; `megarec.load_model` reads both.

    Returns:
        Bytes of the file, and the summary of the checkpoint.

    Raises:
        UserError: the source is damaged, or the target exists.
    """
    index = read_index(source)
    verify(source, index)
    parts = [
        Part(source_of(name, index), name, DTYPES[entry.dtype], (0,) * len(entry.shape), entry.shape)
        for name, entry in index.tensors.items()
        if is_weight(name)
    ]
    with new_directory(target) as directory:
        entry = write_file(directory / MODEL_FILE, _blocks(parts, Reader(source, index)))
        about = {"format": "megarec model", "step": index.step, "config": index.config}
        about |= {"schema": index.data_schema, "towers": index.towers, "file": entry.model_dump()}
        write_whole(directory / MODEL_CONFIG, sealed(about, SEALED_EXPORT))
    return {"bytes": entry.bytes, **said_of(source, index)}


def is_weight(name: str) -> bool:
    """Whether a tensor's name is that of a model's weight, not of training's state."""
    if name.startswith(TABLES):
        return name.endswith("/weight")
    return any(name.startswith(prefix) and "/" not in name.removeprefix(prefix) for prefix in (DENSE, TOWERS))


def source_of(weight: str, index: Index) -> str:
    """The source of an evaluated weight: its average, if there is one."""
    return AVERAGES + weight if AVERAGES + weight in index.tensors else weight


def _parts_of(index: Index, rank: int, ranks: int) -> Iterator[Part]:
    """What one of the new files gets."""
    for name, entry in index.tensors.items():
        dtype = DTYPES[entry.dtype]
        if not entry.shape:
            if rank == 0:
                yield Part(name, name, dtype, (), ())
            continue
        first, last = share_of_range(0, entry.shape[0], ranks, rank)
        start, size = (first, *(0 for _ in entry.shape[1:])), (last - first, *entry.shape[1:])
        if prod(size):
            yield Part(name, f"{name}@{first}", dtype, start, size)


def _blocks(parts: Sequence[Part], reader: Reader) -> Iterator[bytes | memoryview]:
    """A safetensors file, block by block; a block is good until the next one is asked for, which takes its memory."""
    room = torch.empty(BLOCK, dtype=torch.uint8)
    ordered = sorted(parts, key=lambda part: (-part.dtype.itemsize, part.key))
    yield file_header([(part.key, part.dtype, part.size) for part in ordered])
    for part in ordered:
        shape = reader.index.tensors[part.name].shape
        elements, step = prod(part.size), BLOCK // part.dtype.itemsize
        for first in range(0, elements, step):
            last = min(first + step, elements)
            block = room[: (last - first) * part.dtype.itemsize]
            _fill(block.view(part.dtype), part, shape, first, last, reader)
            yield block.numpy().data


def _fill(block: Tensor, part: Part, shape: Ints, first: int, last: int, reader: Reader) -> None:
    """Elements [first, last) of a part, in row-major order."""
    for start, size in rectangles(part.size, first, last):
        in_whole = tuple(at + own for at, own in zip(start, part.start, strict=True))
        reader.fill(TensorSlice(part.name, shape, in_whole, block[: prod(size)].view(size)))
        block = block[prod(size) :]


@contextmanager
def new_directory(target: Path) -> Iterator[Path]:
    """A temporary directory that becomes `target` when all went well, and is gone otherwise."""
    if target.exists():
        raise UserError(f"{target} exists already: name a directory that does not")
    temporary = target.with_name(f"{target.name}.tmp-{secrets.token_hex(8)}")
    try:
        temporary.mkdir(parents=True)
        yield temporary
        move_in(temporary, target)
    except OSError as error:
        raise UserError(f"{target}: cannot be written ({error.strerror or error})") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
