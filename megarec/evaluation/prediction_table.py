"""Predictions as a parquet file."""

from collections.abc import Sequence
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from megarec.data.writing import ROWS_PER_GROUP

COLUMNS = pa.schema([("label", pa.int8()), ("logit", pa.float32()), ("prediction", pa.float64())])


class PredictionTable:
    """A parquet file with one row an example, in row groups: only one group is in memory.

    Args:
        groups: what group each row of the split belongs to; None: rows have no groups.
        labels: that are predicted; the columns of several are "<label>:label" and so on.
    """

    def __init__(self, file: BinaryIO, groups: pa.ChunkedArray | None = None, labels: Sequence[str] = ()) -> None:
        self._groups = groups
        named = [field.with_name(f"{label}:{field.name}") for label in labels for field in COLUMNS if len(labels) > 1]
        self._columns = pa.schema(named) if named else COLUMNS
        if groups is not None:
            self._columns = self._columns.append(pa.field("group", groups.type))
        self._writer = pq.ParquetWriter(file, self._columns, compression="zstd")
        self._waiting: list[tuple[Tensor, Tensor]] = []
        self._rows = self._written = 0

    def add(self, logits: Tensor, labels: Tensor) -> None:
        """Append B examples: logits float32 [B] or [B, T], labels likewise, 0 or 1, NaN: missing."""
        self._waiting.append((logits.float().cpu(), labels.cpu()))
        self._rows += len(logits)
        if self._rows >= ROWS_PER_GROUP:
            self._write_group()

    def _write_group(self) -> None:
        logits, labels = (torch.cat(parts) for parts in zip(*self._waiting, strict=True))
        # In float64 a sigmoid separates values that it would tie in float32.
        columns: list[Any] = []
        for x, y in zip(logits.view(len(logits), -1).T, labels.view(len(labels), -1).T, strict=True):
            there = y.isfinite()
            columns.append(pa.array(y.where(there, 0).to(torch.int8).numpy(), mask=(~there).numpy()))
            columns += [x.numpy(), x.double().sigmoid().numpy()]
        groups = [] if self._groups is None else [self._groups.slice(self._written, self._rows)]
        self._writer.write_table(pa.table([*columns, *groups], self._columns))
        self._waiting.clear()
        self._written, self._rows = self._written + self._rows, 0

    def close(self) -> None:
        """Write the last rows and the footer."""
        if self._rows:
            self._write_group()
        self._writer.close()
