"""What every operation of a piece of torch code computes and moves: FLOPs, bytes read and written, kernels.

    with OpCounter() as counter:
        model(x).sum().backward()
    counter.ops

On the meta device nothing is computed, so that a step of any size is counted in a second. An operation reads each of
its inputs once and writes each of its results once, as a kernel does whose intermediate values stay on the chip; views
move nothing.
"""

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

aten = torch.ops.aten
Kind = Literal["gemm", "batched", "memory"]
_KINDS: dict[Any, Kind] = {aten.mm: "gemm", aten.addmm: "gemm", aten.bmm: "batched", aten.baddbmm: "batched"}
_NOTHING = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "lift_fresh", "_unsafe_view"}
_OVERWRITES = {"copy_", "zero_", "fill_", "normal_", "uniform_"}  # in place, without a look at what was there
_NOT_REALLY_WRITTEN = {"grads"}  # of fused optimizers: only with a loss scale of their own, which nobody uses here
_READ_TWICE = {aten.native_layer_norm_backward}  # torch's CUDA kernels: once for the input, once for the weight


class Shape(NamedTuple):
    """Of `batch` products [m, k] x [k, n]."""

    batch: int
    m: int
    n: int
    k: int


@dataclass(frozen=True)
class Op:
    """One kernel.

    Attributes:
        kind: a matrix product, products example by example, or anything that only moves memory.
        reads, writes: bytes by storage.
        shape: of a product.
    """

    name: str
    kind: Kind
    flop: int
    reads: dict[int, int]
    writes: dict[int, int]
    shape: Shape | None = None

    @property
    def bytes(self) -> int:
        """Read and written."""
        return sum(self.reads.values()) + sum(self.writes.values())


class OpCounter(TorchDispatchMode):
    """Lists the operations inside `with`, those of backward passes included.

    Attributes:
        ops: in the order in which they were started.
    """

    def __init__(self) -> None:
        super().__init__()
        self.ops: list[Op] = []
        self._storages: list[Any] = []  # kept, so that none takes the place and the name of an earlier one

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        packet = func.overloadpacket
        if not func.is_view and packet.__name__ not in _NOTHING:
            self._record(func, packet, args, kwargs, result)
        return result

    def _record(self, func: Any, packet: Any, args: Any, kwargs: Any, result: Any) -> None:
        changed, only_written = _written(func, args, kwargs)
        if packet.__name__ in _OVERWRITES:
            only_written.append(args[0])
        overwritten = {id(tensor) for tensor in only_written}
        reads = self._bytes(tensor for tensor in _tensors((args, kwargs)) if id(tensor) not in overwritten)
        if packet in _READ_TWICE:
            reads = {storage: 2 * size for storage, size in reads.items()}
        # An operation in place returns what it was given, or nothing.
        writes = self._bytes({id(tensor): tensor for tensor in [*changed, *_tensors(result)]}.values())
        if not reads and not writes:
            return
        flop = flop_registry[packet](*args, **kwargs, out_val=result) if packet in flop_registry else 0
        kind = _KINDS.get(packet, "memory")
        shape = None if kind == "memory" else _shape(*args[-2:])
        self.ops.append(Op(packet.__name__, kind, int(flop), reads, writes, shape))

    def _bytes(self, tensors: Iterable[Tensor]) -> dict[int, int]:
        """Of each storage, no more than it has: an expanded tensor repeats its elements."""
        found: dict[int, int] = {}
        for tensor in tensors:
            storage = tensor.untyped_storage()
            self._storages.append(storage)
            size = found.get(storage._cdata, 0) + tensor.numel() * tensor.element_size()
            found[storage._cdata] = min(size, storage.nbytes())
        return {storage: size for storage, size in found.items() if size}


def _shape(left: Tensor, right: Tensor) -> Shape:
    return Shape(left.shape[0] if left.dim() == 3 else 1, left.shape[-2], right.shape[-1], left.shape[-1])


def _tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]


def _written(func: Any, args: Any, kwargs: Any) -> tuple[list[Tensor], list[Tensor]]:
    """Tensors that an operation changes, and those of them that it does not look at (`out=`)."""
    changed, out = [], []
    for position, argument in enumerate(func._schema.arguments):
        if argument.alias_info is None or not argument.alias_info.is_write or argument.name in _NOT_REALLY_WRITTEN:
            continue
        given = _tensors(kwargs.get(argument.name) if argument.kwarg_only else args[position : position + 1])
        changed += given
        out += given if argument.kwarg_only else []
    return changed, out


def fused(ops: Sequence[Op]) -> list[Op]:
    """Every run of neighbours that only move memory as one kernel: it reads what others made, and writes what others
    read or what is left at the end. A floor of what a compiler can do without touching the products."""
    result: list[Op] = []
    last_read = {storage: index for index, op in enumerate(ops) for storage in op.reads}
    position = 0
    for kind, group in itertools.groupby(ops, key=lambda op: op.kind == "memory"):
        run = list(group)
        position += len(run)
        if not kind:
            result += run
            continue
        reads: dict[int, int] = {}
        writes: dict[int, int] = {}
        for op in run:
            for storage, size in op.reads.items():
                if storage not in writes:
                    reads[storage] = max(reads.get(storage, 0), size)
            for storage, size in op.writes.items():
                writes[storage] = max(writes.get(storage, 0), size)
        read_inside = {storage for op in run for storage in op.reads}
        kept = {s: size for s, size in writes.items() if s not in read_inside or last_read.get(s, 0) >= position}
        result.append(Op("fused", "memory", 0, reads, kept))
    return result
