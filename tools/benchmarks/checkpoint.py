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
from megarec.checkpoint.publish import Plan, publish, write_part
from megarec.checkpoint.reading import Reader, verify
from megarec.checkpoint.snapshot import Snapshot
from megarec.checkpoint.writing import CHUNK, lower_priority
from megarec.slices import TensorSlice

BYTES = 1 << 30
TENSOR = 1 << 26
STEPS = 40
REPETITIONS = 5
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
    plan = Plan(directory, 1, "t", 1, ABOUT, ("latest",), keep=1, timeout=60.0)

    def save() -> None:
        write_part(plan, 0, snapshot)
        publish(plan)

    plain_write, saved = _alternating(lambda: _plain_write(directory / "plain", snapshot.data()), save)
    milliseconds = _steps(beside_plain=lambda: _plain_write(directory / "beside", snapshot.data()), beside_save=save)
    alone, beside_plain, beside = (median(taken) for taken in milliseconds)
    checkpoint = directory / "step-000000001"
    room = [TensorSlice(p.name, p.shape, p.start, torch.ones_like(p.tensor)) for p in pieces]

    def load() -> None:
        index = read_index(checkpoint)
        verify(checkpoint, index)
        reader = Reader(checkpoint, index)
        for piece in room:
            reader.fill(piece)

    file = checkpoint / "rank-00000.safetensors"  # one for both: disks, too, remember what was read of late

    def cold_load() -> None:
        _forget(file)
        load()

    def cold_read() -> None:
        _forget(file)
        _plain_read(file)

    plain_read, loaded = _alternating(cold_read, cold_load)
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


def _piece(index: int) -> TensorSlice:
    tensor = torch.randn(TENSOR // 4 // 1024, 1024)
    return TensorSlice(f"dense/{index}", tuple(tensor.shape), (0, 0), tensor)


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


def _alternating(plain: Callable[[], object], ours: Callable[[], object]) -> tuple[float, float]:
    """Median seconds of both: disks have good and bad moments."""
    pairs = [(_seconds(plain), _seconds(ours)) for _ in range(REPETITIONS)]
    return median(pair[0] for pair in pairs), median(pair[1] for pair in pairs)


def _forget(path: Path) -> None:
    """Leave nothing of a file in the page cache."""
    descriptor = os.open(path, os.O_RDONLY)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(descriptor)


def _steps(beside_plain: Callable[[], None], beside_save: Callable[[], None]) -> tuple[list[float], ...]:
    """Milliseconds of training steps alone, beside plain writes and beside saves, in turns."""
    step = _training_step()
    taken: tuple[list[float], ...] = ([], [], [])
    for _ in range(REPETITIONS):
        taken[0].extend(step() for _ in range(STEPS))
        taken[1].extend(_beside(beside_plain, step))
        taken[2].extend(_beside(beside_save, step))
    return taken


def _beside(save: Callable[[], None], step: Callable[[], float]) -> list[float]:
    """Milliseconds of steps while saves follow one another in a thread."""
    stop = threading.Event()

    def saves() -> None:
        lower_priority()
        while not stop.is_set():
            save()

    thread = threading.Thread(target=saves)
    thread.start()
    try:
        return [step() for _ in range(STEPS)]
    finally:
        stop.set()
        thread.join()


def _training_step() -> Callable[[], float]:
    """A step of a plain MLP; returns the milliseconds it took."""
    model = torch.nn.Sequential(torch.nn.Linear(1024, 1024), torch.nn.ReLU(), torch.nn.Linear(1024, 1))
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    x = torch.randn(1024, 1024)

    def step() -> None:
        loss: Tensor = model(x).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    return lambda: 1e3 * _seconds(step)
