"""The tensor and data groups in the form that DeepSpeed needs."""

from dataclasses import dataclass
from typing import Any

import deepspeed
import torch.distributed as dist

from megarec.dense.settings import settings_of
from megarec.distributed.topology import Topology, group_ranks
from megarec.errors import UserError


@dataclass(frozen=True)
class ModelParallelUnit:
    """DeepSpeed's `mpu`: it shards and averages over the data group, and sums squares over the tensor group."""

    topology: Topology
    tensor: dist.ProcessGroup
    data: dist.ProcessGroup

    def get_model_parallel_rank(self) -> int:
        return self.topology.rank % self.topology.tensor_size

    def get_model_parallel_world_size(self) -> int:
        return self.topology.tensor_size

    def get_model_parallel_group(self) -> dist.ProcessGroup:
        return self.tensor

    def get_data_parallel_rank(self) -> int:
        return self.topology.rank // self.topology.tensor_size

    def get_data_parallel_world_size(self) -> int:
        return self.topology.data_size

    def get_data_parallel_group(self) -> dist.ProcessGroup:
        return self.data

    get_tensor_model_parallel_rank = get_model_parallel_rank
    get_tensor_model_parallel_world_size = get_model_parallel_world_size
    get_tensor_model_parallel_group = get_model_parallel_group


def model_parallel_unit(topology: Topology) -> ModelParallelUnit | None:
    """None without tensor parallelism: DeepSpeed then takes all ranks as the data group. Collective."""
    if topology.tensor is None:
        return None
    data = topology.data
    if data is None:  # one rank: DeepSpeed still needs a group
        alone = [dist.new_group([rank]) for rank in range(topology.world_size)]
        data = alone[topology.rank]
    return ModelParallelUnit(topology, topology.tensor, data)


def set_deepspeed_groups(topology: Topology, mpu: ModelParallelUnit | None, section: dict[str, Any]) -> None:
    """Set the groups that DeepSpeed keeps in globals, which may be those of an earlier engine; collective.

    The secondary partition of ZeRO-3 (hpZ) lies among ranks of one host with the same place in their tensor group;
    DeepSpeed would take consecutive ranks, which under tensor parallelism hold different shards: silently wrong.

    Args:
        section: the DeepSpeed config.

    Raises:
        UserError: zero_hpz_partition_size does not divide the data ranks of a host.
    """
    deepspeed.utils.groups.mpu = mpu
    deepspeed.utils.groups._WORLD_GROUP = None  # kept from an engine of the same process, whose groups may be gone
    size = settings_of(section).zero.zero_hpz_partition_size
    data_ranks = topology.ranks_per_host // topology.tensor_size
    if size > 1 and data_ranks % size:
        raise UserError(
            f"deepspeed.zero_optimization.zero_hpz_partition_size={size} does not divide the {data_ranks} data ranks "
            f"of a host (parallel.ranks_per_host={topology.ranks_per_host} over parallel.tensor={topology.tensor_size})"
        )
    mine = None
    for ranks in secondary_partitions(topology, size) if size > 1 else []:
        group = dist.new_group(ranks)
        mine = group if topology.rank in ranks else mine
    deepspeed.utils.groups._ZERO_PARAM_INTRA_PARALLEL_GROUP = mine


def secondary_partitions(topology: Topology, size: int) -> list[list[int]]:
    """The ranks of every hpZ group: `size` data ranks of one host."""
    of_data = group_ranks(topology.world_size, topology.ranks_per_host, topology.tensor_size)["data"]
    return [ranks[start : start + size] for ranks in of_data for start in range(0, len(ranks), size)]
