"""Labelled raw rows of a file, such as those of a new day, scored by an export: no data set is prepared."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from megarec.errors import UserError, did_you_mean
from megarec.serving.bundle_predictor import BundlePredictor


@dataclass(frozen=True)
class RawRows:
    """What an export says of the rows of a file.

    Attributes:
        logits, labels: float32 [rows].
        columns: values of those that were asked for, row by row.
        skipped: how many rows are left out, by reason; only with data.bad_rows=skip.
    """

    logits: NDArray[np.float32]
    labels: NDArray[np.float32]
    columns: dict[str, pa.ChunkedArray]
    skipped: dict[str, int]


def score_raw_rows(model: BundlePredictor, file: Path, wanted: Sequence[str], maybe: str | None) -> RawRows:
    """Score a CSV, TSV, parquet or Arrow file that also has the label.

    Args:
        wanted: columns whose values are kept.
        maybe: another one, if the file has it.

    Raises:
        UserError: the file cannot be read, lacks the label or a wanted column, or has a row that cannot be scored.
    """
    from megarec.serving.scorer import RowError, ScoringError

    names, skips = model.schema.predicted, model.config.data.bad_rows == "skip"
    optional = [name in model.schema.optional for name in names]
    logits, labels = [], []
    kept: dict[str, list[Any]] = {name: [] for name in [*wanted, *([maybe] if maybe else ())]}
    skipped: Counter[str] = Counter()
    start = 0
    try:
        for rows in model.raw_rows(file):
            first = next((row for row in rows if not isinstance(row, RowError)), None)
            if first is not None and not start:
                for label in names:
                    _check_columns(file, list(first), label, model.schema.label_rule, wanted)
                if maybe not in first:
                    kept.pop(maybe or "", None)
            found = model.score(rows)
            own = [[_label(row, name, may) for name, may in zip(names, optional, strict=True)] for row in rows]
            errors = {
                place: f"{names[values.index(None)]} is not 0 or 1"
                for place, values in enumerate(own)
                if None in values
            }
            errors |= found.errors
            if errors and not skips:
                place = min(errors)
                raise UserError(f"{file}: row {start + place} (from 0): {errors[place]}; correct it, or leave it out")
            skipped.update(errors.values())
            good = [place for place in range(len(rows)) if place not in errors]
            there = [row for place in good if not isinstance(row := rows[place], RowError)]
            logits.append(found.logits[good])
            labels.append(np.array([own[place] for place in good], np.float32).reshape(len(good), len(names)))
            for name, values in kept.items():
                values += [row.get(name) for row in there]
            start += len(rows)
    except ScoringError as error:
        raise UserError(error) from error
    if not sum(map(len, logits)):
        raise UserError(f"{file}: has no row that can be scored")
    columns = {name: _typed(file, name, values) for name, values in kept.items()}
    found_labels = np.concatenate(labels)
    return RawRows(
        np.concatenate(logits), found_labels if len(names) > 1 else found_labels[:, 0], columns, dict(skipped)
    )


def _check_columns(file: Path, found: list[str], label: str, rule: str, wanted: Sequence[str]) -> None:
    if label not in found:
        made = f" ({rule})" if rule else ""
        raise UserError(f"{file}: there is no column {label!r}, the label{made}; {did_you_mean(label, found)}")
    for name in wanted:
        if name not in found:
            raise UserError(f"{file}: there is no column {name!r}; {did_you_mean(name, found)}")


def _label(row: Any, name: str, optional: bool) -> float | None:
    """0, 1, NaN where an optional one is missing; None: it is no label."""
    from megarec.serving.scorer import RowError
    from megarec.serving.scorer.values import number

    try:
        value = number(row.get(name)) if not isinstance(row, RowError) else None
    except RowError:
        return None
    if optional and value is None and not isinstance(row, RowError):
        return math.nan
    return value if value in (0.0, 1.0) else None


def _typed(file: Path, name: str, values: list[Any]) -> pa.ChunkedArray:
    """As text where any value is; numbers that a text file has are numbers."""
    try:
        column = pa.array([None if value == "" else value for value in values])
    except pa.ArrowException:
        column = pa.array([None if value is None else str(value) for value in values])
    if pa.types.is_nested(column.type):
        raise UserError(f"{file}: column {name!r} is {column.type}; expected one value a row, not a list")
    if pa.types.is_string(column.type):
        for kind in (pa.int64(), pa.float64()):
            try:
                return pa.chunked_array([column.cast(kind)])
            except pa.ArrowException:
                continue
    return pa.chunked_array([column])
