"""Collectives with gradients and a byte ledger.

A `Channel` is a process group under the name it has in the ledger; it is passed explicitly to every collective. With
one rank (`group` None) a collective is the identity and nothing is recorded.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

Direction = Literal["forward", "backward"]


class TrafficKey(NamedTuple):
    """What is counted apart: group name, operation (with its purpose), element type, direction."""

    group: str
    op: str
    dtype: str
    direction: Direction


@dataclass
class Traffic:
    """Payload of one rank: `bytes` leave it for other ranks, `self_bytes` is the part it sends to itself."""

    calls: int = 0
    bytes: int = 0
    self_bytes: int = 0


@dataclass
class Ledger:
    """Counts what this rank sends; one object a run, handed to every channel."""

    traffic: dict[TrafficKey, Traffic] = field(default_factory=dict)
    _taken: dict[str, int] = field(default_factory=dict)

    def record(self, key: TrafficKey, sent: int, kept: int) -> None:
        entry = self.traffic.setdefault(key, Traffic())
        entry.calls += 1
        entry.bytes += sent
        entry.self_bytes += kept

    def rows(self) -> list[dict[str, Any]]:
        """One row a key, for JSON and tables: group, op, dtype, direction, calls, bytes, self_bytes."""
        return [key._asdict() | vars(entry) for key, entry in sorted(self.traffic.items())]

    def take(self) -> dict[str, int]:
        """Bytes sent since the last call, by group; the totals stay."""
        totals: dict[str, int] = {}
        for key, entry in self.traffic.items():
            totals[key.group] = totals.get(key.group, 0) + entry.bytes
        new = {group: total - self._taken.get(group, 0) for group, total in totals.items()}
        self._taken = totals
        return new


@dataclass(frozen=True)
class Channel:
    """A process group, this rank's place in it, and the ledger that counts its traffic.

    Attributes:
        name: the group's name in the ledger: world, tower, peer, tensor or data.
        group: None when the channel holds one rank.
    """

    name: str
    group: dist.ProcessGroup | None
    rank: int
    size: int
    ledger: Ledger


def all_to_all(
    tensor: Tensor,
    output_sizes: Sequence[int],
    input_sizes: Sequence[int],
    channel: Channel,
    purpose: str,
    direction: Direction = "forward",
) -> Tensor:
    """Send block r of `tensor` to rank r; no gradient.

    Args:
        tensor: [sum(input_sizes)], contiguous: the blocks for rank 0, 1, ...
        output_sizes: elements that rank r sends to this rank.
        input_sizes: elements that this rank sends to rank r.
        purpose: what the message is, for the ledger: the operation is recorded as "all_to_all <purpose>".

    Returns:
        [sum(output_sizes)]: the blocks of rank 0, 1, ...
    """
    if channel.size == 1:
        return tensor
    received = tensor.new_empty(sum(output_sizes))
    dist.all_to_all_single(received, tensor, list(output_sizes), list(input_sizes), group=channel.group)
    kept = input_sizes[channel.rank]
    width = tensor.element_size()
    _record(channel, f"all_to_all {purpose}", tensor, direction, (sum(input_sizes) - kept) * width, kept * width)
    return received


def all_gather_rows(
    tensor: Tensor, channel: Channel, purpose: str, direction: Direction = "forward"
) -> tuple[Tensor, "dist.Work | None"]:
    """Start gathering [B, ...] of every rank into [size x B, ...], in rank order; no gradient.

    Returns:
        The result, and the work to wait for before it is read (None: it is there).
    """
    if channel.size == 1:
        return tensor, None
    gathered = tensor.new_empty(channel.size * tensor.shape[0], *tensor.shape[1:])
    work = dist.all_gather_into_tensor(gathered, tensor.contiguous(), group=channel.group, async_op=True)
    own = tensor.numel() * tensor.element_size()
    _record(channel, f"all_gather {purpose}", tensor, direction, (channel.size - 1) * own, own)
    return gathered, work


def reduce_scatter_rows(
    tensor: Tensor, channel: Channel, purpose: str, direction: Direction = "forward"
) -> tuple[Tensor, "dist.Work | None"]:
    """Start summing [size x B, ...] over the ranks; this rank receives its own [B, ...]; no gradient.

    Returns:
        The result, and the work to wait for before it is read (None: it is there).
    """
    if channel.size == 1:
        return tensor, None
    own = tensor.new_empty(tensor.shape[0] // channel.size, *tensor.shape[1:])
    work = dist.reduce_scatter_tensor(own, tensor.contiguous(), group=channel.group, async_op=True)
    kept = own.numel() * own.element_size()
    _record(channel, f"reduce_scatter {purpose}", tensor, direction, (channel.size - 1) * kept, kept)
    return own, work


def all_reduce_mean(tensor: Tensor, channel: Channel, purpose: str, direction: Direction = "forward") -> Tensor:
    """The mean over the ranks, summed in float32, in the tensor's own type; no gradient."""
    if channel.size == 1:
        return tensor
    mean = tensor.float() if tensor.dtype != torch.float32 else tensor.clone()
    dist.all_reduce(mean, group=channel.group)
    kept = mean.numel() * mean.element_size() // channel.size
    _record(channel, f"all_reduce {purpose}", mean, direction, 2 * (channel.size - 1) * kept, 2 * kept)
    return mean.div_(channel.size).to(tensor.dtype)


def _record(channel: Channel, op: str, tensor: Tensor, direction: Direction, sent: int, kept: int) -> None:
    key = TrafficKey(channel.name, op, str(tensor.dtype).removeprefix("torch."), direction)
    channel.ledger.record(key, sent, kept)


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
    tensor: Tensor, output_sizes: Sequence[int], input_sizes: Sequence[int], channel: Channel, purpose: str
) -> Tensor:
    """`all_to_all` that gradients flow back through, the reverse way."""
    if channel.size == 1:
        return tensor
    result: Tensor = _AllToAll.apply(tensor.contiguous(), output_sizes, input_sizes, channel, purpose)
    return result
