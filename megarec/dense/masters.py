"""The dense side as slices of whole tensors: master weights and optimizer states, however the engine stores them.

DeepSpeed 0.19.8 keeps them in six ways. What differs is where the master copy of a parameter's elements lies:

    stage 0, fp32                   the parameter itself
    stage 0, bf16 or fp16           a copy for each parameter, or (fused Adam) one flat copy for each parameter group
    stages 1 and 2; bf16 with fp32 accumulation    a range of this rank's flat partition of the group (_hp_mapping)
    stage 3                         this rank's range of every parameter, in flat partitions of sub-groups

All are "elements [first, last) of the rank's part of the parameter, at an offset of a tensor that the optimizer steps".
The part is the whole parameter or, under tensor parallelism, the rectangle that `shard_of` names.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from math import isfinite, prod
from typing import Any

import torch
from torch import Tensor, nn

from megarec.dense.tensor_parallel import is_sharded
from megarec.distributed.topology import Topology
from megarec.errors import DamagedCheckpoint, UserError
from megarec.models.norms import batch_norms
from megarec.slices import Ints, ParameterShard, TensorSlice, rectangles, share_of_range

DENSE = "dense/"


def _scaler(engine: Any) -> Any:
    return getattr(engine.optimizer, "loss_scale_config", None) or engine.optimizer.loss_scaler


def loss_scale(engine: Any) -> dict[str, int | float] | None:
    """The numbers of fp16's dynamic loss scale, under DeepSpeed's names."""
    if not engine.fp16_enabled():
        return None
    kept = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")
    return {name: getattr(_scaler(engine), name) for name in kept if hasattr(_scaler(engine), name)}


def set_loss_scale(engine: Any, numbers: Mapping[str, int | float]) -> None:
    """Restore what `loss_scale` returned; other names in an untrusted file are ignored."""
    for name in loss_scale(engine) or ():
        if name in numbers:
            setattr(_scaler(engine), name, numbers[name])


@dataclass(frozen=True)
class Fragment:
    """Where the master copy of elements [first, last) of this rank's part of a parameter lies.

    Attributes:
        shape: of that part.
        shard: the place of that part in the whole parameter.
        master: the tensor that the optimizer steps, its key in `optimizer.state`.
        offset: of element `first` in it.
        data_replicas: whether the other ranks of the data group hold the same elements.
        tensor_replicas: whether the other ranks of the tensor group do.
    """

    name: str
    shape: Ints
    shard: ParameterShard
    master: Tensor
    offset: int
    first: int
    last: int
    data_replicas: bool
    tensor_replicas: bool

    def pieces(self, suffix: str, values: Tensor, first: int, last: int) -> Iterator[TensorSlice]:
        """The rectangles of elements [first, last) in a tensor that is laid out as `master`."""
        flat = values.detach().view(-1)[self.offset + first - self.first : self.offset + last - self.first]
        for start, size in rectangles(self.shape, first, last):
            count = prod(size)
            in_whole = tuple(at + own for at, own in zip(start, self.shard.start, strict=True))
            yield TensorSlice(DENSE + self.name + suffix, self.shard.shape, in_whole, flat[:count].view(size))
            flat = flat[count:]


def optimizer_of(engine: Any) -> torch.optim.Optimizer:
    """The optimizer that steps the master weights, inside of DeepSpeed's wrappers."""
    inner: torch.optim.Optimizer = getattr(engine.optimizer, "optimizer", engine.optimizer)
    return inner


def held(engine: Any, topology: Topology) -> list[TensorSlice]:
    """Everything of the dense side on this rank that a checkpoint fills, single numbers (Adam's step) left out."""
    state = optimizer_of(engine).state
    return statistics(engine.module, topology) + [
        piece
        for fragment in fragments(engine, topology)
        for suffix, values in [("", fragment.master), *_elementwise(fragment.master, state)]
        for piece in fragment.pieces(suffix, values, fragment.first, fragment.last)
    ]


def written(engine: Any, topology: Topology) -> list[TensorSlice]:
    """What this rank writes: equal holders write equal parts, so that no two write the same."""
    optimizer = optimizer_of(engine)
    pieces = _written_statistics(engine.module, topology)
    for fragment in fragments(engine, topology):
        first, last = _written_range(fragment, topology)
        for suffix, values in [("", fragment.master), *_elementwise(fragment.master, optimizer.state)]:
            pieces += fragment.pieces(suffix, values, first, last)
        if first == 0 < last and not any(fragment.shard.start):
            for what, number in _numbers(fragment.master, optimizer).items():
                pieces.append(TensorSlice(f"{DENSE}{fragment.name}/{what}", (), (), torch.as_tensor(number).cpu()))
    return pieces


def _written_statistics(model: nn.Module, topology: Topology) -> list[TensorSlice]:
    data_rank, tensor_rank = divmod(topology.rank, topology.tensor_size)
    pieces = statistics(model, topology)
    return [p for p in pieces if data_rank == 0 and (tensor_rank == 0 or p.tensor.shape != p.shape)]


def _written_range(fragment: Fragment, topology: Topology) -> tuple[int, int]:
    """The part of a fragment that this rank writes."""
    data_rank, tensor_rank = divmod(topology.rank, topology.tensor_size)
    first, last = fragment.first, fragment.last
    if fragment.data_replicas:
        first, last = share_of_range(first, last, topology.data_size, data_rank)
    if fragment.tensor_replicas:
        first, last = share_of_range(first, last, topology.tensor_size, tensor_rank)
    return first, last


def tensors(engine: Any, topology: Topology) -> list[Tensor]:
    """Every tensor that holds master weights or running statistics on this rank, once each; live."""
    found = [fragment.master for fragment in fragments(engine, topology)]
    found += [piece.tensor for piece in statistics(engine.module, topology)]
    return list({id(tensor): tensor for tensor in found}.values())


def laid_out(
    engine: Any, topology: Topology, of_tensor: Callable[[Tensor], Tensor], *, to_write: bool
) -> list[TensorSlice]:
    """Slices of tensors with the layout of the master weights and running statistics, such as their averages.

    Args:
        of_tensor: such a tensor for each of `tensors`.
        to_write: those that this rank writes; else all it holds.
    """
    found = _written_statistics(engine.module, topology) if to_write else statistics(engine.module, topology)
    pieces = [replace(piece, tensor=of_tensor(piece.tensor)) for piece in found]
    for fragment in fragments(engine, topology):
        first, last = _written_range(fragment, topology) if to_write else (fragment.first, fragment.last)
        pieces += fragment.pieces("", of_tensor(fragment.master), first, last)
    return pieces


def statistics(model: nn.Module, topology: Topology) -> list[TensorSlice]:
    """Running statistics of batch normalisations: this rank's columns, live; data ranks hold the same."""
    pieces = []
    for name, norm in batch_norms(model):
        columns = norm.running_mean.numel() * (topology.tensor_size if norm.sharded else 1)
        for what in ("running_mean", "running_var"):
            pieces.append(TensorSlice(f"{DENSE}{name}.{what}", (columns,), (norm.first_column,), getattr(norm, what)))
    return pieces


def unsharded_states(engine: Any, topology: Topology) -> Iterator[tuple[str, str, Tensor]]:
    """(parameter, state, elements [N]) of fp32 masters and optimizer states of ZeRO 0; every data rank holds a
    copy; nothing at other stages."""
    if engine.zero_optimization_stage() != 0:
        return
    parameters, state = dict(engine.module.named_parameters()), optimizer_of(engine).state
    for fragment in fragments(engine, topology):
        own = slice(fragment.offset, fragment.offset + fragment.last - fragment.first)
        if fragment.master is not parameters[fragment.name]:
            yield fragment.name, "master", fragment.master.detach().view(-1)[own]
        for suffix, values in _elementwise(fragment.master, state):
            yield fragment.name, suffix.removeprefix("/"), values.detach().view(-1)[own]


def check_supported(engine: Any) -> None:
    """Raise a UserError for states that a checkpoint cannot hold: before training, not at the first save."""
    if getattr(engine.optimizer, "swap_optimizer", False):
        raise UserError("checkpoints do not reach into NVMe: set offload_optimizer.device to cpu, or leave it out")
    for name, parameter in engine.module.named_parameters():
        if not parameter.requires_grad:
            raise UserError(f"checkpoints expect every dense parameter to be trained; {name} is not")


def fragments(engine: Any, topology: Topology) -> Iterator[Fragment]:
    """All fragments of this rank, in the order of the parameters; of an engine that is supported."""
    wrapper, stage = engine.optimizer, engine.zero_optimization_stage()
    masters = _unsharded_masters(wrapper)
    for name, parameter in engine.module.named_parameters():
        shape = tuple(getattr(parameter, "ds_shape", parameter.shape))
        shard = getattr(parameter, "shard", ParameterShard(shape, (0,) * len(shape)))
        size, replicas = prod(shape), topology.tensor_size > 1 and not is_sharded(parameter)
        if stage == 3:
            group, offset, partition = wrapper.grad_position[wrapper.get_param_id(parameter)]
            first = min(size, topology.rank // topology.tensor_size * partition)
            place = (wrapper.fp32_partitioned_groups_flat[group], offset, first, min(size, first + partition), False)
        elif hasattr(parameter, "_hp_mapping"):
            here = parameter._hp_mapping
            if here is None:
                continue
            (master,) = optimizer_of(engine).param_groups[here.param_group_index]["params"]
            first, count = here.lp_fragment_address.start, here.lp_fragment_address.numel
            place = (master, here.hp_fragment_address.start, first, first + count, False)
        else:
            master, offset = masters.get(id(parameter), (parameter, 0))
            place = (master, offset, 0, size, topology.data_size > 1)
        yield Fragment(name, shape, shard, *place, replicas)


def _unsharded_masters(wrapper: Any) -> dict[int, tuple[Tensor, int]]:
    """By id of a low-precision parameter at stage 0: its master copy, and the offset in it."""
    found: dict[int, tuple[Tensor, int]] = {}
    if hasattr(wrapper, "fp32_groups_flat"):
        for flat, group in zip(wrapper.fp32_groups_flat, wrapper.fp16_groups, strict=True):
            offset = 0
            for parameter in group:
                found[id(parameter)] = flat, offset
                offset += parameter.numel()
    elif hasattr(wrapper, "fp32_groups"):
        for masters, group in zip(wrapper.fp32_groups, wrapper.fp16_groups, strict=True):
            found |= {id(parameter): (master, 0) for master, parameter in zip(masters, group, strict=True)}
    return found


def _elementwise(master: Tensor, state: Mapping[Tensor, Mapping[str, Any]]) -> list[tuple[str, Tensor]]:
    """(/name, tensor) of the states that hold a number for every element of a master tensor."""
    own = state.get(master, {})
    return [(f"/{what}", v) for what, v in own.items() if isinstance(v, Tensor) and v.shape == master.shape]


def _numbers(master: Tensor, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The states that are one number for a whole tensor; apex keeps its step in the parameter group."""
    numbers = {what: v for what, v in optimizer.state.get(master, {}).items() if v is not None}
    numbers = {what: v for what, v in numbers.items() if not isinstance(v, Tensor) or v.shape != master.shape}
    group = optimizer.param_groups[0]
    return {**numbers, "step": group["step"]} if "step" in group else numbers


def allocate_states(engine: Any, topology: Topology, states: Mapping[str, Mapping[str, Any]]) -> None:
    """Give the optimizer exactly the states that a checkpoint has, so that `held` shows them.

    Before its first step an optimizer has none.

    Args:
        states: by parameter and state: a number, or None for one that has a number for every element.
    """
    optimizer = optimizer_of(engine)
    if hasattr(engine.optimizer, "checkpoint_event_prologue"):
        engine.optimizer.checkpoint_event_prologue()  # ZeRO-3: whole small parameters would hide the partitions
    seen: set[int] = set()
    for fragment in fragments(engine, topology):
        if id(fragment.master) in seen:
            continue
        seen.add(id(fragment.master))
        before = optimizer.state.get(fragment.master, {})
        now = {}
        for what, number in states.get(fragment.name, {}).items():
            if number is None:
                now[what] = before[what] if what in before else torch.zeros_like(fragment.master.detach())
            elif type(optimizer).__module__.startswith("apex."):
                for group in optimizer.param_groups:
                    group[what] = int(number)
            else:
                now[what] = _as_kept(optimizer, fragment.master, number)
        optimizer.state[fragment.master] = now
    if hasattr(engine.optimizer, "_hp_optimizer_states_linked"):
        engine.optimizer._hp_optimizer_states_linked = False  # DeepSpeed links them again after the next step


def _as_kept(optimizer: torch.optim.Optimizer, master: Tensor, number: float) -> Any:
    """torch's optimizers count steps in a float tensor (beside the weights when fused), others in an int.

    Raises:
        DamagedCheckpoint: it is not finite.
    """
    if not isfinite(number):
        raise DamagedCheckpoint(f"an optimizer state is {number}, which no run has counted")
    if not type(optimizer).__module__.startswith("torch."):
        return int(number)
    beside = any(optimizer.defaults.get(key) for key in ("fused", "capturable"))
    return torch.tensor(float(number), dtype=torch.float32, device=master.device if beside else "cpu")


@torch.no_grad()
def sync_from_masters(engine: Any) -> None:
    """Set the weights that the model computes with from the master weights; collective."""
    wrapper = engine.optimizer
    if engine.zero_optimization_stage() == 3:
        wrapper.checkpoint_event_prologue()  # small whole parameters would keep their old values
        for group in range(len(wrapper.fp32_partitioned_groups_flat)):
            wrapper._reassign_or_swap_out_partitioned_parameters(group)
        wrapper.checkpoint_event_epilogue()
    elif hasattr(wrapper, "update_lp_params"):
        wrapper.update_lp_params()
    else:
        masters = _unsharded_masters(wrapper)
        for parameter in engine.module.parameters():
            if id(parameter) in masters:
                master, offset = masters[id(parameter)]
                own = master.detach().view(-1)[offset : offset + parameter.numel()]
                nn.Parameter.copy_(parameter, own.view_as(parameter))
