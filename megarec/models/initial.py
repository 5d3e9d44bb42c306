"""First weights of a dense model: a function of (seed, parameter name, place in the whole tensor), nothing else.

So any shard of a model, on any topology, starts from the numbers that one unsharded process starts from, and a model
that fits no machine can be built on the meta device and filled shard by shard.
"""

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor, nn

ROWS_PER_CHUNK = 64  # part of the definition: another value draws other weights


@dataclass(frozen=True)
class Shard:
    """Where a rank's part of a parameter lies in the whole tensor.

    Attributes:
        shape: of the whole tensor.
        start: global index of the part's first element, by dimension.
    """

    shape: tuple[int, ...]
    start: tuple[int, ...]


def shard_of(parameter: Tensor) -> Shard:
    """The attribute `shard` that tensor parallelism gives its parameters; else the parameter is whole."""
    whole = Shard(tuple(parameter.shape), (0,) * parameter.dim())
    shard: Shard = getattr(parameter, "shard", whole)
    return shard


def draw_normal_(weight: Tensor, std: float) -> None:
    """Draw a weight [rows, columns], and remember its standard deviation for `initialize`."""
    nn.init.normal_(weight, std=std)
    weight.initial_std = std  # type: ignore[attr-defined]


def materialize(module: nn.Module, device: torch.device) -> None:
    """Give every parameter that lies on the meta device memory on `device`; keeps what is remembered about it."""
    for part in module.modules():
        for name, parameter in part.named_parameters(recurse=False):
            if parameter.is_meta:
                setattr(part, name, with_memory(parameter, device, parameter.dtype))


def with_memory(parameter: nn.Parameter, device: torch.device, dtype: torch.dtype) -> nn.Parameter:
    """An uninitialised parameter on `device` in place of one on the meta device; keeps what is remembered about it."""
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
    weight of a normalisation, 0 for every bias.
    """
    std = getattr(parameter, "initial_std", None)
    if std is None:
        parameter.fill_(1.0 if name.rpartition(".")[2] == "weight" else 0.0)
        return
    shard = shard_of(parameter)
    rows, columns = parameter.shape
    first_row, first_column = shard.start
    row = first_row
    while row < first_row + rows:
        chunk, skipped = divmod(row, ROWS_PER_CHUNK)
        values = _chunk(name, seed, std, shard.shape, chunk)[skipped : skipped + first_row + rows - row]
        own = values[:, first_column : first_column + columns]
        parameter[row - first_row : row - first_row + len(own)] = own.to(parameter)
        row += len(own)


def _chunk(name: str, seed: int, std: float, shape: tuple[int, ...], chunk: int) -> Tensor:
    """The rows chunk x ROWS_PER_CHUNK ... of the whole tensor, in all its columns; float32 on the CPU."""
    digest = hashlib.blake2b(f"{seed}/{name}/{chunk}".encode(), digest_size=7).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "big"))
    rows, columns = shape
    drawn = torch.empty(min(ROWS_PER_CHUNK, rows - chunk * ROWS_PER_CHUNK), columns)
    return drawn.normal_(0.0, std, generator=generator)
