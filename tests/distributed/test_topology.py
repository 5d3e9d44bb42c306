from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from megarec.distributed.rank_pool import RankPool
from megarec.distributed.topology import build_topology, check_divides, check_groups, group_ranks
from megarec.errors import UserError


def test_one_process_without_a_launcher() -> None:
    topology = build_topology(ranks_per_host=None, tensor=1)
    assert (topology.rank, topology.world_size, topology.hosts, topology.data_size) == (0, 1, 1, 1)
    assert topology.world is topology.tower is topology.peer is topology.data is None


def test_groups_of_two_hosts_with_four_ranks_and_two_tensor_ways() -> None:
    groups = group_ranks(world_size=8, ranks_per_host=4, tensor=2)
    assert groups["tower"] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert groups["peer"] == [[0, 4], [1, 5], [2, 6], [3, 7]]
    assert groups["tensor"] == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert groups["data"] == [[0, 2, 4, 6], [1, 3, 5, 7]]


@given(hosts=st.integers(1, 5), columns=st.integers(1, 4), tensor=st.integers(1, 4))
def test_every_kind_of_group_partitions_the_ranks(hosts: int, columns: int, tensor: int) -> None:
    per_host = columns * tensor
    groups = group_ranks(hosts * per_host, per_host, tensor)
    for members in groups.values():
        assert sorted(rank for group in members for rank in group) == list(range(hosts * per_host))
    # a tower and a peer group meet in exactly one rank, and so do a tensor and a data group
    for one, other in (("tower", "peer"), ("tensor", "data")):
        assert all(len(set(a) & set(b)) == 1 for a in groups[one] for b in groups[other])


def test_failed_arithmetic_is_printed() -> None:
    with pytest.raises(UserError, match=r"parallel\.ranks_per_host=3 does not divide the 4 ranks of the job"):
        check_divides(4, 3, 1)
    with pytest.raises(
        UserError, match=r"parallel\.tensor=3 does not divide the 4 ranks of a host \(parallel\.ranks_per_host=4\)"
    ):
        check_divides(8, 4, 3)


def groups_that_answer(broken: str | None) -> str | None:
    """On every rank of two hosts of two: why `check_groups` failed, where a group's messages do."""
    topology = build_topology(2, tensor=2)
    add_up = dist.all_reduce

    def all_reduce(tensor: torch.Tensor, group: dist.ProcessGroup) -> None:
        if broken is not None and group is getattr(topology, broken):
            raise RuntimeError("Connection closed by peer [10.0.0.2]:1234")
        add_up(tensor, group=group)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "all_reduce", all_reduce)
        try:
            check_groups(topology, torch.device("cpu"))
        except RuntimeError as error:
            return str(error)
    return None


def test_every_group_is_asked_at_the_start_and_named_when_it_fails(rank_pool: Callable[[int], RankPool]) -> None:
    pool = rank_pool(4)
    assert pool.run(groups_that_answer, None) == [None] * 4
    messages = pool.run(groups_that_answer, "peer")
    expected = [f"the peer group of ranks {ranks} does not answer: " for ranks in ([0, 2], [1, 3]) * 2]
    assert [text.startswith(start) for text, start in zip(messages, expected, strict=True)] == [True] * 4
