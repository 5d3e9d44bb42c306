"""The context of every part of tools/gpu_check.py: device, sizes, output directory, and a clock."""

import gc
import itertools
import json
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch

from megarec.config.load import load_config
from megarec.config.sections import RunConfig
from megarec.data.schema import schema_of
from megarec.run.spec import ModelSpec, resolve
from tools.benchmarks.interleave import seconds_of as once

ROOT = Path(__file__).resolve().parents[2]
TINY_MODEL = (
    'model={"name": "wukong", "layers": 1, "num_fm": 2, "num_lcb": 2, "rank": 2, "mlp": [8], "dim": 160, "head": [8], '
    '"numeric_mlp": [8], "numeric_embeddings": 2}'
)
ALONE = (  # on one card; the ladder's own sections are for a cluster
    "parallel.tensor=1",
    'deepspeed={"zero_optimization": {"stage": 1}, "bf16": {"enabled": true}, "gradient_clipping": 1.0}',
)


class TableCase(NamedTuple):
    """Equal tables, each looked up once an example."""

    tables: int
    rows: int
    columns: int
    batch: int


class Sizes(NamedTuple):
    """How much the parts do.

    Attributes:
        gemm, copy_bytes: of the ceilings.
        steps: of a parity case.
        ladder: (row, examples).
        compiled: whether rows are measured with dense.compile too.
        job: hosts and ranks a host of the true rank; `rows` of the ladder that it becomes.
        repeats: of a measured step.
        run_row, run_batch, run_examples, run_rows: of the run end to end: data, and rows of every table.
        overrides: of every config of the ladder.
    """

    gemm: int
    copy_bytes: int
    steps: int
    ladder: tuple[tuple[str, int], ...]
    compiled: bool
    job: tuple[int, int]
    rows: tuple[str, ...]
    tables: tuple[TableCase, ...]
    repeats: int
    run_row: str
    run_batch: int
    run_examples: int
    run_rows: int
    overrides: tuple[str, ...] = ()


SIZES = {
    "cuda": Sizes(
        gemm=8192,
        copy_bytes=2**32,
        steps=20,
        ladder=(("0.53", 16384), ("1.25", 16384), ("2.12", 16384), ("5.6", 16384), ("22.23", 8192)),
        compiled=True,
        job=(32, 8),
        rows=("61", "108"),
        tables=(TableCase(26, 4_000_000, 128, 65536), TableCase(100, 1_000_000, 160, 65536)),
        repeats=10,
        run_row="5.6",
        run_batch=8192,
        run_examples=40_000,
        run_rows=10_000,
    ),
    "cpu": Sizes(
        gemm=1024,
        copy_bytes=2**27,
        steps=20,
        ladder=(("0.53", 32),),
        compiled=False,
        job=(32, 8),
        rows=("0.53",),
        tables=(TableCase(26, 20_000, 64, 1024),),
        repeats=3,
        run_row="0.53",
        run_batch=64,
        run_examples=800,
        run_rows=100,
    ),
    "tiny": Sizes(
        gemm=64,
        copy_bytes=2**16,
        steps=2,
        ladder=(("0.53", 2),),
        compiled=False,
        job=(2, 2),
        rows=("0.53", "1.25"),
        tables=(TableCase(2, 50, 8, 4),),
        repeats=1,
        run_row="0.53",
        run_batch=4,
        run_examples=50,
        run_rows=5,
        overrides=(TINY_MODEL, f"data.schema={ROOT / 'ds_configs/schemas/movielens-100k.json'}"),
    ),
}


@dataclass
class Context:
    """One process of one part.

    Attributes:
        directory: of this process, to write into.
        shared: of all processes of the part.
        rank: of the part's processes.
        kept: what `prepare` leaves for `run`.
    """

    device: torch.device
    sizes: Sizes
    directory: Path
    shared: Path
    rank: int
    kept: dict[str, Any] = field(default_factory=dict)

    def emit(self, what: str, value: float | str, unit: str = "", limit: float | None = None) -> None:
        """A row of the table, written at once: a part that is cut off keeps what it has.

        Args:
            limit: the most that `value` may be; `check_limits` reports those beyond.
        """
        if isinstance(value, float) and not math.isfinite(value):
            value = str(value)  # JSON has no number for it
        row = {"what": what, "value": value, "unit": unit} | ({} if limit is None else {"limit": limit})
        self.kept.setdefault("rows", []).append(row)
        if self.rank == 0:
            with (self.directory / "rows.jsonl").open("a") as file:
                file.write(json.dumps(row) + "\n")

    def check_limits(self) -> None:
        """Raise an AssertionError that names the rows beyond their limits (NaN is beyond any)."""
        rows = [row for row in self.kept.get("rows", []) if "limit" in row]
        beyond = [f"{row['what']}: {row['value']} > {row['limit']:g}" for row in rows if not _within(row)]
        assert not beyond, f"{len(beyond)} of {len(rows)} beyond their limits: {'; '.join(beyond)}"


def _within(row: dict[str, Any]) -> bool:
    return isinstance(row["value"], float) and row["value"] <= row["limit"]


def ladder_row(sizes: Sizes, row: str, *overrides: str) -> tuple[RunConfig, ModelSpec]:
    """A row of the published ladder, and its model."""
    path = ROOT / f"ds_configs/ladder/wukong-{row}gflop.json"
    config = load_config(path, [*sizes.overrides, *overrides])
    return config, resolve(config, schema_of(config.data))


def seconds_of(work: Callable[[], object], device: torch.device, repeats: int, warmup: int = 2) -> float:
    """Median seconds of some work: between events of the device, or by the clock of a CPU."""
    for _ in range(warmup):
        work()
    if device.type == "cpu":
        return statistics.median(once(work, device) for _ in range(repeats))
    events = [torch.Event(device=device, enable_timing=True) for _ in range(repeats + 1)]
    events[0].record()
    for event in events[1:]:
        work()
        event.record()
    events[-1].synchronize()
    return 1e-3 * statistics.median(first.elapsed_time(last) for first, last in itertools.pairwise(events))


def in_turns(works: Sequence[Callable[[], object]], device: torch.device, repeats: int, warmup: int = 2) -> list[float]:
    """Median seconds of each of several pieces of work that follow one another, over and over."""
    for _ in range(warmup):
        for work in works:
            work()
    seconds: list[list[float]] = [[] for _ in works]
    for _ in range(repeats):
        for work, times in zip(works, seconds, strict=True):
            times.append(once(work, device))
    return [statistics.median(times) for times in seconds]


def copy_seconds(device: torch.device, size: int) -> float:
    """Of a copy of that many bytes; twice as many are read and written."""
    source = torch.randint(0, 2**31 - 1, (size // 4,), dtype=torch.int32, device=device)  # zeros would be quicker
    target = torch.empty_like(source)
    return seconds_of(lambda: target.copy_(source), device, repeats=10)


def forget(device: torch.device) -> None:
    """Give back what is not used any more, and restart the measurement of the peak."""
    gc.collect()
    if device.type != "cpu":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def largest_allocation(device: torch.device) -> int | None:
    """Bytes that torch's allocator gave out at its peak; None on a CPU."""
    return None if device.type == "cpu" else torch.cuda.max_memory_allocated(device)
