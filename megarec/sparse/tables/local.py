"""Tables of one rank: which backend holds which table and why, and the record of touched rows."""

import dataclasses
import functools
import itertools
import logging
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from megarec.config.sections import EmbeddingConfig
from megarec.distributed.collectives import Channel, all_reduce_sum
from megarec.errors import UserError
from megarec.kernels.launch import triton_problem
from megarec.sparse.layout import EmbeddingLayout
from megarec.sparse.lookups import LookupPlan, plan_lookups
from megarec.sparse.placement import COLUMN_UNIT, Shard, replicated
from megarec.sparse.tables.base import LocalIds, LocalShard, Pooled, State, Tables, Unpooled, group_lookups
from megarec.sparse.tables.initial import fill_initial
from megarec.sparse.tables.optimizers import table_bytes
from megarec.sparse.tables.torch_backend import ColumnShardSum, ReplicatedTorchTables, TorchTables

FBGEMM_COLUMNS_ON_GPU = 1024
SMALL_UPDATE = (2**28, 2**33)  # bytes of a rank's whole-table updates: near 0.05 s on a CPU, and 5 ms on a GPU
TRITON_COLUMNS = 8192  # a program holds a row in registers
_log = logging.getLogger(__name__)


Backend = Literal["fbgemm", "triton", "torch"]


@dataclass(frozen=True)
class Choice:
    """The backend of a table and why."""

    backend: Backend
    reason: str


def choose_backends(
    layout: EmbeddingLayout, shards: Sequence[Shard], config: EmbeddingConfig, device: torch.device
) -> dict[str, Choice]:
    """The backend of every table on this machine.

    Raises:
        UserError: embedding.backend names a backend that cannot hold a table, or that does not work here.
    """
    choices = {}
    unpooled = {feature.table for feature in layout.unpooled}
    slow: dict[str, list[str]] = {}  # tables by the reason why neither fast backend can hold them
    for table in layout.tables:
        own = [shard for shard in shards if shard.table == table.name]
        choice = requested_backend(own, config, device.type, unpooled=table.name in unpooled)
        if choice.backend == "fbgemm" and (problem := _fbgemm_problem(device.type)) is not None:
            choice = Choice("torch" if device.type == "cpu" or config.backend == "fbgemm" else "triton", problem)
        if choice.backend == "triton" and (problem := triton_problem(device.type)) is not None:
            reason = problem if config.backend == "triton" else f"{choice.reason}, and {problem}"
            choice = Choice("torch", reason)
            slow.setdefault(reason, []).append(table.name)
        if config.backend in ("fbgemm", "triton") and choice.backend != config.backend:
            raise UserError(
                f'embedding.backend="{config.backend}" cannot hold table {table.name!r}: {choice.reason}; use "auto"'
            )
        choices[table.name] = choice
    for reason, names in slow.items():
        _log.warning("SLOW TABLES: %d tables are held by plain torch, because %s", len(names), reason)
    _warn_of_whole_updates(shards, config, device.type)
    return choices


def _warn_of_whole_updates(shards: Sequence[Shard], config: EmbeddingConfig, device: str) -> None:
    """One line if updates of all rows move enough memory to slow down every step."""
    whole = [shard for shard in shards if config.rule_of(shard.table).all_rows]
    ranks = {shard.rank: [other for other in whole if other.rank == shard.rank] for shard in whole}
    moved = {rank: 2 * table_bytes(own, config) for rank, own in ranks.items()}
    rank = max(moved, key=lambda rank: moved[rank], default=None)
    if rank is None or moved[rank] <= SMALL_UPDATE[device != "cpu"]:
        return
    largest = max(ranks[rank], key=lambda shard: shard.rows * shard.columns)
    _log.warning(
        "WHOLE-TABLE UPDATES: every step reads and writes %.1f GB on rank %d, most of it for %s rows x %d columns of "
        "table %r; L2 with coupled=false touches the rows of a batch alone (docs/regularisation.md)",
        *(moved[rank] / 1e9, rank, f"{largest.rows:,}", largest.columns, largest.table),
    )


def requested_backend(shards: Sequence[Shard], config: EmbeddingConfig, device: str, *, unpooled: bool) -> Choice:
    """The backend of a table that is placed as these shards, by config and type of device: the same on every rank.

    Args:
        unpooled: whether rows of it travel one by one.
    """
    if config.backend == "torch":
        return Choice("torch", 'embedding.backend="torch"')
    if unpooled:
        return Choice("torch", "a sequence looks up its rows one by one: one update has their gradients and the pooled")
    if (own := config.rule_of(shards[0].table).reason) is not None:
        return Choice("torch", f"{own}, which torch's alone can")
    if replicated(shards):
        return Choice("torch", "a copy on every rank: the gradients of all ranks are summed before its update")
    if config.optimizer == "adam":
        return Choice("torch", "Adam over touched rows, bias-corrected by the global step, is torch's alone")
    if config.optimizer == "rowwise_adagrad" and any(shard.column_start > 0 for shard in shards):
        return Choice("torch", "row-wise Adagrad needs the gradient's whole row, and the table is split by columns")
    widest, reason = max(shard.columns for shard in shards), f'embedding.backend="{config.backend}"'
    if config.backend != "triton":
        odd = [shard.columns for shard in shards if shard.columns % COLUMN_UNIT]
        if not odd and (device == "cpu" or widest <= FBGEMM_COLUMNS_ON_GPU):
            return Choice("fbgemm", reason)
        reason = f"FBGEMM's CUDA kernels take at most {FBGEMM_COLUMNS_ON_GPU} columns, not {widest}"
        if odd:
            reason = f"FBGEMM wants multiples of {COLUMN_UNIT} columns, not {odd[0]}"
        if device == "cpu" or config.backend == "fbgemm":
            return Choice("torch", reason)
    if widest > TRITON_COLUMNS:
        return Choice("torch", f"a Triton kernel holds at most {TRITON_COLUMNS} columns, not {widest}")
    return Choice("triton", reason)


def routes_of(
    layout: EmbeddingLayout, shards: Sequence[Shard], config: EmbeddingConfig, ranks: int, device: torch.device
) -> LookupPlan:
    """The routes of tables that are spread over a group."""
    by_table = {table: [s for s in shards if s.table == table] for table in {s.table for s in shards}}
    unpooled = {feature.table for feature in layout.unpooled}
    backends = {
        table: requested_backend(own, config, device.type, unpooled=table in unpooled).backend
        for table, own in by_table.items()
    }
    fused, triton = ([t for t, backend in backends.items() if backend == kind] for kind in ("fbgemm", "triton"))
    return plan_lookups(layout, shards, ranks, fused, triton)


def split_replicated(shards: Sequence[Shard], rank: int) -> tuple[tuple[Shard, ...], tuple[Shard, ...]]:
    """The shards of tables that are spread over a group, and those of replicated ones that a rank has."""
    names = replicated(shards)
    spread = tuple(shard for shard in shards if shard.table not in names)
    return spread, tuple(shard for shard in shards if shard.table in names and shard.rank == rank)


@functools.cache
def _fbgemm_problem(device: str) -> str | None:
    """Why this installation cannot use FBGEMM; None: it can."""
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
        plan: the routes; this rank is that of the channel.
        shards: of all ranks.
        replicated: whether every rank of the channel holds these tables whole.
        output: the type in which summed rows are asked for; a backend may emit float32 instead.
    """

    def __init__(
        self,
        plan: LookupPlan,
        layout: EmbeddingLayout,
        shards: Sequence[Shard],
        choices: dict[str, Choice],
        config: EmbeddingConfig,
        channel: Channel,
        device: torch.device,
        *,
        replicated: bool = False,
        output: torch.dtype = torch.float32,
    ) -> None:
        self._layout, self.replicated = layout, replicated
        slots, self._unpooled = plan.slots[channel.rank], plan.unpooled[channel.rank]
        local = group_lookups(slots, plan.shards[channel.rank])
        # Row-wise Adagrad over column slices needs every rank in its exchange, one without such slices as well.
        split = config.optimizer == "rowwise_adagrad" and any(shard.column_start > 0 for shard in shards)
        self._groups: list[tuple[int, Tables]] = []  # (slots, tables), in slot order
        made = set()
        for backend, group in itertools.groupby(local, key=lambda part: choices[part.shard.table].backend):
            parts = list(group)
            count = sum(len(part.slots) for part in parts)
            made.add(backend)
            if backend == "fbgemm":
                from megarec.sparse.tables.fbgemm_backend import FbgemmTables  # takes a second, may not be installed

                self._groups.append((count, FbgemmTables(parts, config, device)))
            elif backend == "triton":
                from megarec.sparse.tables.triton_backend import TritonTables  # may not be installed

                self._groups.append((count, TritonTables(parts, config, device, output)))
            else:
                self._groups.append((count, self._torch_tables(parts, shards, config, channel, device, split=split)))
        if not local or (split and "torch" not in made):
            self._groups.append((0, self._torch_tables([], shards, config, channel, device, split=split)))
        self._in_torch = [tables for _, tables in self._groups if isinstance(tables, TorchTables)]
        self._std_of = config.initial_std_of
        rows = [part.shard.rows for part in local]
        flags = torch.zeros(sum(rows), dtype=torch.bool, device=device)  # one buffer: a step marks all its rows at once
        self._flags = flags
        self._touched = {part.shard: view.unsqueeze(1) for part, view in zip(local, flags.split(rows), strict=True)}
        first_row = {part.shard: sum(rows[:index]) for index, part in enumerate(local)}
        self._first_rows, self._first_unpooled = (
            torch.tensor([first_row[slot.shard] for slot in own], dtype=torch.int64, device=device)
            for own in (slots, self._unpooled)
        )

    def _torch_tables(
        self,
        parts: Sequence[LocalShard],
        shards: Sequence[Shard],
        config: EmbeddingConfig,
        channel: Channel,
        device: torch.device,
        *,
        split: bool,
    ) -> Tables:
        """A rank's only group of such tables: the routes keep them together (lookups.py)."""
        columns = [self._layout.table(part.shard.table).columns for part in parts]
        if self.replicated:
            assert not split
            return ReplicatedTorchTables(parts, columns, config, device, channel, self._mark, self._unpooled)
        owners = ColumnShardSum([part.shard for part in parts], shards, channel, device)
        total = functools.partial(all_reduce_sum, channel=channel, purpose="table norm", direction="backward")
        return TorchTables(parts, columns, config, device, owners.sum if split else None, self._unpooled, total)

    def fill(self, seed: int) -> None:
        """Initial weights (initial.py)."""
        for tables in self._in_torch:
            tables.start(seed)
        for name, (shard, tensor) in self.state().items():
            if name == f"{shard.table}/weight":
                fill_initial(tensor, shard, self._layout.table(shard.table), seed, self._std_of(shard.table))

    def pool(self, ids: LocalIds) -> Pooled:
        """Summed rows of every bag, contiguous [examples, columns of all slots]."""
        parts = []
        first = 0
        for slots, tables in self._groups:
            own = ids.part(first, first + slots)
            if ids.unpooled is not None and isinstance(tables, TorchTables):
                own = dataclasses.replace(own, unpooled=ids.unpooled)
            parts.append(tables.pool(own))
            first += slots
        columns = [part.values.shape[1] for part in parts]

        def update(gradient: Tensor) -> None:
            if not self.replicated:  # else in the update itself, which knows all ranks' rows
                self._touch(ids, self._first_rows)  # with the update: a step that is skipped touches nothing
                if ids.unpooled is not None:
                    self._touch(ids.unpooled.ids, self._first_unpooled)
            for part, own in zip(parts, gradient.split(columns, dim=1), strict=True):
                part.update(own)

        shown = [part.values for part, width in zip(parts, columns, strict=True) if width] or [parts[0].values]
        return Pooled(shown[0] if len(shown) == 1 else torch.cat(shown, dim=1), update)

    def rows_of(self, unpooled: Unpooled) -> list[Tensor]:
        """The rows of every unpooled slot, float32 [ids, columns]; `update` of what `pool` returns takes their
        gradients as well."""
        holders = [tables for _, tables in self._groups if isinstance(tables, TorchTables)]
        return holders[0].rows_of(unpooled) if holders else []

    def set_learning_rate(self, rate: float) -> None:
        for _, tables in self._groups:
            tables.set_learning_rate(rate)

    def row_usage(self) -> dict[str, float]:
        """Share of the rows that updates have touched, by table."""
        if not self._touched:
            return {}
        counts = torch.stack([touched.sum() for touched in self._touched.values()]).tolist()  # one wait for all tables
        return {shard.table: count / shard.rows for shard, count in zip(self._touched, counts, strict=True)}

    def settle(self, names: Collection[str] | None = None) -> None:
        """Apply pending decay: of these tables, or of all."""
        for tables in self._in_torch:
            tables.settle(names)

    def memory_bytes(self) -> int:
        """Weights, optimizer state, and what is kept beside them."""
        state = sum(tensor.nbytes for _, tensor in self.state().values())
        return state + sum(tables.decay_bytes for tables in self._in_torch)

    def state(self) -> State:
        named: State = {f"{shard.table}/touched": (shard.per_row, touched) for shard, touched in self._touched.items()}
        for _, tables in self._groups:
            named |= tables.state()
        return named

    def _touch(self, ids: LocalIds, first_rows: Tensor) -> None:
        first_rows = first_rows.repeat_interleave(ids.counts_on_device(), output_size=ids.values.numel())
        self._mark(first_rows.add_(ids.values))

    def _mark(self, rows: Tensor) -> None:
        """Rows as touched, counted over all shards in their order."""
        self._flags.index_fill_(0, rows, True)
