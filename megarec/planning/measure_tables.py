"""What work on tables costs on a CPU, by what is counted of it (table_work.py): fitted on tables of one kind at a time.

Each shape of SHAPES is four equal tables of one rank, with lists of random ids, in a backend of the engine's own
sparse side: ids joined, looked up, updated. A call takes the median of its CPU seconds on the calling thread, which
does all of it, so that other jobs of the machine count less. The costs of a kind are those, none below zero, whose
relative errors have the least squares over all shapes.
"""

import itertools
import statistics
import time
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy.optimize import nnls

from megarec.config.sections import EmbeddingConfig
from megarec.data.batch import Batch, Ids
from megarec.distributed.collectives import Ledger
from megarec.distributed.topology import ONE_RANK
from megarec.planning.hardware import TableKind
from megarec.planning.table_work import Counts
from megarec.sparse.exchange.ids import RowSplitter
from megarec.sparse.exchange.regroup import ColumnBlock, Regroup
from megarec.sparse.layout import EmbeddingLayout, Feature, Table
from megarec.sparse.lookups import plan_lookups
from megarec.sparse.placement import Shard
from megarec.sparse.side import SparseSide
from megarec.sparse.tables.local import choose_backends

TABLES, EXAMPLES, REPETITIONS = 4, 4_096, 5
SHAPES = tuple(itertools.product((1_000, 8_000, 64_000), (8, 32, 64), (1, 4, 16)))
"""Rows, columns, ids of a list on average."""
COPIES = ((64, 8), *itertools.product((EXAMPLES,), (8, 32, 128, 512)))
"""Rows and columns of each half of a copy."""
PLACED = ((64, 2, 16), *itertools.product((EXAMPLES,), (4, 16), (8, 32, 64)))
"""Examples, slots of each of two senders, and columns of a slot."""
KEPT = 8  # results at once, so that the next one is written to memory that no cache holds


class Sample(NamedTuple):
    """Seconds of some work of a kind."""

    kind: TableKind
    counts: Counts
    seconds: float


def samples(config: EmbeddingConfig) -> list[Sample]:
    """Of this process; the same kinds and counts in the same order on every rank."""
    backends = ["torch"]
    layout, shards = _layout(*SHAPES[0])
    auto = config.model_copy(update={"backend": "auto"})
    if choose_backends(layout, shards, auto, torch.device("cpu"))[layout.tables[0].name].backend == "fbgemm":
        backends.append("fbgemm")
    found = [_copied(*shape) for shape in COPIES] + [sample for shape in PLACED for sample in _placed(*shape)]
    for backend, shape in itertools.product(backends, SHAPES):
        found += _shape(config.model_copy(update={"backend": backend}), backend, *shape)
    return found


def costs_of(found: Sequence[Sample]) -> dict[TableKind, dict[str, float]]:
    """Nanoseconds by kind and by what is counted; only those that are not zero."""
    kinds = dict.fromkeys(sample.kind for sample in found)
    return {kind: _fitted([sample for sample in found if sample.kind == kind]) for kind in kinds}


def _fitted(found: Sequence[Sample]) -> dict[str, float]:
    table, seconds = np.array([sample.counts for sample in found]), np.array([sample.seconds for sample in found])
    scale = np.maximum(table.max(axis=0), 1e-30)
    weights, _ = nnls(table / scale / seconds[:, None], np.ones(len(seconds)))
    felt = weights > 1e-9 * seconds.max()
    found_ns = 1e9 * weights / scale
    return {name: float(own) for name, own, counts in zip(Counts._fields, found_ns, felt, strict=True) if counts}


def _layout(rows: int, columns: int, length: int) -> tuple[EmbeddingLayout, tuple[Shard, ...]]:
    names = [f"table_{index}" for index in range(TABLES)]
    tables = tuple(Table(name, rows, columns) for name in names)
    features = tuple(
        Feature(name, name, "sum", length > 1, columns * index, columns) for index, name in enumerate(names)
    )
    layout = EmbeddingLayout(columns, tables, features, full_embeddings=TABLES, small_columns=0)
    return layout, tuple(Shard(name, 0, 0, rows, 0, columns) for name in names)


def _shape(config: EmbeddingConfig, backend: str, rows: int, columns: int, length: int) -> list[Sample]:
    """Of the parts of a step."""
    layout, shards = _layout(rows, columns, length)
    device, random = torch.device("cpu"), torch.Generator().manual_seed(1)
    side = SparseSide(layout, config, ONE_RANK, seed=1, device=device, ledger=Ledger(), shards=shards)
    ids = {}
    for table in layout.tables:
        lengths = torch.randint(2 * length + 1, (EXAMPLES,), generator=random) if length > 1 else None
        count = EXAMPLES if lengths is None else int(lengths.sum())
        ids[table.name] = Ids(torch.randint(rows, (count,), generator=random), lengths)
    batch = Batch(torch.zeros(EXAMPLES, 0), ids, torch.zeros(EXAMPLES), torch.arange(EXAMPLES), EXAMPLES)
    gradient = torch.ones(EXAMPLES, TABLES * columns) / EXAMPLES
    total = sum(len(own.values) for own in ids.values())
    touched = sum(len(own.values.unique()) for own in ids.values())
    bags = EXAMPLES * TABLES
    counts = Counts(start=1, bag=bags, id=total, cell=total * columns)
    updated = counts._replace(row=touched, row_cell=touched * columns)
    taken: list[list[float]] = [[], [], [], []]
    halves = tuple(
        Shard(t.name, rank, rank * rows // 2, (rank + 1) * rows // 2, 0, columns) for t in layout.tables
        for rank in range(2)
    )  # fmt: skip
    splitter = RowSplitter(plan_lookups(layout, halves, 2).slots, device)
    for repetition in range(1 + REPETITIONS):
        split, _ = _timed(lambda: splitter(ids, EXAMPLES))
        joining, arrived = _timed(lambda: side.distribute(batch))
        looking, lookup = _timed(lambda: _looked_up(side, arrived))  # noqa: B023
        lookup.backward(gradient)
        updating, _ = _timed(lookup.apply)
        for own, seconds in zip(taken, (split, joining, looking, updating), strict=True):
            own += [seconds] if repetition else []
    split, joining, looking, updating = (statistics.median(own) for own in taken)
    found = [
        Sample("fbgemm lookup" if backend == "fbgemm" else "torch lookup", counts, looking),
        Sample("fbgemm update" if backend == "fbgemm" else "torch update", updated, updating),
    ]
    if backend == "torch":
        lists = Counts(start=1, bag=bags if length > 1 else 0, id=total)
        found += [Sample("ids", lists, joining), Sample("split", Counts(start=TABLES, bag=bags, id=total), split)]
    return found


def _looked_up(side: SparseSide, arrived: Any) -> Any:
    lookup = side.forward(arrived)
    _ = lookup.values
    return lookup


def _copied(rows: int, columns: int) -> Sample:
    """Two matrices put side by side, into memory of their own, as in the exchange."""
    halves = [[torch.ones(rows, columns) for _ in range(2)] for _ in range(KEPT)]
    seconds = _rotated([partial(torch.cat, own, dim=1) for own in halves])
    return Sample("copy", Counts(start=1, bag=2 * rows, cell=2 * rows * columns), seconds)


def _placed(examples: int, slots: int, columns: int) -> list[Sample]:
    """The slots of two senders, which take turns in the layout."""
    pieces = [
        [ColumnBlock("x", (2 * slot + sender) * columns, slot * columns, columns) for slot in range(slots)]
        for sender in range(2)
    ]
    regroup, numbers = Regroup(pieces, torch.device("cpu")), examples * 2 * slots * columns
    blocks = [torch.ones(numbers) for _ in range(KEPT)]
    counts = Counts(start=1, bag=examples * 2 * slots, cell=numbers)
    put = _rotated([partial(regroup.assemble, own, None, examples, torch.float32) for own in blocks])
    gradients = [own.view(examples, -1) for own in blocks]
    taken = _rotated([partial(regroup.scatter, own, None, examples, torch.float32, 2) for own in gradients])
    return [Sample("assemble", counts, put), Sample("scatter", counts._replace(start=2 * slots), taken)]


def _rotated(calls: Sequence[Callable[[], Any]]) -> float:
    """Seconds of a call, the last results of all of them kept."""
    kept, taken = deque[Any](maxlen=len(calls)), list[float]()
    for call in [*calls, *calls, *calls]:
        seconds, found = _timed(call)
        kept.append(found)
        taken.append(seconds)
    return statistics.median(taken[len(calls) :])


def _timed(work: Callable[[], Any]) -> tuple[float, Any]:
    """CPU seconds of the calling thread, and what the call returned."""
    start = time.thread_time()
    found = work()
    return time.thread_time() - start, found
