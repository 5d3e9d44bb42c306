"""Whether a run can fit its machine at all: a lower bound, by arithmetic, before anything is built.

tools/rehearse.py measures; this only keeps a slip of the pen (a width with three zeros too many, a table of 10^12 rows)
from ending in the kernel's out-of-memory killer, or in minutes of allocation first.
"""

import os
from collections.abc import Sequence
from pathlib import Path

import torch

from megarec.config.sections import RunConfig
from megarec.dense.settings import settings_of
from megarec.distributed.topology import Topology
from megarec.errors import UserError
from megarec.run.spec import ModelSpec
from megarec.sparse.placement import Shard
from megarec.sparse.run_placement import place_run
from megarec.sparse.tables.optimizers import table_bytes

GIB = 2**30
_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


def check_fits(config: RunConfig, spec: ModelSpec, topology: Topology, device: torch.device) -> None:
    """Compare what the ranks of this machine need at least with what it has.

    Raises:
        UserError: one line with the arithmetic.
    """
    on_cpu = device.type == "cpu"
    here = int(os.environ.get("LOCAL_WORLD_SIZE") or 1) if on_cpu else 1
    first = topology.rank - topology.rank % here
    shards = [s for s in place_run(config, spec.layout, spec.towers, topology) if first <= s.rank < first + here]
    needs = {
        f"tables {_rows(shards)} rows": table_bytes(shards, config.embedding),
        f"dense {spec.cost.dense_parameters:,} parameters": here * least_dense_bytes(config, spec, topology, on_cpu),
        f"step {config.data.batch_size:,} examples": here * least_step_bytes(config, spec, topology),
    }
    total, there = sum(needs.values()), memory_of(device)
    if total > there:
        parts = " + ".join(f"{size / GIB:,.1f} ({name})" for name, size in needs.items())
        where = f"this machine's {here} ranks" if on_cpu else "this rank's GPU"
        raise UserError(
            f"{where} need at least {total / GIB:,.1f} GiB = {parts}, and there are {there / GIB:,.1f} GiB; take more "
            "ranks, a smaller model.dim, data.batch_size or tables; tools/rehearse.py has the parts"
        )


def _rows(shards: Sequence[Shard]) -> str:
    return f"{sum(shard.rows for shard in shards):,}"


def least_dense_bytes(config: RunConfig, spec: ModelSpec, topology: Topology, on_cpu: bool) -> int:
    """Least bytes of weights, gradients, masters and optimizer states of one rank."""
    settings = settings_of(config.deepspeed)
    width, shards = settings.dtype.itemsize, topology.data_size
    weights = width / (shards if settings.stage == 3 else 1)
    states = {"adamw": 2, "sgd": 0}[config.dense.optimizer] if "optimizer" not in config.deepspeed else 0
    kept = 4 * (states + (width < 4)) / (shards if settings.stage else 1)
    offloaded = not on_cpu and settings.zero.offload_optimizer is not None
    return int(spec.cost.dense_parameters / topology.tensor_size * (weights + (0 if offloaded else kept)))


def least_step_bytes(config: RunConfig, spec: ModelSpec, topology: Topology) -> int:
    """Least bytes of the looked-up embeddings and their gradients on one rank."""
    return 2 * 4 * spec.layout.width * (config.data.batch_size // topology.world_size)


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
