"""Work at the rates of a device: seconds of products, of bytes, of messages; the constants of all machines are here.

    a product      max(FLOPs of whole tiles / (rate x share) x (1 + SMs / (2 tiles)), bytes / copy) + start
    other kernels  bytes / copy + start
    a part         its kernels one after the other, or the host's starts of them, whichever takes longer

Tiles are 128 x 128, and a sum of more than 2,048 terms is cut; the last wave of tiles is half empty on average. `start`
is what a kernel takes on the device beside its work. A machine whose SMs are not known has neither tiles nor starts.
docs/results/planner.md says which constants were fitted, and on what.
"""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from megarec.distributed.topology import Topology
from megarec.errors import UserError
from megarec.planning.hardware import Figure, Hardware
from megarec.planning.links import all_reduce_seconds, message_seconds, ring_seconds
from megarec.planning.op_counts import Op, Shape, fused
from megarec.planning.traffic import Message

GEMM_SHARE, BATCHED_SHARE = 0.9, 0.4
"""Of the rate of a large product: the products of a model where SMs are not known, and those example by example. From
a review of the code."""
TILE, TERMS = 128, 2048


class Constants(NamedTuple):
    """What an accelerator is said to reach, whichever it is.

    Attributes:
        gemm_share: of the rate of a large product, by those of a model that fill the chip: in the middle of a step, at
            its power limit, with cold caches.
        kernel_us: start and end of a kernel, in which the device does no work.
    """

    gemm_share: float
    kernel_us: float


FITTED = Constants(gemm_share=0.65, kernel_us=0.5)
Bound = Literal["compute", "memory", "link", "launches"]


@dataclass(frozen=True)
class PartTime:
    """One part of a step of one rank.

    Attributes:
        seconds: it takes, and what bounds it.
        fused_seconds: were every run of operations that only move memory one kernel.
    """

    flop: int
    bytes: int
    launches: int
    seconds: float
    bound: Bound
    fused_seconds: float


class Clock:
    """Work at the rates of a device."""

    def __init__(self, device: Hardware, constants: Constants = FITTED) -> None:
        self.device, self._constants = device, constants

    def gemm(self, width: int) -> float:
        """TFLOP/s that a large product of elements of so many bytes reaches.

        Raises:
            UserError: the device's rate is not known.
        """
        figure, kind, key = (
            (self.device.gemm_tflops, "16-bit", "gemm_tflops")
            if width < 4
            else (self.device.fp32_tflops, "fp32", "fp32_tflops")
        )
        if figure is None:
            other = "enable deepspeed.bf16" if width == 4 else "switch deepspeed.bf16 off"
            raise UserError(
                f"hardware {self.device.name}: its {kind} rate is not known here ({key}); give it in its JSON, or "
                f"{other} (tower modules compute in fp32)"
            )
        return figure.value

    def peak(self, width: int) -> float:
        """TFLOP/s that an MFU is a share of."""
        sheet = self.device.peak_tflops
        return sheet.value if sheet is not None and width < 4 else self.gemm(width)

    def memory(self, moved: int, launches: int = 0, rate: Figure | None = None) -> PartTime:
        """Bytes at the rate of a copy, or at another one in GB/s."""
        seconds = moved / (self._copy if rate is None else 1e9 * rate.value)
        return self._part(0, moved, launches, 0.0, seconds)

    def messages(self, messages: Sequence[Message], topology: Topology) -> PartTime:
        """Of the sparse side, one after the other."""
        seconds = sum(message_seconds(message, topology, self.device) for message in messages)
        return PartTime(0, sum(m.bytes for m in messages), len(messages), seconds, "link", seconds)

    def rings(self, passes: Sequence[float], hosts: int = 1, ranks_of_a_host: int = 1) -> PartTime:
        """Passes of a ring by the bytes that a rank sends."""
        seconds = sum(ring_seconds(sent, hosts, ranks_of_a_host, self.device) for sent in passes)
        return PartTime(0, int(sum(passes)), len(passes), seconds, "link", seconds)

    def all_reduce(self, passes: Sequence[float], hosts: int, ranks_of_a_host: int) -> PartTime:
        """By the bytes that a rank sends in each of a ring's two passes."""
        seconds = all_reduce_seconds(passes, hosts, ranks_of_a_host, self.device)
        return PartTime(0, int(sum(passes)), len(passes), seconds, "link", seconds)

    @property
    def _copy(self) -> float:
        return 1e12 * self.device.memory_tb_s.value

    def whole(self, ops: Sequence[Op], width: int) -> PartTime:
        """All operations as one part; products are of elements of `width` bytes."""
        fast = self._ops(fused(ops), width)
        return dataclasses.replace(self._ops(ops, width), fused_seconds=fast.seconds)

    def on_device(self, ops: Sequence[Op], width: int) -> float:
        """Seconds of operations that the host has started in time."""
        return sum(self._work_of(ops, width)) + len(ops) * self.start

    def dense(self, ops: Sequence[Op], times: int, width: int) -> dict[str, PartTime]:
        """By kind of operation, `times` times over."""
        parts, fast = {}, fused(ops)
        for name, kind in (("GEMMs", "gemm"), ("products by example", "batched"), ("other dense", "memory")):
            slow = self._ops([op for op in ops if op.kind == kind] * times, width)
            quick = self._ops([op for op in fast if op.kind == kind] * times, width)
            parts[name] = dataclasses.replace(slow, fused_seconds=quick.seconds)
        return parts

    def _ops(self, ops: Sequence[Op], width: int) -> PartTime:
        return self._part(sum(op.flop for op in ops), sum(op.bytes for op in ops), len(ops), *self._work_of(ops, width))

    def _work_of(self, ops: Sequence[Op], width: int) -> tuple[float, float]:
        """Seconds of those that compute longer than they move bytes, and of the others."""
        compute = memory = 0.0
        tflops = self.gemm(width)
        cache = 0.0 if self.device.cache_mb is None else 1e6 * self.device.cache_mb.value
        found = from_cache(ops, cache)
        products = GEMM_SHARE if self.device.sms is None else self._constants.gemm_share
        share = {"gemm": products, "batched": BATCHED_SHARE, "memory": 1.0}
        for op, hit in zip(ops, found, strict=True):
            computing = self._filling(op, width) * op.flop / (1e12 * tflops * share[op.kind])
            moving = (op.bytes - hit) / self._copy
            compute += computing if computing > moving else 0.0
            memory += moving if computing <= moving else 0.0
        return compute, memory

    def _filling(self, op: Op, width: int) -> float:
        """How much longer a product takes than a large one, or than on a chip that it fills."""
        if op.kind != "gemm" or op.shape is None:
            return 1.0
        ramp = self.device.gemm_ramp if width < 4 else self.device.fp32_ramp
        if ramp is not None:
            return 1 / ramp.at(min(op.shape.m, op.shape.n, op.shape.k), 1)
        if self.device.sms is None:
            return 1.0
        return filling(op.shape, self.device.sms.value)

    @property
    def start(self) -> float:
        """Seconds of a kernel beside its work."""
        return 0.0 if self.device.sms is None else 1e-6 * self._constants.kernel_us

    def _part(self, flop: int, moved: int, launches: int, compute: float, memory: float) -> PartTime:
        started = launches * 1e-6 * self.device.launch_us.value
        on_device = compute + memory + launches * self.start
        bound: Bound = "launches" if started > on_device else "compute" if compute > memory else "memory"
        return PartTime(flop, moved, launches, max(started, on_device), bound, max(started, on_device))


def filling(shape: Shape, sms: float) -> float:
    """Work of whole tiles over the work that is needed, and the last wave of them, half empty on average."""
    rows, columns = math.ceil(shape.m / TILE), math.ceil(shape.n / TILE)
    padded = rows * columns * TILE * TILE / (shape.m * shape.n)
    units = shape.batch * rows * columns * math.ceil(shape.k / TERMS)
    return padded * (1 + sms / (2 * units))


def from_cache(ops: Sequence[Op], cache: float) -> list[float]:
    """Of each operation, the bytes that it reads from the last cache: the less was touched since the tensor was, the
    more of it is still there."""
    if not cache:
        return [0.0] * len(ops)
    touched, last, found = 0.0, dict[int, float](), list[float]()
    for op in ops:
        here = {**op.reads, **op.writes}
        far = {storage: touched - last[storage] + here[storage] for storage in op.reads if storage in last}
        found.append(sum(op.reads[storage] * max(0.0, 1 - distance / cache) for storage, distance in far.items()))
        for storage, size in here.items():
            touched += size
            last[storage] = touched
    return found
