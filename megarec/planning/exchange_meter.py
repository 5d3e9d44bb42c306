"""Measures the part `exchange`: the memory that the sparse side makes and takes in during a step, at its peak.

Inside the calls of the sparse side every tensor that an operator returns in memory of its own is followed until nothing
refers to it, and so is the gradient that the dense model hands over, with all of its memory. Not followed: what another
part has (saved tensors of the dense model and of tower modules, and all that modules and optimizers make), the batch,
and what tables make to sort, sum and update their rows. exchange_memory.py predicts the same.

Threads and streams beside the step's own are not seen: a rehearsal sends ids from the main thread.
"""

import sys
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import wraps
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megarec.sparse import side
from megarec.sparse.side import SparseSide, StepLookup
from megarec.sparse.tables.local import LocalTables
from megarec.sparse.tables.stacked import StackedTable
from megarec.sparse.tables.torch_backend import TorchTables

_TRITON = "megarec.sparse.tables.triton_backend"  # not imported where it is not installed


class ExchangeMeter(TorchDispatchMode):
    """Follows memory while it is entered and something is watched.

    Attributes:
        peak: bytes, the most that was held at a time so far.
    """

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._watched = self._paused = 0
        self._held: dict[int, tuple[StorageWeakRef, int]] = {}  # weak references keep a storage's name from another
        self._elsewhere: dict[str, dict[int, tuple[StorageWeakRef, int]]] = {}

    @property
    def watching(self) -> bool:
        """Whether the sparse side computes."""
        return self._watched > 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if self._watched and not self._paused:
            self._follow(result, given={_name(tensor) for tensor in _tensors((args, kwargs))})
        return result

    def take(self, tensors: Any) -> None:
        """Follow tensors that were made elsewhere."""
        self._follow(tensors, given=())

    def leave_out(self, part: str, storages: Iterable[int]) -> None:
        """Another part has these, by name, in the place of those that it had: they are followed again."""
        self._held |= self._elsewhere.pop(part, {})
        self._elsewhere[part] = {name: self._held.pop(name) for name in storages if name in self._held}

    @contextmanager
    def watch(self) -> Iterator[None]:
        """The sparse side computes inside."""
        self._watched += 1
        try:
            yield
        finally:
            self._watched -= 1

    @contextmanager
    def pause(self) -> Iterator[None]:
        """What is made inside is of another part."""
        self._paused += 1
        try:
            yield
        finally:
            self._paused -= 1

    def _follow(self, made: Any, given: Collection[int]) -> None:
        new, known = False, {*self._held, *(name for part in self._elsewhere.values() for name in part)}
        for tensor in _tensors(made):
            name, storage = _name(tensor), tensor.untyped_storage()
            if storage.nbytes() and name not in given and name not in known:
                self._held[name] = StorageWeakRef(storage), storage.nbytes()
                new = True
        if new:
            self._held = {name: held for name, held in self._held.items() if not held[0].expired()}
            self.peak = max(self.peak, sum(size for _, size in self._held.values()))

    def paused(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The same function, unwatched."""
        return _within(self.pause, function)

    def watched(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The same function, watched."""
        return _within(self.watch, function)


def _within(context: Callable[[], AbstractContextManager[Any]], function: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        with context():
            return function(*args, **kwargs)

    return call


def _tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]


def _name(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


@contextmanager
def exchange_measured(meter: ExchangeMeter, sparse: SparseSide) -> Iterator[None]:
    """The calls of a sparse side inside are watched, but for its tower modules; `meter` is not entered here."""
    send_back, through, single = StepLookup.send_back, side._through, StackedTable.touched_gradients

    def watched_send_back(lookup: StepLookup, micro: int, gradient: Tensor) -> None:
        with meter.watch():
            meter.take(gradient)
            send_back(lookup, micro, gradient)

    def watched_through(made: Tensor, leaf: Tensor, gradient: Tensor) -> Tensor:
        found = through(made, leaf, gradient)
        meter.take(found)
        return found

    def summed(*args: Any) -> Iterator[Any]:  # lazily, chunk by chunk
        chunks = single(*args)
        while True:
            with meter.pause():
                chunk = next(chunks, None)
            if chunk is None:
                return
            yield chunk

    with ExitStack() as stack:
        for name in ("distribute", "forward"):
            stack.enter_context(patch.object(sparse, name, meter.watched(getattr(sparse, name))))
        for name in ("micro_batch", "apply", "skip"):
            stack.enter_context(patch.object(StepLookup, name, meter.watched(getattr(StepLookup, name))))
        stack.enter_context(patch.object(StepLookup, "send_back", watched_send_back))
        stack.enter_context(patch.object(side, "_through", watched_through))
        unwatched: list[tuple[Any, str]] = [(TorchTables, "update"), (StackedTable, "of_sums"), (StackedTable, "apply")]
        unwatched += [(LocalTables, "_touch"), (LocalTables, "_mark"), (torch.Tensor, "backward")]
        if _TRITON in sys.modules:
            unwatched.append((sys.modules[_TRITON].TritonTables, "update"))
        for owner, name in unwatched:
            stack.enter_context(patch.object(owner, name, meter.paused(getattr(owner, name))))
        stack.enter_context(patch.object(StackedTable, "touched_gradients", summed))
        stack.enter_context(_optimizers_unwatched(meter))
        yield


@contextmanager
def _optimizers_unwatched(meter: ExchangeMeter) -> Iterator[None]:
    pauses: list[ExitStack] = []

    def before(*_: Any) -> None:
        pauses.append(ExitStack())
        pauses[-1].enter_context(meter.pause())

    hooks = register_optimizer_step_pre_hook(before), register_optimizer_step_post_hook(lambda *_: pauses.pop().close())
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
