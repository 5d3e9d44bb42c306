"""The sparse side on one process beside bare FBGEMM: ids in, pooled embeddings out, gradient in, tables updated.

    python tools/bench.py tables

26 tables x 200,000 rows x 64 columns, batch 4,096, row-wise Adagrad in float32; on a GPU 1,000,000 x 128 and 65,536,
timed by its own clock. Ours runs in the backend that "auto" chooses, FBGEMM, which shows what the sparse side adds to
it, and again in torch. All get the same ids: FBGEMM as one ready tensor, ours as a batch of features.
"""

import itertools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from megarec.config.sections import EmbeddingConfig
from megarec.data.batch import Batch
from megarec.distributed.collectives import Ledger
from megarec.distributed.topology import ONE_RANK
from megarec.sparse.layout import EmbeddingLayout
from megarec.sparse.side import SparseSide
from tools.benchmarks.interleave import interleave, median_ms
from tools.benchmarks.workload import equal_tables, quick_tables, random_batch


class Size(NamedTuple):
    """Of a workload; each table is looked up once an example."""

    tables: int
    rows: int
    columns: int
    batch: int


SIZES = {"cpu": Size(26, 200_000, 64, 4_096), "cuda": Size(26, 1_000_000, 128, 65_536)}
REPETITIONS = 30
RATE, EPS = 0.05, 1e-8


def run() -> dict[str, Any]:
    """Milliseconds a step, and our time over bare FBGEMM's: over_fbgemm by default, torch_over_fbgemm in torch."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    size = SIZES[device.type]
    layout = equal_tables(size.tables, size.rows, size.columns)
    batches = [random_batch(layout, size.batch, seed).to(device) for seed in range(4)]
    gradient = torch.randn(size.batch, layout.width, generator=torch.Generator().manual_seed(0)).to(device) / size.batch
    bare = _bare_fbgemm(size, batches, device)
    contestants = {
        "sparse side": steps_of(_sparse_side(layout, batches, gradient, "auto")),
        "sparse side in torch": steps_of(_sparse_side(layout, batches, gradient, "torch")),
        "bare fbgemm": steps_of(lambda number: bare(number).backward(gradient)),
    }
    seconds = interleave(contestants, REPETITIONS, device=device)
    medians = {name: median_ms(times) for name, times in seconds.items()}
    row = {"device": device.type, "threads": torch.get_num_threads()}
    return {
        "name": "tables",
        "rows": [{"name": name, "step_ms": ms, **row} for name, ms in medians.items()],
        "ratios": {
            "over_fbgemm": medians["sparse side"] / medians["bare fbgemm"],
            "torch_over_fbgemm": medians["sparse side in torch"] / medians["bare fbgemm"],
        },
    }


def steps_of(step: Callable[[int], None]) -> Callable[[], None]:
    """A training step on the next of four batches, over and over."""
    numbers = itertools.cycle(range(4))
    return lambda: step(next(numbers))


def _sparse_side(
    layout: EmbeddingLayout, batches: list[Batch], gradient: Tensor, backend: Literal["auto", "torch"]
) -> Callable[[int], None]:
    config = EmbeddingConfig(optimizer="rowwise_adagrad", learning_rate=RATE, eps=EPS, backend=backend)
    device = gradient.device
    with quick_tables(device):
        sparse = SparseSide(layout, config, ONE_RANK, seed=0, device=device, ledger=Ledger())

    def step(number: int) -> None:
        lookup = sparse.look_up(batches[number])
        _ = lookup.values  # waits for them and lays them out
        lookup.backward(gradient)
        lookup.apply()

    return step


def _bare_fbgemm(size: Size, batches: list[Batch], device: torch.device) -> Callable[[int], Tensor]:
    """FBGEMM's module as its own documentation uses it, without bounds checks; takes a batch's number."""
    from fbgemm_gpu.split_embedding_configs import EmbOptimType
    from fbgemm_gpu.split_table_batched_embeddings_ops_common import BoundsCheckMode, EmbeddingLocation
    from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
        ComputeDevice,
        SplitTableBatchedEmbeddingBagsCodegen,
    )

    place = (EmbeddingLocation.DEVICE, ComputeDevice.CUDA)
    if device.type == "cpu":
        place = (EmbeddingLocation.HOST, ComputeDevice.CPU)
    module: Any = SplitTableBatchedEmbeddingBagsCodegen(
        [(size.rows, size.columns, *place)] * size.tables,
        optimizer=EmbOptimType.EXACT_ROWWISE_ADAGRAD,
        learning_rate=RATE,
        eps=EPS,
        bounds_check_mode=BoundsCheckMode.NONE,
        device=device,
    )
    module.init_embedding_weights_uniform(-(size.rows**-0.5), size.rows**-0.5)
    indices = [torch.cat([ids.values for ids in batch.ids.values()]) for batch in batches]
    offsets = torch.arange(size.tables * size.batch + 1, device=device)
    return lambda number: module(indices[number], offsets)
