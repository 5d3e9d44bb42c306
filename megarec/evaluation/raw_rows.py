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
    """An export's scores of the rows of a file.

    Attributes:
        logits, labels: float32 [rows], or of several labels [rows, labels]; NaN: a label that is missing.
        columns: values of those that were asked for, row by row.
        skipped: how many rows are left out, by reason; only with data.bad_rows=skip.
    """

    logits: NDArray[np.float32]
    labels: NDArray[np.float32]
    columns: dict[str, pa.ChunkedArray]
    skipped: dict[str, int]


def score_raw_rows(model: BundlePredictor, file: Path, wanted: Sequence[str], maybe: str | None) -> RawRows:
    """Score a CSV, TSV, parquet or Arrow file that also has the labels that the model predicts.

    Args:
        wanted: columns whose values are kept.
        maybe: another one, if the file has it.

    Raises:
        UserError: the file cannot be read, lacks a label or a wanted column, or has a row that cannot be scored.
    """
    from megarec.serving.scorer import RowError, ScoringError

    names, skips = model.schema.predicted, model.config.data.bad_rows == "skip"
    logits, labels = [], []
    kept: dict[str, list[Any]] = {name: [] for name in [*wanted, *([maybe] if maybe else ())]}
    skipped: Counter[str] = Counter()
    start = 0
    try:
        for rows in model.raw_rows(file):
            first = next((row for row in rows if not isinstance(row, RowError)), None)
            if first is not None and not start:
                _check_columns(file, list(first), names, model.schema.label_rule, wanted)
                if maybe not in first:
                    kept.pop(maybe or "", None)
            found = model.score(rows)
            own = np.array([[_label(row, name, model.schema.optional) for name in names] for row in rows], np.float32)
            wrong = np.isinf(own)
            errors = {
                int(n): f"{names[int(wrong[n].argmax())]} is not 0 or 1" for n in np.flatnonzero(wrong.any(axis=1))
            }
            errors |= found.errors
            if errors and not skips:
                place = min(errors)
                raise UserError(f"{file}: row {start + place} (from 0): {errors[place]}; correct it, or leave it out")
            skipped.update(errors.values())
            good = [place for place in range(len(rows)) if place not in errors]
            there = [row for place in good if not isinstance(row := rows[place], RowError)]
            logits.append(found.logits[good])
            labels.append(own[good].reshape(found.logits[good].shape))
            for name, values in kept.items():
                values += [row.get(name) for row in there]
            start += len(rows)
    except ScoringError as error:
        raise UserError(error) from error
    if not sum(map(len, logits)):
        raise UserError(f"{file}: has no row that can be scored")
    columns = {name: _typed(file, name, values) for name, values in kept.items()}
    return RawRows(np.concatenate(logits), np.concatenate(labels), columns, dict(skipped))


def _check_columns(file: Path, found: list[str], labels: Sequence[str], rule: str, wanted: Sequence[str]) -> None:
    for label in labels:
        if label not in found:
            made = f" ({rule})" if rule else ""
            what = f"{label!r}, {'the' if len(labels) == 1 else 'a'} label{made}"
            raise UserError(f"{file}: there is no column {what}; {did_you_mean(label, found)}")
    for name in wanted:
        if name not in found:
            raise UserError(f"{file}: there is no column {name!r}; {did_you_mean(name, found)}")


def _label(row: Any, name: str, optional: Sequence[str]) -> float:
    """0 or 1; NaN: an optional label is missing; infinite: it is not a label."""
    from megarec.serving.scorer import RowError
    from megarec.serving.scorer.values import number

    if isinstance(row, RowError):
        return math.inf
    if name in optional and row.get(name) in (None, ""):
        return math.nan
    try:
        value = number(row.get(name))
    except RowError:
        return math.inf
    return value if value in (0.0, 1.0) else math.inf


def _typed(file: Path, name: str, values: list[Any]) -> pa.ChunkedArray:
    """As text if any value is text; numbers in a text file are numbers."""
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
