"""A first spec of users' own files, from a sample of their rows: to be edited, each choice with its reason."""

import codecs
import json
import re
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from megarec.data.preparation import arrow_files, json_lines
from megarec.data.preparation.formats import DELIMITERS, UTF_8, kind_of, open_text
from megarec.data.preparation.table_reader import readable
from megarec.data.preparation.table_spec import TableSpec
from megarec.data.preparation.text_files import TextFile
from megarec.errors import UserError
from megarec.files import write_whole

SAMPLE_ROWS = 100_000
FEW = 100  # distinct whole numbers that are taken for categories
NULL_WORDS = ("NA", "N/A", "<NA>", "NULL", "null", "None", "\\N", "NaN", "nan")
LABELS = ("label", "click", "clicked", "target", "y", "bought", "conversion", "is_click", "like")
Keys = dict[str, tuple[Any, str]]
_WHOLE = r"^-?[0-9]{1,18}(\.0*)?$"
_NUMBER = r"^[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?$"
_SEPARATORS = ("|", ";", " ")


@dataclass(frozen=True)
class Guess:
    """What a column may be.

    Attributes:
        column: as in the spec.
        reason: why, from the sample.
        distinct: different values of the sample.
        missing: share of the rows without a value.
    """

    name: str
    column: dict[str, Any]
    reason: str
    distinct: int
    missing: float


@dataclass(frozen=True)
class Guesses:
    """A first spec.

    Attributes:
        rows: of the sample.
        keys: what the spec says of the files as a whole, each with its reason.
    """

    rows: int
    keys: dict[str, tuple[Any, str]]
    columns: list[Guess]


def infer(path: Path, target: Path) -> Guesses:
    """Write a first spec of a file, whole or not at all.

    Args:
        path: a file as `table` reads; text of another name has the delimiter that most of its lines agree on.
        target: where to write the spec.

    Raises:
        UserError: the file cannot be read or has no rows, no column can be the label, or `target` exists.
    """
    check_new(target)
    keys, sample = _sample(path)
    return infer_from(str(path), path.name.partition(".")[0], keys, sample, target)


def check_new(target: Path) -> None:
    """Refuse a spec that exists.

    Raises:
        UserError: with the remedy.
    """
    if target.exists():
        raise UserError(f"--schema {target}: exists already; --infer writes a new file: choose another name")


def infer_from(named: str, name: str, keys: Keys, sample: pa.RecordBatch, target: Path) -> Guesses:
    """`infer`, for rows in memory; `named` is their name in messages."""
    if not len(sample):
        raise UserError(f"{named}: no rows to infer from")
    columns = {column: _plain(sample.column(column)) for column in sample.schema.names}
    if words := _null_words(columns):
        keys = keys | {"null_words": (list(words), "; ".join(f"{w!r} stands in {c!r}" for w, c in words.items()))}
        columns = {
            column: pc.if_else(pc.is_in(values, pa.array(words)), None, values) if _is_text(values) else values
            for column, values in columns.items()
        }
    label = _label(named, columns)
    guesses = [_guess(column, values, column == label) for column, values in columns.items()]
    spec = {
        "name": name or "data",
        **{key: value for key, (value, _) in keys.items()},
        "columns": {guess.name: guess.column for guess in guesses},
    }
    TableSpec.model_validate_json(json.dumps(spec), strict=False)
    lines = json.dumps(spec, indent=2)
    lines = re.sub(r"\{\n\s+([^{}]*?)\n\s+\}", lambda m: "{" + re.sub(r"\n\s+", " ", m[1]) + "}", lines)
    target.parent.mkdir(parents=True, exist_ok=True)
    write_whole(target, (lines + "\n").encode())
    return Guesses(len(sample), keys, guesses)


def in_words(guesses: Guesses, named: str, target: Path) -> str:
    """A first spec as text, each choice with its reason."""
    lines = [f"  {key}: {json.dumps(value)}: {reason}" for key, (value, reason) in guesses.keys.items()]
    shown = {g.name: g.name if g.name.isprintable() else repr(g.name) for g in guesses.columns}
    width = max(map(len, [*shown.values(), "column"]))
    lines.append(f"  {'column':{width}}  {'type':12} {'distinct':>9} {'missing':>8}  reason")
    for guess in guesses.columns:
        kind = guess.column["type"]
        lines.append(
            f"  {shown[guess.name]:{width}}  {kind:12} {guess.distinct:9,} {guess.missing:8.1%}  {guess.reason}"
        )
    lines.append(
        f"{target}: a first spec, from the first {guesses.rows:,} rows of {named}: read it, correct it, then prepare "
        "with it"
    )
    return "\n".join(lines)


def _sample(path: Path) -> tuple[Keys, pa.RecordBatch]:
    """What the spec says of the file as a whole, and its first rows."""
    with readable(path):
        kind = kind_of(path, ",")
        if kind.format in ("parquet", "arrow"):
            return {}, arrow_files.sample(path, kind.format, SAMPLE_ROWS)
        keys: Keys = {}
        if (encoding := _encoding(path, kind.compression)) is not None:
            keys["encoding"] = encoding
        file = TextFile(path, "\t", ["x"], kind.compression, keys.get("encoding", (UTF_8,))[0])
        if kind.format == "json":
            for _, block in islice(file.blocks(lambda names: None), 1):
                return keys, json_lines.sample(file, block, SAMPLE_ROWS)
            raise UserError(f"{path}: no rows to infer from")
        usual = DELIMITERS.get(kind.suffix)
        delimiter = _delimiter(file, usual, sure=kind.suffix != ".txt")
        if delimiter != usual:
            keys["delimiter"] = delimiter, "appears equally often in all of the first lines"
        text = replace(file, delimiter=delimiter, names=None)
        for names, block in islice(text.blocks(lambda names: None), 1):
            if len(set(names)) == len(names) and not any(_is_number(name) or not name for name in names):
                return keys, text.rows(block, names, names).table.slice(0, SAMPLE_ROWS)
            names = [f"column_{place}" for place in range(1, len(names) + 1)]
            keys["header"] = False, "the first line has numbers, empty values or the same one twice: no names"
            text = replace(text, names=names)
            for _, first in islice(text.blocks(lambda names: None), 1):
                return keys, text.rows(first, names, names).table.slice(0, SAMPLE_ROWS)
    raise UserError(f"{path}: no rows to infer from")


def _encoding(path: Path, compression: str | None) -> tuple[str, str] | None:
    """The encoding of text and its reason; None: UTF-8."""
    with open_text(path, compression, UTF_8) as file:
        begin = file.read(1 << 20)
    if begin[:2] in (b"\xff\xfe", b"\xfe\xff"):
        return "utf-16", "the file begins with UTF-16's mark"
    try:
        codecs.getincrementaldecoder(UTF_8)().decode(begin)
    except UnicodeDecodeError as error:
        return "latin-1", f"byte {error.start} ({begin[error.start : error.start + 1]!r}) is not UTF-8; cp1252?"
    return None


def _delimiter(text: TextFile, usual: str | None, sure: bool) -> str:
    """The one that the first lines have, each as often as the others; the tab before the comma.

    Args:
        usual: what the file's name stands for; spreadsheets write CSV with semicolons, too.
        sure: whether that is it wherever the first line has it.
    """
    for _, block in islice(text.blocks(lambda names: None), 1):
        lines = [line for line in block.splitlines()[:100] if line]
        if sure and usual is not None and lines and usual.encode() in lines[0]:
            return usual
        for delimiter in ("\t", ",", ";", "|"):
            times = {line.count(delimiter.encode()) for line in lines}
            if len(times) == 1 and times != {0}:
                return delimiter
    if sure and usual is not None:
        return usual  # one column
    raise UserError(f"{text.path}: no tab, comma, semicolon or bar appears equally often in all of its first lines")


def _plain(values: pa.Array) -> pa.Array:
    """Without a dictionary; text as string."""
    if pa.types.is_dictionary(values.type):
        values = values.dictionary_decode()
    if pa.types.is_null(values.type) or (
        not _is_text(values) and "string" in str(values.type) and not _is_list(values)
    ):
        values = values.cast(pa.string())
    return values


def _is_text(values: pa.Array) -> bool:
    return bool(pa.types.is_string(values.type))


def _is_list(values: pa.Array) -> bool:
    kind = values.type
    return pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)


def _null_words(columns: dict[str, pa.Array]) -> dict[str, str]:
    """Words that mostly mean a missing value, each with the first column that has it."""
    found: dict[str, str] = {}
    for name, values in columns.items():
        if _is_text(values):
            for word in pc.unique(values.filter(pc.is_in(values, pa.array(NULL_WORDS)))).to_pylist():
                found.setdefault(word, name)
    return found


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _label(named: str, columns: dict[str, pa.Array]) -> str:
    """The column of zeros and ones whose name says so; else the last one."""
    both = [name for name, values in columns.items() if _zero_or_one(values)]
    called = [name for name in both if name.lower() in LABELS]
    if not both:
        raise UserError(f"{named}: no column of the sample has only 0 and 1, so none can be the label")
    return called[0] if called else both[0] if next(iter(columns)) == both[0] else both[-1]


def _zero_or_one(values: pa.Array) -> bool:
    if values.null_count or pa.types.is_nested(values.type):
        return False
    return set(pc.unique(values.cast(pa.string())).to_pylist()) <= {"0", "1", "0.0", "1.0", "true", "false"}


def _guess(name: str, values: pa.Array, label: bool) -> Guess:
    present = values.drop_null()
    kind = values.type
    missing = values.null_count / len(values)
    if not len(present):
        return Guess(name, {"type": "ignored"}, "only missing values", 0, missing)
    if _is_list(values):
        return Guess(name, *_list_guess(present), missing)
    if pa.types.is_nested(kind) or pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
        return Guess(name, {"type": "ignored"}, f"is {kind}", 0, missing)
    text = present.cast(pa.string())
    distinct = pc.unique(text)
    if label:
        why = "only 0 and 1" + (", and its name" if name.lower() in LABELS else "")
        return Guess(name, {"type": "label"}, why, len(distinct), missing)
    if pa.types.is_timestamp(kind) or pa.types.is_time(kind) or pa.types.is_duration(kind):
        why = f"is {kind}: store what the model should see, such as the hour, as a number"
        return Guess(name, {"type": "ignored"}, why, len(distinct), missing)
    column, why = _scalar_guess(name, text, distinct, missing > 0)
    return Guess(name, column, why, len(distinct), missing)


def _list_guess(lists: pa.Array) -> tuple[dict[str, Any], str, int]:
    """(column, reason, distinct elements) of a column of lists."""
    elements = _plain(lists.flatten()).drop_null()
    lengths = set(pc.unique(pc.list_value_length(lists)).to_pylist())
    text = elements.cast(pa.string()) if not pa.types.is_nested(elements.type) else pa.array([], pa.string())
    distinct = pc.unique(text)
    if pa.types.is_nested(elements.type):
        return {"type": "ignored"}, f"lists of {elements.type}", 0
    fractions = not _all_match(distinct, _WHOLE)
    if len(lengths) == 1 and lengths != {0} and fractions and _all_match(distinct, _NUMBER):
        (length,) = lengths
        return {"type": "vector", "length": length}, f"lists of {length} numbers each", len(distinct)
    dtype = "integer" if len(distinct) and not fractions else "string"
    return {"type": "multi_valued", "dtype": dtype}, f"lists of {lists.type.value_type}", len(distinct)


def _scalar_guess(name: str, text: pa.Array, distinct: pa.Array, missing: bool) -> tuple[dict[str, Any], str]:
    """(column, reason) of values that are there, as text."""
    if _all_match(distinct, _WHOLE):
        if len(distinct) <= FEW or re.search(r"(^|_)ids?$", name.lower()):
            why = "few whole numbers" if len(distinct) <= FEW else "whole numbers, named an id"
            return {"type": "categorical", "dtype": "integer"}, why
        return _numeric(text, "whole numbers", missing)
    if _all_match(distinct, r"^[0-9a-fA-F]{8}$"):
        return {"type": "categorical", "dtype": "hexadecimal"}, "8 hexadecimal digits"
    if _all_match(distinct, _NUMBER):
        return _numeric(text, "numbers", missing)
    for separator in (" ", ",", ";", "|"):
        parts = pc.split_pattern(text, separator)
        lengths = pc.unique(pc.list_value_length(parts))
        if len(lengths) == 1 and (length := lengths[0].as_py()) > 1:
            elements = pc.unique(pc.list_flatten(parts))
            if _all_match(elements, _NUMBER) and not _all_match(elements, _WHOLE):
                column = {"type": "vector", "length": length, "separator": separator}
                return column, f"{length} numbers each, separated by {separator!r}"
    for separator in _SEPARATORS:
        share = pc.mean(pc.match_substring(text, separator).cast(pa.float64())).as_py()
        words = pc.unique(pc.list_flatten(pc.split_pattern(text, separator)))
        if share >= 0.2 and len(words) < len(distinct):
            column = {"type": "multi_valued", "separator": separator}
            return column, f"{share:.0%} have {separator!r}, {len(words):,} distinct parts"
    if len(distinct) > 0.9 * len(text) and len(text) > 1000:
        return {"type": "ignored"}, "text that hardly ever repeats"
    return {"type": "categorical"}, "text"


def _all_match(distinct: pa.Array, pattern: str) -> bool:
    return bool(pc.all(pc.match_substring_regex(distinct, pattern)).as_py())


def _numeric(text: pa.Array, reason: str, missing: bool) -> tuple[dict[str, Any], str]:
    numbers = text.cast(pa.float64()).to_numpy()
    column: dict[str, Any] = {"type": "numeric"}
    if np.abs(numbers).max() > 100 * max(np.median(np.abs(numbers)), 1):
        column["log"] = True
        reason += ", the largest far above the median"
    if missing:
        column["missing"] = 0.0
    return column, reason
