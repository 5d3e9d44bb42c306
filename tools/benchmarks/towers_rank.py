"""One rank of `bench.py towers`: reads orders as JSON lines from standard input, answers each with a JSON line.

    {"model": "dlrm", "variant": "tower, compression 4", "work": "exchange", "repetitions": 8}  ->  {"ms": [...], ...}

Started on every slot of the lab with RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT set.
"""

import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.functional import binary_cross_entropy_with_logits

from megarec.config.sections import RunConfig
from megarec.data.batch import Batch, Ids
from megarec.data.schema import CategoricalFeature, Schema
from megarec.distributed.process import start_process
from megarec.distributed.topology import build_topology
from megarec.planning.measure import machine
from megarec.run.build import build_model
from megarec.run.spec import resolve
from megarec.training.id_prefetch import IdPrefetcher
from megarec.training.profiling import StepTimer, tracing
from megarec.training.step import train_step

TABLES, ROWS, COLUMNS, NUMERIC, BATCH = 26, 20_000, 64, 13, 2_048
MODELS: dict[str, dict[str, Any]] = {
    "dlrm": {"name": "dlrm", "dim": COLUMNS, "numeric_mlp": [512, 256], "head": [512, 512, 256]},
    "wukong": {
        "name": "wukong", "dim": COLUMNS, "numeric_mlp": [512, 256], "layers": 2, "num_fm": 8, "num_lcb": 8, "rank": 8,
        "mlp": [256], "head": [256],
    },
}  # fmt: skip
RATE, EPS = 0.05, 1e-8


@dataclass
class Contestant:
    """A variant that is ready to run.

    Attributes:
        step: a whole training step.
        exchange: the sparse side alone: ids out, embeddings in, gradients back, update.
        cross_host_bytes: what this rank sent to other hosts so far in the exchange.
        flop: of a step and rank.
    """

    step: Callable[[], None]
    exchange: Callable[[], None]
    cross_host_bytes: Callable[[], int] | None
    flop: float = 0.0


def main() -> None:
    torch.set_num_threads(1)
    built: dict[tuple[str, str], Contestant] = {}
    for line in sys.stdin:
        order = json.loads(line)
        if "overlap" in order:
            print(json.dumps(exposed_ids(order["overlap"], order["steps"])), flush=True)
            continue
        if "machine" in order:
            print(json.dumps(this_machine()), flush=True)
            continue
        key = (order["model"], order["variant"])
        if key not in built:
            built[key] = build(*key)
        print(json.dumps(measure(built[key], order["work"], order["repetitions"])), flush=True)


def build(model: str, variant: str) -> Contestant:
    if variant.startswith("torchrec flat"):
        return _torchrec(model, "16-bit messages" in variant)
    return _megarec(model, variant)


def measure(contestant: Contestant, work: Literal["exchange", "step"], repetitions: int) -> dict[str, Any]:
    """Milliseconds of each repetition, and what one sends to other hosts by the ledger."""
    run = contestant.exchange if work == "exchange" else contestant.step
    sent = contestant.cross_host_bytes() if contestant.cross_host_bytes else 0
    milliseconds = []
    for _ in range(repetitions):
        dist.barrier()
        start = time.perf_counter()
        run()
        milliseconds.append(1e3 * (time.perf_counter() - start))
    across = (contestant.cross_host_bytes() - sent) // repetitions if contestant.cross_host_bytes else None
    return {"ms": milliseconds, "cross_host_bytes": across, "flop": contestant.flop}


def this_machine() -> dict[str, Any]:
    """What `plan --measure` writes, of this job's ranks and links."""
    if not dist.is_initialized():
        _start()
    return machine(_config("dlrm", "flat"), torch.device("cpu"), build_topology(None, tensor=1))


def exposed_ids(overlap: bool, steps: int) -> dict[str, Any]:
    """Train with the tower exchange on lists of ids; milliseconds a step that training waits for ids, by the trace."""
    if not dist.is_initialized():
        _start()
    config = _config("dlrm", "tower, overlap" if overlap else "tower, no overlap")
    topology, device = build_topology(None, tensor=1), torch.device("cpu")
    built = build_model(config, resolve(config, _schema(lists=True)), topology, device)
    built.dense.set_learning_rate(1e-3)
    ahead, clock = IdPrefetcher(built.sparse, device, overlap), StepTimer(device)
    batches = [_batch(topology.rank * 100 + step, lists=True) for step in range(steps + 2)]
    seconds = []
    with tempfile.TemporaryDirectory() as directory:
        with tracing((3, steps + 2), Path(directory), topology.rank) as step_done:
            for pending, start_next in ahead.steps(iter(batches), clock):
                start = time.perf_counter()
                batch, ids = pending()
                train_step(built.dense, built.sparse, batch, timer=clock, ids=ids,
                    after_lookup=start_next,
                    meanwhile=start_next,
                )  # fmt: skip
                seconds.append(time.perf_counter() - start)
                step_done()
        (trace,) = Path(directory).glob("*.json")
        events = json.loads(trace.read_text())["traceEvents"]
    name = "wait for ids" if overlap else "distribute ids"
    waited = [event["dur"] for event in events if event.get("name") == name and event.get("cat") == "user_annotation"]
    step_ms = 1e3 * statistics.median(seconds[2:])
    return {"exposed_ms": sum(waited) / 1e3 / steps, "step_ms": step_ms, "waits": len(waited)}


def _config(model: str, variant: str, ranks: int | None = None) -> RunConfig:
    """`variant` is "flat", "tower" (SPTT alone) or "tower, compression C"; then "overlap" of ids, "16-bit messages"
    and "N micro-batches" that travel one by one, where it says so.

    Args:
        ranks: of the job; None: of this one.
    """
    exchange, *more = variant.split(", ")
    parallel: dict[str, Any] = {"exchange": exchange}
    if "overlap" in more or "no overlap" in more:
        parallel["overlap"] = "overlap" in more
    section: dict[str, Any] = {"name": "identity"}
    if exchange == "tower":
        parallel["towers"] = 2
    if "16-bit messages" in more:
        parallel["messages"] = ["fp16", "fp16"]
    micro_batches = next((int(part.split()[0]) for part in more if part.endswith("micro-batches")), 1)
    if micro_batches > 1:
        parallel["overlap"] = True
    for compression in (float(part.split()[-1]) for part in more if part.startswith("compression")):
        section = {"name": model, "compression": compression}
        if model == "wukong":
            section |= {"rank": 8, "mlp": [128]}
    return RunConfig.model_validate(
        {
            "model": MODELS[model],
            "data": {"path": "-", "batch_size": BATCH * (ranks or dist.get_world_size())},
            "embedding": {"optimizer": "rowwise_adagrad", "learning_rate": RATE, "eps": EPS},
            "dense": {"optimizer": "sgd"},
            "parallel": parallel,
            "tower_module": section,
            "train": {"threads": 1},
            "deepspeed": {
                "zero_optimization": {"stage": 0},
                "gradient_clipping": 0.0,
                "gradient_accumulation_steps": micro_batches,
            },
        }
    )


def _schema(lists: bool = False) -> Schema:
    """26 features; with `lists` every other one is multi-valued."""
    return Schema(
        name="bench",
        label_rule="random",
        categorical=tuple(
            CategoricalFeature(name=f"feature_{i}", rows=ROWS, multi_valued=lists and i % 2 == 1) for i in range(TABLES)
        ),
        numeric=tuple(f"numeric_{i}" for i in range(NUMERIC)),
        rows={"train": 0, "valid": 0, "test": 0},
        source="synthetic",
    )


def _start() -> None:
    start_process(RunConfig.model_validate({"model": MODELS["dlrm"], "data": {"path": "-"}, "train": {"threads": 1}}))


def _megarec(model: str, variant: str) -> Contestant:
    if not dist.is_initialized():
        _start()
    config = _config(model, variant)
    spec = resolve(config, _schema())
    device = torch.device("cpu")
    topology = build_topology(None, tensor=1)
    built = build_model(config, spec, topology, device)
    built.dense.set_learning_rate(1e-3)
    batch, clock = _batch(topology.rank), StepTimer(device)
    with torch.no_grad():
        gradient = torch.randn_like(built.sparse.look_up(batch).values) / BATCH

    def step() -> None:
        train_step(built.dense, built.sparse, batch, timer=clock)

    def exchange() -> None:
        lookup = built.sparse.look_up(batch)
        _ = lookup.values  # waits for them and lays them out
        lookup.backward(gradient)
        lookup.apply()

    def sent() -> int:
        return sum(row["cross_host_bytes"] for row in built.ledger.rows())

    return Contestant(step, exchange, sent, spec.cost.flop * BATCH)


def _batch(seed: int, lists: bool = False) -> Batch:
    """Uniformly random ids; with `lists` every other feature has 0 to 20 of them."""
    generator = torch.Generator().manual_seed(seed)
    ids = {}
    for i in range(TABLES):
        lengths = torch.randint(21, (BATCH,), generator=generator) if lists and i % 2 == 1 else None
        count = BATCH if lengths is None else int(lengths.sum())
        ids[f"feature_{i}"] = Ids(torch.randint(ROWS, (count,), generator=generator), lengths)
    labels = torch.randint(2, (BATCH,), generator=generator).float()
    numeric = torch.randn(BATCH, NUMERIC, generator=generator)
    return Batch(numeric, ids, labels, torch.arange(BATCH), BATCH)


def _torchrec(model: str, in_16_bits: bool) -> Contestant:
    """TorchRec's own DLRM as its documentation trains it: whole tables, fused row-wise Adagrad, DDP for the MLPs; in 16
    bits with its own codecs around the all-to-all of embeddings and gradients."""
    assert model == "dlrm", "TorchRec has no Wukong"
    world_size = dist.get_world_size()
    os.environ["LOCAL_WORLD_SIZE"] = os.environ["LOCAL_SIZE"]
    from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, KeyedJaggedTensor
    from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
    from torchrec.distributed.fbgemm_qcomm_codec import CommType, QCommsConfig, get_qcomm_codecs_registry
    from torchrec.distributed.model_parallel import DistributedModelParallel
    from torchrec.distributed.planner import EmbeddingShardingPlanner, Topology
    from torchrec.distributed.planner.types import ParameterConstraints
    from torchrec.distributed.types import ShardingEnv
    from torchrec.models.dlrm import DLRM
    from torchrec.optim import RowWiseAdagrad
    from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward

    names = [f"feature_{i}" for i in range(TABLES)]
    tables = [
        EmbeddingBagConfig(name=name, embedding_dim=COLUMNS, num_embeddings=ROWS, feature_names=[name])
        for name in names
    ]
    collection = EmbeddingBagCollection(device=torch.device("meta"), tables=tables)
    apply_optimizer_in_backward(RowWiseAdagrad, collection.parameters(), {"lr": RATE, "eps": EPS})
    dlrm = DLRM(collection, NUMERIC, [512, 256, COLUMNS], [512, 512, 256, 1], dense_device=torch.device("cpu"))
    codecs = QCommsConfig(CommType.FP16, CommType.FP16) if in_16_bits else QCommsConfig()
    registry = get_qcomm_codecs_registry(codecs, device=torch.device("cpu"))
    sharders: list[Any] = [EmbeddingBagCollectionSharder(qcomm_codecs_registry=registry)]
    local = int(os.environ["LOCAL_SIZE"])
    world = dist.group.WORLD
    planner = EmbeddingShardingPlanner(
        topology=Topology(world_size=world_size, compute_device="cpu", local_world_size=local),
        constraints={name: ParameterConstraints(["table_wise"], ["fused"]) for name in names},
    )
    parallel = DistributedModelParallel(
        dlrm,
        env=ShardingEnv.from_process_group(world),
        device=torch.device("cpu"),
        plan=planner.collective_plan(dlrm, sharders, world),
        sharders=sharders,
    )
    batch = _batch(dist.get_rank())
    values = torch.cat([batch.ids[name].values for name in names])
    lengths = torch.ones(len(names) * BATCH, dtype=torch.int32)
    dense = torch.optim.SGD([p for n, p in parallel.named_parameters() if "embedding_bag" not in n], 1e-3)
    sharded: nn.Module = parallel.module.sparse_arch.embedding_bag_collection
    gradient = torch.randn(BATCH, TABLES * COLUMNS) / (BATCH * world_size)

    def features() -> Any:
        return KeyedJaggedTensor(keys=names, values=values, lengths=lengths)

    def step() -> None:
        dense.zero_grad()
        logits = parallel(batch.numeric, features()).squeeze(1)
        binary_cross_entropy_with_logits(logits, batch.labels).backward()
        dense.step()

    def exchange() -> None:
        sharded(features()).values().backward(gradient)

    return Contestant(step, exchange, None)


if __name__ == "__main__":
    main()
