"""From a dense model and a topology to what trains: one ordered recipe."""

from typing import Any

import torch
from torch import nn

from megarec.config.sections import RunConfig
from megarec.models.initial import initialize, materialize
from megarec.parallel.collectives import Channel, Ledger
from megarec.parallel.mpu import model_parallel_unit
from megarec.parallel.tensor import average_replicated_gradients, shard_mlps
from megarec.topology import Topology
from megarec.training.engine import build_engine


def parallelize(
    model: nn.Module, config: RunConfig, topology: Topology, device: torch.device, ledger: Ledger
) -> tuple[Any, str]:
    """Shard, fill and wrap a dense model; collective.

    Args:
        model: built on the meta device, so that no rank ever holds more than its part.
        device: where the parameters go.
        ledger: counts the bytes that tensor parallelism sends.

    Returns:
        The DeepSpeed engine, and a sentence that says which optimizer was taken and why.

    Raises:
        UserError: widths or batch do not divide, or DeepSpeed refuses its section.
    """
    tensor = Channel("tensor", topology.tensor, topology.rank % topology.tensor_size, topology.tensor_size, ledger)
    shard_mlps(model, tensor)
    materialize(model, device)
    initialize(model, config.train.seed)
    average_replicated_gradients(model, tensor)
    return build_engine(model, config, topology, model_parallel_unit(topology))
