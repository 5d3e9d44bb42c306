"""The tables of one rank: what both backends share, and which backend holds which table."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from megarec.config.sections import EmbeddingConfig
from megarec.embeddings.ids import LocalIds
from megarec.embeddings.layout import EmbeddingLayout
from megarec.embeddings.placement import Shard, replicated
from megarec.embeddings.plans import COLUMN_UNIT
from megarec.embeddings.routes import Slot
from megarec.errors import UserError

State = dict[str, tuple[Shard, Tensor]]
"""By "<table>/<what>": the slice of the global tensor, and the tensor on this rank itself (not a copy)."""


class Tables(Protocol):
    """Shards of one rank in one backend. A backward pass through `forward` updates them, once."""

    def forward(self, ids: LocalIds) -> Tensor:
        """Summed rows float32 [examples, columns of all slots]; with gradients enabled it carries the update."""

    def set_learning_rate(self, rate: float) -> None: ...

    def state(self) -> State:
        """Weights and optimizer state, live; one number a row is a [rows, 1] tensor, one a table [1, 1]."""


@dataclass(frozen=True)
class LocalShard:
    """A shard of this rank and the slots that look it up; they are neighbours, and so are their columns."""

    shard: Shard
    slots: tuple[Slot, ...]

    @property
    def jagged(self) -> bool:
        """Whether a bag may hold any number of ids; else exactly one."""
        return any(slot.source.multi_valued for slot in self.slots)


def group_slots(slots: Sequence[Slot]) -> tuple[LocalShard, ...]:
    """Shards in slot order, each with its slots."""
    shards = dict.fromkeys(slot.shard for slot in slots)
    return tuple(LocalShard(shard, tuple(slot for slot in slots if slot.shard == shard)) for shard in shards)


@dataclass(frozen=True)
class Choice:
    """The backend of a table and why."""

    backend: Literal["fbgemm", "torch"]
    reason: str


def choose_backends(
    layout: EmbeddingLayout, shards: Sequence[Shard], config: EmbeddingConfig, device: torch.device
) -> dict[str, Choice]:
    """The backend of every table.

    Raises:
        UserError: embedding.backend is "fbgemm" and a table cannot be held by it.
    """
    choices = {}
    for table in layout.tables:
        choice = wished_backend([shard for shard in shards if shard.table == table.name], config)
        problem = _fbgemm_problem(device.type) if choice.backend == "fbgemm" else None
        if problem is not None:
            choice = Choice("torch", problem)
        if config.backend == "fbgemm" and choice.backend == "torch":
            raise UserError(f'embedding.backend="fbgemm" cannot hold table {table.name!r}: {choice.reason}; use "auto"')
        choices[table.name] = choice
    return choices


def wished_backend(shards: Sequence[Shard], config: EmbeddingConfig) -> Choice:
    """The backend of a table that is placed as these shards, by the config alone: the same on every rank."""
    if config.backend == "torch":
        return Choice("torch", 'embedding.backend="torch"')
    if replicated(shards):
        return Choice("torch", "a copy on every rank: the gradients of all ranks are summed before its update")
    if config.optimizer == "adam":
        return Choice("torch", "Adam over touched rows, bias-corrected by the global step, is not FBGEMM's")
    if config.optimizer == "rowwise_adagrad" and any(shard.column_start > 0 for shard in shards):
        return Choice("torch", "row-wise Adagrad needs the gradient's whole row, and the table is split by columns")
    odd = [shard.columns for shard in shards if shard.columns % COLUMN_UNIT]
    if odd:
        return Choice("torch", f"FBGEMM wants multiples of {COLUMN_UNIT} columns, not {odd[0]}")
    return Choice("fbgemm", f'embedding.backend="{config.backend}"')


@functools.cache
def _fbgemm_problem(device: str) -> str | None:
    """What in this installation rules FBGEMM out; None: nothing."""
    try:
        import megarec.embeddings.fbgemm_tables  # noqa: F401
    except (ImportError, OSError) as error:
        return f"fbgemm_gpu cannot be imported ({' '.join(str(error).split())})"
    if device == "cuda" and not torch._C._dispatch_has_kernel_for_dispatch_key("fbgemm::bounds_check_indices", "CUDA"):
        return "fbgemm_gpu is installed without CUDA (fbgemm-gpu-cpu); install fbgemm-gpu instead"
    return None
