"""Fixtures for every test: pools of gloo ranks, started when first asked for and shared by the whole session."""

import os
from collections.abc import Callable, Iterator

import pytest
from hypothesis import settings

from megarec.parallel.pool import RankPool

# No deadline: a busy machine is not a defect. The same examples every time where a failure must be one's own doing.
settings.register_profile("megarec", deadline=None, derandomize="CI" in os.environ)
settings.load_profile("megarec")


# Some group of every engine that DeepSpeed makes stays alive, with threads that wake a hundred times a second: after
# a hundred tests they take half the machine.
TESTS_OF_A_POOL = 25


@pytest.fixture(scope="session")
def rank_pool() -> Iterator[Callable[[int], RankPool]]:
    """`rank_pool(world_size)`: a running pool; one that a failure has closed, or that is worn out, is started anew."""
    pools: dict[int, RankPool] = {}
    used: dict[int, int] = {}

    def pool(world_size: int) -> RankPool:
        used[world_size] = used.get(world_size, 0) + 1
        if world_size in pools and used[world_size] % TESTS_OF_A_POOL == 0:
            pools[world_size].close()
        if world_size not in pools or pools[world_size].closed:
            pools[world_size] = RankPool(world_size)
        return pools[world_size]

    yield pool
    for started in pools.values():
        started.close()
