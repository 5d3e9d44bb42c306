"""One column of a prepared split, whole, beside the batches: what groups rows, cuts them into slices, or goes along.

A loader reads features and labels only. A column of another kind is read from the shards, in the order and with the
rows that `Store` has.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from megarec.data.row_checks import check_columns, find_defects
from megarec.data.schema import Schema, Split
from megarec.errors import UserError, did_you_mean

_ROWS = 65_536


@dataclass(frozen=True)
class Coded:
    """Values of a column as whole numbers.

    Attributes:
        codes: int32 [N], places in `values`; -1: null.
        values: the distinct ones, in the order in which they first come.
    """

    codes: NDArray[np.int32]
    values: pa.Array


def read_column(path: Path, split: Split, name: str, schema: Schema, skipped: bool) -> pa.ChunkedArray:
    """The values of a column, row by row of the split.

    Args:
        path: the data set's directory.
        schema: the features whose rows `Store` has checked.
        skipped: bad rows are left out, as there (`Store.skipped`); else there are none, and nothing else is read.

    Raises:
        UserError: a shard has no such column, or one of lists, or cannot be read.
    """
    shards = sorted((path / split).glob("*.parquet"))
    parts, kind = [], pa.null()
    for shard in shards:
        try:
            with pq.ParquetFile(shard) as file:
                kind = _kind(shard, file.schema_arrow, name)
                if skipped:
                    check_columns(shard, file.schema_arrow, schema)
                columns = [name, *(_checked(schema) if skipped else ())]
                for batch in file.iter_batches(_ROWS, columns=list(dict.fromkeys(columns))):
                    parts.append(_kept(batch, schema).column(name) if skipped else batch.column(name))
        except (pa.ArrowException, OSError) as error:
            raise UserError(f"{shard} cannot be read as parquet ({error}); prepare the data again") from error
    return pa.chunked_array(parts, kind)


def coded(column: pa.ChunkedArray) -> Coded:
    """Whole numbers in place of the values."""
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    whole = column.combine_chunks().dictionary_encode()
    codes = pc.fill_null(whole.indices, -1).to_numpy(zero_copy_only=False)
    return Coded(codes.astype(np.int32, copy=False), whole.dictionary)


def group_codes(path: Path, split: Split, name: str, schema: Schema, skipped: bool) -> NDArray[np.int32]:
    """What group every row belongs to, as int32 [N]: equal numbers are one group; -1: none. As `read_column`."""
    return coded(read_column(path, split, name, schema, skipped)).codes


def _kind(shard: Path, columns: pa.Schema, name: str) -> pa.DataType:
    if name not in columns.names:
        raise UserError(f"{shard}: there is no column {name!r}; {did_you_mean(name, columns.names)}")
    kind = columns.field(name).type
    if pa.types.is_nested(kind):
        raise UserError(f"{shard}: column {name!r} is {kind}; expected one value a row, not a list")
    return kind


def _checked(schema: Schema) -> list[str]:
    names = [*(f.name for f in schema.categorical), *schema.numbers]
    return names + [f.weights_column for f in schema.categorical if f.weighted]


def _kept(batch: pa.RecordBatch, schema: Schema) -> Any:
    good = np.ones(len(batch), bool)
    for defect in find_defects(batch, schema):
        good &= ~defect.rows
    return batch.filter(pa.array(good))
