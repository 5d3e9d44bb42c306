"""Values of a category -> rows of its table: by a vocabulary in sorted files, by a hash, or as they are."""

import hashlib
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from .bundle import Bundle, RowError, shown
from .values import category, finite, number

Ids = NDArray[np.int64]


class LookUp(Protocol):
    """How the raw values of a feature become rows."""

    def read(self, value: Any) -> Any:
        """The value as `rows` takes it; None: it is missing.

        Raises:
            RowError: it is not such a value.
        """

    def rows(self, values: Sequence[Any]) -> Ids:
        """Int64 [len(values)]; 0 for unknown values."""


def text_hash(value: str) -> int:
    """BLAKE2b-64 of the text, the same on every machine."""
    return int.from_bytes(hashlib.blake2b(value.encode(), digest_size=8).digest(), "little")


class _Category:
    """Values of one type: string, integer or hexadecimal."""

    def __init__(self, dtype: str) -> None:
        self._dtype = dtype

    def read(self, value: Any) -> Any:
        return category(value, self._dtype)


class Hashed(_Category):
    """1 + (BLAKE2b-64 of the value's text) mod (rows - 1)."""

    def __init__(self, dtype: str, rows: int) -> None:
        super().__init__(dtype)
        self._most = rows - 1

    def rows(self, values: Sequence[Any]) -> Ids:
        return np.fromiter((1 + text_hash(str(value)) % self._most for value in values), np.int64, len(values))


class Plain(_Category):
    """Values that are rows already: what made-up data have."""

    def __init__(self, rows: int) -> None:
        super().__init__("integer")
        self._rows = rows

    def read(self, value: Any) -> Any:
        found = super().read(value)
        if found is not None and not 0 <= found < self._rows:
            raise RowError(f"{shown(value)}, expected a row of the table, 0 to {self._rows - 1}")
        return found

    def rows(self, values: Sequence[Any]) -> Ids:
        return np.array(values, np.int64)


class Buckets:
    """1 + how many boundaries a number has reached."""

    def __init__(self, boundaries: Sequence[float]) -> None:
        self._boundaries = np.array(boundaries, np.float64)

    def read(self, value: Any) -> Any:
        found = finite(number(value))
        return None if found != found else found

    def rows(self, values: Sequence[Any]) -> Ids:
        return 1 + self._boundaries.searchsorted(np.array(values, np.float64), side="right").astype(np.int64)


class Numbers(_Category):
    """A vocabulary of integers: sorted, with the row of each beside it."""

    def __init__(self, dtype: str, keys: Ids, rows: NDArray[Any]) -> None:
        super().__init__(dtype)
        self._keys, self._rows = np.asarray(keys), np.asarray(rows)

    def rows(self, values: Sequence[Any]) -> Ids:
        wanted = np.array(values, np.int64)
        if not len(self._keys):
            return np.zeros(len(wanted), np.int64)
        places = np.minimum(self._keys.searchsorted(wanted), len(self._keys) - 1)
        return np.where(self._keys[places] == wanted, self._rows[places], 0).astype(np.int64)


class Texts(_Category):
    """A vocabulary of texts, sorted by their hash; the text itself decides.

    Args:
        hashes: uint64, rising; equal ones are neighbours.
        ends: of each text in `text`, UTF-8.
    """

    def __init__(self, hashes: NDArray[Any], rows: NDArray[Any], ends: Ids, text: NDArray[np.uint8]) -> None:
        super().__init__("string")
        self._hashes, self._rows, self._ends = (np.asarray(part) for part in (hashes, rows, ends))
        self._text = np.ascontiguousarray(text).data

    def rows(self, values: Sequence[Any]) -> Ids:
        distinct = dict.fromkeys(values)
        hashes = np.fromiter(map(text_hash, distinct), np.uint64, len(distinct))
        for value, place, wanted in zip(distinct, self._hashes.searchsorted(hashes).tolist(), hashes, strict=True):
            distinct[value] = self._row(value.encode(), place, wanted)
        return np.fromiter((distinct[value] for value in values), np.int64, len(values))

    def _row(self, value: bytes, place: int, wanted: np.uint64) -> int:
        while place < len(self._hashes) and self._hashes[place] == wanted:
            start = self._ends[place - 1] if place else 0
            if self._text[start : self._ends[place]] == value:
                return int(self._rows[place])
            place += 1
        return 0


def load_look_up(bundle: Bundle, about: dict[str, Any], rows: int) -> LookUp:
    """From the manifest's entry of a feature's values.

    Args:
        rows: of its table.
    """
    match about["kind"]:
        case "row":
            return Plain(rows)
        case "hash":
            return Hashed(about["dtype"], rows)
        case "buckets":
            return Buckets(about["boundaries"])
    of_rows = bundle.array(about["rows"], "<i8")
    if about["dtype"] == "string":
        parts = (("hashes", "<u8"), ("ends", "<i8"), ("text", "u1"))
        hashes, ends, text = (bundle.array(about[part], dtype) for part, dtype in parts)
        return Texts(hashes, of_rows, ends, text)
    return Numbers(about["dtype"], bundle.array(about["keys"], "<i8"), of_rows)
