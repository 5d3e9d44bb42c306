"""The sparse workloads of the benchmarks: equal tables, single-valued features, uniformly random ids."""

from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

import torch
from torch import Tensor

from megarec.data.batch import Batch, Ids
from megarec.sparse.layout import EmbeddingLayout, Feature, Table
from megarec.sparse.tables import local


def equal_tables(tables: int, rows: int, columns: int) -> EmbeddingLayout:
    """One single-valued feature a table."""
    names = [f"feature_{index}" for index in range(tables)]
    return EmbeddingLayout(
        columns,
        tuple(Table(name, rows, columns) for name in names),
        tuple(Feature(name, name, "sum", False, index * columns, columns) for index, name in enumerate(names)),
        full_embeddings=tables,
        small_columns=0,
    )


def random_batch(layout: EmbeddingLayout, size: int, seed: int) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    ids = {
        feature.name: Ids(torch.randint(layout.table(feature.table).rows, (size,), generator=generator))
        for feature in layout.features
    }
    return Batch(torch.empty(size, 0), ids, torch.zeros(size), torch.arange(size), size)


@contextmanager
def quick_tables(device: torch.device) -> Iterator[None]:
    """Tables that are made inside for an accelerator start from its own random numbers: those of a run are drawn on the
    CPU, where billions take minutes."""
    if device.type == "cpu":
        yield
        return

    def fill(weight: Tensor, *_: object) -> None:
        with torch.no_grad():
            weight.uniform_(-0.01, 0.01)

    with patch.object(local, "fill_initial", fill):
        yield
