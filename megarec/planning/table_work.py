"""What a CPU does for the tables of a rank, counted by the code of sparse/, given where all tables lie.

On an accelerator the bytes of table_loads.py say what tables cost. On a CPU the code that moves them does: FBGEMM's
loops, or torch's operations one after another, a sort of every id among them, and copies where several kinds of tables
meet in a rank. A kind of work is counted in

    start       its calls
    bag         lists that are pooled; of a copy, runs of neighbouring numbers
    id          ids
    cell        ids x columns: rows read by a lookup, gradients read by an update; of a copy, its numbers
    row         rows that an update changes
    row_cell    these rows x columns

and costs of each are figures of the machine (`table_ns`), which `plan --measure` fits on tables of one kind at a time.

    ids                 lists joined by the rank that sends them, and by the one that receives them
    split               ids of a table that is split by rows: sorted by owner, on the rank whose examples they are
    fbgemm, torch       lookup and update by backend (sparse/tables/local.py): whole tables and those split by rows are
                        FBGEMM's, columns under row-wise Adagrad and replicated tables torch's
    copy                what is put together or taken apart in a rank: columns of both backends, of tables split by rows
                        and whole ones, sums over ranks
    assemble, scatter   columns of all senders put into the order of the layout, and their gradients taken from there,
                        one operation a slot
"""

from collections.abc import Collection, Sequence
from typing import Literal, NamedTuple

from megarec.config.sections import RunConfig
from megarec.planning.hardware import Costs, Hardware, TableKind
from megarec.planning.traffic import mean_ids, touched_rows
from megarec.run.spec import ModelSpec
from megarec.sparse.placement import Shard, replicated, split_by_rows
from megarec.sparse.tables.local import requested_backend

Part = Literal["ids", "lookup", "back", "update"]
PARTS: tuple[Part, ...] = ("ids", "lookup", "back", "update")
Backend = Literal["fbgemm", "torch"]


class Counts(NamedTuple):
    """Of a kind of work."""

    start: float = 0
    bag: float = 0
    id: float = 0
    cell: float = 0
    row: float = 0
    row_cell: float = 0

    def seconds(self, costs: Costs) -> float:
        """At the costs of a machine."""
        return 1e-9 * sum(count * float(getattr(costs, name)) for name, count in self._asdict().items())


RankWork = dict[tuple[Part, TableKind], Counts]


class _Asked(NamedTuple):
    """Of a table in a step of all ranks: features that pool its rows, how many of them are lists, ids, rows updated."""

    features: int
    lists: int
    ids: float
    touched: float


class _Held(NamedTuple):
    """A shard of a rank, and what of its table's ids and rows falls on it."""

    shard: Shard
    backend: Backend
    by_rows: bool
    asked: _Asked
    ids: float
    touched: float

    @property
    def columns(self) -> int:
        """That it adds to an example."""
        return self.shard.columns * self.asked.features


class _Job(NamedTuple):
    """What is the same for all ranks.

    Attributes:
        examples: of all ranks; `own` of one.
        split: tables that are split by rows.
        whole: whether others travel as well.
        columns, pieces: of the matrix that all slots are put into.
        lists, ids: that a rank sends.
    """

    ranks: int
    examples: int
    split: list[_Asked]
    whole: bool
    columns: int
    pieces: int
    lists: float
    ids: float

    @property
    def own(self) -> float:
        return self.examples / self.ranks


def part_seconds(work: Sequence[RankWork], hardware: Hardware) -> dict[Part, float]:
    """By part, of the rank that takes longest: the others wait for it. Work whose cost is not known takes none."""
    found = dict.fromkeys(PARTS, 0.0)
    for rank in work:
        found = {part: max(found[part], seconds) for part, seconds in rank_seconds(rank, hardware).items()}
    return found


def rank_seconds(work: RankWork, hardware: Hardware) -> dict[Part, float]:
    """By part, of one rank."""
    assert hardware.table_ns is not None
    costs, found = hardware.table_ns.value, dict.fromkeys(PARTS, 0.0)
    for (part, kind), counts in work.items():
        found[part] += counts.seconds(costs.get(kind, Costs()))
    return found


def table_work(
    config: RunConfig, spec: ModelSpec, shards: Sequence[Shard], ranks: int, kinds: Collection[TableKind]
) -> list[RankWork]:
    """By rank.

    Args:
        shards: of all ranks.
        kinds: of which the machine's costs are known: without FBGEMM's, its tables are torch's.
    """
    asked, names, by_rows = _asked(config, spec), replicated(shards), split_by_rows(shards)
    rows = {table.name: table.rows for table in spec.layout.tables}
    of_table: dict[str, list[Shard]] = {}
    for shard in shards:
        of_table.setdefault(shard.table, []).append(shard)
    unpooled = {feature.table for feature in spec.layout.unpooled}
    backends: dict[str, Backend] = {}
    for name, own in of_table.items():
        chosen = requested_backend(own, config.embedding, "cpu", unpooled=name in unpooled).backend
        backends[name] = "fbgemm" if chosen == "fbgemm" and "fbgemm lookup" in kinds else "torch"
    held: list[list[_Held]] = [[] for _ in range(ranks)]
    copies: list[list[_Held]] = [[] for _ in range(ranks)]
    for shard in shards:
        table, share = asked[shard.table], shard.rows / rows[shard.table]
        if shard.table in names:
            copies[shard.rank].append(_Held(shard, "torch", False, table, table.ids / ranks, table.touched))
        else:
            own_ids = share * table.ids, share * table.touched
            split = shard.table in by_rows
            held[shard.rank].append(_Held(shard, backends[shard.table], split, table, *own_ids))
    spread = [part for rank in held for part in rank]
    examples = config.data.batch_size
    job = _Job(
        ranks=ranks,
        examples=examples,
        split=[asked[name] for name in sorted(by_rows)],
        whole=any(not part.by_rows for part in spread),
        columns=spec.layout.width,
        pieces=len(spread) + max(len(own) for own in copies),
        lists=examples / ranks * sum(_lists(part) for part in spread),
        ids=sum(part.ids for part in spread) / ranks,
    )
    return [_rank_work(job, own, copied) for own, copied in zip(held, copies, strict=True)]


def _lists(part: _Held) -> int:
    return part.asked.features if part.by_rows else part.asked.lists


class _Collector:
    """Sums up counts."""

    def __init__(self) -> None:
        self.work: RankWork = {}

    def add(self, part: Part, kind: TableKind, **counts: float) -> None:
        """To those of a kind of work in a part."""
        before = self.work.get((part, kind), Counts())
        self.work[part, kind] = Counts(*(sum(both) for both in zip(before, Counts(**counts), strict=True)))


def _rank_work(job: _Job, held: Sequence[_Held], copied: Sequence[_Held]) -> RankWork:
    found = _Collector()
    received = sum(part.ids for part in held)
    lists = job.examples * sum(_lists(part) for part in held)
    found.add("ids", "ids", start=1, bag=(job.lists + lists) / 2, id=(job.ids + received) / 2)
    for table in job.split:
        found.add("ids", "split", start=1, id=table.ids / job.ranks, bag=job.own * table.features)
    for backend in ("fbgemm", "torch"):
        _tables(found, job, backend, [part for part in held if part.backend == backend])
    _replicated(found, job, copied)
    _shuffled(found, job, held, copied)
    return found.work


def _tables(found: _Collector, job: _Job, backend: Backend, own: Sequence[_Held]) -> None:
    """Lookup and update of the tables of a backend in a rank: of torch's, a call for each width (stacked.py)."""
    if not own:
        return
    calls = 1 if backend == "fbgemm" else len({part.shard.columns for part in own})
    counts = {
        "start": calls,
        "bag": job.examples * sum(part.asked.features for part in own),
        "id": sum(part.ids for part in own),
        "cell": sum(part.ids * part.shard.columns for part in own),
    }
    rows = {"row": sum(part.touched for part in own), "row_cell": sum(p.touched * p.shard.columns for p in own)}
    looked_up: TableKind = "fbgemm lookup" if backend == "fbgemm" else "torch lookup"
    updated: TableKind = "fbgemm update" if backend == "fbgemm" else "torch update"
    found.add("lookup", looked_up, **counts)
    found.add("update", updated, **counts, **rows)


def _replicated(found: _Collector, job: _Job, copied: Sequence[_Held]) -> None:
    """Own examples alone; a buffer of all rows and a mark of each is zeroed, filled, copied and summed over the ranks;
    then all rows that any rank touched are updated (ReplicatedTorchTables)."""
    if not copied:
        return
    counts = {
        "start": len({part.shard.columns for part in copied}),
        "bag": job.own * sum(part.asked.features for part in copied),
        "id": sum(part.ids for part in copied),
        "cell": sum(part.ids * part.shard.columns for part in copied),
    }
    rows = {"row": sum(part.touched for part in copied), "row_cell": sum(p.touched * p.shard.columns for p in copied)}
    buffer = sum(part.shard.rows * (part.shard.columns + 1) for part in copied)
    found.add("lookup", "torch lookup", **counts)
    found.add("update", "torch update", **counts, **rows)
    found.add("update", "copy", start=4, cell=2 * buffer + 2 * rows["row_cell"])


def _shuffled(found: _Collector, job: _Job, held: Sequence[_Held], copied: Sequence[_Held]) -> None:
    """Columns of all examples put together and taken apart where a rank has several kinds of them, and those of its own
    examples from all senders (sharded.py, group.py, regroup.py)."""
    whole, split = (sum(part.columns for part in held if part.by_rows == by) for by in (False, True))
    same = sum(part.columns for part in copied)
    every, both = job.examples, job.examples * (whole + split)
    if len({part.backend for part in held}) > 1:  # the outputs of both; and their gradients are made contiguous
        found.add("lookup", "copy", start=1, bag=2 * every, cell=both)
        found.add("update", "copy", start=2, bag=2 * every, cell=both)
    if whole and split:
        found.add("lookup", "copy", start=2, bag=3 * every, cell=both)
        found.add("update", "copy", start=1, bag=3 * every, cell=both)
    if split:  # gloo sums a copy of what it scatters
        found.add("lookup", "copy", start=1, cell=every * split)
    found.add("lookup", "copy", start=1, cell=job.own * whole)  # the part of its own examples
    found.add("update", "copy", start=1, cell=job.own * whole)
    placed = {"bag": job.own * job.pieces, "cell": job.own * job.columns}
    found.add("lookup", "assemble", start=1, **placed)
    found.add("back", "scatter", start=job.pieces, **placed)
    if job.split and job.whole:  # sums behind what came from all ranks
        found.add("lookup", "copy", start=1, cell=job.own * (job.columns - same))
    if same:
        found.add("lookup", "copy", start=1, cell=job.own * job.columns)


def _asked(config: RunConfig, spec: ModelSpec) -> dict[str, _Asked]:
    found = {}
    for table in spec.layout.tables:
        own = [feature for feature in spec.layout.looked_up if feature.table == table.name]
        ids = sum(mean_ids(feature, config.data.batch_size) for feature in own)
        all_rows = config.embedding.rule_of(table.name).all_rows
        touched = float(table.rows) if all_rows else touched_rows(table.rows, ids)
        found[table.name] = _Asked(len(own), sum(feature.multi_valued for feature in own), ids, touched)
    return found
