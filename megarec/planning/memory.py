"""Bytes of one rank of a run, by part, predicted from its config and the features of its data; nothing is built.

Parts: `parameters`, `gradients`, `optimizer` and `step` of the dense side and its `communication` (zero.py);
`activations`, what a micro-batch saves for its backward pass; `exchange`, messages of the sparse side and what is
around them (exchange_memory.py); `tables`, the rank's shards with their optimizer state; `averages`, those of train.ema
(run/averages.py), which validation holds once more while they are the weights; `towers`, the rank's tower modules with
gradients, optimizer state and what a step saves for their backward pass. `runtime` is what an accelerator's libraries
take of its memory (held_memory.py). `snapshot` is what a checkpoint copies of the rank into the machine's memory,
page-locked where there is an accelerator: no part of the total, which a run reaches before its first one.
"""

import dataclasses
from collections.abc import Iterator, Sequence

import torch
from torch import nn

from megarec.config.deepspeed import micro_batch_size
from megarec.config.sections import RunConfig
from megarec.dense.memory import Parts, saved_activations
from megarec.dense.settings import settings_of
from megarec.dense.tensor_parallel import shard_mlps
from megarec.distributed.collectives import Channel, Ledger
from megarec.distributed.topology import Topology
from megarec.models.blocks import MLP
from megarec.models.norms import batch_norms
from megarec.planning.exchange_memory import exchange_bytes
from megarec.planning.held_memory import runtime_bytes
from megarec.planning.memo import Same, remembered
from megarec.planning.probes import dense_pass
from megarec.planning.traffic import placed, seen_by
from megarec.planning.zero import MASTER, dense_parts, partition_elements, zero_of
from megarec.run.fits import activation_bytes
from megarec.run.spec import ModelSpec
from megarec.sparse.placement import Shard
from megarec.sparse.run_placement import place_run
from megarec.sparse.tables.optimizers import table_bytes
from megarec.sparse.towers.modules import TowerModules
from megarec.sparse.towers.replicas import resolve_optimizer
from megarec.sparse.towers.sizes import ResolvedTowers

CPU = torch.device("cpu")
MODEL_STATES = ("parameters", "gradients", "optimizer")


def predict(
    config: RunConfig,
    spec: ModelSpec,
    topology: Topology,
    micro_batch: int,
    shards: Sequence[Shard] | None = None,
    device: torch.device = CPU,
    connected: bool = True,
) -> Parts:
    """Predicted bytes of a rank, by part; see `with_totals`.

    Args:
        spec: the model that `config` asks for.
        topology: the job and the rank; its groups are not looked at.
        micro_batch: examples of the rank in one micro-batch.
        shards: where all tables lie; None: as the config places them.
        device: where the rank computes.
        connected: whether there are other ranks and NCCL connects its groups; a rehearsal's are not there.

    Raises:
        UserError: ranks and tables do not fit together.
    """
    if shards is None:
        shards = place_run(config, spec.layout, spec.towers, topology)
    own = [shard for shard in shards if shard.rank == topology.rank]
    zero = zero_of(config, topology)
    sizes = parameter_sizes(spec, topology)
    parts = dense_parts(sizes, zero, dense_pass(config, spec).arrival)
    parts["exchange"] = exchange_bytes(
        config, spec, topology, shards, micro_batch, zero.accumulation, device, connected
    )
    # Beside what waits to be reduced: more than there is where their peaks do not meet.
    message = zero.width * micro_batch * (1 + topology.tensor_size) * message_columns(spec, topology)
    parts["communication"] += message
    parts["activations"] = _saved(config, spec, micro_batch)
    parts["activations"] += zero.width * micro_batch * scattered_columns(spec, topology)
    parts["tables"] = table_bytes(own, config.embedding)
    parts["towers"] = tower_bytes(config, spec.towers, micro_batch * zero.accumulation, topology)
    parts["averages"] = average_bytes(config, spec, topology, own)
    parts["runtime"], parts["cached"] = runtime_bytes(topology, device, connected), 0
    parts["snapshot"] = MASTER * (1 + zero.moments) * sum(sizes) // zero.ranks + parts["tables"]
    if config.train.ema is not None:
        copied = average_bytes(config, spec, topology, own) - MASTER * partition_elements(sizes, zero)
        parts["snapshot"] += MASTER * sum(sizes) // zero.ranks + copied
    return parts


def largest_rank(
    config: RunConfig,
    spec: ModelSpec,
    topology: Topology,
    device: torch.device = CPU,
    shards: Sequence[Shard] | None = None,
) -> Parts:
    """`predict` with totals, of the rank whose tables take most; the topology's own rank does not matter.

    Args:
        shards: `traffic.placed`; None: they are placed here.

    Raises:
        UserError: ranks, batch and tables do not fit together.
    """
    shards = placed(config, spec, topology) if shards is None else shards
    largest = dataclasses.replace(topology, rank=_holds_most(config, shards, topology.world_size))
    micro = micro_batch_size(config, topology.world_size)
    return with_totals(predict(config, spec, largest, micro, seen_by(shards, config, largest), device))


@remembered(lambda config, shards, ranks: (Same(shards), config.embedding.model_dump_json()))
def _holds_most(config: RunConfig, shards: Sequence[Shard], ranks: int) -> int:
    """The first of the ranks whose tables take most."""
    sizes, known = [0] * ranks, dict[tuple[str, int, int], int]()
    for shard in shards:  # there are millions, few of which differ in size
        key = shard.table, shard.row_stop - shard.row_start, shard.column_stop - shard.column_start
        if key not in known:
            known[key] = table_bytes([shard], config.embedding)
        sizes[shard.rank] += known[key]
    return sizes.index(max(sizes))


@remembered(
    lambda config, spec, examples: (Same(spec), examples, settings_of(config.deepspeed).dtype, config.dense.recompute)
)
def _saved(config: RunConfig, spec: ModelSpec, examples: int) -> int:
    return activation_bytes(config, spec, examples)


def with_totals(parts: Parts) -> Parts:
    """The parts, `model_states` (parameters, gradients, optimizer) and `total`.

    Activations and communication are gone when the optimizer steps; embeddings and their gradients are not, they wait
    for the tables' update. All are gone when averages take the place of weights, which are kept meanwhile. The largest
    of the three moments counts, each with the peak of `exchange`: more than there is where that comes at another one.
    """
    averages = parts.get("averages", 0)
    states = sum(parts[name] for name in MODEL_STATES)
    in_step = max(parts["activations"] + parts["communication"], parts["step"]) + parts["exchange"]
    moment = max(in_step, averages)
    sparse = parts["tables"] + parts["towers"] + averages
    outside = parts.get("process", 0) + parts.get("runtime", 0)
    return {**parts, "model_states": states, "total": states + sparse + moment + outside}


@remembered(lambda spec, topology: (Same(spec), topology.tensor_size, topology.rank % topology.tensor_size))
def parameter_sizes(spec: ModelSpec, topology: Topology) -> list[int]:
    """Elements of every dense parameter of the rank, as tensor parallelism shards it, in the model's order."""
    model = spec.meta_model()
    place_in_group = topology.rank % topology.tensor_size
    shard_mlps(model, Channel("tensor", None, place_in_group, topology.tensor_size, Ledger()))
    return [parameter.numel() for parameter in model.parameters()]


@remembered(lambda spec, topology: (Same(spec), topology.tensor_size))
def _statistics(spec: ModelSpec, topology: Topology) -> int:
    """Elements of the running statistics of a rank."""
    model = spec.meta_model()
    shard_mlps(model, Channel("tensor", None, 0, topology.tensor_size, Ledger()))
    return sum(2 * norm.running_mean.numel() for _, norm in batch_norms(model))


def average_bytes(config: RunConfig, spec: ModelSpec, topology: Topology, shards: Sequence[Shard]) -> int:
    """Averages of weights that a rank holds, float32: of its master weights, tables that are small enough, modules.

    Args:
        shards: those of other ranks may be among them.
    """
    ema = config.train.ema
    if ema is None:
        return 0
    elements = partition_elements(parameter_sizes(spec, topology), zero_of(config, topology))
    elements += _statistics(spec, topology)
    rows = {table.name: table.rows for table in spec.layout.tables}
    own = [shard for shard in shards if shard.rank == topology.rank]
    elements += sum(shard.rows * shard.columns for shard in own if rows[shard.table] <= ema.table_rows)
    towers, modules, _ = spec.towers
    if towers is not None and modules is not None:
        host, hosts = (topology.host, topology.hosts) if config.parallel.exchange == "tower" else (0, 1)
        layers = spec.cost.layers["towers"]
        elements += sum(layers[f"towers.{tower}"].parameters for tower in towers.of_host(host, hosts))
    return MASTER * elements


@remembered(lambda spec, topology: (Same(spec), topology.tensor_size))
def scattered_columns(spec: ModelSpec, topology: Topology) -> int:
    """Columns of an example that tensor-parallel MLPs save twice: the input of a last layer that is row-parallel by
    itself, as it was and as columns of all ranks' examples (dense/tensor_parallel.py)."""
    if topology.tensor_size == 1:
        return 0
    shared = _shared_mlps(spec, topology.tensor_size)
    return sum(linears[-1].in_features * (len(linears) % 2) for linears in shared)


@remembered(lambda spec, topology: (Same(spec), topology.tensor_size))
def message_columns(spec: ModelSpec, topology: Topology) -> int:
    """Columns of the largest message of tensor-parallel MLPs: inputs of their odd layers are gathered, and the results
    of the others added up, over the examples of all ranks (dense/tensor_parallel.py)."""
    if topology.tensor_size == 1:
        return 0
    found = 0
    for linears in _shared_mlps(spec, topology.tensor_size):
        for index, linear in enumerate(linears):
            gathered = index % 2 == 0 and index + 1 < len(linears)
            found = max(found, linear.in_features if gathered else linear.out_features)
    return found


def _shared_mlps(spec: ModelSpec, size: int) -> Iterator[list[nn.Linear]]:
    """The layers of each MLP that the ranks of a tensor group share."""
    for module in spec.meta_model().modules():
        if isinstance(module, MLP) and is_shared(module, size):
            yield [linear for linear in module.linears if isinstance(linear, nn.Linear)]


def is_shared(module: nn.Module, size: int) -> bool:
    """Whether the ranks of a tensor group share it: MLPs, but for a single layer whose inputs do not divide."""
    if not isinstance(module, MLP):
        return False
    first = module.linears[0]
    return len(module.linears) > 1 or (isinstance(first, nn.Linear) and first.in_features % size == 0)


@remembered(
    lambda config, resolved, examples, topology: (
        Same(resolved),
        examples,
        topology.host if config.parallel.exchange == "tower" else None,
        topology.hosts,
        config.dense.optimizer,
    )
)
def tower_bytes(config: RunConfig, resolved: ResolvedTowers, examples: int, topology: Topology) -> int:
    """Parameters, gradients, optimizer state and saved activations of the modules that a rank runs, all float32.

    Args:
        examples: of this rank in one step; under the tower exchange its modules see those of its peers as well.
    """
    towers, modules, _ = resolved
    if towers is None or modules is None:
        return 0
    host, hosts = (topology.host, topology.hosts) if config.parallel.exchange == "tower" else (0, 1)
    here = towers.of_host(host, hosts)
    columns = sum(modules.inputs[tower] for tower in here) * modules.width
    kept: dict[str, int] = {}
    with torch.device("meta"), saved_activations(kept):
        bank = TowerModules(modules, here)
        bank(torch.empty(examples * hosts, columns, requires_grad=True))
    copies = 2 if resolve_optimizer(modules.module, config.dense).optimizer == "sgd" else 4
    return 4 * copies * sum(parameter.numel() for parameter in bank.parameters()) + kept["bytes"]
