"""Every collective of a process, seen below torch.distributed: those of DeepSpeed as well as our own."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from megarec.distributed.topology import Topology

# The c10d operator that carries a collective, whichever function of torch.distributed it was called through.
_OPERATIONS = {
    "allreduce_": "all_reduce",
    "allreduce_coalesced_": "all_reduce",
    "allgather_": "all_gather",
    "_allgather_base_": "all_gather",
    "allgather_coalesced_": "all_gather",
    "allgather_into_tensor_coalesced_": "all_gather",
    "reduce_scatter_": "reduce_scatter",
    "_reduce_scatter_base_": "reduce_scatter",
    "reduce_scatter_tensor_coalesced_": "reduce_scatter",
    "alltoall_": "all_to_all",
    "alltoall_base_": "all_to_all",
    "broadcast_": "broadcast",
    "reduce_": "reduce",
    "gather_": "gather",
    "scatter_": "scatter",
    "send": "send",
    "recv_": "recv",
    "barrier": "barrier",
    "monitored_barrier_": "barrier",
}


class CollectiveKey(NamedTuple):
    """What is counted apart.

    Attributes:
        group: world, tower, peer, tensor or data; another group of n ranks is called "n ranks".
        op: as torch.distributed calls it, whatever carries it (lists, one tensor, coalesced).
        dtype: of the elements, such as bfloat16.
    """

    group: str
    op: str
    dtype: str


@dataclass
class CollectiveCount:
    """Calls, and bytes of the whole message on this rank: the larger of what goes in and what comes out.

    So an all-gather counts its result, a reduce-scatter its input, an all-reduce its tensor: the "size" of nccl-tests.
    """

    calls: int = 0
    bytes: int = 0


def group_name(topology: Topology, group: dist.ProcessGroup) -> str:
    """The topology's name of a process group; DeepSpeed's copies of a group are recognized by their ranks."""
    own = {name: getattr(topology, name) for name in ("world", "tower", "peer", "tensor", "data")}
    for name, known in own.items():
        if known is not None and known.group_name == group.group_name:
            return name
    ranks = dist.get_process_group_ranks(group)
    for name, known in own.items():
        if known is not None and dist.get_process_group_ranks(known) == ranks:
            return name
    return f"{len(ranks)} ranks"


class CollectiveRecorder(TorchDispatchMode):
    """Counts the collectives that run inside `with`; groups of one rank move nothing and are left out.

    Args:
        topology: whose groups are named.
        observe: called before every collective with its tensors.
    """

    def __init__(self, topology: Topology, observe: Callable[[list[Tensor]], None] = lambda messages: None) -> None:
        super().__init__()
        self._topology = topology
        self._observe = observe
        self._counts: dict[CollectiveKey, CollectiveCount] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func.namespace == "c10d" and func.__name__.partition(".")[0] in _OPERATIONS:
            self._record(_OPERATIONS[func.__name__.partition(".")[0]], args)
        return func(*args, **(kwargs or {}))

    def _record(self, op: str, args: Sequence[Any]) -> None:
        group = process_group(args)
        if group is None or group.size() == 1:
            return
        # A barrier's tensor is a dummy.
        messages = [[]] if op == "barrier" else [tensors_of(argument) for argument in args[:2]]
        self._observe([tensor for tensors in messages for tensor in tensors])
        dtype = str(messages[0][0].dtype).removeprefix("torch.") if messages[0] else ""
        count = self._counts.setdefault(CollectiveKey(group_name(self._topology, group), op, dtype), CollectiveCount())
        count.calls += 1
        count.bytes += max(sum(tensor.nbytes for tensor in tensors) for tensors in messages)

    def take(self) -> list[dict[str, Any]]:
        """What was counted since the last call: group, op, dtype, calls, bytes, sorted."""
        counts, self._counts = self._counts, {}
        return [key._asdict() | vars(count) for key, count in sorted(counts.items())]


def process_group(args: Sequence[Any]) -> dist.ProcessGroup | None:
    """The process group among the arguments of a c10d operator."""
    for argument in args:
        if isinstance(argument, torch.ScriptObject):
            try:
                return dist.ProcessGroup.unbox(argument)
            except RuntimeError:
                continue  # the reduction operator, or the options
    return None


def tensors_of(argument: Any) -> list[Tensor]:
    """The tensors of an argument: one, a list, or a list of lists."""
    if isinstance(argument, Tensor):
        return [argument]
    if isinstance(argument, (list, tuple)):
        return [tensor for part in argument for tensor in tensors_of(part)]
    return []
