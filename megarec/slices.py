"""Slices of global tensors: what a checkpoint consists of, so that reshaping is set arithmetic."""

from dataclasses import dataclass
from math import prod

from torch import Tensor


@dataclass(frozen=True)
class ParameterShard:
    """Where a rank's part of a parameter lies in the whole tensor.

    Attributes:
        shape: of the whole tensor.
        start: global index of the part's first element, by dimension.
    """

    shape: tuple[int, ...]
    start: tuple[int, ...]


def shard_of(parameter: Tensor) -> ParameterShard:
    """The attribute `shard` that tensor parallelism gives its parameters; else the parameter is whole."""
    whole = ParameterShard(tuple(parameter.shape), (0,) * parameter.dim())
    shard: ParameterShard = getattr(parameter, "shard", whole)
    return shard


Ints = tuple[int, ...]


@dataclass(frozen=True)
class TensorSlice:
    """A rectangle of a global tensor that lies on this rank.

    Attributes:
        name: of the global tensor: dense/<parameter>[/<state>], table/<table>/<what>, tower/<parameter>[/<state>].
        shape: of the global tensor.
        start: its index of the rectangle's first element, by dimension.
        tensor: the rectangle itself, live: reading from it saves, copying into it loads.
    """

    name: str
    shape: Ints
    start: Ints
    tensor: Tensor

    @property
    def stop(self) -> Ints:
        return tuple(start + size for start, size in zip(self.start, self.tensor.shape, strict=True))


def rectangles(shape: Ints, first: int, last: int) -> list[tuple[Ints, Ints]]:
    """Elements [first, last) of a tensor in row-major order, as (start, size) of rectangles in that order.

    Each rectangle is contiguous in row-major order, so that it is a view of the flat range: at most 2 n - 1 for n
    dimensions (the end of a row, whole rows, the beginning of a row).
    """
    if first >= last:
        return []
    if not shape:
        return [((), ())]
    inner = prod(shape[1:])
    row, offset = divmod(first, inner)
    last_row, rest = divmod(last, inner)
    if row == last_row:
        return _in_row(shape, row, offset, rest)
    found = []
    if offset:
        found += _in_row(shape, row, offset, inner)
        row += 1
    if row < last_row:
        found.append(((row, *(0 for _ in shape[1:])), (last_row - row, *shape[1:])))
    return found + _in_row(shape, last_row, 0, rest)


def _in_row(shape: Ints, row: int, first: int, last: int) -> list[tuple[Ints, Ints]]:
    return [((row, *start), (1, *size)) for start, size in rectangles(shape[1:], first, last)]


def share_of_range(first: int, last: int, parts: int, part: int) -> tuple[int, int]:
    """One of `parts` nearly equal parts of the range [first, last): what one of several equal holders writes."""
    size = last - first
    return first + size * part // parts, first + size * (part + 1) // parts
