"""The planner's steps beside measured ones: DLRM-DCNv2 on the systems of MLPerf Training, and public figures.

    python tools/bench.py planner                                # docs/results/mlperf-dlrm-dcnv2.csv
    python tools/bench.py planner --results systems.csv          # another table with its columns

The table is of MLPerf Training's public result logs (mlcommons/training_results, rounds 3.0 to 5.1, Apache-2.0). Three
constants of all accelerators are fitted on it (megarec/planning/clock.py, and `launch_us` of the hardware JSONs), each
kind of system (accelerator, hosts, batch) counting once, by its median; a fourth, the all-to-all over PCIe, on its one
system of H100 PCIe. Held out: the three are fitted again without an accelerator, or without a number of hosts, and
predict what was left out. Public figures of other runs stand beside predictions too (anchors.py).
"""

import csv
import itertools
import math
import statistics
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from megarec.config.load import load_config
from megarec.data.schema import schema_of
from megarec.errors import UserError
from megarec.planning.clock import FITTED, Constants
from megarec.planning.hardware import DelayFigure, load_hardware
from megarec.planning.pieces import timeline
from megarec.planning.step_time import pieces_of
from megarec.planning.work import Work, work_of
from megarec.run.spec import resolve
from tools.benchmarks import anchors

ROOT = Path(__file__).resolve().parents[2]
PUBLISHED = ROOT / "docs/results/mlperf-dlrm-dcnv2.csv"
CONFIG = ROOT / "ds_configs/mlperf-dlrm-dcnv2.json"
KINDS = {  # what stands in MLPerf's name of an accelerator: the first that does
    "GB200": "gb200", "B200": "b200", "H200": "h200", "H100-PCIe": "h100-pcie", "H100": "h100", "A100": "a100",
    "L40S": "l40s", "A40": "a40", "V100": "v100",
}  # fmt: skip
GRID = [0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.9], [0.5, 1.0, 1.5, 2.0, 3.0], [2.0, 3.0, 4.0, 5.0, 6.0]
LEAST = 1e-3  # an error below counts as this much in the geometric mean


class Cell(NamedTuple):
    """A kind of system."""

    kind: str
    hosts: int
    ranks_per_host: int
    batch: int


class Guess(NamedTuple):
    """What is fitted."""

    constants: Constants
    launch_us: float


class Measured(NamedTuple):
    """A row of the table."""

    name: str
    cell: Cell
    step_ms: float


_works: dict[Cell, Work] = {}


def run(results: Path = PUBLISHED) -> dict[str, Any]:
    """A row for each system, and the errors: over all of them, and held out.

    Raises:
        UserError: the file is not such a table.
    """
    measured = read_rows(results)
    predicted = {cell: predict(cell) for cell in dict.fromkeys(row.cell for row in measured)}
    rows = [
        {
            "system": row.name, **row.cell._asdict(), "step_ms": row.step_ms, "predicted_ms": predicted[row.cell],
            "error": predicted[row.cell] / row.step_ms - 1,
        }
        for row in measured
    ]  # fmt: skip
    ratios = {
        "geometric_mean_error": geometric_mean(row["error"] for row in rows),
        "median_error": statistics.median(abs(row["error"]) for row in rows),
        "mean_error": statistics.fmean(abs(row["error"]) for row in rows),
        "within_15_percent": sum(abs(row["error"]) <= 0.15 for row in rows) / len(rows),
        "boundary_2x4_over_1x8": predict(Cell("h100", 2, 4, 55296)) / predict(Cell("h100", 1, 8, 55296)),
    }
    held = held_out(measured) if results == PUBLISHED else {}
    aims = {"geometric_mean_error": 0.1}
    return {"name": "planner", "rows": rows, "anchors": list(anchors.rows()), "ratios": ratios | held, "aims": aims}


def read_rows(path: Path) -> list[Measured]:
    """The systems of a table.

    Raises:
        UserError: it is none.
    """
    try:
        with path.open(encoding="utf-8", newline="") as file:
            raw = list(csv.DictReader(file))
        found = [_measured(row) for row in raw]
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path}: not a table like {PUBLISHED.name} ({type(error).__name__}: {error})") from error
    if not found:
        raise UserError(f"{path}: holds no rows")
    return found


def _measured(row: dict[str, str]) -> Measured:
    accelerator = row["accelerator"]
    kind = next((kind for part, kind in KINDS.items() if part.lower() in accelerator.lower()), None)
    if kind is None:
        raise ValueError(f"accelerator {accelerator!r}; known: {', '.join(KINDS)}")
    sizes = int(row["nodes"]), int(row["gpus_per_node"]), int(row["global_batch"])
    return Measured(f"{row['round']} {row['submitter']} {row['system']}", Cell(kind, *sizes), float(row["step_ms"]))


def predict(cell: Cell, guess: Guess | None = None) -> float:
    """Milliseconds of a step; as published, or by other constants."""
    hardware = load_hardware(cell.kind)
    if cell not in _works:
        config = load_config(CONFIG, [f"data.batch_size={cell.batch}"])
        _works[cell] = work_of(config, resolve(config, schema_of(config.data)), cell.hosts, cell.ranks_per_host)
    if guess is not None:
        hardware = hardware.model_copy(update={"launch_us": DelayFigure(value=guess.launch_us, source="a guess")})
    constants = FITTED if guess is None else guess.constants
    return 1e3 * timeline(pieces_of(_works[cell], hardware, constants)).seconds


def fit(cells: dict[Cell, float]) -> Guess:
    """The constants with the least sum of absolute logarithms of predicted over measured."""
    guesses = [Guess(Constants(share, start), launch) for share, start, launch in itertools.product(*GRID)]
    return min(guesses, key=lambda g: sum(abs(math.log(predict(c, g) / ms)) for c, ms in cells.items()))


def medians(measured: Iterable[Measured]) -> dict[Cell, float]:
    """Each kind of system once."""
    found = defaultdict(list)
    for row in measured:
        found[row.cell].append(row.step_ms)
    return {cell: statistics.median(values) for cell, values in found.items()}


def held_out(measured: list[Measured]) -> dict[str, float]:
    """Error of each kind of system by constants that were fitted without its accelerator, or without its hosts."""
    cells = medians(measured)
    found = {}
    for what in ("kind", "hosts"):
        for value in dict.fromkeys(getattr(cell, what) for cell in cells):
            rest = {cell: ms for cell, ms in cells.items() if getattr(cell, what) != value}
            guess = fit(rest)
            for cell, ms in cells.items():
                if getattr(cell, what) == value:
                    name = f"{cell.kind} {cell.hosts}x{cell.ranks_per_host} of {cell.batch}"
                    found[f"without_{what}_{value}: {name}"] = predict(cell, guess) / ms - 1
    return found


def geometric_mean(errors: Iterable[float]) -> float:
    """Of absolute errors."""
    return math.exp(statistics.fmean(math.log(max(abs(error), LEAST)) for error in errors))
