"""Gradients of replicated parameters under tensor parallelism: their mean over the tensor group, one message a step.

Every rank of a tensor group has other examples, so the gradients of what they all hold (projections, LayerNorms, biases
of row-parallel layers) must be averaged. DeepSpeed averages over the data group alone. A mean over one group and a mean
over another may be taken in either order, so this one comes last: after the last backward pass of a step, of what
DeepSpeed has reduced and left on this rank. The ranks of a tensor group hold the same elements of the same parameters
then, because their shards are of equal size. So it is one message, of 1 / data ranks of the elements from ZeRO 1 on,
however many micro-batches a step has. DeepSpeed computes its norm and its clipping after it, in the step.

Where the elements lie (DeepSpeed 0.19.8):

    stage 0                         `grad` of the parameters
    bf16 with fp32 accumulation     the optimizer's fp32 gradients, one for each parameter
    stages 1 and 2                  lists of tensors that are, one after the other, the rank's flat partition of a group
    stage 3                         the rank's partition of every parameter

With `offload_optimizer` DeepSpeed moves each gradient into host memory, and takes its norm, while the backward pass
runs. The average is needed before that: one message for each parameter, in hooks.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from torch import Tensor, nn

from megarec.dense.tensor_parallel import is_sharded
from megarec.distributed.collectives import Channel, all_reduce_mean_

_PURPOSE = "replicated gradients"


def replicated_average(engine: Any, channel: Channel) -> Callable[[], None]:
    """What a step calls after its last backward pass, before anything reads the gradients; collective.

    Args:
        engine: DeepSpeed's, around the model.
        channel: the tensor group.
    """
    if channel.size == 1:
        return lambda: None
    wrapper = engine.optimizer
    if getattr(wrapper, "cpu_offload", False) or getattr(wrapper, "offload_optimizer", False):
        _average_in_backward(engine.module, channel)
        return lambda: None
    return lambda: all_reduce_mean_(list(reduced_gradients(engine)), channel, _PURPOSE, "backward")


def reduced_gradients(engine: Any) -> Iterator[Tensor]:
    """The gradients of replicated parameters, as far as this rank has them when DeepSpeed has reduced them."""
    wrapper = engine.optimizer
    if isinstance(wrapper, DeepSpeedZeroOptimizer):
        yield from _of_flat_partitions(engine.module.parameters(), wrapper)
    elif isinstance(wrapper, DeepSpeedZeroOptimizer_Stage3):
        for index, group in enumerate(wrapper.fp16_groups):
            yield from _replicated(group, wrapper.averaged_gradients[index])
    elif isinstance(wrapper, BF16_Optimizer):
        for group, gradients in zip(wrapper.bf16_groups, wrapper.fp32_groups_gradients, strict=True):
            yield from _replicated(group, gradients)
    else:
        with_gradient = [parameter for parameter in engine.module.parameters() if parameter.grad is not None]
        yield from _replicated(with_gradient, [parameter.grad for parameter in with_gradient])


def _replicated(parameters: Iterable[nn.Parameter], gradients: Iterable[Tensor | None]) -> Iterator[Tensor]:
    for parameter, gradient in zip(parameters, gradients, strict=True):
        if not is_sharded(parameter) and gradient is not None:
            yield gradient


def _of_flat_partitions(parameters: Iterable[nn.Parameter], wrapper: Any) -> Iterator[Tensor]:
    starts: dict[int, set[int]] = {}
    for parameter in parameters:
        here = parameter._hp_mapping  # type: ignore[attr-defined]
        if here is not None and not is_sharded(parameter):
            starts.setdefault(here.param_group_index, set()).add(here.hp_fragment_address.start)
    for group, replicated in starts.items():
        start = 0
        for gradient in wrapper.averaged_gradients[group]:
            if start in replicated and not getattr(gradient, "_zero_padding", False):
                yield gradient
            start += gradient.numel()


def _average_in_backward(model: nn.Module, channel: Channel) -> None:
    def average(gradient: Tensor) -> Tensor:
        mean = gradient.clone()  # a hook must not change its input
        all_reduce_mean_([mean], channel, _PURPOSE, "backward")
        return mean

    for parameter in model.parameters():
        if not is_sharded(parameter):
            parameter.register_hook(average)
