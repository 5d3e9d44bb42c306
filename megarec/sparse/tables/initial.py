"""First weights of a table: a function of (seed, table name, row), whatever the placement, backend and world size."""

import hashlib
import math

import torch
from torch import Tensor

from megarec.sparse.layout import Table
from megarec.sparse.placement import Shard

ROWS_PER_CHUNK = 4096  # part of the definition: another value gives other weights


def initial_rows(table: Table, seed: int, std: float | None, start: int, stop: int) -> Tensor:
    """Initial weights of the rows start .. stop of a table, in all its columns: float32 [stop - start, columns].

    Every chunk of `ROWS_PER_CHUNK` rows has a generator of its own on the CPU, seeded by (seed, table name, chunk).

    Args:
        std: of a normal distribution; None draws uniformly from +-1/sqrt(rows).
    """
    chunks = range(start // ROWS_PER_CHUNK, math.ceil(stop / ROWS_PER_CHUNK))
    first = chunks.start * ROWS_PER_CHUNK
    rows = [_chunk(table, seed, std, chunk) for chunk in chunks]
    return torch.cat(rows)[start - first : stop - first] if rows else torch.empty(0, table.columns)


@torch.no_grad()
def fill_initial(weight: Tensor, shard: Shard, table: Table, seed: int, std: float | None) -> None:
    """Set the weights [shard.rows, shard.columns] of a shard; holds one chunk in memory beside them."""
    start = shard.row_start
    while start < shard.row_stop:
        stop = min((start // ROWS_PER_CHUNK + 1) * ROWS_PER_CHUNK, shard.row_stop)
        rows = initial_rows(table, seed, std, start, stop)
        weight[start - shard.row_start : stop - shard.row_start] = rows[:, shard.column_start : shard.column_stop]
        start = stop


def _chunk(table: Table, seed: int, std: float | None, chunk: int) -> Tensor:
    name = f"{seed}/{table.name}/{chunk}"
    digest = hashlib.blake2b(name.encode(), digest_size=7).digest()  # 56 bits: what a generator takes on any platform
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "big"))
    first = chunk * ROWS_PER_CHUNK
    weights = torch.empty(min(ROWS_PER_CHUNK, table.rows - first), table.columns)
    if std is None:
        bound = 1 / math.sqrt(table.rows)
        return weights.uniform_(-bound, bound, generator=generator)
    return weights.normal_(0.0, std, generator=generator)
