"""Any rectangle of a global tensor, out of the slices that were written; only what is needed is read."""

import mmap
import warnings
from collections.abc import Iterator
from itertools import product
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from megarec.checkpoint.format import (
    DTYPE_NAMES,
    DTYPES,
    FileEntry,
    FileTensor,
    Index,
    Slice,
    TensorEntry,
    checked_size,
    read_header,
)
from megarec.checkpoint.writing import verify_file
from megarec.errors import DamagedCheckpoint, UserError
from megarec.slices import Ints, TensorSlice

MAX_CORNERS = 1 << 24  # of the rectangles that a tensor is cut into: 2^d each, for d dimensions that are cut
RESIDENT = 1 << 24  # bytes after which pages that were read are handed back to the system
Corners = tuple[NDArray[np.int64], NDArray[np.int64]]


class Reader:
    """Reads slices of the tensors of one checkpoint; files are mapped, never loaded as a whole."""

    def __init__(self, directory: Path, index: Index) -> None:
        self.directory, self.index = directory, index
        self._headers: dict[str, dict[str, FileTensor]] = {}
        self._maps: dict[str, mmap.mmap] = {}
        self._corners: dict[str, Corners] = {}
        self._resident = 0

    def fill(self, piece: TensorSlice) -> None:
        """Copy what was written into a piece's tensor, whatever slices it was written in.

        Raises:
            DamagedCheckpoint: a file is not what the index says, or the slices overlap.
            UserError: a file cannot be mapped.
        """
        for part, start, stop in self.overlaps(piece.name, piece.start, piece.stop):
            source = self.slice_of(piece.name, part)[_within(start, stop, part.start)]
            piece.tensor[_within(start, stop, piece.start)].copy_(source)
            self._resident += source.nbytes
            if self._resident > RESIDENT:
                self._hand_back()

    def _hand_back(self) -> None:
        """Mapped pages count as the process's memory until then, in the end all of them; the page cache keeps them."""
        self._resident = 0
        if hasattr(mmap, "MADV_DONTNEED"):
            for mapped in self._maps.values():
                mapped.madvise(mmap.MADV_DONTNEED)

    def overlaps(self, name: str, start: Ints, stop: Ints) -> Iterator[tuple[Slice, Ints, Ints]]:
        """The slices that a rectangle needs, each with what they have in common.

        Raises:
            DamagedCheckpoint: they do not cover it exactly once.
        """
        entry = self.index.tensors[name]
        if name not in self._corners:
            shape = len(entry.slices), len(entry.shape)
            corners = [[part.start for part in entry.slices], [part.stop for part in entry.slices]]
            self._corners[name] = tuple(np.array(c, dtype=np.int64).reshape(shape) for c in corners)  # type: ignore
        starts, stops = self._corners[name]
        low, high = np.maximum(starts, start), np.minimum(stops, stop)
        hits = np.flatnonzero((low < high).all(axis=1))
        if not _tile(low[hits], high[hits], start, stop):
            raise DamagedCheckpoint(f"{self.directory}: the slices of {name} do not cover {start} to {stop} once")
        for hit in hits:
            yield entry.slices[hit], tuple(low[hit].tolist()), tuple(high[hit].tolist())

    def slice_of(self, name: str, part: Slice) -> Tensor:
        """A slice as a tensor over the mapped file."""
        found = self.located(name, part)
        count = torch.Size(found.shape).numel()
        with warnings.catch_warnings():  # torch has no tensors that may only be read; nothing writes to this one
            warnings.filterwarnings("ignore", message="The given buffer is not writable")
            flat = torch.frombuffer(self._maps[part.file], dtype=found.dtype, count=count, offset=found.start)
        return flat.view(found.shape)

    def located(self, name: str, part: Slice) -> FileTensor:
        """Where a slice lies in its file, which is of the type and shape that the index says."""
        if part.file not in self._maps:
            path = checked_size(self.directory, part.file, self.index.files[part.file])
            self._headers[part.file] = read_header(path)
            self._maps[part.file] = _map(path)
        found = self._headers[part.file].get(part.key)
        dtype = DTYPES[self.index.tensors[name].dtype]
        shape = tuple(stop - start for start, stop in zip(part.start, part.stop, strict=True))
        if found is None or (found.dtype, found.shape) != (dtype, shape):
            raise DamagedCheckpoint(f"{self.directory / part.file}: {part.key} is not the {dtype} {shape} of the index")
        return found


def index_of_file(path: Path, entry: FileEntry) -> Index:
    """What a file of whole tensors, such as an exported model's, would be in a checkpoint: enough for a `Reader`.

    Raises:
        DamagedCheckpoint: it is no safetensors file.
    """
    tensors = {}
    for name, found in read_header(path).items():
        part = Slice(file=path.name, key=name, start=(0,) * len(found.shape), stop=found.shape)
        tensors[name] = TensorEntry(dtype=DTYPE_NAMES[found.dtype], shape=found.shape, slices=(part,))  # type: ignore
    return Index(
        format="megarec checkpoint",
        version=2,
        step=0,
        position={},
        topology={},
        config={},
        data_schema={},
        towers=None,
        optimizer="",
        loss_scale=None,
        tensors=tensors,
        files={path.name: entry},
    )


def _map(path: Path) -> mmap.mmap:
    """A whole file, to be read only: a map that may be written counts as memory, and one larger than it is refused.

    Raises:
        UserError: the system does not map it; the checkpoint may be fine.
    """
    try:
        with path.open("rb") as file:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as error:
        raise UserError(f"{path}: cannot be mapped into memory ({error.strerror})") from error


def verify(directory: Path, index: Index, part: int = 0, parts: int = 1) -> None:
    """Verify one of `parts` shares of a checkpoint: checksums, headers, and that slices cover their tensors once.

    Raises:
        DamagedCheckpoint: something is not as the index says.
    """
    files = sorted(index.files)[part::parts]
    for name in files:
        verify_file(checked_size(directory, name, index.files[name]), index.files[name])
    reader, mine = Reader(directory, index), set(files)
    for position, (name, entry) in enumerate(index.tensors.items()):
        for piece in entry.slices:
            if piece.file in mine:
                reader.located(name, piece)
        if position % parts == part:
            for _ in reader.overlaps(name, (0,) * len(entry.shape), entry.shape):
                break


def _within(start: Ints, stop: Ints, origin: Ints) -> tuple[slice, ...]:
    """The rectangle [start, stop) as an index of a tensor whose first element is at `origin`."""
    return tuple(slice(a - o, b - o) for a, b, o in zip(start, stop, origin, strict=True))


def _tile(low: NDArray[np.int64], high: NDArray[np.int64], start: Ints, stop: Ints) -> bool:
    """Whether rectangles [N, d] inside the rectangle [start, stop) have each of its elements once.

    They do if and only if the corners of all of them, with the sign of a mixed difference, add up to those of the
    whole: the mixed difference of "how many rectangles have this element" loses nothing. So a sort is enough, where
    comparing pairs takes a minute for 200,000 of them.
    """
    cut = [
        axis for axis in range(len(start)) if (low[:, axis] != start[axis]).any() or (high[:, axis] != stop[axis]).any()
    ]
    if not cut:
        return len(low) == 1 or (not len(low) and any(a >= b for a, b in zip(start, stop, strict=True)))
    if len(low) << len(cut) > MAX_CORNERS:
        return False
    lows = np.vstack([low[:, cut], np.array(start, dtype=np.int64)[cut]])
    highs = np.vstack([high[:, cut], np.array(stop, dtype=np.int64)[cut]])
    weight = np.array([1] * len(low) + [-1], dtype=np.int64)
    corners, weights = [], []
    for ends in product((False, True), repeat=len(cut)):
        corners.append(np.where(ends, highs, lows))
        weights.append(weight * (-1) ** sum(ends))
    _, which = np.unique(np.vstack(corners), axis=0, return_inverse=True)
    return not np.bincount(which.reshape(-1), np.concatenate(weights)).any()
