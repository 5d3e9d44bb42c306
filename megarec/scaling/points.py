"""The measurements: one row a run, with its model's family, cost and quality."""

import csv
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import pyarrow as pa
from pyarrow import parquet

from megarec.errors import UserError
from megarec.files import regular_file

Axis = Literal["gflop", "parameters"]
Quality = Literal["relative_logloss_percent", "logloss", "ne", "excess_logloss"]

COLUMN: dict[Axis, str] = {"gflop": "train_gflop_per_example", "parameters": "parameters"}
UNIT: dict[Axis, str] = {"gflop": "GFLOP/example", "parameters": "parameters"}
MAX_CSV_BYTES = 2**28
QUALITIES: tuple[Quality, ...] = get_args(Quality)


class Run(NamedTuple):
    """One run.

    Attributes:
        cost: training GFLOP/example, or parameters.
        loss: LogLoss, NE, or LogLoss divided by the baseline's; lower is better.
    """

    cost: float
    loss: float


@dataclass(frozen=True)
class Points:
    """The runs of a file.

    Attributes:
        source: the file's name.
        axis: what `Run.cost` counts.
        quality: the column that `Run.loss` comes from.
        families: runs by family, cheapest first; only families with a measured run.
        unmeasured: by family, the costs of rows whose quality is empty.
        optimum: the Bayes LogLoss on the same labels, where it is known and LogLoss is what the runs hold.
    """

    source: str
    axis: Axis
    quality: Quality
    families: dict[str, tuple[Run, ...]]
    unmeasured: dict[str, tuple[float, ...]]
    optimum: float | None = None


def read_points(path: Path, axis: Axis = "gflop", quality: Quality | None = None) -> Points:
    """Read a table of runs.

    Args:
        path: CSV, or parquet if it is named so. Columns: `model`; `train_gflop_per_example` or `parameters`;
            `relative_logloss_percent` (of a baseline's LogLoss), `logloss`, `ne` or `excess_logloss`; `seed` if
            there is one. A sweep's rows at learning rates that were not `chosen` are left out. `optimum_logloss`:
            where it is known.
        axis: which cost to read.
        quality: which quality to read; None: the first of these that exists.

    Raises:
        UserError: the file cannot be read, a column is missing, or a row's value is invalid; rows count from 1,
            without the header.
    """
    columns, rows = read_rows(path)
    chosen = _quality(path, columns, quality)
    for needed in ("model", COLUMN[axis]):
        if needed not in columns:
            raise UserError(f"{path}: no column {needed}; the columns are {', '.join(columns)}")
    families: dict[str, list[Run]] = {}
    unmeasured: dict[str, list[float]] = {}
    first_row: dict[tuple[str, ...], int] = {}
    optima: set[float] = set()
    for number, row in enumerate(rows, start=1):
        if str(row.get("chosen")).lower() == "false":
            continue
        where = f"{path}, row {number}"
        family, cost = family_of(_name(row, where)), _positive(row, COLUMN[axis], where)
        if _empty(row.get(chosen)):
            unmeasured.setdefault(family, []).append(cost)
            continue
        _refuse_repeat(first_row, row, number, path)
        families.setdefault(family, []).append(Run(cost, _loss(row, chosen, where)))
        if chosen == "logloss" and not _empty(row.get("optimum_logloss")):
            optima.add(_positive(row, "optimum_logloss", where))
    if not families:
        raise UserError(f"{path}: no row has a {chosen}; there is nothing to fit")
    return Points(
        path.name,
        axis,
        chosen,
        {family: tuple(sorted(runs)) for family, runs in families.items()},
        {family: tuple(sorted(costs)) for family, costs in unmeasured.items()},
        optima.pop() if len(optima) == 1 else None,
    )


def read_rows(path: Path) -> tuple[list[str], Iterator[dict[str, Any]]]:
    """Columns and rows of a CSV, or of a parquet if it is named so.

    Raises:
        UserError: the file cannot be read.
    """
    return _read_parquet(path) if path.suffix == ".parquet" else _read_csv(path)


def family_of(model: str) -> str:
    """A model's name up to its size: `wukong-5.6gflop` and `wukong_8x96` are of the family wukong."""
    return re.sub(r"[-_ ]\d.*$", "", model)


def _quality(path: Path, columns: list[str], asked: Quality | None) -> Quality:
    for column in (asked,) if asked else QUALITIES:
        if column in columns:
            return column
    raise UserError(f"{path}: no column {asked or ' or '.join(QUALITIES)}; the columns are {', '.join(columns)}")


def _name(row: dict[str, Any], where: str) -> str:
    if _empty(row["model"]):
        raise UserError(f"{where}: model is empty; give each row the name of its model")
    return str(row["model"]).strip()


def _number(row: dict[str, Any], column: str, where: str) -> float:
    value = row[column]
    try:
        number = float(value) if not isinstance(value, bool) else math.nan
    except (TypeError, ValueError, OverflowError):
        raise UserError(f"{where}: {column} is {value!r}, not a number") from None
    if not math.isfinite(number):
        raise UserError(f"{where}: {column} is {value!r}; leave it empty if the run has no result")
    return number


def _positive(row: dict[str, Any], column: str, where: str) -> float:
    number = _number(row, column, where)
    if number <= 0:
        raise UserError(f"{where}: {column} is {number:g}, but must be above 0")
    return number


def _loss(row: dict[str, Any], quality: Quality, where: str) -> float:
    if quality != "relative_logloss_percent":
        return _positive(row, quality, where)
    percent = _number(row, quality, where)
    if percent <= -100:
        raise UserError(f"{where}: {quality} is {percent:g}, but must be above -100: no LogLoss is left at -100 %")
    return 1 + percent / 100


def _refuse_repeat(first_row: dict[tuple[str, ...], int], row: dict[str, Any], number: int, path: Path) -> None:
    """Two runs of one size and seed, say at two learning rates, would count as noise; only the user can choose."""
    if _empty(row.get("seed")):
        return
    key = tuple(str(row.get(column)) for column in ("model", *COLUMN.values(), "seed"))
    if first_row.setdefault(key, number) != number:
        raise UserError(
            f"{path}, row {number}: model, size and seed are those of row {first_row[key]}; keep one of them "
            "(the learning rate that was chosen on validation)"
        )


def _empty(value: Any) -> bool:
    return value is None or (isinstance(value, str) and not value.strip())


def _read_csv(path: Path) -> tuple[list[str], Iterator[dict[str, Any]]]:
    try:
        lines = regular_file(path, "a CSV of runs", MAX_CSV_BYTES).decode("utf-8-sig").splitlines()
        reader = csv.DictReader(lines, strict=True)
        columns = list(reader.fieldnames or [])
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: cannot be read as CSV ({error})") from None
    return _known_once(columns, path), _checked_width(path, reader)


def _known_once(columns: list[str], path: Path) -> list[str]:
    for name in columns:
        if columns.count(name) > 1:
            raise UserError(f"{path}: the column {name!r} appears {columns.count(name)} times; keep one of them")
    return columns


def _checked_width(path: Path, reader: "csv.DictReader[str]") -> Iterator[dict[str, Any]]:
    columns = list(reader.fieldnames or [])
    try:
        for number, row in enumerate(reader, start=1):
            if None in row or None in row.values():
                raise UserError(f"{path}, row {number}: not as many values as the header's {len(columns)} columns")
            yield row
    except csv.Error as error:
        raise UserError(f"{path}, line {reader.line_num}: not CSV ({error})") from None


def _read_parquet(path: Path) -> tuple[list[str], Iterator[dict[str, Any]]]:
    try:
        table = parquet.read_table(pa.BufferReader(regular_file(path, "a parquet of runs", MAX_CSV_BYTES)))
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{path}: cannot be read as parquet ({str(error).splitlines()[0]})") from None
    return _known_once(table.column_names, path), iter(table.to_pylist())
