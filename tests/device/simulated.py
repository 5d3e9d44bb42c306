"""A simulated accelerator on a CPU build of torch: numbers are computed on the CPU, tensors say `fakegpu:0`.

What a GPU would refuse raises here: an operation over two devices, a CPU tensor or a type without NCCL counterpart in a
collective. What would make the host wait for a GPU is counted, with file and line, and so are copies and kernels.

Autograd runs on it; DeepSpeed does not (its flat buffers ask tensors for their storage).
"""

import traceback
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

import megarec
from megarec.kernels import launch

_setup_privateuseone_for_python_backend("fakegpu")
DEVICE = torch.device("fakegpu:0")
PACKAGE = str(Path(megarec.__file__).parent)
aten = torch.ops.aten
SIZE_DEPENDS_ON_DATA = {
    aten.nonzero, aten.unique_consecutive, aten._unique2, aten.unique_dim, aten.masked_select,
    aten._local_scalar_dense, aten.equal, aten.is_nonzero,
}  # fmt: skip
VIEWS = {
    "view", "_unsafe_view", "slice", "select", "split", "t", "transpose", "permute", "expand", "detach", "alias",
    "unsqueeze", "squeeze", "as_strided", "_reshape_alias", "split_with_sizes", "unbind", "chunk", "narrow", "unfold",
}  # fmt: skip
ALLOCATIONS = {"empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided", "_local_scalar_dense"}
ONLY_WRITE = {"copy_", "fill_", "zero_", "cat", "index_select"}  # with `out`, or in place
NOT_IN_NCCL = (torch.int16, torch.bool, torch.complex64)


@dataclass
class Seen:
    """What the host asked of the device.

    Attributes:
        waits: (what, "file:line" in the package): how often the host would stand still.
        launches: kernels, "H2D" and "D2H" copies, collectives by name.
        bytes: that kernels and collectives read and wrote: every tensor they were given, once, and what they made.
    """

    waits: Counter[tuple[str, str]] = field(default_factory=Counter)
    launches: Counter[str] = field(default_factory=Counter)
    bytes: int = 0

    def wait(self, what: str) -> None:
        self.waits[what, _place()] += 1

    def clear(self) -> None:
        self.waits.clear()
        self.launches.clear()
        self.bytes = 0

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Inside, nothing is counted."""
        before = self.waits.copy(), self.launches.copy(), self.bytes
        yield
        self.waits, self.launches, self.bytes = before


_seen = Seen()


def _place() -> str:
    frames = [frame for frame in traceback.extract_stack() if frame.filename.startswith(PACKAGE)]
    return f"{frames[-1].filename.removeprefix(PACKAGE + '/')}:{frames[-1].lineno}" if frames else "test"


class SimulatedTensor(torch.Tensor):
    """A tensor of the simulated device; `on_cpu` has its numbers."""

    on_cpu: Tensor

    @staticmethod
    def __new__(cls, on_cpu: Tensor) -> "SimulatedTensor":
        made: SimulatedTensor = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            on_cpu.size(),
            strides=on_cpu.stride(),
            storage_offset=on_cpu.storage_offset(),
            dtype=on_cpu.dtype,
            device=DEVICE,
            requires_grad=False,
        )
        made.on_cpu = on_cpu
        return made

    def __repr__(self) -> str:  # type: ignore[override]
        return f"SimulatedTensor({self.on_cpu})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})

    def tolist(self) -> Any:
        _seen.wait("tolist")
        return self.on_cpu.tolist()


class _Mode(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


@contextmanager
def simulated() -> Iterator[Seen]:
    """Inside, `DEVICE` computes; yields what has been seen, which may be cleared between steps."""
    global _seen
    _seen = Seen()
    plain = torch.tensor

    def tensor(data: Any, **options: Any) -> Tensor:
        device = options.get("device")
        if device is None or torch.device(device).type != DEVICE.type:
            return plain(data, **options)
        _seen.wait("torch.tensor(..., device=)")  # from pageable memory: the host waits for the stream
        _seen.launches["H2D"] += 1
        return SimulatedTensor(plain(data, **{**options, "device": "cpu"}))

    with patch.object(torch, "tensor", tensor), patch.object(launch, "start", _start), _Mode():
        yield _seen


def _start(kernel: Any, programs: int, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
    """A Triton kernel, interpreted."""
    tensors = {id(argument): argument for argument in arguments if isinstance(argument, Tensor)}.values()
    on_cpu = [tuple(tensor.shape) for tensor in tensors if not isinstance(tensor, SimulatedTensor)]
    if on_cpu:
        raise RuntimeError(f"kernel {kernel} was given CPU tensors {on_cpu} at {_place()}")
    _seen.launches["kernels"] += 1
    _seen.bytes += sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    with torch.utils._python_dispatch._disable_current_modes():
        kernel[(programs,)](*(a.on_cpu if isinstance(a, SimulatedTensor) else a for a in arguments), **options)


def _run(func: Any, args: Any, kwargs: Any) -> Any:
    tensors = [leaf for leaf in tree_flatten((args, kwargs))[0] if isinstance(leaf, Tensor)]
    on_device = [tensor for tensor in tensors if isinstance(tensor, SimulatedTensor)]
    packet = func.overloadpacket
    target = kwargs.get("device")
    to_device = target is not None and torch.device(target).type == DEVICE.type
    to_cpu = target is not None and torch.device(target).type == "cpu"
    if func.namespace == "c10d":
        _check_collective(packet.__name__, tensors)
    if on_device and packet not in (aten.copy_, aten._to_copy):
        _check_devices(func, tensors)
    _count_waits(packet, args, kwargs, on_device=bool(on_device), to_device=to_device, to_cpu=to_cpu)
    if to_device:
        kwargs = {**kwargs, "device": torch.device("cpu")}
    starts = (on_device or to_device) and packet.__name__ not in VIEWS
    if starts:
        _seen.launches["kernels"] += 1
    wrappers: dict[int, SimulatedTensor] = {}  # an operation in place returns the tensor it was given

    def unwrap(value: Any) -> Any:
        if isinstance(value, SimulatedTensor):
            wrappers[id(value.on_cpu)] = value
            return value.on_cpu
        return value

    result = func(*tree_map(unwrap, args), **tree_map(unwrap, kwargs))
    if func.namespace == "c10d":
        _seen.bytes += _bytes(packet, tensors, ())  # output and input are both given
    elif starts and packet.__name__ not in ALLOCATIONS:
        _seen.bytes += _bytes(packet, tensors, result)
    stays = isinstance(args[0], SimulatedTensor) if packet is aten.copy_ else to_device or (on_device and not to_cpu)

    def wrap(value: Any) -> Any:
        if not isinstance(value, Tensor) or isinstance(value, SimulatedTensor):
            return value
        if id(value) in wrappers:
            return wrappers[id(value)]
        return SimulatedTensor(value) if stays else value

    return tree_map(wrap, result)


def _bytes(packet: Any, tensors: list[Tensor], result: Any) -> int:
    """Read and written; an operation in place reads what it writes, except those that only write."""
    made = [leaf for leaf in tree_flatten(result)[0] if isinstance(leaf, Tensor)]
    given = [tensor.on_cpu if isinstance(tensor, SimulatedTensor) else tensor for tensor in tensors]
    written = {id(tensor) for tensor in made}
    only_written = packet.__name__ in ONLY_WRITE
    read = [tensor for tensor in given if not (only_written and id(tensor) in written)]
    return sum(tensor.numel() * tensor.element_size() for tensor in [*read, *made])


def _check_collective(name: str, tensors: list[Tensor]) -> None:
    _seen.launches[f"c10d {name}"] += 1
    on_cpu = [tuple(tensor.shape) for tensor in tensors if not isinstance(tensor, SimulatedTensor)]
    odd = [tensor.dtype for tensor in tensors if tensor.dtype in NOT_IN_NCCL]
    if on_cpu or odd:
        raise RuntimeError(f"{name}: CPU tensors {on_cpu}, types that NCCL lacks {odd}, at {_place()}")


def _check_devices(func: Any, tensors: list[Tensor]) -> None:
    for tensor in tensors:
        if isinstance(tensor, SimulatedTensor) or not tensor.dim():
            continue
        if func.overloadpacket not in (aten.index, aten.index_put_, aten._index_put_impl_):
            raise RuntimeError(f"two devices in {func}: a CPU tensor {tuple(tensor.shape)} at {_place()}")
        _seen.wait("a CPU index")


def _count_waits(packet: Any, args: Any, kwargs: Any, *, on_device: bool, to_device: bool, to_cpu: bool) -> None:
    if on_device and packet in SIZE_DEPENDS_ON_DATA:
        _seen.wait(packet.__name__)
    if packet is aten.repeat_interleave and on_device and kwargs.get("output_size") is None and len(args) < 3:
        _seen.wait("repeat_interleave without output_size")
    masks = args[1] if packet in (aten.index, aten.index_put_) and on_device else []
    if any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in masks):
        _seen.wait("an index by mask")
    if packet is aten.copy_ and isinstance(args[0], SimulatedTensor) != isinstance(args[1], SimulatedTensor):
        way = "H2D" if isinstance(args[0], SimulatedTensor) else "D2H"
        _seen.launches[way] += 1
        if not kwargs.get("non_blocking", args[2] if len(args) > 2 else False):
            _seen.wait(way)
    if packet is aten._to_copy and to_device and not on_device:
        _seen.launches["H2D"] += 1
        if not kwargs.get("non_blocking", False):
            _seen.wait("H2D")
    if packet is aten._to_copy and to_cpu and on_device:
        _seen.launches["D2H"] += 1
        _seen.wait("D2H")
