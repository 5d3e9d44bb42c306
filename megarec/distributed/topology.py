"""Ranks -> hosts, local ranks and process groups: built once from one cube of ranks, passed explicitly.

The cube is [hosts, tensor groups of a host, ranks of a tensor group]; every group is a line or a plane of it:

    tower group    ranks of one host                      cube[h, :, :]
    peer group     same local rank on every host          cube[:, i, j]
    tensor group   neighbours that share dense layers     cube[h, i, :]
    data group     same place in their tensor group       cube[:, :, j]
"""

import dataclasses
import socket
from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.distributed as dist

from megarec.distributed.process import rank_device
from megarec.errors import UserError

Group = dist.ProcessGroup
MOST_RANKS = 1 << 20
NAME_BYTES = 255  # of a host: POSIX has no longer ones


@dataclass(frozen=True)
class Topology:
    """Where this rank stands. Groups are None when they hold this rank alone.

    Attributes:
        world, tower, peer, tensor, data: the process groups of design.md's vocabulary.
    """

    rank: int
    world_size: int
    ranks_per_host: int
    tensor_size: int
    world: Group | None = None
    tower: Group | None = None
    peer: Group | None = None
    tensor: Group | None = None
    data: Group | None = None

    @property
    def hosts(self) -> int:
        return self.world_size // self.ranks_per_host

    @property
    def host(self) -> int:
        return self.rank // self.ranks_per_host

    @property
    def local_rank(self) -> int:
        """Index inside the host (parallel.ranks_per_host), not the launcher's LOCAL_RANK of the machine."""
        return self.rank % self.ranks_per_host

    @property
    def data_size(self) -> int:
        return self.world_size // self.tensor_size

    def describe(self) -> str:
        return (
            f"{self.world_size} ranks = {self.hosts} hosts x {self.ranks_per_host} local ranks; "
            f"tensor groups of {self.tensor_size}, data groups of {self.data_size}"
        )


ONE_RANK = Topology(0, 1, 1, 1)


def check_job(hosts: int, ranks_per_host: int) -> None:
    """Raise a UserError where the options of a tool make no job that anybody has."""
    for name, value in (("--hosts", hosts), ("--ranks-per-host", ranks_per_host)):
        if value < 1:
            raise UserError(f"{name} {value}: expected at least 1")
    if hosts * ranks_per_host > MOST_RANKS:
        raise UserError(
            f"--hosts {hosts} x --ranks-per-host {ranks_per_host} = {hosts * ranks_per_host:,} ranks: expected at most "
            f"{MOST_RANKS:,}"
        )


def check_divides(world_size: int, ranks_per_host: int, tensor: int) -> None:
    """Raise a UserError that prints the failed arithmetic."""
    if world_size % ranks_per_host:
        raise UserError(f"parallel.ranks_per_host={ranks_per_host} does not divide the {world_size} ranks of the job")
    if ranks_per_host % tensor:
        raise UserError(
            f"parallel.tensor={tensor} does not divide the {ranks_per_host} ranks of a host "
            f"(parallel.ranks_per_host={ranks_per_host})"
        )


def group_ranks(world_size: int, ranks_per_host: int, tensor: int) -> dict[str, list[list[int]]]:
    """The ranks of every group, by kind, read off the cube."""
    hosts, columns = world_size // ranks_per_host, ranks_per_host // tensor

    def at(h: int, i: int, j: int) -> int:
        return h * ranks_per_host + i * tensor + j

    h_all, i_all, j_all = range(hosts), range(columns), range(tensor)
    return {
        "tower": [[at(h, i, j) for i in i_all for j in j_all] for h in h_all],
        "peer": [[at(h, i, j) for h in h_all] for i in i_all for j in j_all],
        "tensor": [[at(h, i, j) for j in j_all] for h in h_all for i in i_all],
        "data": [[at(h, i, j) for h in h_all for i in i_all] for j in j_all],
    }


def build_topology(ranks_per_host: int | None, tensor: int) -> Topology:
    """The topology of the running job; without torch.distributed, of the single process.

    Args:
        ranks_per_host: None means the ranks of one machine, found by hostname.

    Raises:
        UserError: the sizes do not divide, or machines run unequal numbers of ranks.
    """
    if not dist.is_initialized():
        check_divides(1, ranks_per_host or 1, tensor)
        return ONE_RANK
    rank, world_size = dist.get_rank(), dist.get_world_size()
    per_host = ranks_per_host or _ranks_of_a_machine(world_size)
    check_divides(world_size, per_host, tensor)
    members = group_ranks(world_size, per_host, tensor)
    groups = {kind: _my_group(rank, world_size, members[kind]) for kind in members}
    return Topology(rank, world_size, per_host, tensor, world=dist.group.WORLD if world_size > 1 else None, **groups)


def check_groups(topology: Topology, device: torch.device) -> None:
    """Add up a number over every group, in one order on all ranks; collective.

    So NCCL connects here, not in the middle of the first step, and a link that does not work is named by its group.

    Raises:
        RuntimeError: a group did not answer, or answered a wrong sum.
    """
    for kind in ("world", "tower", "peer", "tensor", "data"):
        group: Group | None = getattr(topology, kind)
        if group is None:
            continue
        ranks = dist.get_process_group_ranks(group)
        number = torch.ones(1, dtype=torch.int64, device=device)
        try:
            dist.all_reduce(number, group=group)
            answered = int(number)
        except RuntimeError as error:
            raise RuntimeError(f"the {kind} group of ranks {ranks} does not answer: {error}") from error
        if answered != len(ranks):
            raise RuntimeError(f"the {kind} group of ranks {ranks}: {answered} answered")


def separate_groups(topology: Topology) -> Topology:
    """The same topology with new world, tower and peer groups, whose messages never wait for those of the old ones;
    collective."""
    size = topology.world_size
    if size == 1:
        return topology
    members = group_ranks(size, topology.ranks_per_host, topology.tensor_size) | {"world": [list(range(size))]}
    world, tower, peer = (_my_group(topology.rank, 0, members[kind]) for kind in ("world", "tower", "peer"))
    return dataclasses.replace(topology, world=world, tower=tower, peer=peer)


def data_of_hosts(topology: Topology) -> list[list[int]]:
    """The ranks of one host with the same place in their tensor group: the part of each data group on a host."""
    local, tensor = topology.ranks_per_host, topology.tensor_size
    firsts = range(0, topology.world_size, local)
    return [list(range(first + place, first + local, tensor)) for first in firsts for place in range(tensor)]


def separate_data_groups(topology: Topology) -> tuple[Group | None, Group | None]:
    """Groups of their own of this rank's data ranks on its host, and of its peers; collective."""
    peers = group_ranks(topology.world_size, topology.ranks_per_host, topology.tensor_size)["peer"]
    return _my_group(topology.rank, 0, data_of_hosts(topology)), _my_group(topology.rank, 0, peers)


def _ranks_of_a_machine(world_size: int) -> int:
    names = _gathered_names(world_size)
    counts = {name: names.count(name) for name in names}
    if len(set(counts.values())) > 1:
        listed = ", ".join(f"{name}: {count}" for name, count in counts.items())
        raise UserError(f"machines run unequal numbers of ranks ({listed}): give the hostfile equal slots")
    per_host = next(iter(counts.values()))
    if any(len(set(names[i : i + per_host])) > 1 for i in range(0, world_size, per_host)):
        raise UserError(f"ranks of one machine are not consecutive ({', '.join(names)}): list each host once")
    return per_host


def _gathered_names(world_size: int) -> list[str]:
    """The names of all ranks' machines, by rank: bytes of one length, never a pickle, which could run any code."""
    device = torch.device("cpu") if dist.get_backend() == "gloo" else rank_device()
    name = socket.gethostname().encode(errors="replace")[:NAME_BYTES].ljust(NAME_BYTES, b"\0")
    mine = torch.frombuffer(bytearray(name), dtype=torch.uint8)
    rows = torch.empty(world_size * NAME_BYTES, dtype=torch.uint8, device=device)
    dist.all_gather_into_tensor(rows, mine.to(device))
    return [bytes(row).rstrip(b"\0").decode(errors="replace") for row in rows.view(world_size, NAME_BYTES).tolist()]


def _my_group(rank: int, world_size: int, members: Iterable[list[int]]) -> Group | None:
    """Create every group of one kind (all ranks must call in the same order); return the one that holds `rank`.

    Args:
        world_size: a group of that many ranks is the existing world group; 0: none is.
    """
    mine = None
    for ranks in members:
        if len(ranks) == 1:
            continue
        group = dist.group.WORLD if len(ranks) == world_size else dist.new_group(ranks)
        if rank in ranks:
            mine = group
    return mine
