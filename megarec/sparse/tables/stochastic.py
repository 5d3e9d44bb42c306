"""Float32 -> float16, rounded up or down at random: the mean of the result is the input, however small a change.

The random number is a function of (seed, table, step, row, column) of the global table alone, from a counter-based
generator: the same on every rank, placement and backend, and nothing but the step is kept.
"""

import hashlib
import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from megarec.sparse.placement import Shard

_GAMMA, _FIRST, _SECOND = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB  # SplitMix64's


class Rounding:
    """Of the rows of a stack.

    Args:
        shards: of the stack, one after another.
        seed: of the run.
    """

    def __init__(self, shards: Sequence[Shard], seed: int, device: torch.device) -> None:
        stops = list(itertools.accumulate(shard.rows for shard in shards))
        places = [
            (stop, table_key(seed, s.table), s.row_start - stop + s.rows, s.column_start)
            for s, stop in zip(shards, stops, strict=True)
        ]
        self._stops, self._tables, self._row_offsets, self._columns = torch.tensor(places, device=device).T.contiguous()

    def round(self, values: Tensor, rows: Tensor | slice, draw: int) -> Tensor:
        """Float32 weights of rows of the stack -> float16.

        Args:
            draw: which of the stack's roundings it is.
        """
        if isinstance(rows, slice):
            rows = torch.arange(rows.start, rows.stop, device=values.device)
        shard = torch.bucketize(rows, self._stops, right=True)
        columns = self._columns[shard].unsqueeze(1) + torch.arange(values.shape[1], device=values.device)
        return to_half(values, chances(self._tables[shard], draw, rows + self._row_offsets[shard], columns))


def table_key(seed: int, table: str) -> int:
    """Of a table's generator, int64."""
    return int.from_bytes(
        hashlib.blake2b(f"{seed}/{table}/rounding".encode(), digest_size=8).digest(), "big", signed=True
    )


def chances(tables: Tensor, draw: int, rows: Tensor, columns: Tensor) -> Tensor:
    """Float32 numbers in [0, 1), multiples of 2^-24.

    Args:
        tables: int64 [n], `table_key` of every row's table.
        draw: number of the table's rounding; numbers of different draws are independent.
        rows: int64 [n], in the global table.
        columns: int64 [n, c], in the global table.
    """
    of_draw = _mixed(tables + _signed(draw * _GAMMA))
    of_row = _mixed(of_draw + (rows + 1) * _signed(_GAMMA))
    bits = _mixed(of_row.unsqueeze(1) + (columns + 1) * _signed(_GAMMA))
    return _shifted(bits, 40).to(torch.float32).mul_(2.0**-24)


def to_half(values: Tensor, chance: Tensor) -> Tensor:
    """One of the two neighbours in float16 of every float32 number: the further one with a probability of how far the
    number is from the nearer one, in units of their distance."""
    exponent = (values.view(torch.int32) >> 23) & 0xFF
    step = torch.clamp(exponent - 127, min=-14) - 10  # numbers of this size are 2^step apart in float16
    scaled = values.abs() * _power_of_2(-step)
    whole = scaled.floor()
    whole += chance < scaled - whole  # not where it is infinite or NaN
    return (whole * _power_of_2(step)).copysign_(values).to(torch.float16)


def _power_of_2(exponent: Tensor) -> Tensor:
    """Float32, exactly, of int32 exponents of normal numbers."""
    return ((exponent + 127) << 23).view(torch.float32)


def _mixed(bits: Tensor) -> Tensor:
    """SplitMix64's last step: every output bit depends on every input bit."""
    bits = (bits ^ _shifted(bits, 30)) * _signed(_FIRST)
    bits = (bits ^ _shifted(bits, 27)) * _signed(_SECOND)
    return bits ^ _shifted(bits, 31)


def _shifted(bits: Tensor, places: int) -> Tensor:
    """To the right, zeros coming in from the left; an int64's own shift would bring its sign."""
    return (bits >> places) & ((1 << (64 - places)) - 1)


def _signed(bits: int) -> int:
    """As int64, modulo 2^64."""
    return (bits + 2**63) % 2**64 - 2**63
