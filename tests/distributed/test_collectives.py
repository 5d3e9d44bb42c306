from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megarec.distributed import pieces
from megarec.distributed.collectives import (
    Channel,
    Ledger,
    Traffic,
    TrafficKey,
    all_to_all,
    all_to_all_into,
    all_to_all_with_grad,
)
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
    # a gradient that encodes the receiver and the value: 1000 receiver + value; a strided one, as autograd may hand it
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


def numbers(source: int, target: int, part: int) -> list[float]:
    return [1000.0 * part + number for number in block(source, target)]


def exchange_two_parts(sent_by_part: bool, received_by_part: bool, in_one: bool) -> tuple[Tensor, list[dict[str, Any]]]:
    """Two parts to every rank, posted piece by piece or as one all-to-all."""
    rank, size = dist.get_rank(), dist.get_world_size()
    channel = Channel("world", dist.group.WORLD, rank, size, Ledger(), tuple(other > rank for other in range(size)))
    inputs = [len(block(rank, target)) for target in range(size)]
    outputs = [len(block(source, rank)) for source in range(size)]
    sent = torch.tensor([x for part in range(2) for target in range(size) for x in numbers(rank, target, part)])
    received = torch.empty(2, sum(outputs))
    if not sent_by_part:
        sent = torch.tensor([x for target in range(size) for part in range(2) for x in numbers(rank, target, part)])
    with patch.object(pieces, "_piece_by_piece", lambda group: not in_one):
        all_to_all_into(
            received if received_by_part else received.view(-1), sent.view(2, -1) if sent_by_part else sent, outputs,
            inputs, channel, "embeddings", "forward", 2,
        )  # fmt: skip
    return received.flatten(), channel.ledger.rows()


@pytest.mark.parametrize("sent_by_part", [False, True])
@pytest.mark.parametrize("received_by_part", [False, True])
def test_parts_in_any_order(rank_pool: Callable[[int], RankPool], sent_by_part: bool, received_by_part: bool) -> None:
    size = 3
    by_way = [rank_pool(size).run(exchange_two_parts, sent_by_part, received_by_part, way) for way in (False, True)]
    for rank, ((received, rows), (in_one, same)) in enumerate(zip(*by_way, strict=True)):
        pairs = [(part, source) for part in range(2) for source in range(size)]
        if not received_by_part:
            pairs.sort(key=lambda pair: pair[1])
        assert received.tolist() == [x for part, source in pairs for x in numbers(source, rank, part)]
        assert torch.equal(received, in_one)
        assert rows == same
        (row,) = rows
        count = {target: 2 * 4 * len(block(rank, target)) for target in range(size)}
        assert (row["calls"], row["self_bytes"]) == (1, count[rank])
        assert row["bytes"] == sum(count.values()) - count[rank]
        assert row["cross_host_bytes"] == sum(own for target, own in count.items() if target > rank)


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
