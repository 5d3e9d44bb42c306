"""Embedding tables as mapped files: rows in float32, float16, or quantised row by row."""

from collections.abc import Callable
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from .bundle import Bundle

Floats = NDArray[np.float32]
TableType = Literal["fp32", "fp16", "int8", "int4"]


def row_bytes(kind: str, columns: int) -> int:
    """Bytes of a row; `Table` has the layouts."""
    return {"fp32": 4 * columns, "fp16": 2 * columns, "int8": columns + 2, "int4": (columns + 1) // 2 + 4}[kind]


class Table:
    """Rows of a table.

        fp32, fp16   the numbers
        int8         q of every column, then a float16 scale: the numbers are scale x q
        int4         two q of 0 to 15 a byte, the lower half first, then float16 scale and lowest:
                     the numbers are lowest + scale x q

    Args:
        raw: uint8 [rows x row_bytes], mapped.
        kind: one of these four.
        columns: numbers of a row.
    """

    def __init__(self, raw: NDArray[np.uint8], kind: str, columns: int) -> None:
        self._raw = np.asarray(raw).reshape(-1, row_bytes(kind, columns))
        self._decode = _DECODERS[kind]
        self._columns = columns

    def __len__(self) -> int:
        return len(self._raw)

    def rows(self, ids: NDArray[np.int64]) -> Floats:
        """Float32 [len(ids), columns]."""
        return self._decode(self._raw[ids], self._columns)


def open_tables(bundle: Bundle) -> dict[str, Table]:
    """The tables of an export, by name."""
    return {
        name: Table(bundle.array(about["file"], "u1"), about["type"], about["columns"])
        for name, about in bundle.manifest["tables"].items()
    }


def _fp32(raw: NDArray[np.uint8], columns: int) -> Floats:
    return raw.view("<f4")


def _fp16(raw: NDArray[np.uint8], columns: int) -> Floats:
    return raw.view("<f2").astype(np.float32)


def _int8(raw: NDArray[np.uint8], columns: int) -> Floats:
    scale = np.ascontiguousarray(raw[:, columns:]).view("<f2").astype(np.float32)
    return raw[:, :columns].view(np.int8) * scale


def _int4(raw: NDArray[np.uint8], columns: int) -> Floats:
    packed = raw[:, : (columns + 1) // 2]
    both = np.stack([packed & 15, packed >> 4], axis=2).reshape(len(raw), -1)[:, :columns]
    scale_lowest = np.ascontiguousarray(raw[:, packed.shape[1] :]).view("<f2").astype(np.float32)
    return both * scale_lowest[:, :1] + scale_lowest[:, 1:]


_DECODERS: dict[str, Callable[[NDArray[np.uint8], int], Floats]] = {
    "fp32": _fp32,
    "fp16": _fp16,
    "int8": _int8,
    "int4": _int4,
}


def encode_rows(values: Floats, kind: str) -> NDArray[np.uint8]:
    """What `Table` reads: float32 [n, columns] -> uint8 [n, row_bytes]."""
    n, columns = values.shape
    if kind == "fp32":
        return values.astype("<f4").view(np.uint8).reshape(n, -1)
    if kind == "fp16":
        return values.astype("<f2").view(np.uint8).reshape(n, -1)
    if kind == "int8":
        scale = _not_below(np.abs(values).max(axis=1, keepdims=True) / 127)
        q = _levels(values, scale, -127, 127).astype(np.int8)
        return np.hstack([q.view(np.uint8), scale.view(np.uint8).reshape(n, 2)])
    lowest = -_not_below(-values.min(axis=1, keepdims=True))
    scale = _not_below((values.max(axis=1, keepdims=True) - lowest.astype(np.float32)) / 15)
    q = _levels(values - lowest.astype(np.float32), scale, 0, 15).astype(np.uint8)
    q = np.pad(q, ((0, 0), (0, columns % 2)))
    ends = np.hstack([scale, lowest]).view(np.uint8).reshape(n, 4)
    return np.hstack([q[:, 0::2] | q[:, 1::2] << 4, ends])


def _not_below(values: Floats) -> NDArray[Any]:
    """As float16, rounded up: the range that a row needs is never cut."""
    rounded = values.astype("<f2")
    low = rounded.astype(np.float32) < values
    return np.where(low, np.nextafter(rounded, np.float16(np.inf)), rounded).astype("<f2")


def _levels(values: Floats, scale: NDArray[Any], low: int, high: int) -> Floats:
    step = scale.astype(np.float32)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.clip(np.nan_to_num(np.rint(values / step), nan=0.0, posinf=0.0, neginf=0.0), low, high)
