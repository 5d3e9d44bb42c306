"""Bytes of the dense side on one rank, from the sizes of its parameters alone.

The rules are those of DeepSpeed 0.19.8, not of the ZeRO papers; each names its source under deepspeed/runtime. They
are checked to the byte against gloo ranks (tests/planning/test_zero.py). P is the number of elements of this rank's
parameters (under tensor parallelism its shards), N the ranks of its data group, w the bytes of an element in which
the model computes.

| stage | parameters | gradients | optimizer (k moments) | step |
| --- | --- | --- | --- | --- |
| 0, fp32 | 4 P | 4 P | 4 k P | |
| 0, bf16 | 2 P | 2 P | (4 + 4 k) P | 4 P |
| 1, 2 | w P | w x parameters that touch the partition | (4 + 4 k) P / N | 4 P / N |
| 3 | w P / N + w x persistent | w P / N | (4 + 4 k) P / N | 4 P / N |

From stage 1 on there are master weights in fp32 as well: DeepSpeed copies them.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from megarec.config.sections import RunConfig
from megarec.dense.memory import Parts
from megarec.dense.reduction import buckets_of
from megarec.dense.settings import DeepSpeedZeroConfig, settings_of
from megarec.distributed.topology import Topology
from megarec.errors import UserError

MASTER = 4  # bytes of a master weight, a moment, and of the gradient that the optimizer steps with
MOMENTS = {"adam": 2, "adamw": 2, "fusedadam": 2, "lamb": 2, "adagrad": 1, "lion": 1}


@dataclass(frozen=True)
class Zero:
    """What memory depends on beside the sizes of the parameters.

    Attributes:
        settings: DeepSpeed's zero_optimization with its defaults.
        ranks, rank: of the data group.
        width: bytes of an element in which the model computes.
        moments: elements of optimizer state per parameter.
        accumulation: micro-batches of one step.
        of_host: how many of the data group's ranks are on one host.
        sent: bytes of an element of a gradient under way, at stage 0.
    """

    settings: DeepSpeedZeroConfig
    ranks: int
    rank: int
    width: int
    moments: int
    accumulation: int
    of_host: int
    sent: int

    @property
    def stage(self) -> int:
        return int(self.settings.stage)

    @property
    def offloaded(self) -> bool:
        """Whether optimizer state and the gradients it steps with live in host memory."""
        offload = self.settings.offload_optimizer
        return offload is not None and offload.device != "none"


def zero_of(config: RunConfig, topology: Topology) -> Zero:
    """ZeRO as a run's config asks for it.

    Raises:
        UserError: DeepSpeed refuses the section, or the optimizer is unknown here.
    """
    section = config.deepspeed
    settings = settings_of(section)
    return Zero(
        settings=settings.zero,
        ranks=topology.data_size,
        rank=topology.rank // topology.tensor_size,
        width=settings.dtype.itemsize,
        moments=_moments(config),
        accumulation=section.get("gradient_accumulation_steps", 1),
        of_host=topology.ranks_per_host // topology.tensor_size,
        sent={"fp32": 4, "fp16": 2, "bf16": 2}.get(
            str(section.get("communication_data_type")), settings.dtype.itemsize
        ),
    )


def _moments(config: RunConfig) -> int:
    given: dict[str, Any] | None = config.deepspeed.get("optimizer")
    if given is None:
        return {"adamw": 2, "adam": 2, "sgd": 0}[config.dense.optimizer]
    name = str(given.get("type")).lower()
    if name == "sgd":
        return int(bool(given.get("params", {}).get("momentum")))
    if name not in MOMENTS:
        raise UserError(
            f"deepspeed.optimizer.type={given.get('type')!r}: its memory is not known here; "
            f"expected one of {', '.join(['sgd', *MOMENTS])}"
        )
    return MOMENTS[name]


def dense_parts(sizes: Sequence[int], zero: Zero, arrival: Sequence[int] | None = None) -> Parts:
    """Predicted bytes of dense/memory.py's parts.

    `gradients` are those that the optimizer steps with, when the last backward pass of a step has ended;
    `communication` is its largest over a step, without the messages of tensor-parallel layers.

    Args:
        sizes: elements of every parameter of this rank, in the model's order.
        arrival: their places in the order in which gradients arrive; None: the reverse.
    """
    total, partition = sum(sizes), partition_elements(sizes, zero)
    if zero.stage == 0:
        low_precision = zero.width < MASTER  # fp16/unfused_optimizer.py: fp32 copies of weights and gradients
        return {
            "parameters": zero.width * total,
            "gradients": zero.width * total,
            "optimizer": (zero.moments + low_precision) * MASTER * total,
            "step": low_precision * MASTER * total,
            "communication": _reduction(sizes, zero),
        }
    return {
        "parameters": _parameters(sizes, zero, partition),
        "gradients": _gradients(sizes, zero, partition),
        "optimizer": (1 + zero.moments) * MASTER * partition + _offload_buffer(zero, partition),
        "step": _step(sizes, zero, partition),
        "communication": _communication(sizes, zero, range(len(sizes))[::-1] if arrival is None else arrival),
    }


def partition_elements(sizes: Sequence[int], zero: Zero) -> int:
    """Elements of this rank's partition, padding included."""
    if zero.stage == 3:  # zero/partition_parameters.py, _aligned_size: every parameter by itself
        return sum(-(-size // zero.ranks) for size in sizes)
    if zero.stage == 0:
        return sum(sizes)
    return -(-sum(sizes) // (2 * zero.ranks)) * 2  # zero/stage_1_and_2.py: nccl_start_alignment_factor = 2


def _parameters(sizes: Sequence[int], zero: Zero, partition: int) -> int:
    if zero.stage < 3:  # zero/stage_1_and_2.py: bit16_groups_flat, padded
        return zero.width * partition * zero.ranks
    whole = _persistent(sizes, zero) if zero.ranks > 1 else 0  # from the end of the first step on
    sharers = zero.settings.zero_hpz_partition_size  # zero/partition_parameters.py, _partition_param_sec
    secondary = (sum(sizes) - whole) // sharers if sharers > 1 else 0
    return zero.width * (partition + secondary + whole)


def persistent(sizes: Sequence[int], zero: Zero) -> list[bool]:
    """Which parameters stay gathered: mark_persistent_parameters, zero/parameter_offload.py."""
    kept, found = 0, []
    for size in sizes:
        small = size <= zero.settings.param_persistence_threshold
        found.append(small and kept + size <= zero.settings.model_persistence_threshold)
        kept += size if found[-1] else 0
    return found


def _persistent(sizes: Sequence[int], zero: Zero) -> int:
    return sum(size for size, stays in zip(sizes, persistent(sizes, zero), strict=True) if stays)


def _gradients(sizes: Sequence[int], zero: Zero, partition: int) -> int:
    if zero.stage == 3:  # zero/stage3.py: grad_partitions_flat_buffer
        return zero.width * partition
    if zero.offloaded:  # zero/stage_1_and_2.py: they go to the fp32 copy in host memory (part `step`)
        return 0
    # zero/stage_1_and_2.py, copy_grads_in_partition: every parameter that reaches into the partition, whole
    return zero.width * sum(_touching(sizes, zero, partition))


def _touching(sizes: Sequence[int], zero: Zero, partition: int) -> list[int]:
    """Sizes of the parameters that reach into the rank's partition."""
    start, stops = zero.rank * partition, itertools.accumulate(sizes)
    return [size for size, stop in zip(sizes, stops, strict=True) if stop > start and stop - size < start + partition]


def _offload_buffer(zero: Zero, partition: int) -> int:
    """zero/stage_1_and_2.py: param_buffer_of_bit16_for_cpu_offload_groups."""
    return zero.width * partition if zero.offloaded and zero.stage < 3 else 0


def _step(sizes: Sequence[int], zero: Zero, partition: int) -> int:
    """The gradients as the optimizer takes them, in fp32; with offload they stay, else they live while it steps."""
    if zero.stage == 3 and not zero.offloaded:  # zero/stage3.py steps sub-group by sub-group
        return MASTER * min(partition, int(zero.settings.sub_group_size))
    if zero.width == MASTER and not zero.offloaded:  # a partition inside one parameter is a view of its whole gradient
        touching = _touching(sizes, zero, partition)
        return MASTER * (touching[0] if len(touching) == 1 else partition)
    return MASTER * partition


def _reduction(sizes: Sequence[int], zero: Zero) -> int:
    """Stage 0, dense/reduction.py: buckets hold the gradients themselves, unless these travel in another type; and over
    several hosts a rank receives as much as a bucket (on an accelerator only its share)."""
    if zero.ranks == 1:
        return 0
    buckets = 0 if zero.sent == zero.width else zero.sent * sum(sizes)
    if zero.of_host == 1 or zero.of_host == zero.ranks:
        return buckets
    largest = max(sum(sizes[index] for index in bucket) for bucket in buckets_of(sizes, zero.sent))
    return buckets + zero.sent * largest


def _communication(sizes: Sequence[int], zero: Zero, arrival: Sequence[int]) -> int:
    """Buckets, gradients that wait to be reduced, copies that are sent, and at ZeRO-3 gathered parameters."""
    settings = zero.settings
    buckets = (1 + (zero.stage < 3 and bool(settings.overlap_comm))) * bool(settings.contiguous_gradients)
    beside = _beside_gathered(sizes, zero, arrival) if zero.stage == 3 else _at_a_flush(sizes, zero, arrival)
    return zero.width * (buckets * int(settings.reduce_bucket_size) + beside)


def _at_a_flush(sizes: Sequence[int], zero: Zero, arrival: Sequence[int]) -> int:
    """Most elements beside the buckets when one is sent: zero/stage_1_and_2.py.

    Gradients move into the bucket as they arrive, at stage 1 without overlap once all of them wait, in the model's
    order; one that is larger than a bucket stays where it is. A bucket is sent when the next one does not fit. What it
    sends is a copy, unless all of it is of one rank's partition (average_tensor, allreduce_bucket).
    """
    bucket, at_end = int(zero.settings.reduce_bucket_size), zero.stage == 1 and not zero.settings.overlap_comm
    moves, partition = bool(zero.settings.contiguous_gradients), partition_elements(sizes, zero)
    starts = [0, *itertools.accumulate(sizes)]
    waiting = most = sum(sizes) if at_end else 0
    content: list[int] = []
    for place in [*(range(len(sizes)) if at_end else arrival), None]:
        size = 0 if place is None else sizes[place]
        waiting += 0 if at_end else size
        held = sum(sizes[own] for own in content)
        if content and (place is None or held + size > bucket):
            owners = [range(starts[own] // partition, (starts[own + 1] - 1) // partition + 1) for own in content]
            copied = len({owner for own in owners for owner in own}) > 1
            most = max(most, waiting + held * copied)
            waiting -= sum(
                sizes[own]
                for own, of in zip(content, owners, strict=True)
                if (not moves or sizes[own] > bucket) and (zero.stage == 2 or (moves and zero.rank in of))
            )
            content = []
        if place is not None:
            content.append(place)
            waiting -= size if moves and size <= bucket else 0
    return most


def _beside_gathered(sizes: Sequence[int], zero: Zero, arrival: Sequence[int]) -> int:
    """Most elements beside the bucket at stage 3: parameters that are gathered, and when a bucket is sent its content,
    copied (reduce_scatter_coalesced), and the gradient that did not fit.

    zero/partitioned_param_coordinator.py: in the backward pass a parameter is released when its gradient is there.
    Every submodule fetches ahead as long as fewer than max_live_parameters are there; and what the next
    max_reuse_distance elements need again is not released, which at the end of the forward pass is the last half of
    that distance.
    """
    settings, bucket, kept = zero.settings, int(zero.settings.reduce_bucket_size), persistent(sizes, zero)
    ahead = int(settings.max_live_parameters) if settings.prefetch_bucket_size else 0
    most = max(ahead, int(settings.max_reuse_distance) // 2) + max(sizes)
    most, content = min(sum(sizes) - _persistent(sizes, zero), most) if zero.ranks > 1 else 0, 0
    order: list[int | None] = [*arrival, None]
    for turn, place in enumerate(order):
        size = 0 if place is None else sizes[place]
        if place is None or (content and content + size > bucket):
            live = 0
            for own in order[turn:]:
                if own is not None and not kept[own] and (live < ahead or own == place):
                    live += sizes[own]
            alone = content if content > bucket or not settings.contiguous_gradients else 0  # in no bucket
            most, content = max(most, live * (zero.ranks > 1) + content + alone + size), 0
        content += size
    return most
