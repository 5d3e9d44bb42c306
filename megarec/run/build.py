"""From a config to everything that trains: one ordered recipe."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megarec.config.deepspeed import micro_batch_size, monitor_sections, without_monitors
from megarec.config.sections import DataConfig, RunConfig
from megarec.config.towers import IdentityTowerConfig
from megarec.data.columns import group_codes
from megarec.data.loader import EpochLoader, EvalLoader, Source
from megarec.data.schema import Schema, Split, load_schema, selected
from megarec.data.store import open_split
from megarec.data.stream import open_training
from megarec.dense.engine import layer_norm_factory
from megarec.dense.parallelize import parallelize
from megarec.dense.settings import settings_of
from megarec.dense.side import DenseSide
from megarec.distributed.collectives import MESSAGE_TYPES, Ledger, WireDtypes, raise_together
from megarec.distributed.process import describe_device, threads_that_pay
from megarec.distributed.topology import Topology, build_topology, check_groups, separate_groups
from megarec.errors import UserError
from megarec.run.averages import Averages
from megarec.run.fits import check_fits
from megarec.run.metrics import Predictions
from megarec.run.rounding import rounding_warning
from megarec.run.schedule import Schedule
from megarec.run.spec import ModelSpec, resolve
from megarec.sparse.placement import Shard
from megarec.sparse.run_placement import explain, place_run
from megarec.sparse.side import SparseSide
from megarec.sparse.towers.replicas import resolve_optimizer


@dataclass(frozen=True)
class Run:
    """Everything that trains; built once, passed explicitly.

    Attributes:
        choices: what was chosen and why, for the log.
        rounding: why another topology's losses will differ, if they will.
        skipped_rows: by split and reason.
    """

    config: RunConfig
    device: torch.device
    topology: Topology
    schema: Schema
    spec: ModelSpec
    train: EpochLoader
    valid: EvalLoader
    test: EvalLoader
    sparse: SparseSide
    dense: DenseSide
    averages: Averages
    schedule: Schedule
    ledger: Ledger
    overlap: bool
    choices: tuple[str, ...]
    rounding: str | None
    skipped_rows: dict[str, dict[str, int]]


def build_run(config: RunConfig, device: torch.device, *, watched: bool = False) -> Run:
    """Build data, topology, sparse side, dense model and engine of a run, in this order; collective.

    Args:
        watched: open TensorBoard and the other monitors of the deepspeed section; a probe or a test writes nothing.

    Raises:
        UserError: a mistake of the user, before anything is trained or written.
    """
    topology = build_topology(config.parallel.ranks_per_host, config.parallel.tensor)
    check_groups(topology, device)
    examples = micro_batch_size(config, topology.world_size)  # fails on the arithmetic before any data is read

    path = Path(config.data.path)
    data = config.data
    schema = selected(load_schema(path), data)
    loading: dict[str, Any] = {
        "batch_size": data.batch_size,
        "rank": topology.rank,
        "world_size": topology.world_size,
        "seed": config.train.seed,
        "prefetch": data.prefetch,
        "pin_memory": device.type != "cpu",
    }
    train = open_training(data, schema, **loading)
    splits: tuple[Split, ...] = ("valid", "test")
    valid, test = (_held_out(data, split, schema, topology, device, loading) for split in splits)
    stores: dict[Split, Source] = {"train": train.store, "valid": valid.store, "test": test.store}

    spec = resolve(config, schema)
    check_fits(config, spec, topology, device, {split: len(store) for split, store in stores.items()})
    config = config.model_copy(update={"model": spec.sizes})  # from here on every size is explicit
    section = without_monitors(config.deepspeed)
    if watched:
        section = monitor_sections(config.deepspeed, Path(config.train.output_dir))
    model = build_model(config.model_copy(update={"deepspeed": section}), spec, topology, device)
    for store in stores.values():
        store.arrange(model.sparse.id_order, [sequence.features for sequence in config.model.sequences])
    if device.type == "cpu" and config.train.threads is None:
        torch.set_num_threads(threads_that_pay(torch.get_num_threads(), examples * spec.cost.flop))

    total_steps = config.train.epochs * train.steps_per_epoch
    if config.train.max_steps is not None:
        total_steps = min(total_steps, config.train.max_steps)
    choices = (
        f"device: {describe_device(device)}",
        f"topology: {topology.describe()}",
        f"data: {schema.name}, {', '.join(f'{len(store):,} {split}' for split, store in stores.items())} examples",
        *model.choices,
    )
    skipped: dict[str, dict[str, int]] = {split: store.skipped for split, store in stores.items() if store.skipped}
    schedule = Schedule(config.schedule, total_steps, train.steps_per_epoch)
    return Run(
        config=config,
        device=device,
        topology=topology,
        schema=schema,
        spec=spec,
        train=train,
        valid=valid,
        test=test,
        sparse=model.sparse,
        dense=model.dense,
        averages=Averages(config.train.ema, model.dense, model.sparse, spec.layout),
        schedule=schedule,
        ledger=model.ledger,
        overlap=overlaps(config, topology, device),
        choices=choices,
        rounding=rounding_warning(config, spec, total_steps),
        skipped_rows=skipped,
    )


def predictions_of(run: Run) -> Predictions:
    """The window of a run's predictions."""
    return Predictions(run.schema.tasks, run.config.train.best_label)


def _held_out(
    data: DataConfig, split: Split, schema: Schema, topology: Topology, device: torch.device, loading: dict[str, Any]
) -> EvalLoader:
    """The rows of validation or test; rank 0 has their groups, where the data name one; collective."""
    path = Path(data.path)
    store = open_split(path, split, schema, data.bad_rows, data.cache)
    groups, error = None, None
    if topology.rank == 0 and schema.group is not None:
        try:
            groups = group_codes(path, split, schema.group, schema, bool(store.skipped))
        except UserError as problem:
            error = problem
    if schema.group is not None:
        raise_together(error, topology, device)
    return EvalLoader(store, schema, **loading, groups=groups)


def overlaps(config: RunConfig, topology: Topology, device: torch.device) -> bool:
    """Whether the ids of the next batch, the embeddings of micro-batches, and dense gradients travel while a step
    computes: as configured, else where they cross hosts or an accelerator computes."""
    if config.parallel.overlap is not None:
        return config.parallel.overlap
    return topology.hosts > 1 or device.type != "cpu"


@dataclass(frozen=True)
class Model:
    """Both sides of a model on one rank.

    Attributes:
        choices: what was chosen and why, for the log.
    """

    sparse: SparseSide
    dense: DenseSide
    ledger: Ledger
    choices: tuple[str, ...]


def build_model(
    config: RunConfig,
    spec: ModelSpec,
    topology: Topology,
    device: torch.device,
    shards: tuple[Shard, ...] | None = None,
) -> Model:
    """Build sparse side, dense model and engine; no data are read; collective.

    Args:
        spec: the model that `config` asks for.
        shards: the placement of all tables; None: as the config asks.

    Raises:
        UserError: ranks, tables or the DeepSpeed section do not fit together.
    """
    layout, towers, cost = spec.layout, spec.towers, spec.cost
    ledger = Ledger()
    module = config.tower_module
    sparse = SparseSide(
        layout,
        config.embedding,
        topology,
        seed=config.train.seed,
        device=device,
        ledger=ledger,
        exchange=config.parallel.exchange,
        towers=towers,
        tower_optimizer=None if isinstance(module, IdentityTowerConfig) else resolve_optimizer(module, config.dense),
        messages=WireDtypes(*(MESSAGE_TYPES[name] for name in config.parallel.messages)),
        # fp16 is too narrow for the gradients of embeddings, which are of the type of the embeddings.
        dtype=torch.bfloat16 if settings_of(config.deepspeed).dtype is torch.bfloat16 else torch.float32,
        ids=separate_groups(topology) if overlaps(config, topology, device) else None,
        shards=place_run(config, layout, towers, topology) if shards is None else shards,
        overlap=overlaps(config, topology, device),
    )

    norm, norm_reason = layer_norm_factory(config.train.fused_kernels == "auto" and spec.sizes.bias)
    overlap = overlaps(config, topology, device)
    dense = parallelize(spec.meta_model(norm), config, topology, device, ledger, overlap)

    choices = (
        f"model: {spec.sizes.name}, {cost.dense_parameters:,} dense + {cost.sparse_parameters:,} sparse parameters, "
        f"{cost.flop / 1e9:.4f} training GFLOP/example",
        *spec.reasons,
        f"dense: ZeRO {dense.zero_stage}, optimizer {dense.reason}; {norm_reason}",
        *(explain(config, layout, towers, topology).lines() if shards is None else ()),
        *sparse.describe(),
    )
    return Model(sparse, dense, ledger, choices)
