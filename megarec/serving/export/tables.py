"""The tables of a checkpoint as flat files, written in pieces: memory stays bounded whatever their size."""

from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from megarec.checkpoint.sparse import TABLES
from megarec.files import file_name
from megarec.serving.predictor import Weights
from megarec.serving.scorer.tables import encode_rows
from megarec.sparse.layout import Table

TableType = Literal["fp32", "fp16", "int8", "int4"]
PIECE = 1 << 24  # bytes of float32 rows in memory at a time


def write_tables(tables: tuple[Table, ...], weights: Weights, kind: TableType, target: Path) -> dict[str, Any]:
    """Write tables/<name>.bin of every table below `target`.

    Returns:
        By table, what the manifest says of it.
    """
    (target / "tables").mkdir()
    found = {}
    for table in tables:
        file = f"tables/{file_name(table.name, '.bin')}"
        at_once = max(1, PIECE // (4 * table.columns))
        with (target / file).open("wb") as output:
            for first in range(0, table.rows, at_once):
                rows = torch.empty(min(at_once, table.rows - first), table.columns)
                weights.fill(f"{TABLES}{table.name}/weight", rows, first)
                output.write(np.ascontiguousarray(encode_rows(rows.numpy(), kind)).data)
        found[table.name] = {"file": file, "type": kind, "rows": table.rows, "columns": table.columns}
    return found
