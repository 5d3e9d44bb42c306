"""What a rank moves in memory for its tables, given where all tables lie: a step waits for the rank that moves most.

    lookup    ids x (row bytes + 4) of the shards that a rank holds
    update    ids sorted, and the rows that they touch read and written, of each shard
    glue      pooled embeddings and their gradients on the way between tables and messages

Rows of a table are asked for evenly by all examples: a rank that holds half of them gets half of the ids, one that
holds half of the columns gets all of them, as do all that hold other columns. A rank pools what it holds for all
examples: of a table that is split by rows as many columns as if it had it whole. A copy of a replicated table gets the
ids of its own rank alone, but the gradients of all.
"""

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from megarec.config.sections import RunConfig
from megarec.planning import skew
from megarec.planning.roofline import GLUE_BYTES_A_COLUMN, GLUE_BYTES_IN_FP32, SORT_BYTES_AN_ID
from megarec.planning.traffic import mean_ids, touched_rows
from megarec.run.spec import ModelSpec
from megarec.sparse.placement import Shard, replicated
from megarec.sparse.tables.optimizers import table_bytes

ID_BYTES = 4


class Load(NamedTuple):
    """Bytes that a rank moves in a step for the tables that it holds.

    Attributes:
        skewed: the update, of ids that follow a power law over the rows (skew.py); `update`: spread evenly over them.
        glue: half of roofline.py's for a column of an example; the other half is on the side of the dense model.
    """

    lookup: float
    update: float
    skewed: float
    glue: float


class _Asked(NamedTuple):
    """Of a table in a step of all ranks: ids, rows that they touch, features that pool their rows."""

    rows: int
    ids: float
    touched: float
    skewed: float
    pooled: int


def loads(config: RunConfig, spec: ModelSpec, shards: Sequence[Shard], ranks: int) -> list[Load]:
    """By rank.

    Args:
        shards: of all ranks; of replicated tables some copies are enough, since all ranks have the same of them.
    """
    asked, examples = _asked(config, spec), config.data.batch_size
    element = 2 if config.embedding.weights == "fp16" else 4
    glue = (GLUE_BYTES_IN_FP32 if "fp32" in config.parallel.messages else GLUE_BYTES_A_COLUMN) // 2
    row_bytes: dict[tuple[str, int], int] = {}  # read and written of a row: weights and optimizer states
    for shard in shards:
        if (shard.table, shard.columns) not in row_bytes:
            one = Shard(shard.table, 0, 0, 1, 0, shard.columns)
            row_bytes[shard.table, shard.columns] = 2 * table_bytes([one], config.embedding)

    def load(shard: Shard, ids: float, share: float, pooled: float) -> Load:
        table, moved = asked[shard.table], row_bytes[shard.table, shard.columns]
        lookup, sorting = ids * (shard.columns * element + ID_BYTES), ids * SORT_BYTES_AN_ID
        return Load(
            lookup,
            sorting + share * table.touched * moved,
            sorting + share * table.skewed * moved,
            glue * shard.columns * table.pooled * pooled,
        )

    names = replicated(shards)
    copies = Counter(shard.table for shard in shards if shard.table in names)
    found = [[0.0] * ranks for _ in Load._fields]
    for shard in shards:
        if shard.table not in names:
            share = shard.rows / asked[shard.table].rows
            for totals, size in zip(found, load(shard, share * asked[shard.table].ids, share, examples), strict=True):
                totals[shard.rank] += size
    for name, shard in {shard.table: shard for shard in shards if shard.table in names}.items():
        of = max(ranks, copies[name])
        own = load(shard, asked[name].ids / of, 1.0, examples / of)
        found = [[total + size for total in totals] for totals, size in zip(found, own, strict=True)]
    return [Load(*rank) for rank in zip(*found, strict=True)]


def _asked(config: RunConfig, spec: ModelSpec) -> dict[str, _Asked]:
    found = {}
    for table in spec.layout.tables:
        own = [feature for feature in spec.layout.looked_up if feature.table == table.name]
        ids = sum(mean_ids(feature, config.data.batch_size) for feature in own)
        touched = (
            (float(table.rows), float(table.rows))
            if config.embedding.rule_of(table.name).all_rows
            else (touched_rows(table.rows, ids), skew.touched_rows(table.rows, ids))
        )
        found[table.name] = _Asked(table.rows, ids, *touched, pooled=len(own))
    return found
