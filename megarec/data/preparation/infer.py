"""A first spec of people's own files, from a sample of their rows: to be edited, each choice with its reason."""

import json
import re
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from megarec.data.preparation.table_reader import readable
from megarec.data.preparation.table_spec import TableSpec
from megarec.data.preparation.text_files import DELIMITERS, TextFile, kind_of
from megarec.errors import UserError
from megarec.files import write_whole

SAMPLE_ROWS = 100_000
FEW = 100  # distinct whole numbers that are taken for categories
LABELS = ("label", "click", "clicked", "target", "y", "bought", "conversion", "is_click", "like")
_SEPARATORS = ("|", ";", " ")


@dataclass(frozen=True)
class Guess:
    """What a column may be.

    Attributes:
        column: as it stands in the spec.
        reason: what of the sample speaks for it.
    """

    name: str
    column: dict[str, Any]
    reason: str


def infer(path: Path, target: Path) -> list[Guess]:
    """Write a first spec of a file, whole or not at all.

    Args:
        path: CSV, TSV or parquet; text of another name has the delimiter that most of its lines agree on.
        target: where the spec shall lie.

    Raises:
        UserError: the file cannot be read or has no rows, no column may be the label, or `target` is there.
    """
    if target.exists():
        raise UserError(f"--schema {target}: is there already; --infer writes a new file: choose another name")
    keys, sample = _sample(path)
    if not len(sample):
        raise UserError(f"{path}: no rows to infer from")
    label = _label(path, sample)
    guesses = [_guess(name, sample.column(name), name == label) for name in sample.schema.names]
    spec = {"name": path.name.partition(".")[0] or "data", **keys, "columns": {g.name: g.column for g in guesses}}
    TableSpec.model_validate(spec)
    lines = json.dumps(spec, indent=2)
    lines = re.sub(r"\{\n\s+([^{}]*?)\n\s+\}", lambda m: "{" + re.sub(r"\n\s+", " ", m[1]) + "}", lines)
    target.parent.mkdir(parents=True, exist_ok=True)
    write_whole(target, (lines + "\n").encode())
    return guesses


def _sample(path: Path) -> tuple[dict[str, Any], pa.RecordBatch]:
    """What the spec says of the file as a whole, and its first rows."""
    with readable(path):
        suffix, compressed = kind_of(path, ",")
        if suffix == ".parquet":
            with pq.ParquetFile(path) as file:
                batch = next(file.iter_batches(SAMPLE_ROWS, use_threads=False), None)
                return {}, batch if batch is not None else pa.RecordBatch.from_pylist([], file.schema_arrow)
        keys: dict[str, Any] = {}
        delimiter = DELIMITERS.get(suffix)
        if delimiter is None:
            delimiter = keys["delimiter"] = _delimiter(path, compressed)
        text = TextFile(path, delimiter, None, compressed)
        for names, block in islice(text.blocks(lambda names: None), 1):
            if len(set(names)) == len(names) and not any(_is_number(name) or not name for name in names):
                return keys, text.rows(block, names, names).table.slice(0, SAMPLE_ROWS)
            names = [f"column_{place}" for place in range(1, len(names) + 1)]
            keys["header"] = False
            for _, first in islice(TextFile(path, delimiter, names, compressed).blocks(lambda names: None), 1):
                return keys, text.rows(first, names, names).table.slice(0, SAMPLE_ROWS)
    raise UserError(f"{path}: no rows to infer from")


def _delimiter(path: Path, compressed: bool) -> str:
    """The one that the first lines have, each as often as the others; the tab before the comma."""
    for _, block in islice(TextFile(path, "\t", ["x"], compressed).blocks(lambda names: None), 1):
        lines = [line for line in block.splitlines()[:100] if line]
        for delimiter in ("\t", ",", ";", "|"):
            times = {line.count(delimiter.encode()) for line in lines}
            if len(times) == 1 and times != {0}:
                return delimiter
    raise UserError(f"{path}: no tab, comma, semicolon or bar stands equally often in all of its first lines")


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _label(path: Path, sample: pa.RecordBatch) -> str:
    """The column of zeros and ones whose name says so; else the last one."""
    both = [name for name in sample.schema.names if _zero_or_one(sample.column(name))]
    named = [name for name in both if name.lower() in LABELS]
    if not both:
        raise UserError(f"{path}: no column of the sample has 0 and 1 alone, so that none can be the label")
    return named[0] if named else both[0] if sample.schema.names[0] == both[0] else both[-1]


def _zero_or_one(values: pa.Array) -> bool:
    if values.null_count or pa.types.is_nested(values.type):
        return False
    return set(pc.unique(values.cast(pa.string())).to_pylist()) <= {"0", "1", "0.0", "1.0", "true", "false"}


def _guess(name: str, values: pa.Array, label: bool) -> Guess:
    if label:
        return Guess(name, {"type": "label"}, "0 and 1 alone" + (", and its name" if name.lower() in LABELS else ""))
    if pa.types.is_list(values.type) or pa.types.is_large_list(values.type):
        inside = "integer" if pa.types.is_integer(values.type.value_type) else "string"
        return Guess(name, {"type": "multi_valued", "dtype": inside}, f"lists of {values.type.value_type}")
    present = values.drop_null()
    missing = f", {values.null_count / len(values):.1%} missing" if values.null_count else ""
    if not len(present):
        return Guess(name, {"type": "ignored"}, "nothing but missing values")
    text = present.cast(pa.string())
    distinct = pc.unique(text)
    told = f"{len(distinct):,} distinct of {len(present):,}{missing}"

    def all_match(pattern: str) -> bool:
        return bool(pc.all(pc.match_substring_regex(distinct, pattern)).as_py())

    if all_match(r"^-?[0-9]{1,18}(\.0*)?$"):
        if len(distinct) <= FEW or re.search(r"(^|_)ids?$", name.lower()):
            why = "few whole numbers" if len(distinct) <= FEW else "whole numbers, named an id"
            return Guess(name, {"type": "categorical", "dtype": "integer"}, f"{why}: {told}")
        return _numeric(name, text, f"whole numbers: {told}", bool(missing))
    if all_match(r"^[0-9a-fA-F]{8}$"):
        return Guess(name, {"type": "categorical", "dtype": "hexadecimal"}, f"8 hexadecimal digits: {told}")
    if all_match(r"^[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?$"):
        return _numeric(name, text, f"numbers: {told}", bool(missing))
    for separator in _SEPARATORS:
        share = pc.mean(pc.match_substring(text, separator).cast(pa.float64())).as_py()
        words = pc.unique(pc.list_flatten(pc.split_pattern(text, separator)))
        if share >= 0.2 and len(words) < len(distinct):
            column = {"type": "multi_valued", "separator": separator}
            return Guess(name, column, f"{share:.0%} have {separator!r}, {len(words):,} distinct parts: {told}")
    if len(distinct) > 0.9 * len(present) and len(present) > 1000:
        return Guess(name, {"type": "ignored"}, f"text that hardly ever comes twice: {told}")
    return Guess(name, {"type": "categorical"}, f"text: {told}")


def _numeric(name: str, text: pa.Array, told: str, missing: bool) -> Guess:
    numbers = text.cast(pa.float64()).to_numpy()
    column: dict[str, Any] = {"type": "numeric"}
    if np.abs(numbers).max() > 100 * max(np.median(np.abs(numbers)), 1):
        column["log"] = True
        told += ", the largest far above the median"
    if missing:
        column["missing"] = 0.0
    return Guess(name, column, told)
