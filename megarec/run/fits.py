"""Whether a run can fit its machine at all: a lower bound, by arithmetic, before anything is built.

tools/rehearse.py measures; this only keeps a typo (a width with three zeros too many, a table of 10^12 rows)
from ending in the kernel's out-of-memory killer, or in minutes of allocation first.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from megarec.config.deepspeed import micro_batch_size
from megarec.config.sections import RunConfig
from megarec.data.schema import Split
from megarec.dense.layers import recompute_layers
from megarec.dense.memory import saved_activations
from megarec.dense.settings import settings_of
from megarec.distributed.topology import Topology
from megarec.errors import UserError
from megarec.run.spec import ModelSpec
from megarec.sparse.run_placement import place_run
from megarec.sparse.tables.optimizers import table_bytes

GIB = 2**30
_THREAD_LIMITS = ("/sys/fs/cgroup/pids.max", "/sys/fs/cgroup/pids/pids.max", "/proc/sys/kernel/threads-max")
_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


@dataclass(frozen=True)
class Need:
    """The least bytes that are needed, and for what.

    Attributes:
        what: for people.
    """

    what: str
    bytes: int


def check_fits(
    config: RunConfig, spec: ModelSpec, topology: Topology, device: torch.device, examples: Mapping[Split, int]
) -> None:
    """Compare the least memory that this machine's ranks need with what it has.

    Args:
        examples: of each split.

    Raises:
        UserError: one line with the arithmetic.
    """
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE") or 1)
    machine = f"this machine, for its {ranks} ranks," if ranks > 1 else "this machine"
    check_threads(config, ranks)
    host = host_needs(config, spec, topology, ranks, examples)
    if device.type == "cpu":
        first = topology.rank - topology.rank % ranks
        here = range(first, min(first + ranks, topology.world_size))
        _compare(device_needs(config, spec, topology, here, examples, device) + host, device, machine)
    else:
        own = device_needs(config, spec, topology, [topology.rank], examples, device)
        _compare(own, device, "this rank's GPU")
        _compare(host + offloaded(config, spec, topology, ranks), torch.device("cpu"), machine)


def _compare(needs: Sequence[Need], device: torch.device, where: str) -> None:
    total, there = sum(need.bytes for need in needs), memory_of(device)
    if total > there:
        parts = " + ".join(f"{need.bytes / GIB:,.1f} ({need.what})" for need in needs)
        raise UserError(
            f"{where} must have at least {total / GIB:,.1f} GiB = {parts}, and there are {there / GIB:,.1f} GiB; "
            "take more ranks, a smaller model.dim, data.batch_size or tables; tools/rehearse.py has the parts"
        )


def device_needs(
    config: RunConfig,
    spec: ModelSpec,
    topology: Topology,
    ranks: Sequence[int],
    examples: Mapping[Split, int],
    device: torch.device,
) -> list[Need]:
    """What these ranks of one machine hold where they compute."""
    shards = [shard for shard in place_run(config, spec.layout, spec.towers, topology) if shard.rank in ranks]
    rows, count, on_cpu = sum(shard.rows for shard in shards), len(ranks), device.type == "cpu"
    return [
        Need(f"tables {rows:,} rows", table_bytes(shards, config.embedding)),
        Need(
            f"dense {_dense_parameters(spec):,} parameters", count * least_dense_bytes(config, spec, topology, on_cpu)
        ),
        Need(f"step {config.data.batch_size:,} examples", count * least_step_bytes(config, spec, topology)),
        Need("reduce_bucket_size", count * least_bucket_bytes(config, topology, device)),
        kept_predictions(config, topology, ranks, examples),
    ]


def host_needs(
    config: RunConfig, spec: ModelSpec, topology: Topology, ranks: int, examples: Mapping[Split, int]
) -> list[Need]:
    """The memory of the machine that its ranks hold, whatever the device."""
    share = config.data.batch_size // topology.world_size
    batches = min(config.data.prefetch, examples["train"] // config.data.batch_size)
    width = 4 if all(table.rows < 2**31 for table in spec.layout.tables) else 8  # of an id, or a list's length
    row = 8 + 4 * spec.labels + 4 * config.data.weighted + 4 * spec.numeric
    row += width * sum(max(1, feature.positions) for feature in spec.layout.looked_up)
    needs = [Need(f"data.prefetch {batches:,} batches", ranks * batches * share * row)]
    if (stream := config.data.stream_rows) is not None:
        held = min(2 * stream, examples["train"])  # two windows over all ranks
        needs.append(Need(f"data.stream_rows {stream:,} rows", held * (row + 16) * ranks // topology.world_size))
    return needs


def offloaded(config: RunConfig, spec: ModelSpec, topology: Topology, ranks: int) -> list[Need]:
    """What GPU ranks of one machine keep in its memory, by deepspeed.zero_optimization.offload_optimizer."""
    settings = settings_of(config.deepspeed)
    if settings.zero.offload_optimizer is None or settings.zero.offload_optimizer.device != "cpu":
        return []
    return [Need("offloaded optimizer states", ranks * _state_bytes(config, spec, topology))]


def _dense_parameters(spec: ModelSpec) -> int:
    """Of the dense model under the engine; tower modules are not: a rank has those of its host alone."""
    towers = spec.cost.layers.get("towers", {})
    return spec.cost.dense_parameters - sum(part.parameters for part in towers.values())


def least_dense_bytes(config: RunConfig, spec: ModelSpec, topology: Topology, on_cpu: bool) -> int:
    """Least bytes of weights, gradients, masters and optimizer states of one rank."""
    settings = settings_of(config.deepspeed)
    zero = settings.zero
    weights = settings.dtype.itemsize / (topology.data_size if settings.stage == 3 else 1)
    weights = 0 if not on_cpu and zero.offload_param is not None else weights
    kept = 0 if not on_cpu and zero.offload_optimizer is not None else _state_bytes(config, spec, topology)
    return int(_dense_parameters(spec) / topology.tensor_size * weights) + kept


def _state_bytes(config: RunConfig, spec: ModelSpec, topology: Topology) -> int:
    """Masters and optimizer states of one rank."""
    settings = settings_of(config.deepspeed)
    states = {"adamw": 2, "adam": 2, "sgd": 0}[config.dense.optimizer] if "optimizer" not in config.deepspeed else 0
    shards = topology.data_size if settings.stage else 1
    return int(4 * (states + (settings.dtype.itemsize < 4)) * _dense_parameters(spec) / topology.tensor_size / shards)


def least_step_bytes(config: RunConfig, spec: ModelSpec, topology: Topology) -> int:
    """Least bytes of the looked-up embeddings, their gradients, and what a micro-batch saves, on one rank."""
    looked_up = 2 * 4 * spec.arriving * (config.data.batch_size // topology.world_size)
    if config.dense.compile:
        return looked_up  # it saves less, by an unknown amount
    return looked_up + activation_bytes(config, spec, micro_batch_size(config, topology.world_size))


def activation_bytes(config: RunConfig, spec: ModelSpec, micro_batch: int) -> int:
    """What the dense model saves for the backward pass of a micro-batch: its forward pass, run on the meta device.

    Tensor parallelism holds no activation twice, so the whole model on the rank's own examples saves as much.
    """
    model = spec.meta_model().to(settings_of(config.deepspeed).dtype)
    recompute_layers(model, config.dense.recompute)
    kept: dict[str, int] = {}
    with torch.device("meta"), saved_activations(kept, model):
        embedded = torch.empty(micro_batch, model.width, requires_grad=True)
        keys = torch.empty(micro_batch, dtype=torch.int64)
        model(torch.empty(micro_batch, spec.numeric), embedded, keys)
    return kept["bytes"]


def least_bucket_bytes(config: RunConfig, topology: Topology, device: torch.device) -> int:
    """The buffer that ZeRO allocates before it reduces gradients; a CPU has memory behind it only once it is filled,
    but gives none that is larger than all there is."""
    settings = settings_of(config.deepspeed)
    if settings.stage < 2 or not settings.zero.contiguous_gradients:
        return 0
    bucket = int(settings.zero.reduce_bucket_size) * settings.dtype.itemsize
    return bucket if device.type != "cpu" or bucket > memory_of(device) else 0


def kept_predictions(
    config: RunConfig, topology: Topology, ranks: Sequence[int], examples: Mapping[Split, int]
) -> Need:
    """Logits and labels between two log lines, or of a split that is evaluated; rank 0 gathers those of all ranks."""
    train = config.train
    steps = train.epochs * (examples["train"] // config.data.batch_size)
    window = min(train.log_every, steps if train.max_steps is None else min(steps, train.max_steps))
    most, what = max(
        (window * config.data.batch_size, f"train.log_every {window:,} steps"),
        *((examples[split], f"{split} split") for split in ("valid", "test")),
    )
    labels = len(config.data.label) if isinstance(config.data.label, list) else 1
    own = 2 * 4 * labels * most // topology.world_size
    return Need(f"predictions of {what}", len(ranks) * own + (own * topology.world_size if 0 in ranks else 0))


def check_threads(config: RunConfig, ranks: int) -> None:
    """Raise a UserError where the ranks of this machine ask for more threads than it allows."""
    wanted, (allowed, where) = (config.train.threads or 1) * ranks, min(_thread_limits())
    if wanted > allowed:
        raise UserError(
            f"train.threads={config.train.threads} x {ranks} ranks of this machine = {wanted:,} threads, and {where} "
            f"allows {allowed:,}; leave train.threads out, a rank then takes its share of the cores"
        )


def _thread_limits() -> list[tuple[int, str]]:
    """(limit of threads, its source), of this machine and its container."""
    found = [(2**22, "Linux")]  # its largest number of processes
    for path in map(Path, _THREAD_LIMITS):
        if path.is_file() and path.read_text().strip().isdigit():
            found.append((int(path.read_text()), str(path)))
    return found


def memory_of(device: torch.device) -> int:
    """All of a GPU's memory; or the machine's, or what a cgroup allows of it."""
    if device.type != "cpu":
        return int(torch.cuda.get_device_properties(device).total_memory)
    lines = Path("/proc/meminfo").read_text().splitlines()
    total = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemTotal:"))
    swap = next((int(line.split()[1]) * 1024 for line in lines if line.startswith("SwapTotal:")), 0)
    for limit in map(Path, _LIMITS):
        if limit.is_file() and limit.read_text().strip().isdigit():
            total = min(total, int(limit.read_text()))
    return total + swap
