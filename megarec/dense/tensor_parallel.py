"""Tensor-parallel MLPs: the ranks of a tensor group share the weights, and every rank brings its own examples.

    gather the batch -> column-parallel layer -> activation, dropout -> row-parallel layer -> reduce-scatter the batch

All else stays example-local, so no rank repeats another's work, and no activation is held twice: a column-parallel
layer keeps its own examples and gathers again in the backward pass (Korthikanti et al. 2022, arXiv 2205.05198,
section 4.2.2, with the batch where they have the sequence).

Every rank's loss is the mean over its own examples, and DeepSpeed averages gradients over the data group alone. So
    sharded parameters see the examples of all T ranks of the tensor group: their gradient is divided by T,
    replicated parameters see other examples on every rank of it: their gradient is averaged over the tensor group
    (dense/replicated.py).

Shape suffixes: B examples of this rank, G = T x B examples of the tensor group, I inputs, O outputs; i = I / T and
o = O / T are this rank's columns.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megarec.distributed.collectives import (
    Channel,
    Direction,
    all_gather_rows,
    all_to_all_with_grad,
    reduce_scatter_rows,
    sum_in_place,
)
from megarec.errors import UserError
from megarec.models.blocks import MLP, KeyedDropout
from megarec.models.cpu_gemm import fast_cpu_gemm, scaled_product
from megarec.models.norms import BatchNorm, ColumnNorm, SumOverRanks, batch_norms
from megarec.slices import ParameterShard


class _ColumnParallel(torch.autograd.Function):
    """x_BI, weight_oI, bias_o -> y_Go = gather(x) W^T + b."""

    @staticmethod
    def forward(ctx: Any, x_BI: Tensor, weight_oI: Tensor, bias_o: Tensor | None, channel: Channel) -> Tensor:
        ctx.save_for_backward(x_BI, weight_oI)
        ctx.channel, ctx.has_bias = channel, bias_o is not None
        x_GI = all_gather_rows(x_BI, channel, "activations").wait()
        return F.linear(x_GI, weight_oI, bias_o)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        dy_Go = grads[0].contiguous()
        x_BI, weight_oI = ctx.saved_tensors
        channel: Channel = ctx.channel
        # The gather travels while the input's gradient is computed, the scatter while the weight's is.
        gathering = all_gather_rows(x_BI, channel, "activations", "backward")
        scattering = None
        with fast_cpu_gemm(dy_Go.device, dy_Go.dtype):
            if ctx.needs_input_grad[0]:
                scattering = reduce_scatter_rows(dy_Go @ weight_oI, channel, "gradients", "backward")
            dweight_oI = scaled_product(dy_Go.T, gathering.wait(), 1 / channel.size)
        dbias_o = dy_Go.sum(0).div_(channel.size) if ctx.has_bias else None
        return scattering.wait() if scattering else None, dweight_oI, dbias_o, None


class _RowParallel(torch.autograd.Function):
    """x_Gi, weight_Oi -> y_BO = scatter(sum over the tensor group of x W^T)."""

    @staticmethod
    def forward(ctx: Any, x_Gi: Tensor, weight_Oi: Tensor, channel: Channel) -> Tensor:
        ctx.save_for_backward(x_Gi, weight_Oi)
        ctx.channel = channel
        return reduce_scatter_rows(F.linear(x_Gi, weight_Oi), channel, "activations").wait()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x_Gi, weight_Oi = ctx.saved_tensors
        dy_GO = all_gather_rows(grads[0], ctx.channel, "gradients", "backward").wait()
        with fast_cpu_gemm(dy_GO.device, dy_GO.dtype):
            dx_Gi = dy_GO @ weight_Oi
            dweight_Oi = scaled_product(dy_GO.T, x_Gi, 1 / ctx.channel.size)
        return dx_Gi, dweight_Oi, None


class ColumnParallelLinear(nn.Module):
    """The rows of a Linear's weight (its output columns) that belong to this rank: own [B, I] -> group's [G, o].

    Attributes:
        first_column: global index of the first output column.
    """

    def __init__(self, linear: nn.Linear, channel: Channel) -> None:
        super().__init__()
        self.channel = channel
        columns = linear.out_features // channel.size
        self.first_column = channel.rank * columns
        self.weight = _sharded(linear.weight, 0, channel)
        self.bias = None if linear.bias is None else _sharded(linear.bias, 0, channel)

    def forward(self, x_BI: Tensor) -> Tensor:
        """Examples of this rank [B, I] -> of the tensor group [G, o]."""
        y_Go: Tensor = _ColumnParallel.apply(x_BI, self.weight, self.bias, self.channel)
        return y_Go


class RowParallelLinear(nn.Module):
    """The columns of a Linear's weight (its inputs) that belong to this rank: group's [G, i] -> own [B, O]."""

    def __init__(self, linear: nn.Linear, channel: Channel) -> None:
        super().__init__()
        self.channel = channel
        self.weight = _sharded(linear.weight, 1, channel)
        self.bias = linear.bias  # replicated: added to the sum, example by example

    def forward(self, x_Gi: Tensor) -> Tensor:
        """Examples of the tensor group [G, i] -> of this rank [B, O]."""
        y_BO: Tensor = _RowParallel.apply(x_Gi, self.weight, self.channel)
        return y_BO if self.bias is None else y_BO + self.bias


class TensorParallelMLP(nn.Module):
    """An MLP whose linear layers are column- and row-parallel in turn; parameter names stay those of the MLP.

    Of an odd number of layers the last one is row-parallel by itself: an all-to-all gives every rank its columns of
    the whole group's examples. The input and output are this rank's own examples.

    Args:
        mlp: the unsharded MLP; may lie on the meta device.
        name: of the MLP in its model, for errors.
        channel: the tensor group.

    Raises:
        UserError: a hidden width does not divide by the size of the tensor group.
    """

    def __init__(self, mlp: MLP, name: str, channel: Channel) -> None:
        super().__init__()
        self.channel = channel
        self.relu = mlp.relu
        self.activation = mlp.activation
        self.dropouts, self.norms = mlp.dropouts, mlp.norms
        linears = [linear for linear in mlp.linears if isinstance(linear, nn.Linear)]
        _check_widths([linear.out_features for linear in linears[:-1]], name, channel.size)
        self.linears = nn.ModuleList()
        for index, linear in enumerate(linears):
            column = index % 2 == 0 and index + 1 < len(linears)
            self.linears.append((ColumnParallelLinear if column else RowParallelLinear)(linear, channel))
        for index, (layer, dropout) in enumerate(zip(self.linears, self.dropouts, strict=False)):
            if isinstance(layer, ColumnParallelLinear):
                assert isinstance(dropout, KeyedDropout)
                dropout.first_column = layer.first_column
                if self.norms:
                    norm = self.norms[index]
                    assert isinstance(norm, ColumnNorm)
                    _shard_norm(norm, layer.first_column, channel)

    def forward(self, x: Tensor, keys: Tensor | None = None) -> Tensor:
        """[B, inputs] and the examples' dropout keys int64 [B] -> [B, outputs]."""
        group_keys = None
        if keys is not None and self.training and any(dropout.p for dropout in self.dropouts):
            group_keys = all_gather_rows(keys, self.channel, "dropout keys").wait()
        last = len(self.linears) - 1
        for index, linear in enumerate(self.linears):
            if index == last and index % 2 == 0:
                x = _scatter_columns(x, self.channel)
            x = linear(x)
            if index < last:
                of_group = isinstance(linear, ColumnParallelLinear)
                x = self.norms[index](x) if self.norms else x
                x = self.activation(x) if self.relu else x
                x = self.dropouts[index](x, group_keys if of_group else keys)
        return x


def _scatter_columns(x_BI: Tensor, channel: Channel) -> Tensor:
    """All columns of own examples -> own columns of the group's examples: [B, I] -> [G, i]."""
    batch, inputs = x_BI.shape
    columns = inputs // channel.size
    blocks_TBi = x_BI.reshape(batch, channel.size, columns).transpose(0, 1)
    sizes = [batch * columns] * channel.size
    return all_to_all_with_grad(blocks_TBi.flatten(), sizes, sizes, channel, "columns").view(-1, columns)


def _check_widths(widths: list[int], name: str, size: int) -> None:
    for width in widths:
        if width % size:
            below = width // size * size
            near = f"{below} or {below + size}" if below else str(size)
            raise UserError(
                f"parallel.tensor={size} does not divide the hidden width {width} of {name}; take {near} (or another "
                "multiple), or a smaller parallel.tensor"
            )


def _sharded(whole: Tensor, dimension: int, channel: Channel) -> nn.Parameter:
    """This rank's slice of a parameter, marked as DeepSpeed needs it for the norm, and with its place in the whole."""
    part = whole.detach().tensor_split(channel.size, dim=dimension)[channel.rank].clone()
    parameter = nn.Parameter(part)
    parameter.__dict__.update(whole.__dict__)
    start = [0] * whole.dim()
    start[dimension] = channel.rank * part.shape[dimension]
    parameter.shard = ParameterShard(tuple(whole.shape), tuple(start))  # type: ignore[attr-defined]
    parameter.tensor_model_parallel = True  # type: ignore[attr-defined]
    return parameter


def _shard_norm(norm: ColumnNorm, first_column: int, channel: Channel) -> None:
    """Keep this rank's columns of a normalisation behind a column-parallel layer; those of examples meet in the group.

    In a batch normalisation each rank has its own columns of the group's examples (`synchronise_norms`).
    """
    norm.weight = _sharded(norm.weight, 0, channel)
    if norm.bias is not None:
        norm.bias = _sharded(norm.bias, 0, channel)
    if isinstance(norm, BatchNorm):
        for name in ("running_mean", "running_var"):
            setattr(norm, name, getattr(norm, name).tensor_split(channel.size)[channel.rank].clone())
    else:
        norm.spread_over(_sum_over(channel, "layer statistics"), channel.size, channel.size)
    norm.first_column, norm.sharded = first_column, True


def synchronise_norms(model: nn.Module, world: Channel, data: Channel) -> None:
    """Make every batch normalisation take its statistics over the global batch; after `shard_mlps`.

    Behind a column-parallel layer a rank has the examples of its tensor group, elsewhere its own alone.
    """
    for _, norm in batch_norms(model):
        channel = data if norm.sharded else world
        if world.size > 1:
            share = world.size // data.size if norm.sharded else 1
            norm.spread_over(_sum_over(channel, "batch statistics"), channel.size, share)


def _sum_over(channel: Channel, purpose: str) -> SumOverRanks:
    def total(tensor: Tensor, direction: Direction) -> None:
        if channel.size > 1:
            sum_in_place(tensor, channel, purpose, direction)

    return total


def is_sharded(parameter: Tensor) -> bool:
    """Whether the ranks of a tensor group hold different parts of a parameter."""
    return bool(getattr(parameter, "tensor_model_parallel", False))


def shard_mlps(model: nn.Module, channel: Channel) -> None:
    """Replace every MLP of a model by a tensor-parallel one, in place; without a tensor group nothing changes.

    MLPs of sequences stay whole. So does a single linear layer whose inputs do not divide (13 numeric features straight
    to an embedding): it works on this rank's own examples alone, so only its memory is not divided.

    Raises:
        UserError: a hidden width does not divide by the size of the tensor group.
    """
    if channel.size == 1:
        return
    for name, module in list(model.named_modules()):
        if name.startswith("sequences."):
            continue  # small, and once a position: to gather positions would take longer than to compute them
        if isinstance(module, MLP) and (len(module.linears) > 1 or _inputs(module) % channel.size == 0):
            parent, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(parent), attribute, TensorParallelMLP(module, name, channel))


def _inputs(mlp: MLP) -> int:
    first = mlp.linears[0]
    assert isinstance(first, nn.Linear)
    return first.in_features
