"""Every kind of collective is recorded with its group, type and bytes, through whichever function it runs."""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from megarec.distributed.rank_pool import RankPool
from megarec.distributed.topology import build_topology
from megarec.planning.recorder import CollectiveRecorder

RANKS = 4


def some_of_each() -> tuple[list[dict[str, Any]], list[dict[str, Any]], int]:
    """Runs on every rank: what was recorded, what a second `take` finds, and how often `observe` was called."""
    topology = build_topology(ranks_per_host=2, tensor=2)
    clone, alone = dist.new_group([0, 1, 2, 3]), [dist.new_group([rank]) for rank in range(RANKS)]
    odd = dist.new_group([0, 1, 2])
    seen: list[list[torch.Tensor]] = []
    recorder = CollectiveRecorder(topology, seen.append)
    x = torch.ones(12)
    with recorder:
        dist.all_reduce(x)
        dist.all_reduce(x, group=clone, async_op=True).wait()
        dist.all_reduce(x.double(), group=topology.tensor)
        dist.all_gather([torch.empty(12) for _ in range(2)], x, group=topology.data)
        dist.all_gather_into_tensor(torch.empty(24, dtype=torch.bfloat16), x.bfloat16(), group=topology.peer)
        dist.reduce_scatter_tensor(torch.empty(3), x)
        dist.reduce_scatter(torch.empty(3), list(x.split(3)))
        dist.all_to_all_single(torch.empty(8, dtype=torch.int32), x[:8].int(), [2] * 4, [2] * 4)
        dist.broadcast(x, src=0)
        dist.barrier()
        dist.all_reduce(x, group=alone[dist.get_rank()])
        if dist.get_rank() < 3:
            dist.broadcast(x, src=0, group=odd)
        x.add_(1)
    return recorder.take(), recorder.take(), len(seen)


def test_every_kind(rank_pool: Callable[[int], RankPool]) -> None:
    for rank, (rows, again, observed) in enumerate(rank_pool(RANKS).run(some_of_each)):
        expected = {
            ("world", "all_reduce", "float32"): (2, 2 * 48),
            ("tensor", "all_reduce", "float64"): (1, 96),
            ("data", "all_gather", "float32"): (1, 96),
            ("peer", "all_gather", "bfloat16"): (1, 48),
            ("world", "reduce_scatter", "float32"): (2, 2 * 48),
            ("world", "all_to_all", "int32"): (1, 32),
            ("world", "broadcast", "float32"): (1, 48),
            ("world", "barrier", ""): (1, 0),
        }
        if rank < 3:
            expected["3 ranks", "broadcast", "float32"] = (1, 48)
        assert {(r["group"], r["op"], r["dtype"]): (r["calls"], r["bytes"]) for r in rows} == expected
        assert again == []
        assert observed == sum(calls for calls, _ in expected.values())
