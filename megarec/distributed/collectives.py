"""Collectives with gradients and a byte ledger.

A `Channel` is a process group under the name it has in the ledger; it is passed explicitly to every collective. With
one rank (`group` None) a collective is the identity and nothing is recorded.

Ranks agree on an error, or on a number, without pickling anything: unpickling data of another process could run
any code. A text travels as bytes, at most TEXT_BYTES of them.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from megarec.distributed.pieces import Wait, start_exchange
from megarec.distributed.topology import Topology, group_ranks
from megarec.errors import DamagedCheckpoint, UserError

# Since torch 2.13; older versions, which a GPU machine may have, use names that are deprecated now.
all_gather_flat = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
reduce_scatter_flat = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
TEXT_BYTES = 64 * 1024  # of an error or a remark: longer ones are not readable
Direction = Literal["forward", "backward"]


class TrafficKey(NamedTuple):
    """The key of a count: group name, operation (with its purpose), element type, direction."""

    group: str
    op: str
    dtype: str
    direction: Direction


@dataclass
class Traffic:
    """Payload of one rank: `bytes` leave it for other ranks, `cross_host_bytes` of them for ranks of other hosts;
    `self_bytes` is the part it sends to itself."""

    calls: int = 0
    bytes: int = 0
    cross_host_bytes: int = 0
    self_bytes: int = 0


@dataclass
class Ledger:
    """Counts what this rank sends; one object a run, handed to every channel."""

    traffic: dict[TrafficKey, Traffic] = field(default_factory=dict)
    _taken: dict[str, int] = field(default_factory=dict)

    def record(self, key: TrafficKey, sent: int, across: int, kept: int) -> None:
        entry = self.traffic.setdefault(key, Traffic())
        entry.calls += 1
        entry.bytes += sent
        entry.cross_host_bytes += across
        entry.self_bytes += kept

    def rows(self) -> list[dict[str, Any]]:
        """One row a key, for JSON and tables: the key's fields, then those of its traffic."""
        return [key._asdict() | vars(entry) for key, entry in sorted(self.traffic.copy().items())]

    def take(self) -> dict[str, int]:
        """Bytes sent since the last call, by group, and those of all groups that crossed hosts; the totals stay."""
        totals = self.totals()
        new = {group: total - self._taken.get(group, 0) for group, total in totals.items()}
        self._taken = totals
        return new

    def totals(self) -> dict[str, int]:
        """What `take` counts up to now, for `leave_out`."""
        found: dict[str, int] = {"cross_host": 0}
        for key, entry in self.traffic.copy().items():  # ids are recorded from a thread of their own
            found[key.group] = found.get(key.group, 0) + entry.bytes
            found["cross_host"] += entry.cross_host_bytes
        return found

    def leave_out(self, before: dict[str, int]) -> None:
        """Exclude what was sent since `totals` returned `before` from the next `take`."""
        for group, total in self.totals().items():
            self._taken[group] = self._taken.get(group, 0) + total - before.get(group, 0)


@dataclass(frozen=True)
class Channel:
    """A process group, this rank's place in it, and the ledger that counts its traffic.

    Attributes:
        name: the group's name in the ledger: world, tower, peer, tensor or data.
        group: None when the channel holds one rank.
        remote: which ranks of the group are on another host than this one; empty: none.
        id_group: the same ranks in a group of their own, for ids that travel while other messages do; None: `group`.
    """

    name: str
    group: dist.ProcessGroup | None
    rank: int
    size: int
    ledger: Ledger
    remote: tuple[bool, ...] = ()
    id_group: dist.ProcessGroup | None = None

    @property
    def for_ids(self) -> "Channel":
        """The channel over which ids travel."""
        return self if self.id_group is None else dataclasses.replace(self, group=self.id_group)


def build_channel(
    topology: Topology,
    name: Literal["world", "tower", "peer", "tensor", "data"],
    ledger: Ledger,
    ids: Topology | None = None,
) -> Channel:
    """The channel of this rank's group of that kind.

    Args:
        ids: the same topology with groups of its own (`separate_groups`), for ids that travel in the background.
    """
    all_ranks = [list(range(topology.world_size))]
    kinds = group_ranks(topology.world_size, topology.ranks_per_host, topology.tensor_size) | {"world": all_ranks}
    members = next(ranks for ranks in kinds[name] if topology.rank in ranks)
    remote = tuple(rank // topology.ranks_per_host != topology.host for rank in members)
    id_group = None if ids is None else getattr(ids, name)
    return Channel(name, getattr(topology, name), members.index(topology.rank), len(members), ledger, remote, id_group)


class WireDtypes(NamedTuple):
    """The types in which embeddings and their gradients travel."""

    forward: torch.dtype = torch.float32
    backward: torch.dtype = torch.float32


FP32 = WireDtypes()
MESSAGE_TYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


class Message(NamedTuple):
    """What is on its way to this rank.

    It must be waited for even if it is not needed: its memory is still written to.
    """

    received: Tensor
    ready: Wait

    def wait(self) -> Tensor:
        """What was received; the host waits for it on a CPU, the current stream on an accelerator."""
        self.ready()
        return self.received


def _here() -> None:
    """Nothing to wait for."""


def start_all_to_all(
    tensor: Tensor,
    output_sizes: Sequence[int],
    input_sizes: Sequence[int],
    channel: Channel,
    purpose: str,
    direction: Direction = "forward",
) -> Message:
    """Start sending block r of `tensor` to rank r; no gradient.

    Args:
        tensor: [sum(input_sizes)], contiguous: the blocks for rank 0, 1, ...; it stays as it is until the wait.
        output_sizes: elements that rank r sends to this rank.
        input_sizes: elements that this rank sends to rank r.
        purpose: what the message is, for the ledger: the operation is recorded as "all_to_all <purpose>".

    Returns:
        [sum(output_sizes)]: the blocks of rank 0, 1, ...
    """
    if channel.size == 1:
        return Message(tensor, _here)
    received = tensor.new_empty(sum(output_sizes))
    return Message(
        received, start_all_to_all_into(received, tensor, output_sizes, input_sizes, channel, purpose, direction)
    )


def all_to_all(
    tensor: Tensor,
    output_sizes: Sequence[int],
    input_sizes: Sequence[int],
    channel: Channel,
    purpose: str,
    direction: Direction = "forward",
) -> Tensor:
    """`start_all_to_all`, waited for."""
    return start_all_to_all(tensor, output_sizes, input_sizes, channel, purpose, direction).wait()


def start_all_to_all_into(
    received: Tensor,
    sent: Tensor,
    output_sizes: Sequence[int],
    input_sizes: Sequence[int],
    channel: Channel,
    purpose: str,
    direction: Direction = "forward",
    blocks: int = 1,
) -> Wait:
    """`start_all_to_all` of several blocks of these sizes, in one message; of more than one rank.

    Args:
        received: filled: [blocks x sum(output_sizes)], by rank and within a rank by block, or [blocks,
            sum(output_sizes)], by block.
        sent: the same, of the input sizes.
    """
    assert channel.group is not None
    wait = start_exchange(sent, received, input_sizes, output_sizes, channel.group, blocks)
    width = blocks * sent.element_size()
    kept = input_sizes[channel.rank] * width
    across = sum(size for size, remote in zip(input_sizes, channel.remote, strict=False) if remote) * width
    record_traffic(channel, f"all_to_all {purpose}", sent, direction, sum(input_sizes) * width - kept, kept, across)
    return wait


def all_to_all_into(
    received: Tensor,
    sent: Tensor,
    output_sizes: Sequence[int],
    input_sizes: Sequence[int],
    channel: Channel,
    purpose: str,
    direction: Direction = "forward",
    blocks: int = 1,
) -> None:
    """`start_all_to_all_into`, waited for."""
    start_all_to_all_into(received, sent, output_sizes, input_sizes, channel, purpose, direction, blocks)()


def all_gather_rows(tensor: Tensor, channel: Channel, purpose: str, direction: Direction = "forward") -> Message:
    """Start gathering [B, ...] of every rank into [size x B, ...], in rank order; no gradient."""
    if channel.size == 1:
        return Message(tensor, _here)
    gathered = tensor.new_empty(channel.size * tensor.shape[0], *tensor.shape[1:])
    work = all_gather_flat(gathered, tensor.contiguous(), group=channel.group, async_op=True)
    own = tensor.numel() * tensor.element_size()
    record_traffic(
        channel, f"all_gather {purpose}", tensor, direction, (channel.size - 1) * own, own, sum(channel.remote) * own
    )
    return Message(gathered, work.wait)


def reduce_scatter_rows(tensor: Tensor, channel: Channel, purpose: str, direction: Direction = "forward") -> Message:
    """Start summing [size x B, ...] over the ranks; this rank receives its own [B, ...]; no gradient."""
    if channel.size == 1:
        return Message(tensor, _here)
    own = tensor.new_empty(tensor.shape[0] // channel.size, *tensor.shape[1:])
    work = reduce_scatter_flat(own, tensor.contiguous(), group=channel.group, async_op=True)
    kept = own.numel() * own.element_size()
    sent, across = (channel.size - 1) * kept, sum(channel.remote) * kept
    record_traffic(channel, f"reduce_scatter {purpose}", tensor, direction, sent, kept, across)
    return Message(own, work.wait)


def all_reduce_mean_(
    tensors: Sequence[Tensor], channel: Channel, purpose: str, direction: Direction = "forward"
) -> None:
    """Replace every tensor by its mean over the ranks, summed in float32: one message for all of them; no gradient.

    Args:
        tensors: contiguous; of the same sizes, in the same order, on every rank.
    """
    if channel.size == 1 or not tensors:
        return
    views = [tensor.view(-1) for tensor in tensors]
    flat = torch.empty(sum(len(view) for view in views), dtype=torch.float32, device=tensors[0].device)
    parts = flat.split([len(view) for view in views])
    torch._foreach_copy_(parts, views)
    sum_in_place(flat, channel, purpose, direction)
    flat.div_(channel.size)
    torch._foreach_copy_(views, parts)


def all_reduce_sum(tensor: Tensor, channel: Channel, purpose: str, direction: Direction = "forward") -> Tensor:
    """The sum over the ranks, in float32, the same to the last bit on all of them; no gradient."""
    total = tensor.float() if tensor.dtype != torch.float32 else tensor.clone()
    if channel.size > 1:
        sum_in_place(total, channel, purpose, direction)
    return total


def sum_in_place(total: Tensor, channel: Channel, purpose: str, direction: Direction) -> None:
    """Sum a tensor over the ranks, in place."""
    dist.all_reduce(total, group=channel.group)
    kept = total.numel() * total.element_size() // channel.size  # a ring: reduce-scatter, then all-gather
    across = 2 * sum(channel.remote) * kept
    record_traffic(channel, f"all_reduce {purpose}", total, direction, 2 * (channel.size - 1) * kept, 2 * kept, across)


def record_traffic(
    channel: Channel, op: str, tensor: Tensor, direction: Direction, sent: int, kept: int, across: int
) -> None:
    """Count a message of this rank: bytes that leave it, those of them for other hosts, and those for itself."""
    key = TrafficKey(channel.name, op, str(tensor.dtype).removeprefix("torch."), direction)
    channel.ledger.record(key, sent, across, kept)


class _AllToAll(torch.autograd.Function):
    """The gradient of an all-to-all is the all-to-all with the sizes exchanged."""

    @staticmethod
    def forward(
        ctx: Any,
        tensor: Tensor,
        output_sizes: Sequence[int],
        input_sizes: Sequence[int],
        channel: Channel,
        purpose: str,
    ) -> Tensor:
        ctx.sizes, ctx.channel, ctx.purpose = (output_sizes, input_sizes), channel, purpose
        return all_to_all(tensor, output_sizes, input_sizes, channel, purpose)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        output_sizes, input_sizes = ctx.sizes
        grad = all_to_all(grads[0].contiguous(), input_sizes, output_sizes, ctx.channel, ctx.purpose, "backward")
        return grad, None, None, None, None


def all_to_all_with_grad(
    tensor: Tensor,
    output_sizes: Sequence[int],
    input_sizes: Sequence[int],
    channel: Channel,
    purpose: str,
) -> Tensor:
    """`all_to_all` that gradients flow back through, the reverse way."""
    if channel.size == 1:
        return tensor
    result: Tensor = _AllToAll.apply(tensor.contiguous(), output_sizes, input_sizes, channel, purpose)
    return result


def raise_together(error: UserError | None, topology: Topology, device: torch.device) -> None:
    """Raise the error of the first rank that has one, on every rank; collective."""
    if topology.world is None:
        if error is not None:
            raise error
        return
    text = b"" if error is None else _bytes_of(str(error))
    kind = 0 if error is None else 1 if isinstance(error, DamagedCheckpoint) else 2
    mine = torch.tensor([kind, len(text)], device=device)
    kinds = torch.empty(topology.world_size * 2, dtype=mine.dtype, device=device)
    all_gather_flat(kinds, mine, group=topology.world)
    for rank, (kind, size) in enumerate(kinds.view(-1, 2).tolist()):
        if kind:
            message = _text_of(rank, size, text, topology, device)
            raise DamagedCheckpoint(message) if kind == 1 else UserError(message)


def from_rank_0(number: int, topology: Topology, device: torch.device) -> int:
    """Rank 0's number on every rank; collective."""
    shared: Tensor = torch.tensor([number], device=device)
    if topology.world is not None:
        dist.broadcast(shared, 0, group=topology.world)
    return int(shared)


def gather_numbers(numbers: Sequence[float], topology: Topology, device: torch.device) -> list[list[float]]:
    """The numbers of all ranks, by rank, on every rank; each rank has equally many. Collective."""
    if topology.world is None:
        return [list(numbers)]
    mine = torch.tensor(numbers, dtype=torch.float32, device=device)
    gathered = mine.new_empty(topology.world_size * len(numbers))
    all_gather_flat(gathered, mine, group=topology.world)
    rows: list[list[float]] = gathered.view(topology.world_size, -1).tolist()
    return rows


def gather_texts(text: str, topology: Topology, device: torch.device, most: int = 8) -> dict[int, str]:
    """The texts of all ranks that have one, by rank, on every rank; only the first `most` of them; collective."""
    if topology.world is None:
        return {0: text} if text else {}
    letters = _bytes_of(text)
    mine = torch.tensor([len(letters)], device=device)
    sizes = mine.new_empty(topology.world_size)
    all_gather_flat(sizes, mine, group=topology.world)
    texts: dict[int, str] = {}
    for rank, size in enumerate(sizes.tolist()):
        if size and len(texts) < most:
            texts[rank] = _text_of(rank, size, letters, topology, device)
    return texts


def _bytes_of(text: str) -> bytes:
    return text.encode(errors="replace")[:TEXT_BYTES]


def _text_of(rank: int, size: int, mine: bytes, topology: Topology, device: torch.device) -> str:
    """The text of a rank, which announced its size, on every rank; `mine` is this rank's. Collective."""
    if not 0 <= size <= TEXT_BYTES:
        raise RuntimeError(f"rank {rank} announced a text of {size} bytes; expected at most {TEXT_BYTES}")
    letters = torch.zeros(size, dtype=torch.uint8, device=device)
    if rank == topology.rank and size:
        letters.copy_(torch.frombuffer(bytearray(mine), dtype=torch.uint8))
    dist.broadcast(letters, rank, group=topology.world)
    return bytes(letters.tolist()).decode(errors="replace")
