"""Tables of one rank: which backend holds which table and why, and the record of touched rows."""

import functools
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from megarec.config.sections import EmbeddingConfig
from megarec.distributed.collectives import Channel
from megarec.errors import UserError
from megarec.sparse.layout import EmbeddingLayout
from megarec.sparse.lookups import Lookup
from megarec.sparse.placement import COLUMN_UNIT, Shard, replicated
from megarec.sparse.tables.base import LocalIds, Pooled, State, Tables, group_lookups
from megarec.sparse.tables.initial import fill_initial
from megarec.sparse.tables.torch_backend import ColumnShardSum, ReplicatedTorchTables, TorchTables

FBGEMM_COLUMNS_ON_GPU = 1024
_log = logging.getLogger(__name__)


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
    missing: dict[str, list[str]] = {}  # tables by what keeps FBGEMM from holding them
    for table in layout.tables:
        choice = requested_backend([shard for shard in shards if shard.table == table.name], config)
        if choice.backend == "fbgemm" and (problem := _fbgemm_problem(device.type)) is not None:
            choice = Choice("torch", problem)
            missing.setdefault(problem, []).append(table.name)
        elif choice.backend == "fbgemm" and device.type != "cpu" and table.columns > FBGEMM_COLUMNS_ON_GPU:
            choice = Choice(
                "torch", f"FBGEMM's CUDA kernels take at most {FBGEMM_COLUMNS_ON_GPU} columns, not {table.columns}"
            )
        if config.backend == "fbgemm" and choice.backend == "torch":
            raise UserError(f'embedding.backend="fbgemm" cannot hold table {table.name!r}: {choice.reason}; use "auto"')
        choices[table.name] = choice
    for problem, names in missing.items() if device.type != "cpu" else ():
        _log.warning("SLOW TABLES: %d tables are held by plain torch, because %s", len(names), problem)
    return choices


def requested_backend(shards: Sequence[Shard], config: EmbeddingConfig) -> Choice:
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
        import megarec.sparse.tables.fbgemm_backend  # noqa: F401
    except (ImportError, OSError) as error:
        return f"fbgemm_gpu cannot be imported ({' '.join(str(error).split())})"
    if device == "cuda" and not torch._C._dispatch_has_kernel_for_dispatch_key("fbgemm::bounds_check_indices", "CUDA"):
        return "fbgemm_gpu is installed without CUDA (fbgemm-gpu-cpu); install fbgemm-gpu instead"
    return None


class LocalTables:
    """The shards of this rank; its slots are in the order of the output's columns.

    Args:
        slots: of this rank.
        shards: of all ranks.
        replicated: whether every rank of the channel holds these tables whole.
    """

    def __init__(
        self,
        slots: Sequence[Lookup],
        layout: EmbeddingLayout,
        shards: Sequence[Shard],
        choices: dict[str, Choice],
        config: EmbeddingConfig,
        channel: Channel,
        device: torch.device,
        *,
        replicated: bool = False,
    ) -> None:
        self._layout, self.replicated = layout, replicated
        local = group_lookups(slots)
        fused = [part for part in local if choices[part.shard.table].backend == "fbgemm"]
        plain = [part for part in local if choices[part.shard.table].backend == "torch"]
        self._groups: list[tuple[int, Tables]] = []  # (slots, tables), in slot order: the routes put FBGEMM's first
        if fused:
            from megarec.sparse.tables.fbgemm_backend import FbgemmTables  # takes a second and may not be installed

            self._groups.append((sum(len(part.slots) for part in fused), FbgemmTables(fused, config, device)))
        # Row-wise Adagrad over column slices needs every rank in its exchange, one without such slices as well.
        split = config.optimizer == "rowwise_adagrad" and any(shard.column_start > 0 for shard in shards)
        if replicated:
            assert not fused and not split
            columns = [part.shard.columns for part in plain]
            self._groups.append(
                (len(slots), ReplicatedTorchTables(plain, columns, config, device, channel, self._mark))
            )
        elif plain or split or not fused:
            owners = ColumnShardSum([part.shard for part in plain], shards, channel, device)
            columns = [layout.table(part.shard.table).columns for part in plain]
            tables = TorchTables(plain, columns, config, device, owners.sum if split else None)
            self._groups.append((sum(len(part.slots) for part in plain), tables))
        rows = [part.shard.rows for part in local]
        flags = torch.zeros(sum(rows), dtype=torch.bool, device=device)  # one buffer: a step marks all its rows at once
        self._flags = flags
        self._touched = {part.shard: view.unsqueeze(1) for part, view in zip(local, flags.split(rows), strict=True)}
        first_row = {part.shard: sum(rows[:index]) for index, part in enumerate(local)}
        self._first_rows = torch.tensor([first_row[slot.shard] for slot in slots], dtype=torch.int64, device=device)

    def fill(self, seed: int, std: float | None) -> None:
        """Initial weights (initial.py)."""
        for name, (shard, tensor) in self.state().items():
            if name == f"{shard.table}/weight":
                fill_initial(tensor, shard, self._layout.table(shard.table), seed, std)

    def pool(self, ids: LocalIds) -> Pooled:
        """Summed rows of every bag, contiguous [examples, columns of all slots]."""
        parts = []
        first = 0
        for slots, tables in self._groups:
            parts.append(tables.pool(ids.part(first, first + slots)))
            first += slots
        columns = [part.values.shape[1] for part in parts]

        def update(gradient: Tensor) -> None:
            if not self.replicated:  # else in the update itself, which knows all ranks' rows
                self._touch(ids)  # with the update: a step that is skipped touches nothing
            for part, own in zip(parts, gradient.split(columns, dim=1), strict=True):
                part.update(own)

        return Pooled(parts[0].values if len(parts) == 1 else torch.cat([part.values for part in parts], dim=1), update)

    def set_learning_rate(self, rate: float) -> None:
        for _, tables in self._groups:
            tables.set_learning_rate(rate)

    def row_usage(self) -> dict[str, float]:
        """Share of the rows that updates have touched, by table."""
        if not self._touched:
            return {}
        counts = torch.stack([touched.sum() for touched in self._touched.values()]).tolist()  # one wait for all tables
        return {shard.table: count / shard.rows for shard, count in zip(self._touched, counts, strict=True)}

    def state(self) -> State:
        named: State = {f"{shard.table}/touched": (shard.per_row, touched) for shard, touched in self._touched.items()}
        for _, tables in self._groups:
            named |= tables.state()
        return named

    def _touch(self, ids: LocalIds) -> None:
        first_rows = self._first_rows.repeat_interleave(ids.counts_on_device(), output_size=ids.values.numel())
        self._mark(first_rows.add_(ids.values))

    def _mark(self, rows: Tensor) -> None:
        """Rows as touched, counted over all shards in their order."""
        self._flags.index_fill_(0, rows, True)
