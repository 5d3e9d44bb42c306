"""From a dense model and a topology to what trains: one ordered recipe."""

from typing import Any

import torch
from torch import nn

from megarec.config.sections import RunConfig
from megarec.parallel.collectives import Channel, Ledger
from megarec.parallel.compiled import compile_layers
from megarec.parallel.materialize import materialize_and_fill
from megarec.parallel.mpu import model_parallel_unit, set_deepspeed_groups
from megarec.parallel.recompute import recompute_layers
from megarec.parallel.tensor import average_replicated_gradients, shard_mlps
from megarec.topology import Topology
from megarec.training.engine import build_engine, check_precision, refusals_of_deepspeed


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
    compile_layers(model, config.dense, config.deepspeed, device)
    recompute_layers(model, config.dense.recompute)
    mpu = model_parallel_unit(topology)
    check_precision(config.deepspeed)
    set_deepspeed_groups(topology, mpu, config.deepspeed)
    with refusals_of_deepspeed():
        materialize_and_fill(model, config.train.seed, device, config.deepspeed, mpu)
    average_replicated_gradients(model, tensor)
    return build_engine(model, config, topology, mpu)
