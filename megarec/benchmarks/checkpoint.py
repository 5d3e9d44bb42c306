"""Saving and loading beside a plain sequential write and read of the same bytes, and steps while a save is in flight.

One rank's part, without a run: tensors of 64 MiB. The file system is that of the working directory (`.cache/`).
"""

import os
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from megarec.checkpoint.format import read_index
from megarec.checkpoint.pieces import Piece
from megarec.checkpoint.publish import Plan, publish, write_part
from megarec.checkpoint.reading import Reader, verify
from megarec.checkpoint.writing import CHUNK, Snapshot, give_way

BYTES = 1 << 30
TENSOR = 1 << 26
STEPS = 60
ABOUT = {
    "format": "megarec checkpoint",
    "version": 2,
    "position": {},
    "topology": {"ranks": 1},
    "config": {},
    "schema": {},
    "towers": None,
    "optimizer": "none",
    "loss_scale": None,
}


def run(size: int = BYTES) -> dict[str, Any]:
    """Rows of GB/s, and the ratios that issue 5 asks for: at least 0.6, 0.6, and at most 1.05.

    Steps beside a plain write of the same bytes, by a thread that gives way as much, are the floor of the last one.
    """
    directory = Path(".cache/checkpoint-benchmark")
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    try:
        return _measure(directory, size)
    finally:
        shutil.rmtree(directory)


def _measure(directory: Path, size: int) -> dict[str, Any]:
    pieces = [_piece(index) for index in range(size // TENSOR)]
    snapshot = Snapshot()
    first_copy = _seconds(lambda: snapshot.take(pieces))
    copy = _seconds(lambda: snapshot.take(pieces))
    plain_write = _seconds(lambda: _plain_write(directory / "plain", snapshot.data()))
    plan = Plan(directory, 1, "t", 1, ABOUT, ("latest",), keep=1, timeout=60.0)

    def save() -> None:
        write_part(plan, 0, snapshot)
        publish(plan)

    saved = _seconds(save)
    alone = _step_milliseconds()
    beside_plain = _beside(lambda: _plain_write(directory / "beside", snapshot.data()))
    beside = _beside(save)
    alone = min(alone, _step_milliseconds())
    checkpoint = directory / "step-000000001"
    plain_read = _cold(directory / "plain", lambda: _plain_read(directory / "plain"))
    room = [Piece(p.name, p.shape, p.start, torch.ones_like(p.tensor)) for p in pieces]

    def load() -> None:
        index = read_index(checkpoint)
        verify(checkpoint, index)
        reader = Reader(checkpoint, index)
        for piece in room:
            reader.fill(piece)

    loaded = _cold(checkpoint / "rank-00000.safetensors", load)
    assert all(torch.equal(a.tensor, b.tensor) for a, b in zip(pieces, room, strict=True))
    seconds = {"first copy": first_copy, "copy": copy, "plain write": plain_write, "save": saved,
               "plain read": plain_read, "load": loaded}  # fmt: skip
    rows: list[dict[str, Any]] = [
        {"what": what, "seconds": taken, "gigabytes_per_second": size / taken / 1e9} for what, taken in seconds.items()
    ]
    rows += [
        {"what": "step", "milliseconds": alone},
        {"what": "step while a plain write is in flight", "milliseconds": beside_plain},
        {"what": "step while a save is in flight", "milliseconds": beside},
    ]
    ratios = {"save_of_plain_write": plain_write / saved, "load_of_plain_read": plain_read / loaded,
              "step_beside_save": beside / alone, "step_beside_plain_write": beside_plain / alone}  # fmt: skip
    return {"name": "checkpoint", "bytes": size, "rows": rows, "ratios": ratios}


def _piece(index: int) -> Piece:
    tensor = torch.randn(TENSOR // 4 // 1024, 1024)
    return Piece(f"dense/{index}", tuple(tensor.shape), (0, 0), tensor)


def _seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def _plain_write(path: Path, data: memoryview) -> None:
    with path.open("wb") as file:
        for start in range(0, len(data), CHUNK):
            file.write(data[start : start + CHUNK])
        file.flush()
        os.fsync(file.fileno())


def _plain_read(path: Path) -> None:
    buffer = bytearray(CHUNK)
    with path.open("rb", buffering=0) as file:
        while file.readinto(buffer):
            pass


def _cold(path: Path, work: Callable[[], object]) -> float:
    """Seconds with nothing of the file in the page cache."""
    descriptor = os.open(path, os.O_RDONLY)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(descriptor)
    return _seconds(work)


def _beside(save: Callable[[], None]) -> float:
    """Median milliseconds of steps while saves follow one another in a thread."""
    stop = threading.Event()

    def saves() -> None:
        give_way()
        while not stop.is_set():
            save()

    thread = threading.Thread(target=saves)
    thread.start()
    try:
        return _step_milliseconds()
    finally:
        stop.set()
        thread.join()


def _step_milliseconds() -> float:
    """Median milliseconds of a training step of a plain MLP."""
    model = torch.nn.Sequential(torch.nn.Linear(1024, 1024), torch.nn.ReLU(), torch.nn.Linear(1024, 1))
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    x, taken = torch.randn(1024, 1024), []

    def step() -> None:
        loss: Tensor = model(x).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    for _ in range(STEPS):
        taken.append(_seconds(step))
    return 1e3 * median(taken)
