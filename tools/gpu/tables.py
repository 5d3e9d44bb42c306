"""Lookup and update of the table backends beside their floor: the bytes that must move, at the rate of a copy."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megarec.config.sections import EmbeddingConfig
from megarec.data.batch import Batch, Ids
from megarec.distributed.collectives import Ledger
from megarec.distributed.topology import ONE_RANK
from megarec.sparse.side import SparseSide, StepLookup
from tools.benchmarks.workload import equal_tables, quick_tables
from tools.gpu.context import Context, TableCase, copy_seconds, forget, in_turns
from tools.gpu.numbers import backends

ZIPF = 1.1
WEIGHT = 2  # bytes of a weight, fp16
POOLED = 4  # of what comes out and of its gradient


def run(context: Context) -> None:
    device = context.device
    rate = 2 * context.sizes.copy_bytes / copy_seconds(device, context.sizes.copy_bytes)
    failed = []
    for case in context.sizes.tables:
        for spread in ("uniform", "Zipf"):
            batch = _batch(case, spread).to(device)
            touched = sum(int(ids.values.unique().numel()) for ids in batch.ids.values())
            for backend in backends(device.type):
                name = f"{case.tables} x {case.rows:,} x {case.columns} {spread}, {backend}"
                try:
                    _measure(context, name, case, batch, backend, touched, rate)
                except Exception as error:  # keep the other backends
                    failed.append(f"{name}: {type(error).__name__}: {' '.join(str(error).split())[:300]}")
                    context.emit(name, "failed")
                forget(device)
    assert not failed, "; ".join(failed)


def _measure(
    context: Context, name: str, case: TableCase, batch: Batch, backend: Any, touched: int, rate: float
) -> None:
    layout = equal_tables(case.tables, case.rows, case.columns)
    config = EmbeddingConfig(optimizer="rowwise_adagrad", learning_rate=0.05, weights="fp16", backend=backend)
    with quick_tables(context.device):
        sparse = SparseSide(layout, config, ONE_RANK, seed=0, device=context.device, ledger=Ledger())
    gradient = torch.randn(batch.size, layout.width, device=context.device) / batch.size
    held: dict[str, StepLookup] = {}

    def look_up() -> None:
        held["lookup"] = sparse.look_up(batch)
        _ = held["lookup"].values  # lays them out

    def update() -> None:
        lookup = held.pop("lookup")
        lookup.backward(gradient.to(lookup.values.dtype))
        lookup.apply()

    works: list[Callable[[], object]] = [look_up, update]
    looking, updating = in_turns(works, context.device, context.sizes.repeats)
    cells = case.tables * batch.size * case.columns
    moved = cells * (WEIGHT + POOLED), cells * POOLED + 2 * touched * case.columns * WEIGHT
    for what, seconds, size in (("lookup", looking, moved[0]), ("update", updating, moved[1])):
        context.emit(f"{name}: {what}", 1e3 * seconds, "ms")
        context.emit(f"{name}: {what}, of a copy's rate", 100 * size / seconds / rate, "%")


def _batch(case: TableCase, spread: str) -> Batch:
    random = np.random.default_rng(0)

    def ids() -> Tensor:
        if spread == "uniform":
            return torch.from_numpy(random.integers(0, case.rows, case.batch))
        drawn = random.zipf(ZIPF, case.batch).astype(np.uint64)  # hashed: frequent rows lie anywhere
        return torch.from_numpy((drawn * np.uint64(0x9E3779B1) % np.uint64(case.rows)).astype(np.int64))

    features = {f"feature_{index}": Ids(ids()) for index in range(case.tables)}
    size = case.batch
    return Batch(torch.empty(size, 0), features, torch.zeros(size), torch.arange(size), size)
