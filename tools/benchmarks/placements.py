"""The planner's pick among random placements of tables, beside what each of them costs on two real gloo ranks.

    python tools/bench.py placements

A draw is a set of tables and 40 random legal placements of them: each table whole on a rank, by columns, by rows, or,
where it is small, on both ranks. All placements of a draw run in turns in the same two processes, by the engine's own
sparse side: ids out, embeddings back, gradients, update. The planner knows the config, the placement and a machine's
JSON, and neither the batches nor the times. Its pick is held to three truths:

    time       of the slower rank
    CPU time   of the rank that computes most in a part of a step (PARTS), gloo's threads included, the least of all
               repetitions, of all parts: ranks wait for each other between parts. Other jobs touch it less. Beside
               it the planner's messages count for what they compute (MESSAGE_CPU)
    counted    no time at all, but no formula of the planner's either: bytes that the ledger counted, message by message
               on the rank that sends most, and bytes of rows that the ids of the batches really look up, pool and
               update, on the rank that has most, both at the rates of the machine's JSON

Of measured ones the noise is said as well: the placement that is best in every other repetition, by how much it misses
the best in the others. Ids are uniform in even draws, and follow a power law over scattered rows in odd ones.
"""

import itertools
import math
import os
import random
import statistics
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from megarec.config.sections import RunConfig
from megarec.data.batch import Batch, Ids
from megarec.data.schema import CategoricalFeature, Schema
from megarec.distributed.collectives import Ledger
from megarec.distributed.rank_pool import RankPool
from megarec.distributed.topology import build_topology
from megarec.planning.hardware import Hardware, load_hardware
from megarec.planning.pieces import Piece
from megarec.planning.planner import placement_pieces
from megarec.run.spec import ModelSpec, resolve
from megarec.sparse.layout import Table
from megarec.sparse.placement import REPLICATED_CELLS, Shard, replicated
from megarec.sparse.side import SparseSide
from megarec.sparse.tables.optimizers import table_bytes

MACHINE = "epyc-2-ranks"
RANKS, PLACEMENTS, DRAWS, REPETITIONS = 2, 40, 12, 16
BATCH = 2048  # examples of a rank
SKEWED = 4.0  # the power of a uniform number: a tenth of the rows gets 56 % of the ids
CLOSE = 1.05
KINDS = {"table": 6, "column": 2, "row": 2, "replicated": 1}
"""How often each is drawn, whole tables on either rank together."""
CLOCKS = ("time", "CPU time")
HALVES = slice(None), slice(0, None, 2), slice(1, None, 2)  # all repetitions, and every other one
PARTS = {
    "ids": ("ids", "ids joined"),
    "lookup": ("lookup", "embeddings"),
    "back": ("regroup",),
    "update": ("gradients of embeddings", "update"),
}
"""Of a step, and the planner's pieces (step_time.py)."""
MESSAGES, MESSAGE_CPU = ("ids", "embeddings", "gradients of embeddings"), 0.5
"""Pieces that are messages, and what gloo computes of their time: 0.27 to 0.72 of all-to-alls, all-gathers and
reduce-scatters of 1 to 8 MiB, the least of 25 on two ranks."""
SHOWN = 100  # the draw whose parts are shown; it is not judged
Placement = tuple[Shard, ...]
Taken = list[tuple[float, float]]


class Draw(NamedTuple):
    """A model, its tables, and placements of them."""

    config: RunConfig
    spec: ModelSpec
    placements: list[Placement]


class Cost(NamedTuple):
    """What a rank saw of a placement.

    Attributes:
        taken: of each repetition, seconds and CPU seconds of each of PARTS.
        sent: bytes of each message of a step, by the ledger.
    """

    taken: list[Taken]
    sent: dict[str, int]


def run(draws: Sequence[int] = range(DRAWS)) -> dict[str, Any]:
    """Three rows for each draw: what the pick costs over the best, and what half of the placements do at most; before
    them the parts of a step with tables of one kind.

    Args:
        draws: their seeds.
    """
    hardware, rows = load_hardware(MACHINE), list[dict[str, Any]]()
    with RankPool(RANKS, timeout=600) as pool:
        rows += kind_rows(draw(SHOWN), pool.run(cost, SHOWN, PLACEMENTS, REPETITIONS, True), hardware)
        for seed in draws:
            own, load = draw(seed), os.getloadavg()[0]
            by_rank = pool.run(cost, seed)
            seconds, cpu = (predict(own, hardware, share) for share in (1.0, MESSAGE_CPU))
            measured = [measured_row(name, clock, by_rank, (seconds, cpu)[clock]) for clock, name in enumerate(CLOCKS)]
            counted = judge(seconds, counted_costs(own, seed, by_rank, hardware))
            known = {"seed": seed, "tables": len(own.spec.layout.tables), "load": load}
            rows += [{**known, **row} for row in (*measured, {"truth": "counted", **counted})]
    return {"name": "placements", "rows": rows, "ratios": ratios(rows), "aims": {"picked, time": 0.85}}


def draw(seed: int, placements: int = PLACEMENTS) -> Draw:
    """8 to 16 tables of 1,000 to 50,000 rows, the same width for all, half of them for lists of up to 20 ids."""
    dice = random.Random(seed)
    features = tuple(
        CategoricalFeature(
            name=f"feature_{index}",
            rows=round(10 ** dice.uniform(3, 4.7)),
            multi_valued=length > 1,
            mean_length=length,
        )
        for index in range(dice.randint(8, 16))
        for length in [dice.choice([1, dice.randint(2, 20)])]
    )
    rows = {"train": 0, "valid": 0, "test": 0}
    schema = Schema(
        name="draw", label_rule="random", categorical=features, numeric=("x",), rows=rows, source="synthetic"
    )
    model = {"name": "dlrm", "dim": dice.choice([16, 32, 64]), "numeric_mlp": [16], "head": [16]}
    data = {"path": "-", "batch_size": RANKS * BATCH}
    config = RunConfig.model_validate({"model": model, "data": data, "train": {"threads": 1}})
    spec = resolve(config, schema)
    found = dict.fromkeys(random_placement(spec.layout.tables, dice) for _ in range(placements))
    while len(found) < placements:
        found[random_placement(spec.layout.tables, dice)] = None
    return Draw(config, spec, list(found))


def random_placement(tables: tuple[Table, ...], dice: random.Random) -> Placement:
    """On two ranks, each of which holds a part."""
    while True:
        shards = list[Shard]()
        for table in tables:
            small = table.rows * table.columns <= REPLICATED_CELLS
            kinds = [kind for kind in KINDS if kind != "replicated" or small]
            kind = dice.choices(kinds, [KINDS[kind] for kind in kinds])[0]
            shards += _shards(table, kind, dice.randrange(RANKS))
        if len({shard.rank for shard in shards}) == RANKS:
            return tuple(shards)


def _shards(table: Table, kind: str, rank: int) -> list[Shard]:
    name, rows, columns = table.name, table.rows, table.columns
    if kind == "table":
        return [Shard(name, rank, 0, rows, 0, columns)]
    if kind == "column":
        half = columns // RANKS
        return [Shard(name, r, 0, rows, r * half, (r + 1) * half) for r in range(RANKS)]
    if kind == "row":
        half = -(-rows // RANKS)
        return [Shard(name, r, r * half, min(rows, (r + 1) * half), 0, columns) for r in range(RANKS)]
    return [Shard(name, r, 0, rows, 0, columns) for r in range(RANKS)]


def predict(own: Draw, hardware: Hardware, messages: float = 1.0) -> list[float]:
    """Seconds of a step with each placement, as the planner has them.

    Args:
        messages: what counts of theirs: all, or MESSAGE_CPU.
    """
    found = []
    for shards in own.placements:
        pieces = placement_pieces(own.config, own.spec, hardware, 1, RANKS, shards)
        found.append(sum(_cpu(piece, messages) for piece in pieces))
    return found


def of_one_kind(own: Draw) -> dict[str, Placement]:
    """The tables of a draw all placed alike: whole ones in turns, large ones never replicated."""
    found: dict[str, list[Shard]] = {kind: [] for kind in KINDS}
    for (kind, shards), (index, table) in itertools.product(found.items(), enumerate(own.spec.layout.tables)):
        large = table.rows * table.columns > REPLICATED_CELLS
        shards += _shards(table, "table" if kind == "replicated" and large else kind, index % RANKS)
    return {kind: tuple(shards) for kind, shards in found.items()}


def kind_rows(own: Draw, by_rank: list[list[Cost]], hardware: Hardware) -> list[dict[str, Any]]:
    """CPU milliseconds of the parts of a step with all tables alike, of the rank that has most, and as predicted."""
    rows = []
    for (kind, shards), costs in zip(of_one_kind(own).items(), zip(*by_rank, strict=True), strict=True):
        pieces = placement_pieces(own.config, own.spec, hardware, 1, RANKS, shards)
        row: dict[str, Any] = {"truth": "parts", "kind": kind}
        for place, (part, names) in enumerate(PARTS.items()):
            least = [min(step[place][1] for step in cost_of_rank.taken) for cost_of_rank in costs]
            row[f"{part}_ms"] = 1e3 * max(least)
            row[f"{part}_predicted_ms"] = 1e3 * sum(_cpu(piece) for piece in pieces if piece.name in names)
        rows.append(row)
    return rows


def _cpu(piece: Piece, messages: float = MESSAGE_CPU) -> float:
    """Its seconds, of messages what counts of them."""
    return piece.seconds * (messages if piece.name in MESSAGES else 1.0)


def batch_of(own: Draw, seed: int, rank: int) -> Batch:
    """Random ids, of odd seeds by a power law; lists of 0 to twice their mean."""
    generator = torch.Generator().manual_seed(1000 * seed + rank)
    ids = {}
    for feature in own.spec.layout.features:
        rows, count, lengths = own.spec.layout.table(feature.table).rows, BATCH, None
        if feature.multi_valued:
            lengths = torch.randint(round(2 * feature.mean_length) + 1, (BATCH,), generator=generator)
            count = int(lengths.sum())
        drawn = torch.rand(count, generator=generator, dtype=torch.float64)
        found = ((drawn**SKEWED if seed % 2 else drawn) * rows).long().clamp_(max=rows - 1)
        if seed % 2:  # the same places for both ranks
            found = torch.randperm(rows, generator=torch.Generator().manual_seed(seed))[found]
        ids[feature.name] = Ids(found, lengths)
    return Batch(torch.zeros(BATCH, 1), ids, torch.zeros(BATCH), torch.arange(BATCH), BATCH)


def cost(seed: int, placements: int = PLACEMENTS, repetitions: int = REPETITIONS, kinds: bool = False) -> list[Cost]:
    """On a rank: what each placement costs, or each of `of_one_kind`."""
    own, topology = draw(seed, placements), build_topology(RANKS, tensor=1)
    batch, gradient = batch_of(own, seed, topology.rank), torch.ones(BATCH, own.spec.layout.width) / BATCH
    places = list(of_one_kind(own).values()) if kinds else own.placements
    ledgers = [Ledger() for _ in places]
    sides = [
        SparseSide(
            own.spec.layout, own.config.embedding, topology, seed=1, device=torch.device("cpu"), ledger=ledger,
            shards=shards,
        )
        for ledger, shards in zip(ledgers, places, strict=True)
    ]  # fmt: skip
    found = []
    for side, ledger in zip(sides, ledgers, strict=True):
        _step(side, batch, gradient)  # does not count
        found.append(Cost([], {f"{row['op']} {row['direction']}": row["bytes"] for row in ledger.rows()}))
    for repetition in range(repetitions):
        for place in range(len(sides)):
            index = (place + repetition) % len(sides)  # none profits from its predecessor
            found[index].taken.append(_step(sides[index], batch, gradient))
    return found


def _step(side: SparseSide, batch: Batch, gradient: Tensor) -> Taken:
    """Seconds and CPU seconds of each of PARTS."""
    dist.barrier()
    clocks = [(time.perf_counter(), time.process_time())]

    def done() -> None:
        clocks.append((time.perf_counter(), time.process_time()))

    ids = side.distribute(batch)
    done()
    lookup = side.forward(ids)
    _ = lookup.values
    done()
    lookup.backward(gradient)
    done()
    lookup.apply()
    done()
    return [(stop - start, cpu - cpu_start) for (start, cpu_start), (stop, cpu) in itertools.pairwise(clocks)]


def measured_row(name: str, clock: int, by_rank: list[list[Cost]], predicted: list[float]) -> dict[str, Any]:
    """What the pick costs by a clock, and the noise of that clock."""
    measured, even, odd = (_costs(by_rank, clock, part) for part in HALVES)
    again = min(range(len(even)), key=even.__getitem__)
    noise = statistics.median(abs(math.log(one / other)) for one, other in zip(even, odd, strict=True))
    return {"truth": name, **judge(predicted, measured), "again_over_best": odd[again] / min(odd), "noise": noise}


def judge(predicted: list[float], costs: list[float]) -> dict[str, float]:
    """What the placement with the least predicted cost really costs.

    Args:
        costs: by placement, in seconds.
    """
    best, pick = min(costs), min(range(len(predicted)), key=predicted.__getitem__)
    return {
        "best_ms": 1e3 * best,
        "pick_over_best": costs[pick] / best,
        "median_over_best": statistics.median(costs) / best,
        "share_within_5_percent": sum(own <= CLOSE * best for own in costs) / len(costs),
        "rank_correlation": statistics.correlation(_places(predicted), _places(costs)),
    }


def counted_costs(own: Draw, seed: int, by_rank: list[list[Cost]], hardware: Hardware) -> list[float]:
    """Seconds by placement of what was counted: bytes sent, looked up and updated, at the rates of a machine."""
    batches = [batch_of(own, seed, rank) for rank in range(RANKS)]
    ids = {feature.table: [batch.ids[feature.name].values for batch in batches] for feature in own.spec.layout.features}
    assert hardware.host_link_gb_s is not None
    found = []
    for shards, costs in zip(own.placements, zip(*by_rank, strict=True), strict=True):
        names, moved = replicated(shards), [0.0] * RANKS
        for shard in shards:
            every = torch.cat(ids[shard.table])
            asked = ids[shard.table][shard.rank] if shard.table in names else every
            asked, every = (some[(some >= shard.row_start) & (some < shard.row_stop)] for some in (asked, every))
            row = table_bytes([Shard(shard.table, 0, 0, 1, 0, shard.columns)], own.config.embedding)
            pooled = BATCH if shard.table in names else RANKS * BATCH  # written, and their gradients read
            moved[shard.rank] += len(asked) * (4 * shard.columns + 4) + 2 * len(every.unique()) * row
            moved[shard.rank] += 2 * 4 * pooled * shard.columns
        ops = {op for cost_of_rank in costs for op in cost_of_rank.sent}
        sent = sum(max(cost_of_rank.sent.get(op, 0) for cost_of_rank in costs) for op in ops)
        found.append(max(moved) / (1e12 * hardware.memory_tb_s.value) + sent / (1e9 * hardware.host_link_gb_s.value))
    return found


def _places(values: list[float]) -> list[float]:
    """Of each value, how many are below it."""
    return [float(sum(other < value for other in values)) for value in values]


def _costs(by_rank: list[list[Cost]], clock: int, part: slice) -> list[float]:
    """By placement: the median of the slower rank's times, or the least CPU seconds of the rank that computes most in a
    part of a step, of all parts."""
    found = []
    for costs in zip(*by_rank, strict=True):
        taken = [[[own[clock] for own in step] for step in cost_of_rank.taken[part]] for cost_of_rank in costs]
        if clock == 0:
            found.append(statistics.median(max(map(sum, both)) for both in zip(*taken, strict=True)))
        else:
            least = [[min(own) for own in zip(*steps, strict=True)] for steps in taken]
            found.append(sum(max(both) for both in zip(*least, strict=True)))
    return found


def ratios(rows: list[dict[str, Any]]) -> dict[str, float]:
    """By truth: how often the pick, the best of half of the repetitions and a random placement are within 5 %."""
    found = {}
    for name in dict.fromkeys(row["truth"] for row in rows if row["truth"] != "parts"):
        own = [row for row in rows if row["truth"] == name]
        found[f"picked, {name}"] = sum(row["pick_over_best"] <= CLOSE for row in own) / len(own)
        if "again_over_best" in own[0]:
            found[f"measured again, {name}"] = sum(row["again_over_best"] <= CLOSE for row in own) / len(own)
            found[f"noise, {name}"] = statistics.median(row["noise"] for row in own)
        found[f"by chance, {name}"] = statistics.fmean(row["share_within_5_percent"] for row in own)
        found[f"pick over best, median, {name}"] = statistics.median(row["pick_over_best"] for row in own)
        found[f"pick over best, worst, {name}"] = max(row["pick_over_best"] for row in own)
    return found
