"""A rank's slices, copied into memory of the host for a save, beside the next step where an accelerator holds them.

On an accelerator a stream of its own copies while the next step's forward and backward passes run: they change no
weight and no optimizer state. What does, waits on the device for the copy (`Snapshot.hold`).
"""

import logging
from collections.abc import Sequence
from contextlib import suppress

import torch
from torch import Tensor

from megarec.checkpoint.writing import all_finite, file_header, in_file_order, key_of
from megarec.slices import TensorSlice

_log = logging.getLogger(__name__)


class HostBuffer:
    """Memory of the host that grows; page-locked beside an accelerator, by exactly its size.

    The allocator of `pin_memory=True` takes the next power of two, and gives nothing back (pytorch issue 95823).
    """

    def __init__(self) -> None:
        self.bytes = torch.empty(0, dtype=torch.uint8)
        self._locked = False

    def grow(self, size: int, locked: bool) -> None:
        """Have room for that many bytes; the content is lost if it grows."""
        if self.bytes.numel() >= size:
            return
        if self._locked:
            torch.cuda.cudart().cudaHostUnregister(self.bytes.data_ptr())
        self._locked = False
        self.bytes = torch.empty(0, dtype=torch.uint8)  # free the old one first
        self.bytes = torch.empty(size, dtype=torch.uint8)
        if locked:
            result = torch.cuda.cudart().cudaHostRegister(self.bytes.data_ptr(), size, 0)
            self._locked = int(result) == 0
            if not self._locked:
                _log.warning(
                    "%.1f GiB cannot be page-locked (CUDA error %d): saves wait for copies", size / 2**30, result
                )
                forget_cuda_error()


def forget_cuda_error() -> None:
    """Clear the last error in CUDA's runtime after a failed call whose error torch leaves there.

    The next kernel would report it as its own and end the run, so a dummy one is started.
    """
    with suppress(RuntimeError):
        torch.ones((), device="cuda")


class Snapshot:
    """Copies of pieces in one buffer, laid out as the data of a safetensors file; kept for the next save."""

    def __init__(self) -> None:
        self._buffer = HostBuffer()
        self.pieces: list[TensorSlice] = []
        self._failure: Exception | None = None
        self._copied: torch.Event | None = None
        self._changes_wait = False  # whether the next change has to wait for the copy
        self._size = 0

    def take(self, pieces: Sequence[TensorSlice]) -> None:
        """Copy, on an accelerator: queue the copy; what was copied before is overwritten.

        Without memory for it, `not_finite` raises the error: all ranks must reach that point.
        """
        if self._copied is not None:
            self._copied.synchronize()  # of a save that came to nothing before it read the copy
        self._failure = self._copied = None
        try:
            self._copy(pieces)
        except (MemoryError, RuntimeError) as error:
            self._failure = error

    def _copy(self, pieces: Sequence[TensorSlice]) -> None:
        self.pieces = in_file_order(pieces)
        self._size = sum(piece.tensor.nbytes for piece in pieces)
        device = next((piece.tensor.device for piece in pieces if piece.tensor.device.type != "cpu"), None)
        self._buffer.grow(self._size, locked=device is not None)
        if device is None:
            self._fill()
            return
        stream = torch.Stream(device=device)
        stream.wait_event(torch.accelerator.current_stream().record_event())  # what is queued may still change them
        with stream:
            self._fill()
        self._copied, self._changes_wait = stream.record_event(), True

    def _fill(self) -> None:
        for piece, target in zip(self.pieces, self._targets(), strict=True):
            target.view(piece.tensor.shape).copy_(piece.tensor, non_blocking=True)

    def _targets(self) -> list[Tensor]:
        """Where each piece lies in the buffer, flat."""
        targets, offset = [], 0
        for piece in self.pieces:
            targets.append(self._buffer.bytes[offset : offset + piece.tensor.nbytes].view(piece.tensor.dtype))
            offset += piece.tensor.nbytes
        return targets

    def hold(self) -> None:
        """The current stream's later work comes after the copy; the host waits for nothing."""
        if self._changes_wait and self._copied is not None:
            torch.accelerator.current_stream().wait_event(self._copied)
        self._changes_wait = False

    def not_finite(self) -> str | None:
        """Wait for the copy; the name of a piece with a number that is not finite, if there is one."""
        if self._failure is not None:
            raise self._failure
        if self._copied is not None:
            self._copied.synchronize()
        for piece, kept in zip(self.pieces, self._targets(), strict=True):
            if kept.is_floating_point() and not all_finite(kept):
                return key_of(piece)
        return None

    def header(self) -> bytes:
        return file_header([(key_of(p), p.tensor.dtype, tuple(p.tensor.shape)) for p in self.pieces])

    def data(self) -> memoryview:
        """All bytes; after `not_finite`, which has waited for them."""
        return memoryview(self._buffer.bytes.numpy().data)[: self._size]
