"""From a dense model and a topology to a trainable engine: one ordered recipe.

The model comes from the meta device. At ZeRO-3 it gets memory and first weights one parameter at a time, partitioned
before the next is made, and in the type in which the model computes: no rank ever holds more than its partitions and
one whole parameter. The numbers are those of the usual way, which rounds the first weights to that type before it
makes the partitions and, from these, the master weights.
"""

from typing import Any

import deepspeed
import torch
from torch import nn

from megarec.config.sections import RunConfig
from megarec.dense.engine import base_learning_rate, build_engine, mark_gradients_of_shards, prepare_deepspeed
from megarec.dense.groups import ModelParallelUnit, model_parallel_unit, set_deepspeed_groups
from megarec.dense.layers import compile_layers, fuse_layers, recompute_layers
from megarec.dense.objective import objective
from megarec.dense.reduction import gradient_reduction
from megarec.dense.replicated import replicated_average
from megarec.dense.settings import check_precision, refusals_of_deepspeed, settings_of
from megarec.dense.side import DenseSide
from megarec.dense.tensor_parallel import shard_mlps, synchronise_norms
from megarec.distributed.collectives import Channel, Ledger, build_channel
from megarec.distributed.topology import Topology
from megarec.models.initial import fill_initial, initialize, materialize, with_memory
from megarec.models.norms import start_statistics


def materialize_and_fill(
    model: nn.Module, seed: int, device: torch.device, section: dict[str, Any], mpu: ModelParallelUnit | None
) -> None:
    """Give every parameter memory and its initial value; at ZeRO-3 partition it as well (collective).

    Args:
        model: after tensor parallelism, so that its parameters are this rank's shards.
        section: the DeepSpeed config.
        mpu: the tensor and data groups; None: all ranks are one data group.
    """
    settings = settings_of(section)
    if settings.stage != 3:
        materialize(model, device)
        initialize(model, seed)
        return
    start_statistics(model, device)
    # zero.Init reads the type, offloading, hpZ and quantisation of the partitions; batch sizes mean nothing to it.
    named = ("zero_optimization", "bf16", "bfloat16", "fp16")
    config = {"train_micro_batch_size_per_gpu": 1, **{key: section[key] for key in named if key in section}}
    for name, parameter in list(model.named_parameters()):
        whole = with_memory(parameter, device, settings.dtype)
        fill_initial(whole, name, seed)
        parent, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(parent), attribute, whole)
        deepspeed.zero.Init(
            module=nn.ParameterList([whole]),
            data_parallel_group=None if mpu is None else mpu.get_data_parallel_group(),
            zero_param_parallel_group=deepspeed.utils.groups._get_zero_param_intra_parallel_group(),
            config_dict_or_path=config,
            mpu=mpu,
        )


def parallelize(
    model: nn.Module, config: RunConfig, topology: Topology, device: torch.device, ledger: Ledger, overlap: bool = False
) -> DenseSide:
    """Shard, fill and wrap a dense model; collective.

    Args:
        model: built on the meta device, so that no rank ever holds more than its part.
        device: where the parameters go.
        ledger: counts the bytes that tensor parallelism sends, and the gradients that DeepSpeed does not reduce.
        overlap: these travel while the backward pass runs.

    Raises:
        UserError: widths or batch do not divide, or DeepSpeed refuses its section.
    """
    tensor = Channel("tensor", topology.tensor, topology.rank % topology.tensor_size, topology.tensor_size, ledger)
    prepare_deepspeed()
    shard_mlps(model, tensor)
    synchronise_norms(model, build_channel(topology, "world", ledger), build_channel(topology, "data", ledger))
    fused = fuse_layers(model, config.train.fused_kernels == "auto", config.deepspeed, device)
    compile_layers(model, config.dense, config.deepspeed, device)
    recompute_layers(model, config.dense.recompute)
    mpu = model_parallel_unit(topology)
    check_precision(config.deepspeed)
    set_deepspeed_groups(topology, mpu, config.deepspeed)
    with refusals_of_deepspeed():
        materialize_and_fill(model, config.train.seed, device, config.deepspeed, mpu)
    engine, reason = build_engine(model, config, topology, mpu)
    reduction = gradient_reduction(engine, topology, ledger, overlap)
    mark_gradients_of_shards(engine)
    average = replicated_average(engine, tensor)
    loss = objective(model, config, build_channel(topology, "world", ledger))
    rate = base_learning_rate(engine, config)
    return DenseSide(engine, topology, rate, f"{reason}; {fused}", loss, reduction, average)
