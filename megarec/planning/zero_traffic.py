"""What a rank sends for gradients and weights of the dense model, as DeepSpeed 0.19.8 does it, not as ZeRO's papers do.

| stage | gradients | weights |
| --- | --- | --- |
| 0 | all-reduced once a step (dense/reduction.py) | |
| 1 | **all-reduced**, once a step | gathered after the optimizer |
| 2 | **all-reduced**, every micro-batch | gathered after the optimizer |
| 3 | reduce-scattered every micro-batch | gathered for each forward pass, and again for backward what was not kept |

Stages 1 and 2 have no reduce-scatter: zero/stage_1_and_2.py, allreduce_and_scatter, sums whole buckets on all ranks and
copies a rank's part out, also with `reduce_scatter`. At stage 3 a forward pass of a model that is not larger than
`stage3_max_live_parameters` leaves all weights gathered, and they are gathered but once; of a larger one those at its
end are kept. Persistent parameters are gathered once a step, after the optimizer. ZeRO++ gathers over all ranks but
once a step, and inside hosts after that.

Bytes are a ring's: an all-reduce of S bytes over N ranks sends 2 (N - 1) / N S, the others half of it. Norms and
overflow flags, of 4 or 8 bytes, are not counted. tests/planning/test_zero_traffic.py holds all of it to the collectives
of real ranks.
"""

from collections.abc import Sequence
from typing import NamedTuple

from megarec.planning.zero import Zero, partition_elements, persistent


class DenseSent(NamedTuple):
    """Bytes that a rank sends in a step, as passes of a ring over its data group.

    Attributes:
        gradients: of each pass over the gradients, of one reduction; there are two where they are all-reduced.
        reductions: of gradients in a step.
        gathers: gatherings of weights in a step for a forward pass, and as many for backward passes; 0: below stage 3.
        forward, backward: weights that one of them sends, for a forward and a backward pass.
        inside: as `backward`, among the ranks of a host (ZeRO++).
        later: as `inside`, for the forward passes after the first one of a step, in place of `forward`.
        after: weights that are gathered after the optimizer.
    """

    gradients: tuple[int, ...]
    reductions: int = 1
    gathers: int = 0
    forward: int = 0
    backward: int = 0
    inside: int = 0
    later: int = 0
    after: int = 0

    def for_forward(self, micro: int) -> tuple[int, int]:
        """Over the ring and inside a host, before the forward pass of a micro-batch."""
        return (0, self.later) if micro and self.later else (self.forward, 0)

    @property
    def over_the_ring(self) -> int:
        """All but `inside`."""
        forward = sum(self.for_forward(micro)[0] for micro in range(self.gathers))
        return self.reductions * sum(self.gradients) + forward + self.gathers * self.backward + self.after

    @property
    def passes(self) -> list[int]:
        """The passes of a step, those inside hosts as well."""
        forward = [sent for micro in range(self.gathers) for sent in self.for_forward(micro)]
        backward = self.gathers * [self.backward, self.inside]
        return [sent for sent in (*self.reductions * self.gradients, *forward, *backward, self.after) if sent]

    @property
    def inside_hosts(self) -> int:
        """What stays in a host."""
        return self.gathers * self.inside + sum(self.for_forward(micro)[1] for micro in range(self.gathers))


NOTHING = DenseSent(gradients=())


def dense_sent(sizes: Sequence[int], zero: Zero) -> DenseSent:
    """What a rank sends in a step.

    Args:
        sizes: elements of every parameter of the rank, in the model's order.
    """
    ranks, total = zero.ranks, sum(sizes)
    if ranks == 1:
        return NOTHING
    if zero.stage < 3:
        one = _share(zero.sent * total, ranks)
        after = zero.width * partition_elements(sizes, zero) * (ranks - 1) if zero.stage else 0
        return DenseSent((one, one), zero.accumulation if zero.stage == 2 else 1, after=after)
    padded = [-(-size // ranks) * ranks for size in sizes]
    stay = persistent(sizes, zero)
    moving = [size for size, stays in zip(padded, stay, strict=True) if not stays]
    again = zero.width * (sum(moving) - _kept(sizes, padded, stay, zero))
    if zero.settings.reduce_scatter:
        gradients: tuple[int, ...] = (_share(zero.sent * sum(padded), ranks),)
    else:
        gradients = 2 * (_share(zero.sent * total, ranks),)
    sharers = min(zero.settings.zero_hpz_partition_size, ranks)
    return DenseSent(
        gradients,
        zero.accumulation,
        gathers=zero.accumulation,
        forward=_share(zero.width * sum(moving), ranks),
        backward=0 if sharers > 1 else _share(again, ranks),
        inside=_share(again, sharers),
        later=_share(zero.width * sum(moving), sharers),
        after=_share(zero.width * (sum(padded) - sum(moving)), ranks),
    )


def _share(size: int, ranks: int) -> int:
    """Of a pass of a ring over so many bytes."""
    return size * (ranks - 1) // ranks


def _kept(sizes: Sequence[int], padded: Sequence[int], stay: Sequence[bool], zero: Zero) -> int:
    """Elements, padded, that are still there when the backward pass needs them (zero/partitioned_param_coordinator.py):
    the last ones of the model, as many as may be live or are needed again soon."""
    ahead = int(zero.settings.max_live_parameters) if zero.settings.prefetch_bucket_size else 0
    room, kept = max(ahead, int(zero.settings.max_reuse_distance) // 2), 0
    for size, padding, stays in reversed(list(zip(sizes, padded, stay, strict=True))):
        room -= size
        if room < 0:
            break
        kept += 0 if stays else padding
    return kept
