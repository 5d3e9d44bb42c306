"""Fixtures for every test: pools of gloo ranks."""

import os
from collections.abc import Callable, Iterator

import pytest
from hypothesis import settings

from megarec.distributed.rank_pool import RankPool

# No deadline: a busy machine is not a defect. The same examples every time where a failure must be one's own doing.
settings.register_profile("megarec", deadline=None, derandomize="CI" in os.environ)
settings.load_profile("megarec")


@pytest.fixture(scope="session")
def rank_pool() -> Iterator[Callable[[int], RankPool]]:
    """`rank_pool(world_size)`: new ranks every time; those of the call before end."""
    pools: list[RankPool] = []

    def pool(world_size: int) -> RankPool:
        while pools:
            pools.pop().close()
        pools.append(RankPool(world_size))
        return pools[-1]

    yield pool
    while pools:
        pools.pop().close()
