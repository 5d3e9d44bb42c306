"""The exchange of a list row by row, as sequences want it, beside the pooled one of the same ids.

    python tools/bench.py sequences

A table of 100,000 rows x 32 columns with a target and a list of up to 50 ids (26 on average), and four single-valued
features with tables of their own; 2 single-thread gloo ranks, batch 1,024 a rank, row-wise Adagrad in float32. Ids in
on every rank, embeddings out, backward with update. The list is pooled in the backend that "auto" takes, pooled in
torch, and unpooled, which torch holds. All run in the same rank processes in turns; a step takes as long as its slower
rank.
"""

import dataclasses
import statistics
from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.distributed as dist

from megarec.config.sections import EmbeddingConfig
from megarec.data.batch import Batch, Ids
from megarec.distributed.collectives import Ledger
from megarec.distributed.rank_pool import RankPool
from megarec.distributed.topology import build_topology
from megarec.sparse.layout import EmbeddingLayout, Feature, Sequence, Table
from megarec.sparse.side import SparseSide
from tools.benchmarks.interleave import interleave

ROWS, COLUMNS, POSITIONS, BATCH, RANKS, SINGLE = 100_000, 32, 50, 1_024, 2, 4
REPETITIONS = 30


def run() -> dict[str, Any]:
    """Milliseconds a step and MiB that a rank sends in it; the unpooled one over both pooled ones."""
    with RankPool(RANKS) as pool:
        by_rank = pool.run(compare)
    rows = []
    for name in by_rank[0][0]:
        slower = [max(times) for times in zip(*(seconds[name] for seconds, _ in by_rank), strict=True)]
        sent = max(mib[name] for _, mib in by_rank)
        rows.append({"name": name, "step_ms": 1e3 * statistics.median(slower), "sent_mib": sent, "ranks": RANKS})
    pooled, in_torch, unpooled = (row["step_ms"] for row in rows)
    return {
        "name": "sequences",
        "rows": rows,
        "ratios": {"unpooled_over_pooled": unpooled / pooled, "unpooled_over_pooled_in_torch": unpooled / in_torch},
    }


def compare() -> tuple[dict[str, list[float]], dict[str, float]]:
    """On every rank: seconds of each step, and MiB that it sends in one."""
    made = {
        "pooled": _contestant(pooled_layout(), "auto"),
        "pooled in torch": _contestant(pooled_layout(), "torch"),
        "unpooled": _contestant(unpooled_layout(), "auto"),
    }
    sent = {}
    for name, (step, ledger) in made.items():
        before = sum(ledger.totals().values())
        step()
        sent[name] = (sum(ledger.totals().values()) - before) / 2**20
    return interleave({name: step for name, (step, _) in made.items()}, REPETITIONS, before=dist.barrier), sent


def pooled_layout() -> EmbeddingLayout:
    """The list averaged, beside the target and the other features."""
    names = ["target", "list", *(f"single_{i}" for i in range(SINGLE))]
    tables = ["item", "item", *names[2:]]
    features = [
        Feature(name, table, "mean" if name == "list" else "sum", name == "list", i * COLUMNS, COLUMNS)
        for i, (name, table) in enumerate(zip(names, tables, strict=True))
    ]
    held = tuple(Table(name, ROWS, COLUMNS) for name in dict.fromkeys(tables))
    return EmbeddingLayout(COLUMNS, held, tuple(features), len(features), 0)


def unpooled_layout() -> EmbeddingLayout:
    """The same, the list row by row."""
    whole = pooled_layout()
    pooled = [feature for feature in whole.features if feature.name != "list"]
    features = tuple(dataclasses.replace(f, start=i * COLUMNS) for i, f in enumerate(pooled))
    return dataclasses.replace(
        whole,
        features=features,
        full_embeddings=len(features),
        unpooled=(Feature("list", "item", "mean", True, 0, COLUMNS, positions=POSITIONS),),
        sequences=(Sequence(("list",), COLUMNS, POSITIONS, 0),),
    )


def _contestant(layout: EmbeddingLayout, backend: Literal["auto", "torch"]) -> tuple[Callable[[], None], Ledger]:
    config = EmbeddingConfig(optimizer="rowwise_adagrad", backend=backend)
    topology, ledger = build_topology(RANKS, tensor=1), Ledger()
    sparse = SparseSide(layout, config, topology, seed=0, device=torch.device("cpu"), ledger=ledger)
    batch = a_batch(topology.rank)
    gradient = torch.randn(BATCH, layout.width + layout.sequence_columns) / BATCH

    def step() -> None:
        lookup = sparse.look_up(batch)
        _ = lookup.values  # waits for them and lays them out
        lookup.backward(gradient)
        lookup.apply()

    return step, ledger


def a_batch(seed: int) -> Batch:
    """Uniformly random ids; lists of every length from 1 to POSITIONS."""
    generator = torch.Generator().manual_seed(seed)

    def draw(count: int) -> torch.Tensor:
        return torch.randint(ROWS, (count,), generator=generator)

    lengths = torch.arange(BATCH) % POSITIONS + 1
    ids = {"list": Ids(draw(int(lengths.sum())), lengths)}
    ids |= {name: Ids(draw(BATCH)) for name in ("target", *(f"single_{i}" for i in range(SINGLE)))}
    return Batch(torch.empty(BATCH, 0), ids, torch.zeros(BATCH), torch.arange(BATCH), BATCH)
