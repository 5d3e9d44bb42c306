"""The local shuffle on an accelerator: one kernel each way (kernels/regroup.py) in the place of copies and casts."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from megarec.kernels.launch import launch

WIDEST_UNIT = 64  # columns that a kernel takes at a time: 128 bytes in 16 bits
_TILE = 2048  # numbers of a program


class FusedRegroup:
    """What `regroup.Regroup` does with its columns.

    Args:
        columns: by sender.
        pieces: (sender, first column in its block, columns, row of the divisors or -1), in the order of the result.
    """

    def __init__(
        self, columns: Sequence[int], pieces: Sequence[tuple[int, int, int, int]], device: torch.device
    ) -> None:
        from megarec.kernels.regroup import shuffle  # imports triton, which is not everywhere

        self._kernel = shuffle
        self._width = sum(columns)
        self._unit = math.gcd(*columns, *(number for _, offset, own, _ in pieces for number in (offset, own)))
        self._unit = math.gcd(self._unit, WIDEST_UNIT)
        unit = self._unit
        before = [sum(columns[:sender]) // unit for sender in range(len(columns))]
        units = [(sender, offset // unit + n, row) for sender, offset, own, row in pieces for n in range(own // unit)]
        self._mean = any(row >= 0 for _, _, row in units)
        self._units = len(units)
        self._before, self._widths, self._offsets = (
            torch.tensor(numbers, dtype=torch.int64, device=device)
            for numbers in (
                [before[sender] for sender, _, _ in units],
                [columns[sender] // unit for sender, _, _ in units],
                [offset for _, offset, _ in units],
            )
        )
        self._divisor_of = torch.tensor([row for _, _, row in units], dtype=torch.int32, device=device)

    def assemble(self, blocks: Tensor, divisors: Tensor | None, size: int, dtype: torch.dtype) -> Tensor:
        """[sum over senders of B x columns(sender)] -> [B, columns of all], in that type."""
        values = torch.empty(size, self._width, dtype=dtype, device=blocks.device)
        self._shuffle(blocks, values, blocks, divisors, size, 1.0, to_blocks=False)
        return values

    def scatter(
        self, gradient: Tensor, divisors: Tensor | None, size: int, dtype: torch.dtype, divide: int
    ) -> tuple[Tensor, Tensor]:
        """The gradient of `assemble`, divided by a number besides, in that type, and the sum of `gradient`."""
        if gradient.stride(1) != 1:
            gradient = gradient.contiguous()
        blocks = torch.empty(size * self._width, dtype=dtype, device=gradient.device)
        sums = torch.zeros(self._programs(size), device=gradient.device)
        self._shuffle(blocks, gradient, sums, divisors, size, float(divide), to_blocks=True)
        return blocks, sums.sum()

    def _tile(self) -> tuple[int, int]:
        """Examples and units of a program."""
        units = min(max(1, 256 // self._unit), 1 << (self._units - 1).bit_length())
        return max(1, _TILE // (units * self._unit)), units

    def _programs(self, size: int) -> int:
        examples, units = self._tile()
        return -(-size // examples) * -(-self._units // units)

    def _shuffle(
        self, blocks: Tensor, values: Tensor, sums: Tensor, divisors: Tensor | None, size: int, divide: float,
        *, to_blocks: bool,
    ) -> None:  # fmt: skip
        examples, units = self._tile()
        mean = self._mean and divisors is not None
        launch(
            self._kernel, self._programs(size), blocks, values, sums, self._before, self._widths, self._offsets,
            self._divisor_of, divisors if mean else sums, size, values.stride(0), divide, self._units,
            -(-self._units // units), TO_BLOCKS=to_blocks, MEAN=mean, UNIT=self._unit, UNITS=units,
            EXAMPLES=examples,
        )  # fmt: skip
