"""Criteo's click logs (Kaggle's and Terabyte's): a label, 13 integers, 26 hexadecimal categories, separated by tabs."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
from numpy.typing import NDArray

from megarec.data.preparation.table_spec import Categorical, Column, Label, Numeric, TableSpec

NUMERIC = tuple(f"I{i}" for i in range(1, 14))
CATEGORICAL = tuple(f"C{i}" for i in range(1, 27))
# Distinct values of the made-up columns: a few large ones, as in the real files.
_VALUES = (
    *(1460, 583, 10_131_227, 2_202_608, 305, 24, 12_517, 633, 3, 93_145, 5_683, 8_351_593, 3_194),
    *(27, 14_992, 5_461_306, 10, 5_652, 2_173, 4, 7_046_547, 18, 15, 286_181, 105, 142_572),
)
_CHUNK = 1 << 17
_DIGITS = np.frombuffer(b"0123456789abcdef", np.uint8)


def criteo_spec(name: str, min_count: int = 1, rows: int | None = None) -> TableSpec:
    """What the columns are.

    Args:
        min_count: values of a category that are rarer share row 0.
        rows: rows that every category is hashed to; None: vocabularies.
    """
    ids = {"min_count": min_count} if rows is None else {"hash": rows}
    columns: dict[str, Column] = {"label": Label(type="label")}
    columns |= {column: Numeric(type="numeric", log=True, missing=0.0) for column in NUMERIC}
    columns |= {column: Categorical(type="categorical", dtype="hexadecimal", **ids) for column in CATEGORICAL}  # type: ignore[arg-type]
    return TableSpec(name=name, label_rule="clicked", header=False, delimiter="\t", columns=columns)


def write_made_up(path: Path, rows: int, seed: int = 1, most_values: int = 1 << 40) -> None:
    """Write a file of Criteo's format whose content is made up: for tests and benchmarks, no quality.

    Ids follow a power law, an eighth of the numbers and some categories are missing, some numbers are negative, and the
    label follows the first categories a little.

    Args:
        most_values: no column has more distinct values.
    """
    with path.open("wb") as file:
        for start in range(0, rows, _CHUNK):
            random = np.random.default_rng([seed, start])
            count = min(_CHUNK, rows - start)
            numbers = (random.exponential(size=(count, len(NUMERIC))) ** 3 * 4).astype(np.int64) - 1
            columns: list[pa.Array] = [
                pa.array(numbers[:, i], mask=random.random(count) < 0.125) for i in range(len(NUMERIC))
            ]
            logit = np.full(count, -1.0)
            for place, values in enumerate(_VALUES):
                ids = (min(values, most_values) * random.random(count) ** 4).astype(np.uint64)
                if place < 4:
                    logit += np.cos(ids % 97)
                text = hexadecimal((ids + np.uint64(place << 24)) * np.uint64(2654435761) & np.uint64(0xFFFFFFFF))
                columns.append(text if place % 4 else pc.if_else(pa.array(random.random(count) < 0.03), None, text))
            labels = (random.random(count) < 1 / (1 + np.exp(-logit))).astype(np.int8)
            table = pa.table([pa.array(labels), *columns], names=["label", *NUMERIC, *CATEGORICAL])
            options = pyarrow.csv.WriteOptions(include_header=False, delimiter="\t", quoting_style="none")
            pyarrow.csv.write_csv(table, file, options)


def hexadecimal(values: NDArray[np.uint64]) -> pa.Array:
    """Eight digits of each of 32-bit numbers, as text."""
    shifts = np.arange(28, -4, -4, dtype=np.uint64)
    digits = _DIGITS[(values[:, None] >> shifts & np.uint64(15)).astype(np.intp)]
    ends = np.arange(0, 8 * len(values) + 1, 8, dtype=np.int32)
    return pa.StringArray.from_buffers(len(values), pa.py_buffer(ends), pa.py_buffer(digits.tobytes()))
