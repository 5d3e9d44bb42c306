"""Sums over a group of ranks by hierarchy: in the host, among peers, in the host again."""

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from megarec.distributed.collectives import (
    Channel,
    Direction,
    Ledger,
    all_gather_flat,
    record_traffic,
    reduce_scatter_flat,
    sum_in_place,
)
from megarec.distributed.topology import Topology, data_of_hosts, group_ranks, separate_data_groups


class Levels(NamedTuple):
    """A group of ranks by hierarchy: those of this rank's host, and those with its place on every host."""

    host: Channel
    peers: Channel


def data_levels(topology: Topology, ledger: Ledger) -> Levels:
    """The data group by hierarchy, over groups of its own; "data" in the ledger. Collective."""
    world, local, tensor = topology.world_size, topology.ranks_per_host, topology.tensor_size
    peers = group_ranks(world, local, tensor)["peer"]

    def channel(kind: list[list[int]], group: dist.ProcessGroup | None) -> Channel:
        members = next(ranks for ranks in kind if topology.rank in ranks)
        remote = tuple(rank // local != topology.host for rank in members)
        return Channel("data", group, members.index(topology.rank), len(members), ledger, remote)

    groups = separate_data_groups(topology)
    return Levels(*(channel(kind, group) for kind, group in zip((data_of_hosts(topology), peers), groups, strict=True)))


def all_reduce_sum_(flat: Tensor, levels: Levels, purpose: str, direction: Direction = "forward") -> None:
    """Sum a vector over the ranks of all levels, in place, in its own type; the same to the last bit on all of them.

    Of several hosts with several ranks each, every rank sends other hosts only its share of what its host has summed:
    a reduce-scatter in the host, an all-reduce among peers, an all-gather in the host.

    Args:
        flat: a multiple of the host's ranks long.
    """
    host, peers = levels
    if host.size == 1 or peers.size == 1:
        channel = peers if host.size == 1 else host
        if channel.size > 1:
            sum_in_place(flat, channel, purpose, direction)
        return
    own = _share_of_sum(flat, host)
    share = own.numel() * own.element_size()
    record_traffic(host, f"reduce_scatter {purpose}", flat, direction, (host.size - 1) * share, share, 0)
    sum_in_place(own, peers, purpose, direction)
    all_gather_flat(flat, own, group=host.group)
    record_traffic(host, f"all_gather {purpose}", flat, direction, (host.size - 1) * share, share, 0)


def _share_of_sum(flat: Tensor, channel: Channel) -> Tensor:
    """A reduce-scatter."""
    if flat.device.type == "cpu":  # gloo's own is an all-reduce: twice the bytes, and more messages
        blocks = torch.empty_like(flat)
        dist.all_to_all_single(blocks, flat, group=channel.group)
        return blocks.view(channel.size, -1).sum(0)
    own = flat.new_empty(flat.numel() // channel.size)
    reduce_scatter_flat(own, flat, group=channel.group)
    return own
