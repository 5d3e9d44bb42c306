"""Fixtures for every test: pools of gloo ranks, started when first asked for and shared by the whole session."""

from collections.abc import Callable, Iterator

import pytest

from megarec.parallel.pool import RankPool


@pytest.fixture(scope="session")
def rank_pool() -> Iterator[Callable[[int], RankPool]]:
    """`rank_pool(world_size)`: a running pool; one that a failure has closed is started anew."""
    pools: dict[int, RankPool] = {}

    def pool(world_size: int) -> RankPool:
        if world_size not in pools or pools[world_size].closed:
            pools[world_size] = RankPool(world_size)
        return pools[world_size]

    yield pool
    for started in pools.values():
        started.close()
