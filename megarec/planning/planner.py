"""A run on a machine that need not be here: a pure function from config, hardware and job to a plan.

    spec = resolve(config, schema_of(config.data))
    found = plan_run(config, spec, load_hardware("h100"), hosts=8, ranks_per_host=8)
    found.memory, found.traffic, found.pieces, found.timeline.seconds

Memory is memory.py's, traffic traffic.py's and roofline.py's (the ledger's bytes), pieces step_time.py's.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch

from megarec.config.deepspeed import micro_batch_size
from megarec.config.sections import RunConfig
from megarec.dense.memory import Parts
from megarec.dense.settings import settings_of
from megarec.distributed.topology import Topology, check_divides, check_job
from megarec.errors import UserError
from megarec.planning.clock import Clock
from megarec.planning.hardware import Hardware
from megarec.planning.memory import largest_rank
from megarec.planning.pieces import Piece, Timeline, timeline
from megarec.planning.step_time import pieces_of
from megarec.planning.traffic import placed
from megarec.planning.work import Work, work_of
from megarec.run.spec import ModelSpec
from megarec.sparse.placement import Shard

Link = Literal["host", "network"]


class Sent(NamedTuple):
    """Bytes that a rank sends in a step.

    Attributes:
        what: as in the ledger; from ZeRO 1 on `dense gradients and weights`, which it does not count.
        link: to ranks of its own host, or to those of others.
    """

    what: str
    link: Link
    bytes: int


@dataclass(frozen=True)
class Plan:
    """A predicted run.

    Attributes:
        examples: of a rank in a step.
        memory: bytes by part of the rank that holds most, with `model_states` and `total`; `available` of its device.
        work: of the rank that sends most to other hosts; so are `traffic` and `pieces`.
        mfu: against the data sheet's peak.
    """

    hardware: Hardware
    hosts: int
    ranks_per_host: int
    examples: int
    memory: Parts
    available: int
    work: Work
    traffic: tuple[Sent, ...]
    pieces: tuple[Piece, ...]
    timeline: Timeline
    mfu: float

    @property
    def fits(self) -> bool:
        return self.memory["total"] <= self.available

    @property
    def seconds(self) -> float:
        return self.timeline.seconds

    @property
    def examples_per_second(self) -> float:
        return self.examples * self.hosts * self.ranks_per_host / self.seconds


def plan_run(
    config: RunConfig,
    spec: ModelSpec,
    hardware: Hardware,
    hosts: int,
    ranks_per_host: int,
    shards: Sequence[Shard] | None = None,
) -> Plan:
    """Predict memory, traffic and time of a run.

    Args:
        spec: the model that `config` asks for.
        shards: where all tables lie; None: as the config places them.

    Raises:
        UserError: ranks, batch, tables and machine do not fit together, or a figure of the machine is not known.
    """
    check_machine(config, hardware, hosts, ranks_per_host)
    ranks = hosts * ranks_per_host
    job = Topology(0, ranks, ranks_per_host, config.parallel.tensor)
    micro_batch_size(config, ranks)  # fails on the arithmetic before anything takes time
    shards = placed(config, spec, job) if shards is None else shards
    work = work_of(config, spec, hosts, ranks_per_host, shards, kinds=hardware.table_kinds)
    pieces = pieces_of(work, hardware)
    found = timeline(pieces)
    peak = 1e12 * Clock(hardware).peak(settings_of(config.deepspeed).dtype.itemsize)
    return Plan(
        hardware=hardware,
        hosts=hosts,
        ranks_per_host=ranks_per_host,
        examples=config.data.batch_size // ranks,
        memory=largest_rank(config, spec, job, torch.device(hardware.device), shards),
        available=int(1e9 * hardware.memory_gb.value),
        work=work,
        traffic=sent_by(work),
        pieces=tuple(pieces),
        timeline=found,
        mfu=work.flop / found.seconds / peak,
    )


def placement_seconds(
    config: RunConfig, spec: ModelSpec, hardware: Hardware, hosts: int, ranks_per_host: int, shards: Sequence[Shard]
) -> float:
    """A step with the tables in given places, as long as the rank takes that has most of each part.

    It compares placements of the same run; on an accelerator `plan_run` says how long a run takes whose tables lie
    evenly.

    Raises:
        UserError: as `plan_run`.
    """
    return timeline(placement_pieces(config, spec, hardware, hosts, ranks_per_host, shards)).seconds


def placement_pieces(
    config: RunConfig, spec: ModelSpec, hardware: Hardware, hosts: int, ranks_per_host: int, shards: Sequence[Shard]
) -> list[Piece]:
    """The pieces of such a step."""
    check_machine(config, hardware, hosts, ranks_per_host)
    kinds = hardware.table_kinds
    return pieces_of(work_of(config, spec, hosts, ranks_per_host, shards, slowest=True, kinds=kinds), hardware)


def sent_by(work: Work) -> tuple[Sent, ...]:
    """Traffic by link, none that is empty: what the ledger counts, and from ZeRO 1 on passes of a ring, of which each
    rank sends an equal share to the next host."""
    found: dict[tuple[str, Link], int] = {}

    def add(what: str, inside: int, across: int) -> None:
        sizes: dict[Link, int] = {"host": inside, "network": across}
        for link, size in sizes.items():
            found[what, link] = found.get((what, link), 0) + size

    for message in (*work.messages, *work.dense_messages):
        add(message.op, message.bytes - message.cross_host_bytes, message.cross_host_bytes)
    topology = work.topology
    ring, crossing = work.sent.over_the_ring if work.stage else 0, 0
    if topology.hosts > 1:
        crossing = ring * topology.tensor_size // topology.ranks_per_host
    add("dense gradients and weights", ring - crossing + work.sent.inside_hosts, crossing)
    return tuple(Sent(what, link, size) for (what, link), size in found.items() if size)


def check_machine(config: RunConfig, hardware: Hardware, hosts: int, ranks_per_host: int) -> None:
    """Raise a UserError where the machine has no such ranks, or the config asks for others."""
    most = int(hardware.ranks_per_host.value)
    check_job(hosts, ranks_per_host)
    if ranks_per_host > most:
        raise UserError(
            f"--ranks-per-host {ranks_per_host}: a host of {hardware.name} has {most} "
            f"({hardware.ranks_per_host.source}); give at most so many, and more --hosts"
        )
    if config.parallel.ranks_per_host not in (None, ranks_per_host):
        raise UserError(
            f"--ranks-per-host {ranks_per_host}, but the config has parallel.ranks_per_host="
            f"{config.parallel.ranks_per_host}; make them equal"
        )
    check_divides(hosts * ranks_per_host, ranks_per_host, config.parallel.tensor)
