"""What the sparse side adds to bare FBGEMM on one process: ids in, pooled embeddings out, gradient in, tables updated.

    python tools/bench.py tables

26 tables x 200,000 rows x 64 columns, batch 4,096, row-wise Adagrad in float32. Both get the same ids: FBGEMM as one
ready tensor, ours as a batch of features.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from megarec.benchmarks.interleave import interleave, median_ms
from megarec.benchmarks.workload import equal_tables, random_batch
from megarec.config.sections import EmbeddingConfig
from megarec.data.batch import Batch
from megarec.embeddings.exchange import SparseSide
from megarec.parallel.collectives import Ledger

TABLES, ROWS, COLUMNS, BATCH = 26, 200_000, 64, 4_096
REPETITIONS = 30
RATE, EPS = 0.05, 1e-8


def run() -> dict[str, Any]:
    """Milliseconds a step of both, and ratios.over_fbgemm: our time over theirs."""
    layout = equal_tables(TABLES, ROWS, COLUMNS)
    batches = [random_batch(layout, BATCH, seed) for seed in range(4)]
    gradient = torch.randn(BATCH, layout.width, generator=torch.Generator().manual_seed(0)) / BATCH
    config = EmbeddingConfig(optimizer="rowwise_adagrad", learning_rate=RATE, eps=EPS, backend="fbgemm")
    sparse = SparseSide(
        layout, config, world=None, rank=0, world_size=1, seed=0, device=torch.device("cpu"), ledger=Ledger()
    )
    turn = {"sparse side": 0, "fbgemm": 0}
    bare = _bare_fbgemm(batches)

    def ours() -> None:
        turn["sparse side"] += 1
        sparse.forward(batches[turn["sparse side"] % len(batches)]).backward(gradient)

    def theirs() -> None:
        turn["fbgemm"] += 1
        bare(turn["fbgemm"] % len(batches)).backward(gradient)

    seconds = interleave({"sparse side": ours, "fbgemm": theirs}, REPETITIONS)
    rows = [
        {"name": name, "step_ms": median_ms(times), "threads": torch.get_num_threads()}
        for name, times in seconds.items()
    ]
    return {
        "name": "tables",
        "rows": rows,
        "ratios": {"over_fbgemm": median_ms(seconds["sparse side"]) / median_ms(seconds["fbgemm"])},
    }


def _bare_fbgemm(batches: list[Batch]) -> Callable[[int], Tensor]:
    """FBGEMM's module as its own documentation uses it, without bounds checks; takes a batch's number."""
    from fbgemm_gpu.split_embedding_configs import EmbOptimType
    from fbgemm_gpu.split_table_batched_embeddings_ops_common import BoundsCheckMode, EmbeddingLocation
    from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
        ComputeDevice,
        SplitTableBatchedEmbeddingBagsCodegen,
    )

    module: Any = SplitTableBatchedEmbeddingBagsCodegen(
        [(ROWS, COLUMNS, EmbeddingLocation.HOST, ComputeDevice.CPU)] * TABLES,
        optimizer=EmbOptimType.EXACT_ROWWISE_ADAGRAD,
        learning_rate=RATE,
        eps=EPS,
        bounds_check_mode=BoundsCheckMode.NONE,
        device="cpu",
    )
    module.init_embedding_weights_uniform(-(ROWS**-0.5), ROWS**-0.5)
    indices = [torch.cat([ids.values for ids in batch.ids.values()]) for batch in batches]
    offsets = torch.arange(TABLES * BATCH + 1)
    return lambda number: module(indices[number], offsets)
