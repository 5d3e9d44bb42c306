"""The tensor and data groups in the form in which DeepSpeed asks for them."""

from dataclasses import dataclass

import torch.distributed as dist

from megarec.topology import Topology


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
    if data is None:  # one rank: DeepSpeed wants a group all the same
        alone = [dist.new_group([rank]) for rank in range(topology.world_size)]
        data = alone[topology.rank]
    return ModelParallelUnit(topology, topology.tensor, data)
