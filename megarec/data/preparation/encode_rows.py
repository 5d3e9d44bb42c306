"""Rows in memory -> the columns of a prepared data set's shards, by that data set alone."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from megarec.data.preparation.distinct import places_of
from megarec.data.preparation.expand import expand
from megarec.data.preparation.kept_spec import load_prepared
from megarec.data.preparation.merge import place
from megarec.data.preparation.scan import Key, values_of
from megarec.data.preparation.table_reader import Part, RowRefused
from megarec.data.preparation.table_spec import Bucketised, Lists
from megarec.data.preparation.text_files import BadRow
from megarec.data.preparation.values import buckets, standardised
from megarec.data.preparation.vocabulary import OUT_OF_VOCABULARY, Hashing, in_order, read_values
from megarec.errors import UserError, did_you_mean

Row = Mapping[str, Any]
RowsOf = Callable[[pa.Array], NDArray[np.int64]]


class RowEncoder:
    """Encodes a few rows by the rules of files: bit for bit what `prepare_data.py table --like` writes.

    Args:
        directory: a prepared data set; its vocabularies are held in memory.

    Raises:
        UserError: as `load_prepared`.
    """

    def __init__(self, directory: Path) -> None:
        found = load_prepared(directory)
        self._read = found.kept.spec.without(set(found.kept.spec.roles))
        self._spec = self._read.features
        self._declared = found.kept.spec.columns
        self._fitted = found.kept.fitted
        owners = {name: column for name, column in self._spec.ids.items() if column.table is None}
        self._rows_of: dict[str, RowsOf] = {
            name: _Known(read_values(directory, name)).rows if column.hash is None else Hashing(column.hash).encode
            for name, column in owners.items()
        }

    def encode(self, rows: Sequence[Row]) -> pa.Table:
        """The columns of shards, without labels, weight, group and time.

        Args:
            rows: by column of the files, values as text, numbers, lists or None; those that are not features may be
                missing.

        Raises:
            UserError: names the row (from 0) and the column, the value seen and what was expected.
        """
        self._check(rows)
        try:
            return self._encode(rows, 0)
        except _NotOneType:
            return pa.concat_tables([self._encode([row], number) for number, row in enumerate(rows)])

    def _check(self, rows: Sequence[Row]) -> None:
        used = [name for name, column in self._read.columns.items() if column.type != "ignored"]
        for number, row in enumerate(rows):
            for name in used:
                if name not in row:
                    raise UserError(f"row {number}: column {name!r} is missing; {did_you_mean(name, row)}")
            for name in row:
                if name not in self._declared:
                    hint = did_you_mean(name, self._declared)
                    raise UserError(f"row {number}: column {name!r} is not declared; {hint}")

    def _encode(self, rows: Sequence[Row], first: int) -> pa.Table:
        used = [name for name, column in self._read.columns.items() if column.type != "ignored"]
        batch = pa.RecordBatch.from_pydict({name: _column(name, rows, first) for name in used})
        whole = Part(Path("row"), batch, np.arange(first, first + len(rows)), tuple(self._spec.null_words))
        bad: list[BadRow] = []
        tables = []
        for part in expand(whole, self._read, bad):
            if bad:
                raise UserError(f"row {bad[0].row}: {bad[0].what}")
            tables.append(self._table(part))
        return pa.concat_tables(tables)

    def _table(self, part: Part) -> pa.Table:
        try:
            values = values_of(part, self._spec)
        except RowRefused as refused:
            raise UserError(f"row {refused.bad.row}: {refused.bad.what}") from refused
        found: dict[str, pa.Array] = {}
        for name in self._spec.columns:
            if name in self._spec.looked_up:
                found |= self._ids(name, values)
            elif name in self._fitted.moments:
                found[name] = pa.array(standardised(name, values[name], *self._fitted.moments[name]))
            elif name in values:
                found[name] = pa.array(values[name])
        return pa.table(found)

    def _ids(self, name: str, values: dict[Key, Any]) -> dict[str, pa.Array]:
        column = self._spec.looked_up[name]
        distinct, places, _ = places_of(values[name])
        if isinstance(column, Bucketised):
            row_of = buckets(distinct.to_numpy(), self._fitted.boundaries[name])
        else:
            row_of = self._rows_of[column.table or name](distinct)
        encoded = pa.array(np.append(row_of, OUT_OF_VOCABULARY)[places])
        if not isinstance(column, Lists):
            return {name: encoded}
        offsets = pa.array(np.append(0, np.cumsum(values[name, "lengths"])).astype(np.int32))
        found = {name: pa.ListArray.from_arrays(offsets, encoded)}
        if name in self._spec.weights:
            found[f"{name}:weights"] = pa.ListArray.from_arrays(offsets, pa.array(values[name, "weights"]))
        return found


class _Known:
    """The values of a vocabulary, sorted: looking one up is a bisection, so that a few rows take no pass over all."""

    def __init__(self, values: pa.Array) -> None:
        self._values, self._row = in_order(values)

    def rows(self, values: pa.Array) -> NDArray[np.int64]:
        found = np.full(len(values), OUT_OF_VOCABULARY, np.int64)
        for number, value in enumerate(values.to_pylist()):
            at = place(self._values, value)
            if at < len(self._values) and self._values[at].as_py() == value:
                found[number] = self._row[at]
        return found


class _NotOneType(Exception):
    """The values of a column are not of one type."""


def _column(name: str, rows: Sequence[Row], first: int) -> pa.Array:
    """As text files are read: an empty text is missing."""
    values = [None if row[name] == "" else row[name] for row in rows]
    try:
        return pa.array(values)
    except (pa.ArrowException, TypeError, ValueError, OverflowError) as error:
        if len(rows) > 1:
            raise _NotOneType from error
        what = "text, a number, a list or None"
        raise UserError(f"row {first}: {name}={values[0]!r}, expected {what}") from error
