"""The ids of the next batch travel while this one computes, over process groups of their own.

Exact: distributing ids reads no table, so that the lookup still sees every update of the step before.

On a CPU a thread sends them, from the lookup on. On an accelerator the device is the other thread: the main thread
queues copies and messages in a stream of their own once the backward pass is queued. A second thread must not do it:
NCCL wants the operations of all communicators of a device from one thread, in the same order on every rank (NCCL user
guide, "Thread Safety" and "Using multiple NCCL communicators concurrently").
"""

import dataclasses
import queue
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.profiler import record_function

from megarec.data.batch import Batch
from megarec.sparse.exchange.group import Distributed
from megarec.sparse.side import SparseSide
from megarec.training.profiling import StepTimer


class ReadyBatch(NamedTuple):
    """A batch on the device, and its ids where the tables are."""

    batch: Batch
    ids: Distributed


BatchFuture = Callable[[], ReadyBatch]
"""A batch on its way: the call waits for it."""


class IdPrefetcher:
    """Starts batches on their way.

    Args:
        sparse: its ids must have groups of their own where `overlap` is set.
        overlap: in the background; else a batch is sent when it is asked for.

    Attributes:
        threaded: another thread sends: the next batch may start as soon as this one's embeddings are here.
    """

    def __init__(self, sparse: SparseSide, device: torch.device, overlap: bool) -> None:
        self._sparse, self._device = sparse, device
        self._orders: queue.Queue[tuple[Batch, Future[ReadyBatch]] | None] | None = None
        self._last: Future[ReadyBatch] | None = None
        self._stream: torch.Stream | None = None
        self.threaded = overlap and device.type == "cpu"
        if self.threaded:
            self._orders = queue.Queue()
            # A daemon: a job whose other ranks are gone must not wait for it.
            threading.Thread(target=self._serve, name="ids", daemon=True).start()
        elif overlap:
            self._stream = torch.Stream(device=device)

    def start(self, batch: Batch) -> BatchFuture:
        """Send a batch on its way; ranks must start the same batches in the same order."""
        if self._stream is not None:
            return self._queue(batch, self._stream)
        if self._orders is None:
            return lambda: self._send(batch)
        future: Future[ReadyBatch] = Future()
        self._last = future
        self._orders.put((batch, future))
        return lambda: self._wait(future)

    def drain(self) -> None:
        """Wait for what is on its way, before anything else sends ids."""
        if self._last is not None:
            self._last.result()

    def close(self) -> None:
        """Wait for what is on its way and end the thread, before the groups go."""
        self.drain()
        if self._orders is not None:
            self._orders.put(None)

    def steps(self, batches: Iterator[Batch], timer: StepTimer) -> Iterator[tuple[BatchFuture, Callable[[], None]]]:
        """For each batch: its future, and a function that starts the next one (else it starts when asked for)."""
        upcoming: list[BatchFuture] = []

        def start_next() -> None:
            if not upcoming:
                with timer.part("data"):
                    found = _first(batches)
                upcoming.extend(self.start(batch) for batch in found)

        start_next()
        while upcoming:
            yield upcoming.pop(), start_next
            start_next()

    def _serve(self) -> None:
        assert self._orders is not None
        while order := self._orders.get():
            batch, future = order
            try:
                future.set_result(self._send(batch))
            except BaseException as error:  # raised where the batch is asked for
                future.set_exception(error)

    def _send(self, batch: Batch) -> ReadyBatch:
        with record_function("distribute ids"):
            batch = batch.to(self._device)
            return ReadyBatch(batch, self._sparse.distribute(batch))

    def _queue(self, batch: Batch, stream: torch.Stream) -> BatchFuture:
        """Queue a batch in a stream; the stream that asks for it waits on the device, not on the host."""
        with stream:
            arrived = self._send(batch)
        sent = stream.record_event()

        def wait() -> ReadyBatch:
            here = torch.accelerator.current_stream()
            here.wait_event(sent)
            _keep_for(here, arrived)
            return arrived

        return wait

    def _wait(self, future: "Future[ReadyBatch]") -> ReadyBatch:
        with record_function("wait for ids"):
            return future.result()


def _first(batches: Iterator[Batch]) -> list[Batch]:
    """The next batch, if there is one."""
    batch = next(batches, None)
    return [] if batch is None else [batch]


def _keep_for(stream: Any, value: Any) -> None:
    """Record for the allocator that a stream uses tensors made in another: once for each piece of memory."""
    for tensor in {tensor.untyped_storage().data_ptr(): tensor for tensor in _tensors(value)}.values():
        tensor.record_stream(stream)


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            yield from _tensors(getattr(value, field.name))
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, tuple | list):
        for item in value:
            yield from _tensors(item)
