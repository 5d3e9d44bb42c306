import math

import pytest
import torch

from megarec.sparse.layout import Table
from megarec.sparse.placement import Shard
from megarec.sparse.tables.initial import ROWS_PER_CHUNK, fill_initial, initial_rows

TABLE = Table("user", 2 * ROWS_PER_CHUNK + 100, 6)


@pytest.mark.parametrize("std", [None, 0.02])
def test_any_slice_is_the_same_slice_of_the_whole(std: float | None) -> None:
    whole = initial_rows(TABLE, 7, std, 0, TABLE.rows)
    assert whole.shape == (TABLE.rows, 6)
    for start, stop in [(0, 1), (5, ROWS_PER_CHUNK), (ROWS_PER_CHUNK - 1, ROWS_PER_CHUNK + 1), (9000 - 1000, 8200)]:
        assert torch.equal(initial_rows(TABLE, 7, std, start, stop), whole[start:stop])
        shard = Shard("user", 0, start, stop, 2, 5)
        weight = torch.full((stop - start, 3), float("nan"))
        fill_initial(weight, shard, TABLE, 7, std)
        assert torch.equal(weight, whole[start:stop, 2:5])


def test_half_precision_rounds_the_same_numbers() -> None:
    weight = torch.empty(100, 6, dtype=torch.float16)
    fill_initial(weight, Shard("user", 0, 0, 100, 0, 6), TABLE, 7, None)
    assert torch.equal(weight, initial_rows(TABLE, 7, None, 0, 100).half())


def test_distribution() -> None:
    uniform = initial_rows(TABLE, 7, None, 0, TABLE.rows)
    bound = 1 / math.sqrt(TABLE.rows)
    assert uniform.abs().max() <= bound
    assert uniform.std() == pytest.approx(bound / math.sqrt(3), rel=0.02)
    assert initial_rows(TABLE, 7, 0.02, 0, TABLE.rows).std() == pytest.approx(0.02, rel=0.02)


def test_seed_table_and_chunk_each_matter() -> None:
    first = initial_rows(TABLE, 7, 0.02, 0, 10)
    assert not torch.equal(first, initial_rows(TABLE, 8, 0.02, 0, 10))
    assert not torch.equal(first, initial_rows(Table("item", TABLE.rows, 6), 7, 0.02, 0, 10))
    assert not torch.equal(first, initial_rows(TABLE, 7, 0.02, ROWS_PER_CHUNK, ROWS_PER_CHUNK + 10))
