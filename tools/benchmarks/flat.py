"""Our flat exchange against TorchRec's: ids in on every rank, pooled embeddings out, backward with update.

    bash tools/bench_env.sh                          # once: an environment with TorchRec, beside the project's own
    .venv-bench/bin/python tools/bench.py flat

26 tables x 20,000 rows x 64 columns, whole tables on 2 single-thread gloo ranks, batch 2,048 a rank, row-wise Adagrad
in float32. Ours runs in the backend that "auto" chooses, FBGEMM as in TorchRec, and again in torch. All run in the same
rank processes in turns; a step takes as long as its slower rank.
"""

import importlib.util
import os
import statistics
from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from megarec.config.sections import EmbeddingConfig
from megarec.distributed.collectives import Ledger
from megarec.distributed.rank_pool import RankPool
from megarec.distributed.topology import build_topology
from megarec.errors import UserError
from megarec.sparse.layout import EmbeddingLayout
from megarec.sparse.side import SparseSide
from tools.benchmarks.interleave import interleave
from tools.benchmarks.workload import equal_tables, random_batch

TABLES, ROWS, COLUMNS, BATCH, RANKS = 26, 20_000, 64, 2_048, 2
REPETITIONS = 40
RATE, EPS = 0.05, 1e-8


def run() -> dict[str, Any]:
    """Milliseconds a step, and our time over TorchRec's: over_torchrec by default, torch_over_torchrec in torch.

    Raises:
        UserError: TorchRec is not installed here.
    """
    if importlib.util.find_spec("torchrec") is None:
        raise UserError(
            "benchmark flat needs TorchRec, which is not among the project's requirements: run "
            "'bash tools/bench_env.sh', then '.venv-bench/bin/python tools/bench.py flat'"
        )
    with RankPool(RANKS) as pool:
        by_rank = pool.run(compare)
    slower = {
        name: [max(times) for times in zip(*(rank[name] for rank in by_rank), strict=True)] for name in by_rank[0]
    }
    medians = {name: 1e3 * statistics.median(seconds) for name, seconds in slower.items()}
    return {
        "name": "flat",
        "rows": [{"name": name, "step_ms": value, "ranks": RANKS} for name, value in medians.items()],
        "ratios": {
            "over_torchrec": medians["megarec"] / medians["torchrec"],
            "torch_over_torchrec": medians["megarec in torch"] / medians["torchrec"],
        },
    }


def compare() -> dict[str, list[float]]:
    """On every rank: seconds of each step of all."""
    layout = equal_tables(TABLES, ROWS, COLUMNS)
    gradient = torch.randn(BATCH, layout.width, generator=torch.Generator().manual_seed(1)) / BATCH
    contestants = {
        "megarec": _ours(layout, gradient, "auto"),
        "megarec in torch": _ours(layout, gradient, "torch"),
        "torchrec": _torchrec(layout, gradient),
    }
    return interleave(contestants, REPETITIONS, before=dist.barrier)


def _ours(layout: EmbeddingLayout, gradient: Tensor, backend: Literal["auto", "torch"]) -> Callable[[], None]:
    config = EmbeddingConfig(optimizer="rowwise_adagrad", learning_rate=RATE, eps=EPS, backend=backend)
    topology = build_topology(RANKS, tensor=1)
    sparse = SparseSide(layout, config, topology, seed=0, device=torch.device("cpu"), ledger=Ledger())
    batch = random_batch(layout, BATCH, seed=topology.rank)

    def step() -> None:
        lookup = sparse.look_up(batch)
        _ = lookup.values  # waits for them and lays them out
        lookup.backward(gradient)
        lookup.apply()

    return step


def _torchrec(layout: EmbeddingLayout, gradient: Tensor) -> Callable[[], None]:
    """TorchRec as its documentation uses it: meta tables, fused row-wise Adagrad, a table-wise plan, DMP."""
    os.environ.setdefault("LOCAL_WORLD_SIZE", str(RANKS))
    from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, KeyedJaggedTensor
    from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
    from torchrec.distributed.model_parallel import DistributedModelParallel
    from torchrec.distributed.planner import EmbeddingShardingPlanner, Topology
    from torchrec.distributed.planner.types import ParameterConstraints
    from torchrec.distributed.types import ShardingEnv
    from torchrec.optim import RowWiseAdagrad
    from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward

    names = [table.name for table in layout.tables]
    collection = EmbeddingBagCollection(
        device=torch.device("meta"),
        tables=[
            EmbeddingBagConfig(name=name, embedding_dim=COLUMNS, num_embeddings=ROWS, feature_names=[name])
            for name in names
        ],
    )
    apply_optimizer_in_backward(RowWiseAdagrad, collection.parameters(), {"lr": RATE, "eps": EPS})
    sharder: Any = EmbeddingBagCollectionSharder()
    planner = EmbeddingShardingPlanner(
        topology=Topology(world_size=RANKS, compute_device="cpu", local_world_size=RANKS),
        constraints={
            name: ParameterConstraints(sharding_types=["table_wise"], compute_kernels=["fused"]) for name in names
        },
    )
    world = dist.group.WORLD
    model = DistributedModelParallel(
        collection,
        env=ShardingEnv.from_process_group(world),
        device=torch.device("cpu"),
        plan=planner.collective_plan(collection, [sharder], world),
        sharders=[sharder],
        init_data_parallel=False,
    )
    batch = random_batch(layout, BATCH, seed=dist.get_rank())
    values = torch.cat([batch.ids[name].values for name in names])
    lengths = torch.ones(len(names) * BATCH, dtype=torch.int32)

    def step() -> None:
        model(KeyedJaggedTensor(keys=names, values=values, lengths=lengths)).values().backward(gradient)

    return step
