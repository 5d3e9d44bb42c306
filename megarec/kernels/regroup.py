"""One Triton kernel for the local shuffle of the exchange (sparse/exchange/regroup.py), in both directions.

It moves columns, changes their type, divides sums by the lengths of their bags, and adds up what it has seen, all in
one pass: torch would need a pass for each, and several launches for hundreds of features.
"""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["size"])
def shuffle(
    blocks: tl.tensor,
    values: tl.tensor,
    sums: tl.tensor,
    before: tl.tensor,
    widths: tl.tensor,
    offsets: tl.tensor,
    divisor_of: tl.tensor,
    divisors: tl.tensor,
    size: tl.tensor,
    stride: tl.tensor,
    divide: tl.tensor,
    units: tl.tensor,
    unit_blocks: tl.tensor,
    TO_BLOCKS: tl.constexpr,
    MEAN: tl.constexpr,
    UNIT: tl.constexpr,
    UNITS: tl.constexpr,
    EXAMPLES: tl.constexpr,
) -> None:
    """Blocks [sum over senders of size x columns] -> values [size, columns], or with TO_BLOCKS the other way round.

    A unit is `UNIT` neighbouring columns of `values` that also lie together in a sender's block.
    Grid: blocks of examples x blocks of units.

    Args:
        sums: float32, one a program: with TO_BLOCKS the sum of the numbers it read.
        before: int64, by unit: the columns of all senders before its own, counted in units.
        widths: int64, by unit: the columns of its sender, in units.
        offsets: int64, by unit: where it lies in its sender's block, in units.
        divisor_of: int32, by unit: the row of `divisors` that it is divided by; -1: none.
        divisors: float32 [features with mean pooling, size].
        stride: between rows of `values`.
        divide: what all is divided by.
    """
    unit = (tl.program_id(0) % unit_blocks) * UNITS + tl.arange(0, UNITS)
    example = (tl.program_id(0) // unit_blocks).to(tl.int64) * EXAMPLES + tl.arange(0, EXAMPLES)
    known = unit < units
    inside = (example < size)[:, None] & known[None, :]
    column = tl.arange(0, UNIT)[None, None, :]
    place = tl.load(before + unit, known, other=0)[None, :] * size
    place += example[:, None] * tl.load(widths + unit, known, other=0)[None, :]
    place += tl.load(offsets + unit, known, other=0)[None, :]
    in_blocks = blocks + (place[:, :, None] * UNIT + column)
    in_values = values + (example[:, None, None] * stride + unit.to(tl.int64)[None, :, None] * UNIT + column)
    mask = tl.broadcast_to(inside[:, :, None], (EXAMPLES, UNITS, UNIT))
    numbers = tl.load(in_values if TO_BLOCKS else in_blocks, mask, other=0.0).to(tl.float32)
    if TO_BLOCKS:
        tl.store(sums + tl.program_id(0), tl.sum(numbers))
    # As the plain way: first the number, then the length, each rounded as IEEE wants (Triton's `/` is not).
    numbers = tl.div_rn(numbers, divide)
    if MEAN:
        row = tl.load(divisor_of + unit, known, other=-1).to(tl.int64)[None, :]
        divisor = tl.load(divisors + row * size + example[:, None], inside & (row >= 0), other=1.0)
        numbers = tl.div_rn(numbers, divisor[:, :, None])
    tl.store(in_blocks if TO_BLOCKS else in_values, numbers, mask)
