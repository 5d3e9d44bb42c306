"""JSON lines: one object a line, whose keys are the columns.

A number is its text in the file, so that `7.0` or an integer of any size is what it would be in CSV; true
and false are text too, and null is missing. A row that is not strict JSON (NaN, a key twice) is a bad one, and
so is one that lacks a column: what is missing is written as null.
"""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pyarrow as pa

from megarec.data.preparation.table_spec import TableSpec
from megarec.data.preparation.text_files import BadRow, Rows, TextFile, is_text, shown
from megarec.errors import UserError, did_you_mean

_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
_ORDERS = 1000  # of keys that are known to be right
_TEXT = {str, type(None)}


class _Refused(Exception):
    """(reason, what was found and expected) of a line that is not a row."""


def _no_constant(text: str) -> NoReturn:
    raise _Refused("not JSON", f"{text} is not JSON; where a value is missing, write null")


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise _Refused("duplicate key", f"the key {next(n for n in names if names.count(n) > 1)!r} appears twice")
    return found


_DECODER = json.JSONDecoder(object_pairs_hook=_once, parse_float=str, parse_int=str, parse_constant=_no_constant)


def lines_of(block: bytes) -> list[bytes]:
    """The lines of a block of whole lines that are not empty."""
    return [line for line in block.split(b"\n" if b"\n" in block else b"\r") if line and not line.isspace()]


def check_lines(file: TextFile, lines: list[bytes]) -> None:
    """Refuse a file whose first line begins an array, or an object that goes on in the next line.

    Raises:
        UserError: with the remedy.
    """
    first = lines[0].strip() if lines else b""
    if first in (b"[", b"{") or first.startswith(b"[{"):
        raise UserError(
            f"{file.path}: {shown(first)} begins an array or an object of several lines, expected one object a line; "
            "convert it: jq -c '.[]' (of an array), or jq -c '.'"
        )


def object_of(file: TextFile, line: bytes) -> dict[str, Any]:
    """The object that a line is; numbers as text.

    Raises:
        _Refused: it is not an object.
    """
    try:
        found = _DECODER.decode(line.decode())
    except UnicodeDecodeError:
        raise _Refused(file.broken, f"{shown(line)}, expected {file.expected}") from None
    except json.JSONDecodeError as error:
        raise _Refused("not JSON", f"{shown(line)}: {error.msg} at character {error.pos}") from None
    except RecursionError:
        raise _Refused("not JSON", f"{shown(line)}: objects or lists are nested too deeply") from None
    if not isinstance(found, dict):
        raise _Refused("not an object", f"{shown(line)}, expected an object: {{...}}")
    if _SURROGATE.search(line) and not is_text(json.dumps(found, ensure_ascii=False).encode(errors="surrogatepass")):
        raise _Refused("not UTF-8", f"{shown(line)}: half of a pair of surrogates is not a character")
    return found


class JsonRows:
    """Blocks of lines as columns: text, and lists of text for what is a list by the spec."""

    def __init__(self, file: TextFile, spec: TableSpec, used: list[str]) -> None:
        self._file, self._spec, self._used = file, spec, used
        self._separators = {name: spec.separator(name) for name in used}
        self._orders = set[tuple[str, ...]]()
        self._begun = file.span is not None and file.span[0] > 0

    def rows(self, block: bytes) -> Rows:
        """The rows of a block that are whole."""
        lines = lines_of(block)
        if not self._begun:
            check_lines(self._file, lines)
            self._begun = True
        bad: list[BadRow] = []
        kept: list[dict[str, Any]] = []
        numbers: list[int] = []
        for number, line in enumerate(lines):
            try:
                kept.append(self._row(line))
                numbers.append(number)
            except _Refused as refused:
                reason, what = refused.args
                bad.append(BadRow(number, reason, what))
        columns = [self._column(name, [row[name] for row in kept]) for name in self._used]
        table = pa.RecordBatch.from_arrays(columns, names=self._used)
        return Rows(table, np.array(numbers, np.int64), bad, len(lines))

    def _row(self, line: bytes) -> dict[str, Any]:
        row = object_of(self._file, line)
        keys = tuple(row)
        if keys not in self._orders:
            self._check_keys(row)
            if len(self._orders) < _ORDERS:
                self._orders.add(keys)
        for name in self._used:
            value = row[name]
            if type(value) is not str:
                row[name] = self._value(name, value)
        return row

    def _check_keys(self, row: dict[str, Any]) -> None:
        for name in row:
            if name not in self._spec.columns:
                raise _Refused(
                    "undeclared key",
                    f"the key {name!r} is not declared; {did_you_mean(name, self._spec.columns)} "
                    "(unused ones are declared with type 'ignored')",
                )
        for name in self._used:
            if name not in row:
                raise _Refused("missing key", f"the key {name!r} is missing; where a value is missing, write null")

    def _value(self, name: str, value: Any) -> Any:
        """Values other than text as text, or as a list of text."""
        if value is None:
            return None
        if isinstance(value, bool):
            return "true" if value else "false"
        if isinstance(value, list) and self._separators[name] is not None:
            if not set(map(type, value)) <= _TEXT:
                return [self._element(name, element) for element in value]
            return value
        expected = "a value" if self._separators[name] is None else "text or a list"
        raise _Refused(name, f"{name}={_written(value)}, expected {expected}")

    def _element(self, name: str, value: Any) -> str | None:
        if isinstance(value, str):
            return value
        if isinstance(value, list | dict):
            raise _Refused(name, f"{name}: {_written(value)} is in the list, expected only values")
        return self._value(name, value)

    def _column(self, name: str, values: list[Any]) -> pa.Array:
        separator = self._separators[name]
        if separator is None:
            return pa.array(values, pa.string())
        cut = [(value.split(separator) if value else None) if isinstance(value, str) else value for value in values]
        return pa.array(cut, pa.list_(pa.string()))


def _written(value: Any) -> str:
    return shown(json.dumps(value, ensure_ascii=False).encode(errors="replace"))


def sample(file: TextFile, block: bytes, rows: int) -> pa.RecordBatch:
    """The first rows of a block as columns, in the order in which keys come; a key that a row lacks is missing.

    Raises:
        UserError: no line is a row.
    """
    lines = lines_of(block)[:rows]
    check_lines(file, lines)
    found: list[dict[str, Any]] = []
    problem = "no rows to infer from"
    for line in lines:
        try:
            found.append(object_of(file, line))
        except _Refused as refused:
            problem = refused.args[1]
    if not found:
        raise UserError(f"{file.path}: {problem}")
    names = dict.fromkeys(name for row in found for name in row)
    return pa.RecordBatch.from_arrays(
        [_guessed(file.path, name, [row.get(name) for row in found]) for name in names], names=list(names)
    )


def _guessed(path: Path, name: str, values: Sequence[Any]) -> pa.Array:
    words = [("true" if v else "false") if isinstance(v, bool) else v for v in values]
    kinds = {type(word) for word in words}
    try:
        if list not in kinds:
            return pa.array(words, pa.string())
        return pa.array([w if w is None or isinstance(w, list) else [w] for w in words], pa.list_(pa.string()))
    except (pa.ArrowException, TypeError) as error:
        raise UserError(f"{path}: {name!r} has objects or lists of lists, expected values or lists of them") from error
