"""One rank's file: its layout, and its way to the disk with a checksum, in bounded extra memory."""

import json
import os
import threading
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from io import FileIO
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from xxhash import xxh3_64

from megarec.checkpoint.format import DTYPE_NAMES, FileEntry
from megarec.errors import DamagedCheckpoint
from megarec.slices import TensorSlice

CHUNK = 1 << 20  # bytes written, or read, and summed at a time: they stay in the processor's cache in between
FLUSH = 1 << 26  # bytes after which written data are flushed to the disk


def all_finite(values: Tensor) -> bool:
    """Whether a tensor [N] holds only finite numbers, by one thread: torch's would take the step's cores beside it."""
    if values.dtype is torch.bfloat16:  # numpy has no bfloat16; all bits of the exponent set is inf or NaN
        chunks = (chunk.numpy() & 0x7F80 for chunk in values.view(torch.int16).split(CHUNK))
        return not any((exponents == 0x7F80).any() for exponents in chunks)
    with np.errstate(over="ignore", invalid="ignore"):  # a sum is quicker, and may overflow
        return all(np.isfinite(c.sum()) or np.isfinite(c).all() for c in map(Tensor.numpy, values.split(CHUNK)))


def key_of(piece: TensorSlice) -> str:
    """The name of a slice in its file: unique among all of a checkpoint's."""
    return piece.name if not piece.start else f"{piece.name}@{','.join(map(str, piece.start))}"


def in_file_order(pieces: Iterable[TensorSlice]) -> list[TensorSlice]:
    """Wide types first, so that every tensor is aligned to its type."""
    return sorted(pieces, key=lambda piece: (-piece.tensor.dtype.itemsize, piece.name, piece.start))


def file_header(tensors: Iterable[tuple[str, torch.dtype, tuple[int, ...]]]) -> bytes:
    """The beginning of a safetensors file that holds tensors (key, type, shape) one behind the other."""
    entries, offset = {}, 0
    for key, dtype, shape in tensors:
        end = offset + dtype.itemsize * torch.Size(shape).numel()
        entries[key] = {"dtype": DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def write_file(path: Path, blocks: Iterable[bytes | memoryview]) -> FileEntry:
    """Write, flush to the disk, read back and compare.

    The disk flushes what was written while more is written, and the rest while it is read back: one after the other
    these would take twice as long as a plain write.

    Raises:
        OSError: the disk is full, or what is read back is not what was written.
    """
    checksum, size = xxh3_64(), 0
    with path.open("wb", buffering=0) as file, ThreadPoolExecutor(1) as aside:
        flushed = aside.submit(os.fsync, file.fileno())
        for block in blocks:
            for start in range(0, len(block), CHUNK):
                chunk = block[start : start + CHUNK]
                checksum.update(chunk)
                _write_whole(file, chunk)
                size += len(chunk)
                if size % FLUSH < CHUNK and flushed.done():
                    flushed.result()
                    flushed = aside.submit(os.fsync, file.fileno())
        flushed.result()
        flushed = aside.submit(os.fsync, file.fileno())
        entry = FileEntry(bytes=size, xxh3=checksum.hexdigest())
        found = file_entry(path)
        flushed.result()
    if found != entry:
        raise OSError(f"{path}: reading it back gives other bytes than were written")
    return entry


def _write_whole(file: FileIO, chunk: bytes | memoryview) -> None:
    written = 0
    while written < len(chunk):  # a system call may take less than it was given
        written += file.write(chunk[written:])


def file_entry(path: Path) -> FileEntry:
    """Size and checksum of a file as it is."""
    checksum, size = xxh3_64(), 0
    room = memoryview(bytearray(CHUNK))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(room):
            checksum.update(room[:count])
            size += count
    return FileEntry(bytes=size, xxh3=checksum.hexdigest())


def verify_file(path: Path, entry: FileEntry) -> None:
    """Raise a DamagedCheckpoint when a file's bytes are not those that were written."""
    try:
        found = file_entry(path)
    except OSError as error:
        raise DamagedCheckpoint(f"{path}: cannot be read ({error.strerror})") from error
    if found != entry:
        raise DamagedCheckpoint(f"{path}: checksum {found.xxh3}, the index says {entry.xxh3}: damaged")


def lower_priority() -> None:
    """Give this thread only spare CPU time (nice 15, about 3 % of a contended core).

    Linux has priorities by thread; elsewhere the thread competes as any other.
    """
    with suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 15)
