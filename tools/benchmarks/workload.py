"""The sparse workloads of the benchmarks: equal tables, single-valued features, uniformly random ids."""

import torch

from megarec.data.batch import Batch, Ids
from megarec.sparse.layout import EmbeddingLayout, Feature, Table


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
