"""A fake job: what arrives from other ranks is what this rank sends to itself."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from megarec.planning.fake_job import _repeat
from tests.processes import python

PROGRAM = """
import torch
import torch.distributed as dist
from megarec.planning.fake_job import fake_job
from megarec.distributed.topology import build_topology

with fake_job(2, 4):
    topology = build_topology(ranks_per_host=2, tensor=2)
    assert (topology.rank, topology.host, topology.data.size()) == (2, 1, 2)
    received = torch.empty(9, dtype=torch.int64)
    dist.all_to_all_single(received, torch.arange(10), [2, 3, 4, 0], [1, 2, 3, 4])  # own block: 3, 4, 5
    assert received.tolist() == [3, 4, 3, 4, 5, 3, 4, 5, 3], received
    dist.all_to_all_single(received := torch.empty(4), torch.arange(4.0))
    assert received.tolist() == [2, 2, 2, 2], received
    own = [""] * 4
    dist.all_gather_object(own, "rank 2")
    assert own == ["rank 2"] * 4
    from deepspeed.runtime.zero.utils import assert_ints_same_as_other_ranks
    assert_ints_same_as_other_ranks([1, 2, 3])
assert not dist.is_initialized()
"""


def test_a_rank_of_four() -> None:
    run = python("-c", PROGRAM)
    assert run.returncode == 0, run.stderr


@given(source=st.integers(0, 7), target=st.integers(0, 30))
def test_repeat(source: int, target: int) -> None:
    filled = torch.full((target,), -1)
    _repeat(torch.arange(source), filled)
    assert filled.tolist() == [i % source if source else 0 for i in range(target)]
