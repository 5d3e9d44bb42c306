"""Raw values of one row -> what a preparation makes of them: text of a category, numbers, lists.

The rules are those of megarec/data/preparation/values.py (docs/data.md), for values of Python.
"""

import math
import re
from datetime import UTC, date, datetime
from decimal import Decimal
from typing import Any

import numpy as np

from .bundle import RowError, shown

_WHOLE = re.compile(r"(-?[0-9]+)\.0*", re.ASCII)
_INTEGER = re.compile(r"-?[0-9]+", re.ASCII)
_HEXADECIMAL = re.compile(r"[0-9A-Fa-f]{1,15}", re.ASCII)
# One way to read each text: a pattern with two takes hours to refuse a million digits and a letter.
_NUMBER = re.compile(r"-?([0-9]+(\.[0-9]*)?|\.[0-9]+)([eE][-+]?[0-9]+)?|-?inf(inity)?|-?nan", re.ASCII | re.IGNORECASE)
_TRUTH = {"True": "true", "TRUE": "true", "False": "false", "FALSE": "false"}
_EXACT = 2**53  # below, a float holds every whole number
_LIMIT = 2**63
_FLOAT32 = 2.0**128 - 2.0**103  # from here on a float is rounded to an infinite float32


def category(value: Any, dtype: str) -> str | int | None:
    """A value as text ("string") or a number of 64 bits ("integer", "hexadecimal"); None: it is missing.

    Raises:
        RowError: it is not a category of that type.
    """
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, bytes):
        try:
            value = value.decode()
        except UnicodeDecodeError:
            raise RowError(f"{shown(value)}, expected UTF-8 text") from None
    if dtype == "hexadecimal":
        return _hexadecimal(value)
    if isinstance(value, float):
        value = _whole(value)
    elif isinstance(value, Decimal):
        value = format(value, "f")
    elif isinstance(value, bool):
        value = "true" if value else "false"
    if value is None:
        return None
    if not isinstance(value, str | int):
        raise RowError(f"{shown(value)}, expected text or an integer")
    _check_size(value)
    return _text(value) if dtype == "string" else _integer(value)


def _whole(value: float) -> int | None:
    if math.isnan(value):
        return None
    if math.isinf(value) or value != math.trunc(value):
        raise RowError(f"{value!r}, expected an integer (no other float names a category)")
    if abs(value) >= _EXACT:
        raise RowError(f"{value!r}, expected an id below {_EXACT}: a larger float stands for several")
    return int(value)


def _text(value: str | int) -> str | None:
    text = str(value)
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError:  # half of a pair, which JSON can write
            raise RowError(f"{shown(value)}, expected UTF-8 text") from None
    if text in _TRUTH:
        return _TRUTH[text]
    if (match := _WHOLE.fullmatch(text)) is not None:
        text = match[1]
    if text.startswith("-0") and not text.strip("-0") and text.count("-") == 1:
        text = text[1:]
    return text or None


def _integer(value: str | int) -> int | None:
    text = _text(value)
    if text is None:
        return None
    text = {"true": "1", "false": "0"}.get(text, text)
    if not _INTEGER.fullmatch(text):
        raise RowError(f"{shown(value)}, expected an integer")
    number = int(text) if len(text) < 100 else _LIMIT
    if not -_LIMIT <= number < _LIMIT:
        raise RowError(f"{shown(value)}, expected an integer of 64 bits")
    return number


def _hexadecimal(value: Any) -> int | None:
    if _is_empty(value):
        return None
    if not isinstance(value, str) or not _HEXADECIMAL.fullmatch(value):
        raise RowError(f"{shown(value)}, expected text of 1 to 15 hexadecimal digits")
    return int(value, 16)


def _is_empty(value: Any) -> bool:
    """None or no text; of arrays == would compare every element."""
    return value is None or (isinstance(value, str) and not value)


def number(value: Any) -> float:
    """A value as a float; NaN: it is missing.

    Raises:
        RowError: it is not a number.
    """
    if isinstance(value, np.generic):
        value = value.item()
    if _is_empty(value):
        return math.nan
    if isinstance(value, bool | int | float | Decimal):
        _check_size(value)
        try:
            return float(value)
        except ValueError:  # a signalling NaN of Decimal
            raise RowError(f"{shown(value)}, expected a number") from None
    if isinstance(value, str):
        text = _text(value) or ""
        text = {"true": "1", "false": "0"}.get(text, text)
        if _NUMBER.fullmatch(text):
            return float(text)
    raise RowError(f"{shown(value)}, expected a number")


def _check_size(value: object) -> None:
    """Files have no larger integers; as text they are numbers like any other."""
    if isinstance(value, int) and not -_LIMIT <= value < _LIMIT:
        raise RowError(f"{shown(value)}, expected an integer of 64 bits")


def finite(value: float) -> float:
    """The value, or NaN where it is missing.

    Raises:
        RowError: it does not fit a float32.
    """
    if abs(value) >= _FLOAT32:
        raise RowError(f"{value!r}, expected a finite number")
    return value


def elements(value: Any, separator: str | None) -> list[Any]:
    """A list, or text cut at the separator; a missing one is empty.

    Raises:
        RowError: it is neither.
    """
    if _is_empty(value) or (isinstance(value, float) and math.isnan(value)):
        return []
    if isinstance(value, str) and separator is not None:
        return list(value.split(separator))
    if isinstance(value, list | tuple | np.ndarray):
        return list(value)
    raise RowError(
        f"{shown(value)}, expected a list" + ("" if separator is None else f", or text separated by {separator!r}")
    )


def moment(value: Any, written: str, which: str) -> int | None:
    """The hour (0 to 23) or weekday (0 is Monday) of a moment in UTC; None: it is missing.

    Args:
        written: how text and integers are written, by strptime.

    Raises:
        RowError: it is not such a moment.
    """
    if isinstance(value, np.generic):
        value = value.item()
    if _is_empty(value):
        return None
    found = value
    if isinstance(value, str | int) and not isinstance(value, bool):
        try:
            found = datetime.strptime(str(value), written)
        except ValueError:
            found = None
    elif isinstance(value, datetime):
        try:
            found = value if value.tzinfo is None else value.astimezone(UTC)
        except OverflowError:
            found = None
    elif isinstance(value, date):
        found = datetime(value.year, value.month, value.day)
    if not isinstance(found, datetime):
        raise RowError(f"{shown(value)}, expected a moment written as {written!r}")
    return found.hour if which == "hour" else found.weekday()
