"""Dense gradients averaged over the data group while the backward pass and the exchange run, bucket by bucket.

At ZeRO 0 DeepSpeed 0.19.8 does it when the backward pass has ended, in one message. Here a gradient goes into its
bucket as it arrives, and a full bucket is on its way while the layers before it still compute. Buckets are filled from
the last layer to the first, as gradients arrive, and sent in that order on every rank, whichever is full first: a
bucket's content depends on the model alone, so that a run gives the same numbers with and without overlap, and after a
resume. Scaling and message type are DeepSpeed's (prescale_gradients, gradient_predivide_factor,
communication_data_type). The gradient of a parameter is a view of its bucket from then on: copied once, never back.

On a CPU a thread of the step sends, over groups of its own, so that its messages never meet others out of order. On an
accelerator they are queued in a stream of their own, by the thread that queues everything else; the host never waits.

DeepSpeed keeps doing it for ZeRO 1 to 3, and bf16 with fp32 accumulation, which partitions its optimizer.
"""

import queue
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from deepspeed.runtime.base_optimizer import ZeROOptimizer
from torch import Tensor, nn
from torch.profiler import record_function

from megarec.distributed.collectives import Channel, Ledger
from megarec.distributed.levels import Levels, all_reduce_sum_, data_levels
from megarec.distributed.topology import Topology

PURPOSE = "dense gradients"
BUCKETS = 4
"""Only the last bucket is left when the backward pass ends, so more buckets hide more; but each waits for its
messages one after the other, three over hosts, and where ranks share cores such a wait is milliseconds."""
LEAST_BYTES = 256 * 1024
"""A smaller message is bound by latency, not bytes."""
MOST_BYTES = 32 * 1024**2
"""A larger message travels no faster per byte, and would begin later."""
ALIGNED = 16
"""Elements: every gradient starts at a multiple of 32 bytes, as vector instructions and fused kernels want it."""


class Scaling(NamedTuple):
    """How a sum becomes a mean, with DeepSpeed's options.

    Attributes:
        before, after: what gradients are multiplied by before and after they are summed.
        dtype: in which type they travel and are summed.
    """

    before: float
    after: float
    dtype: torch.dtype


def gradient_reduction(engine: Any, topology: Topology, ledger: Ledger, overlap: bool) -> "GradientReduction":
    """Take the reduction over from DeepSpeed where it makes one message of it; collective.

    Args:
        overlap: messages travel during the backward pass; else after it, the same ones.
    """
    if isinstance(engine.optimizer, ZeROOptimizer):
        alone = Channel("data", None, 0, 1, ledger)
        return GradientReduction([], Levels(alone, alone), Scaling(1.0, 1.0, torch.float32), overlap)
    # Not by its own switch: in low precision that adds a check of all ranks for overflows.
    engine.allreduce_gradients = lambda *arguments, **named: None
    scaling = scaling_of(engine, topology.data_size)
    return GradientReduction(list(engine.module.parameters()), data_levels(topology, ledger), scaling, overlap)


def scaling_of(engine: Any, ranks: int) -> Scaling:
    """From the deepspeed section, for a data group of that many ranks."""
    dtype = engine.communication_data_type
    if not engine.postscale_gradients():
        return Scaling(1.0 / ranks, 1.0, dtype)
    divided = engine.gradient_predivide_factor()
    return Scaling(1.0 / divided, divided / ranks, dtype)


def bucket_bytes(total: int) -> int:
    """The size from which a bucket is closed, given the bytes of all gradients."""
    return min(MOST_BYTES, max(LEAST_BYTES, total // BUCKETS))


def buckets_of(sizes: Sequence[int], width: int) -> list[list[int]]:
    """Which parameters each bucket holds, as indices, from the last one of the model to the first.

    Args:
        sizes: elements of every parameter.
        width: bytes of an element under way.
    """
    least = bucket_bytes(width * sum(sizes))
    found: list[list[int]] = []
    content = least
    for index in reversed(range(len(sizes))):
        if content >= least:
            found.append([])
            content = 0
        found[-1].append(index)
        content += width * sizes[index]
    return found


class _Bucket:
    """Gradients that travel as one message.

    Attributes:
        flat: them one after the other, with zeros between them; None between steps.
        missing: those that have not arrived in this step.
    """

    def __init__(self, parameters: list[nn.Parameter], dtype: torch.dtype, multiple: int) -> None:
        """Args:
        multiple: the bucket's length is one of it, for the ranks of a host to share.
        """
        self.parameters, self._dtype = parameters, dtype
        self._sizes = [-(-parameter.numel() // ALIGNED) * ALIGNED for parameter in parameters]
        self._sizes[-1] += -sum(self._sizes) % multiple
        self.flat: Tensor | None = None
        self.missing: set[nn.Parameter] = set()
        self._views: dict[nn.Parameter, Tensor] = {}

    def begin(self) -> None:
        self.missing = set(self.parameters)

    def take(self, parameter: nn.Parameter) -> None:
        """Copy a gradient in."""
        assert parameter.grad is not None
        if self.flat is None:
            self.flat = torch.zeros(sum(self._sizes), dtype=self._dtype, device=parameter.device)
            parts = zip(self.parameters, self.flat.split(self._sizes), strict=True)
            self._views = {p: part[: p.numel()].view(p.shape) for p, part in parts}
        view = self._views[parameter]
        view.copy_(parameter.grad)
        if view.dtype == parameter.dtype:
            parameter.grad = view
        self.missing.remove(parameter)

    def give_back(self) -> None:
        """After the message: write its result into gradients of another type."""
        for parameter, view in self._views.items():
            if parameter.grad is not view:
                parameter.grad.copy_(view)  # type: ignore[union-attr]
        self.flat, self._views = None, {}


class GradientReduction:
    """Averages the gradients of a model over its data group.

    Args:
        parameters: in the order of the model.
        levels: the data group; of this reduction alone.
        overlap: messages travel during the backward pass; else after it, the same ones.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], levels: Levels, scaling: Scaling, overlap: bool) -> None:
        self._levels, self._scaling, self._overlap = levels, scaling, overlap
        self._trained = [parameter for parameter in parameters if parameter.requires_grad and parameter.numel()]
        alone = levels.host.size == levels.peers.size == 1
        sizes = [] if alone else [parameter.numel() for parameter in self._trained]
        self._buckets = [
            _Bucket([self._trained[index] for index in some], scaling.dtype, levels.host.size)
            for some in buckets_of(sizes, scaling.dtype.itemsize)
        ]
        self._unsent: list[_Bucket] = []
        self._sender: _Inline | _Thread | _Stream = _Inline()
        self._armed = False
        for bucket in self._buckets:
            for parameter in bucket.parameters:
                parameter.register_post_accumulate_grad_hook(self._arrival(bucket))

    def messages(self) -> list[Tensor]:
        """The buckets that are filled or under way."""
        return [bucket.flat for bucket in self._buckets if bucket.flat is not None]

    def begin(self) -> None:
        """The next backward pass is the last one of a step."""
        self._armed = True
        self._unsent = list(self._buckets)
        if self._overlap and self._buckets:
            self._sender = _sender(self._levels, self._buckets[0].parameters[0].device)
        for bucket in self._buckets:
            bucket.begin()

    def finish(self) -> None:
        """All gradients are means from here on, in the order of the current stream; collective."""
        self._armed = False
        for parameter in self._trained:
            if parameter.grad is None:  # a branch that this step did not take; an optimizer may still need one
                parameter.grad = torch.zeros_like(parameter)
        for bucket in self._buckets:
            for parameter in [parameter for parameter in bucket.parameters if parameter in bucket.missing]:
                bucket.take(parameter)
        self._send_full()
        with record_function("wait for dense gradients"):
            self._sender.wait()
        for bucket in self._buckets:
            bucket.give_back()

    def _arrival(self, bucket: _Bucket) -> Callable[[Tensor], None]:
        def arrived(parameter: Tensor) -> None:
            if self._armed:
                assert isinstance(parameter, nn.Parameter)
                bucket.take(parameter)
                if self._overlap:
                    self._send_full()

        return arrived

    def _send_full(self) -> None:
        while self._unsent and not self._unsent[0].missing:
            flat = self._unsent.pop(0).flat
            assert flat is not None
            self._sender.start(lambda flat=flat: self._reduce(flat))  # type: ignore[misc]

    @torch.no_grad()
    def _reduce(self, flat: Tensor) -> None:
        with record_function("reduce dense gradients"):
            if self._scaling.before != 1.0:
                flat.mul_(self._scaling.before)
            all_reduce_sum_(flat, self._levels, PURPOSE, "backward")
            if self._scaling.after != 1.0:
                flat.mul_(self._scaling.after)


def _sender(levels: Levels, device: torch.device) -> "_Inline | _Thread | _Stream":
    channel = levels.host if levels.host.size > 1 else levels.peers
    if channel.size == 1:
        return _Inline()
    if device.type != "cpu":
        return _Stream(device)
    return _Thread() if dist.get_backend(channel.group) == "gloo" else _Inline()  # else torch's fake group


class _Inline:
    """Work is done when it is started."""

    def start(self, work: Callable[[], None]) -> None:
        work()

    def wait(self) -> None:
        pass


class _Thread:
    """Work is done in order by a thread, which `wait` ends.

    It is a daemon: a job whose other ranks are gone must not wait for it.
    """

    def __init__(self) -> None:
        self._orders: queue.SimpleQueue[tuple[Callable[[], None], Future[None]] | None] = queue.SimpleQueue()
        self._started: list[Future[None]] = []

    def start(self, work: Callable[[], None]) -> None:
        if not self._started:
            threading.Thread(target=self._serve, name="dense gradients", daemon=True).start()
        future: Future[None] = Future()
        self._started.append(future)
        self._orders.put((work, future))

    def wait(self) -> None:
        """Until all is done; raises the work's error."""
        self._orders.put(None)
        for future in self._started:
            future.result()

    def _serve(self) -> None:
        while order := self._orders.get():
            work, future = order
            try:
                work()
                future.set_result(None)
            except BaseException as error:  # raised where the step waits
                future.set_exception(error)
                return


class _Stream:
    """Work is queued in a stream, behind what was queued before; `wait` makes the current stream wait, not the host."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.Stream(device=device)

    def start(self, work: Callable[[], None]) -> None:
        self._stream.wait_event(torch.accelerator.current_stream().record_event())
        with self._stream:
            work()

    def wait(self) -> None:
        torch.accelerator.current_stream().wait_event(self._stream.record_event())
