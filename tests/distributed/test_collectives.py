from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megarec.distributed.collectives import Channel, Ledger, Traffic, TrafficKey, all_to_all, all_to_all_with_grad
from megarec.distributed.rank_pool import RankPool


def block(source: int, target: int) -> list[float]:
    """What rank `source` sends to rank `target`: source + 2 target values, none from 0 to 0."""
    return [100.0 * source + 10 * target + index for index in range(source + 2 * target)]


def exchange_uneven() -> tuple[Tensor, Tensor, list[dict[str, Any]]]:
    rank, size = dist.get_rank(), dist.get_world_size()
    ledger = Ledger()
    channel = Channel("world", dist.group.WORLD, rank, size, ledger)
    sent = torch.tensor([x for target in range(size) for x in block(rank, target)], requires_grad=True)
    outputs = [len(block(source, rank)) for source in range(size)]
    inputs = [len(block(rank, target)) for target in range(size)]
    received = all_to_all_with_grad(sent, outputs, inputs, channel, "embeddings")
    # a gradient that tells the receiver and the value: 1000 receiver + value; a strided one, as autograd may hand it
    gradient = torch.stack([received.detach() + 1000 * rank] * 2, dim=1)[:, 0]
    received.backward(gradient)
    assert sent.grad is not None
    all_to_all(torch.zeros(size, dtype=torch.float16), [1] * size, [1] * size, channel, "ids")
    return received.detach(), sent.grad, ledger.rows()


def test_uneven_blocks_and_their_gradients(rank_pool: Callable[[int], RankPool]) -> None:
    size = 3
    for rank, (received, gradient, rows) in enumerate(rank_pool(size).run(exchange_uneven)):
        assert received.tolist() == [x for source in range(size) for x in block(source, rank)]
        assert gradient.tolist() == [x + 1000 * target for target in range(size) for x in block(rank, target)]
        sent = sum(len(block(rank, target)) for target in range(size) if target != rank)
        back = sum(len(block(source, rank)) for source in range(size) if source != rank)
        own = len(block(rank, rank))
        common = {"group": "world", "op": "all_to_all embeddings", "dtype": "float32", "calls": 1}
        assert rows == [
            {**common, "direction": "backward", "bytes": 4 * back, "cross_host_bytes": 0, "self_bytes": 4 * own},
            {**common, "direction": "forward", "bytes": 4 * sent, "cross_host_bytes": 0, "self_bytes": 4 * own},
            {
                **common,
                "op": "all_to_all ids",
                "dtype": "float16",
                "direction": "forward",
                "bytes": 4,
                "cross_host_bytes": 0,
                "self_bytes": 2,
            },
        ]


def test_one_rank_needs_no_group_and_counts_nothing() -> None:
    channel = Channel("world", None, 0, 1, Ledger())
    tensor = torch.arange(3.0)
    assert all_to_all(tensor, [3], [3], channel, "ids") is tensor
    assert all_to_all_with_grad(tensor, [3], [3], channel, "ids") is tensor
    assert channel.ledger.rows() == []


def test_ledger_adds_up_and_hands_out_what_is_new() -> None:
    ledger = Ledger()
    world, tower = (TrafficKey(group, "all_to_all ids", "int32", "forward") for group in ("world", "tower"))
    ledger.record(world, sent=8, across=4, kept=1)
    ledger.record(world, sent=8, across=4, kept=1)
    ledger.record(tower, sent=5, across=0, kept=0)
    assert ledger.take() == {"world": 16, "tower": 5, "cross_host": 8}
    ledger.record(world, sent=2, across=2, kept=0)
    assert ledger.take() == {"world": 2, "tower": 0, "cross_host": 2}
    before = ledger.totals()
    ledger.record(world, sent=2, across=2, kept=0)
    ledger.leave_out(before)  # a validation
    ledger.record(world, sent=2, across=2, kept=0)
    assert ledger.take() == {"world": 2, "tower": 0, "cross_host": 2}
    assert ledger.traffic[world] == Traffic(calls=5, bytes=22, cross_host_bytes=14, self_bytes=2)
