"""First weights of a dense model: a function of (seed, parameter name, place in the whole tensor), nothing else.

So any shard of a model, on any topology, starts from the numbers that one unsharded process starts from, and a model
too large for a machine can be built on the meta device and filled shard by shard.
"""

import hashlib
import itertools
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor, nn

from megarec.models.norms import start_statistics
from megarec.slices import shard_of

TILE = 256, 1024  # rows, columns of the whole tensor that are drawn together: another value gives other weights


def draw_normal_(weight: Tensor, std: float) -> None:
    """Draw a weight [rows, columns], and remember its standard deviation for `initialize`."""
    if not weight.is_meta:  # torch is slow where there is nothing to draw
        nn.init.normal_(weight, std=std)
    weight.initial_std = std  # type: ignore[attr-defined]


def materialize(module: nn.Module, device: torch.device) -> None:
    """Give every parameter on the meta device memory on `device`; keeps its attributes.

    Running statistics start at mean 0 and variance 1.
    """
    for part in module.modules():
        for name, parameter in part.named_parameters(recurse=False):
            if parameter.is_meta:
                setattr(part, name, with_memory(parameter, device, parameter.dtype))
    start_statistics(module, device)


def with_memory(parameter: nn.Parameter, device: torch.device, dtype: torch.dtype) -> nn.Parameter:
    """An uninitialised parameter on `device` in place of one on the meta device; keeps its attributes."""
    real = nn.Parameter(torch.empty_like(parameter, device=device, dtype=dtype), parameter.requires_grad)
    real.__dict__.update(parameter.__dict__)
    return real


def initialize(model: nn.Module, seed: int) -> None:
    """Set every parameter to its initial value; see `fill_initial`."""
    for name, parameter in model.named_parameters():
        fill_initial(parameter, name, seed)


@torch.no_grad()
def fill_initial(parameter: Tensor, name: str, seed: int) -> None:
    """Set the rank's part of one parameter.

    Weights that `draw_normal_` drew are normal with that standard deviation; the others are constants: 1 for the
    weight of a normalisation, 0 for every bias. Only the tiles that a shard overlaps are drawn, on all of this
    process's threads: a rank of a large model has billions of weights.
    """
    std = getattr(parameter, "initial_std", None)
    if std is None:
        parameter.fill_(1.0 if name.rpartition(".")[2] == "weight" else 0.0)
        return
    shard = shard_of(parameter)
    values = parameter.detach()  # threads do not inherit no_grad

    def fill(tile: tuple[int, int]) -> None:
        (target_rows, tile_rows), (target_columns, tile_columns) = map(_overlap, tile, TILE, shard.start, values.shape)
        drawn = _draw(f"{seed}/{name}/{tile[0]}/{tile[1]}", std, tile, shard.shape)
        values[target_rows, target_columns].copy_(drawn[tile_rows, tile_columns])

    with ThreadPoolExecutor(torch.get_num_threads()) as threads:
        for _ in threads.map(fill, _tiles(shard.start, values.shape)):
            pass


def _tiles(start: tuple[int, ...], sizes: torch.Size) -> Iterator[tuple[int, int]]:
    """(tile row, tile column) of every tile that a part of `sizes` overlaps."""
    rows, columns = (
        range(first // side, -(-(first + size) // side)) for first, size, side in zip(start, sizes, TILE, strict=True)
    )
    return itertools.product(rows, columns)


def _overlap(index: int, side: int, start: int, size: int) -> tuple[slice, slice]:
    """In one dimension: the range of the part [start, start + size) that tile `index` fills, and the tile's."""
    first, last = max(index * side, start), min((index + 1) * side, start + size)
    return slice(first - start, last - start), slice(first - index * side, last - index * side)


def _draw(key: str, std: float, tile: tuple[int, int], shape: tuple[int, ...]) -> Tensor:
    """One tile of a whole tensor of `shape`, cut off at its end; float32 on the CPU."""
    digest = hashlib.blake2b(key.encode(), digest_size=7).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "big"))
    rows, columns = (min(side, size - index * side) for index, side, size in zip(tile, TILE, shape, strict=True))
    return torch.empty(rows, columns).normal_(0.0, std, generator=generator)
