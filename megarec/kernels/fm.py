"""Triton kernels around the factorization machine: FM and its LayerNorm in one, and the gradient of W.

Sums are float32, in a fixed order. models/fused_fm.py calls them.
"""

import triton
import triton.language as tl

_ELEMENTS = 8192  # of a tile of sums: 64 registers a thread of 128
FLAT = 1024  # elements that are normalised at a time


@triton.jit
def fm_norm_kernel(
    x: tl.tensor,
    y: tl.tensor,
    weight: tl.tensor,
    bias: tl.tensor,
    fm: tl.tensor,
    output: tl.tensor,
    means: tl.tensor,
    rstds: tl.tensor,
    eps: tl.tensor,
    N: tl.constexpr,
    K: tl.constexpr,
    D: tl.constexpr,
    BIAS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    FLAT: tl.constexpr,
) -> None:
    """FM [N, K] of one example, its mean and 1 / standard deviation, and the normalised FM. Grid: examples."""
    example = tl.program_id(0).to(tl.int64)
    x += example * (N * D)
    y += example * (K * D)
    fm += example * (N * K)
    output += example * (N * K)
    depth = tl.arange(0, DEPTH)
    count, mean, squares = 0.0, 0.0, 0.0  # of the elements so far; squares of their deviations from the mean
    for first_row in range(0, N, ROWS):
        row = first_row + tl.arange(0, ROWS)
        for first_column in range(0, K, COLUMNS):
            column = first_column + tl.arange(0, COLUMNS)
            product = tl.zeros([ROWS, COLUMNS], tl.float32)
            for first in range(0, D, DEPTH):
                d = first + depth
                x_tile = tl.load(x + row[:, None] * D + d[None, :], (row < N)[:, None] & (d < D)[None, :], other=0.0)
                y_tile = tl.load(
                    y + column[None, :] * D + d[:, None], (column < K)[None, :] & (d < D)[:, None], other=0.0
                )
                product = tl.dot(x_tile, y_tile, product, input_precision="ieee")
            inside = (row < N)[:, None] & (column < K)[None, :]
            rounded = product.to(fm.dtype.element_ty)
            tl.store(fm + row[:, None] * K + column[None, :], rounded, inside)
            # Chan, Golub, LeVeque: the deviations of two parts from their common mean.
            value = rounded.to(tl.float32)
            new = (min(ROWS, N - first_row) * min(COLUMNS, K - first_column)) * 1.0
            new_mean = tl.sum(tl.sum(value, axis=1), axis=0) / new  # what lies outside is zero
            deviation = tl.where(inside, value - new_mean, 0.0)
            apart = new_mean - mean
            both = count + new
            squares += tl.sum(tl.sum(deviation * deviation, axis=1), axis=0) + apart * apart * (count * new / both)
            mean += apart * (new / both)
            count = both
    rstd = 1.0 / tl.sqrt(squares / (N * K) + eps)
    tl.store(means + example, mean)
    tl.store(rstds + example, rstd)
    tl.debug_barrier()  # other threads of the program wrote what is read here
    for first in range(0, N * K, FLAT):
        place = first + tl.arange(0, FLAT)
        value = tl.load(fm + place, place < N * K, other=0.0).to(tl.float32)
        normal = (value - mean) * rstd * tl.load(weight + place, place < N * K, other=0.0).to(tl.float32)
        if BIAS:
            normal += tl.load(bias + place, place < N * K, other=0.0).to(tl.float32)
        tl.store(output + place, normal.to(output.dtype.element_ty), place < N * K)


@triton.jit
def weight_gradient_kernel(
    dp: tl.tensor,
    x: tl.tensor,
    sums: tl.tensor,
    examples: tl.tensor,
    in_group: tl.tensor,
    O: tl.constexpr,  # noqa: E741
    N: tl.constexpr,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
) -> None:
    """A tile of the sum of dP X^T over a group of examples, float32 [G, O, N]. Grid: tiles of N, tiles of O, G."""
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    group = tl.program_id(2)
    depth = tl.arange(0, DEPTH)
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for nth in range(group * in_group, min(group * in_group + in_group, examples)):
        example = tl.cast(nth, tl.int64)
        for first in range(0, D, DEPTH):
            d = first + depth
            dp_tile = tl.load(
                dp + example * (O * D) + row[:, None] * D + d[None, :],
                (row < O)[:, None] & (d < D)[None, :],
                other=0.0,
            )
            x_tile = tl.load(
                x + example * (N * D) + column[None, :] * D + d[:, None],
                (column < N)[None, :] & (d < D)[:, None],
                other=0.0,
            )
            total = tl.dot(dp_tile, x_tile, total, input_precision="ieee")
    place = (tl.cast(group, tl.int64) * O + row[:, None]) * N + column[None, :]
    tl.store(sums + place, total, (row < O)[:, None] & (column < N)[None, :])


def tile(rows: int, columns: int, depth: int) -> dict[str, int]:
    """The sides of a tile of sums of rows x columns, and how much of the inner dimension is read at a time."""
    wide = min(128, max(16, triton.next_power_of_2(columns)))
    high = min(128, _ELEMENTS // wide, max(16, triton.next_power_of_2(rows)))
    return {"ROWS": high, "COLUMNS": wide, "DEPTH": 16 if depth % 32 else 32}
