"""Tables and tower modules as slices of global tensors."""

from collections.abc import Iterable
from typing import Literal

import torch

from megarec.distributed.topology import Topology
from megarec.slices import Ints, TensorSlice
from megarec.sparse.layout import EmbeddingLayout
from megarec.sparse.placement import Shard
from megarec.sparse.side import SparseSide
from megarec.sparse.towers.replicas import TowerReplicas

TABLES, TOWERS = "table/", "tower/"
Per = Literal["element", "row", "table"]


def tables_held(sparse: SparseSide, layout: EmbeddingLayout) -> list[TensorSlice]:
    """Every slice of a table, of its optimizer's state and of its record of touched rows on this rank."""
    tables = {table.name: table for table in layout.tables}
    pieces = []
    for name, (shard, tensor) in sparse.state().items():
        table = tables[shard.table]
        shapes = {"element": (table.rows, table.columns), "row": (table.rows, 1), "table": (1, 1)}
        shape = shapes[_one_number_per(name, shard, sparse.shards)]
        pieces.append(TensorSlice(TABLES + name, shape, (shard.row_start, shard.column_start), tensor.detach()))
    return pieces


def tables_written(sparse: SparseSide, layout: EmbeddingLayout, topology: Topology) -> list[TensorSlice]:
    """Those that this rank writes: of equal slices on several ranks (copies; one number a row of a table that is
    split by columns), the first rank's."""
    pieces = []
    for piece, (name, (shard, _)) in zip(tables_held(sparse, layout), sparse.state().items(), strict=True):
        per = _one_number_per(name, shard, sparse.shards)
        ranks = [s.rank for s in sparse.shards if s.table == shard.table and _cells(s, per) == _cells(shard, "element")]
        if min(ranks) == topology.rank:
            pieces.append(piece)
    return pieces


def _one_number_per(name: str, shard: Shard, shards: Iterable[Shard]) -> Per:
    """What a state called <table>/<what> has one number for, given the slice of it that a rank holds."""
    if name == f"{shard.table}/steps":
        return "table"
    whole = any(other.table == shard.table and _cells(other, "element") == _cells(shard, "element") for other in shards)
    return "element" if whole else "row"


def _cells(shard: Shard, per: Per) -> Ints:
    """The slice of a state that goes with a table's slice."""
    own = {"element": shard, "row": shard.per_row, "table": shard.per_table}[per]
    return own.row_start, own.row_stop, own.column_start, own.column_stop


def towers_held(modules: TowerReplicas) -> list[TensorSlice]:
    """Parameters of the tower modules on this rank and their optimizer's states; each is whole."""
    state = {name: torch.as_tensor(tensor) for name, tensor in modules.state_dict().items()}
    return [TensorSlice(TOWERS + name, tuple(t.shape), (0,) * t.dim(), t) for name, t in state.items()]


def towers_written(modules: TowerReplicas, topology: Topology, exchange: str) -> list[TensorSlice]:
    """Those that this rank writes: its first replica's."""
    first = topology.local_rank == 0 if exchange == "tower" else topology.rank == 0
    return towers_held(modules) if first else []
