"""Normalisation inside of MLPs: over the examples of the global batch, or over the columns of an example.

    y = (x - mean) / sqrt(variance + eps) * weight + bias

    batch (Ioffe and Szegedy 2015, arXiv 1502.03167)     mean and variance of a column, over all examples of a step
    layer (Ba et al. 2016, arXiv 1607.06450)             of an example, over all columns; needs no other example

Mean and variance are taken in float32 whatever the model computes in. A batch normalisation over the examples of one
rank would be another function on every topology: here it is over those of all ranks, and sums over ranks are float64,
so that the difference of two large numbers loses nothing. Evaluation and exports use its running statistics
instead; they move when a step is applied (`apply_statistics`), so that a skipped step leaves no trace.

Models know no process group: the dense side hands a module what adds numbers up over ranks (`spread_over`).

Shape suffixes: B examples, C columns.
"""

from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import layer_norm

from megarec.config.base import Norm

MOMENTUM = 0.1
"""The weight of a step in running statistics, as in torch and FuxiCTR."""
EPS = 1e-5
SumOverRanks = Callable[[Tensor, Literal["forward", "backward"]], None]


class ColumnNorm(nn.Module):
    """Common to both normalisations: a gain and a bias for each column.

    Args:
        columns: C.
        bias: whether there is a bias.

    Attributes:
        first_column: global column of the first one; tensor parallelism sets it on a shard.
        sharded: whether the columns are a shard: every rank of a tensor group then sees the same examples.
    """

    bias: nn.Parameter | None
    dimension: int
    """The dimension that mean and variance are taken over: 0 the examples, 1 the columns."""

    def __init__(self, columns: int, bias: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(columns))
        self.register_parameter("bias", nn.Parameter(torch.zeros(columns)) if bias else None)
        self.first_column = 0
        self.sharded = False
        self._sum: SumOverRanks | None = None
        self._parts = self._share = 1

    def spread_over(self, sum_over_ranks: SumOverRanks, parts: int, share: int) -> None:
        """Take mean and variance over several ranks, with as many numbers on each.

        Args:
            sum_over_ranks: replaces a tensor by its sum over them; collective.
            parts: how many there are.
            share: number of ranks whose examples this one sees; its gradients of weight and bias are divided by it.
        """
        self._sum, self._parts, self._share = sum_over_ranks, parts, share

    def _normalised(self, x_BC: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """y [B, C], mean and variance."""
        spread = (self._sum, self._parts, self._share)
        made: tuple[Tensor, Tensor, Tensor] = _Normalise.apply(x_BC, self.weight, self.bias, self.dimension, *spread)
        return made


class BatchNorm(ColumnNorm):
    """Over the examples of the global batch.

    Buffers, float32 whatever the parameters are:
        running_mean, running_var [C]: for evaluation; the variance is the unbiased one, as torch's.
    """

    running_mean: Tensor
    running_var: Tensor
    dimension = 0

    def __init__(self, columns: int, bias: bool = True) -> None:
        super().__init__(columns, bias)
        self.register_buffer("running_mean", torch.zeros(columns))
        self.register_buffer("running_var", torch.ones(columns))
        self._seen: tuple[Tensor, Tensor] | None = None

    def forward(self, x_BC: Tensor) -> Tensor:
        """[B, C] -> [B, C]."""
        if not self.training:
            gain = _wide(self.weight) * torch.rsqrt(self.running_var + EPS)
            shift = -self.running_mean * gain if self.bias is None else _wide(self.bias) - self.running_mean * gain
            return (_wide(x_BC) * gain + shift).to(x_BC.dtype)
        y_BC, mean, variance = self._normalised(x_BC)
        examples = len(x_BC) * self._parts
        self._seen = mean, variance * (examples / max(1, examples - 1))
        return y_BC

    @torch.no_grad()
    def apply_statistics(self) -> None:
        """Take the last batch into the running statistics."""
        assert self._seen is not None
        for running, seen in zip((self.running_mean, self.running_var), self._seen, strict=True):
            new = seen.view(-1)  # of a label that was left out of the step it may be NaN (multi_task.py)
            running.lerp_(new.where(new.isfinite(), running), MOMENTUM)
        self._seen = None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        """Conversions of a model leave the statistics float32."""
        kept = self.running_mean, self.running_var
        super()._apply(fn, recurse)
        for name, before in zip(("running_mean", "running_var"), kept, strict=True):
            now: Tensor = getattr(self, name)
            if now.dtype.itemsize < 4:
                setattr(self, name, before.to(now.device))
        return self


class LayerNorm(ColumnNorm):
    """Over the columns of each example."""

    dimension = 1

    def forward(self, x_BC: Tensor) -> Tensor:
        """[B, C] -> [B, C]."""
        if self._sum is None:
            return layer_norm(x_BC, (x_BC.shape[1],), self.weight, self.bias, EPS)
        return self._normalised(x_BC)[0]


class _Normalise(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_BC: Tensor,
        weight_C: Tensor,
        bias_C: Tensor | None,
        dimension: int,
        sum_over_ranks: SumOverRanks | None,
        parts: int,
        share: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        wide_BC = _wide(x_BC)
        variance, mean = torch.var_mean(wide_BC, dimension, correction=0, keepdim=True)
        if sum_over_ranks is not None:
            moments = torch.stack([mean.double(), variance.double() + mean.double().square()])
            sum_over_ranks(moments, "forward")
            mean, square = moments.div_(parts)
            variance = (square - mean.square()).clamp_(min=0)
            mean, variance = mean.to(wide_BC.dtype), variance.to(wide_BC.dtype)
        scale = torch.rsqrt(variance + EPS)
        ctx.save_for_backward(x_BC, weight_C, mean, scale)
        ctx.dimension, ctx.sum_over_ranks, ctx.parts, ctx.share = dimension, sum_over_ranks, parts, share
        ctx.has_bias = bias_C is not None
        y_BC = (wide_BC - mean) * scale * _wide(weight_C)
        ctx.mark_non_differentiable(mean, variance)
        return (y_BC if bias_C is None else y_BC + _wide(bias_C)).to(x_BC.dtype), mean, variance

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x_BC, weight_C, mean, scale = ctx.saved_tensors
        dy_BC = _wide(grads[0])
        normal_BC = (_wide(x_BC) - mean) * scale
        dweight_C = (dy_BC * normal_BC).sum(0).div_(ctx.share).to(weight_C.dtype)
        dbias_C = dy_BC.sum(0).div_(ctx.share).to(weight_C.dtype) if ctx.has_bias else None
        dnormal_BC = dy_BC * _wide(weight_C)
        sums = torch.stack([dnormal_BC.sum(ctx.dimension), (dnormal_BC * normal_BC).sum(ctx.dimension)])
        if ctx.sum_over_ranks is not None:
            ctx.sum_over_ranks(sums, "backward")
        first, second = sums.div_(x_BC.shape[ctx.dimension] * ctx.parts).unsqueeze(ctx.dimension + 1)
        dx_BC = (dnormal_BC - first - normal_BC * second) * scale
        return dx_BC.to(x_BC.dtype), dweight_C, dbias_C, *[None] * 4


def _wide(x: Tensor) -> Tensor:
    """In float32, if it is narrower."""
    return x.float() if x.dtype.itemsize < 4 else x


def norm_of(norm: Norm, columns: int, bias: bool) -> ColumnNorm | None:
    """What `model.norm` names; None: nothing."""
    if norm == "none":
        return None
    return (BatchNorm if norm == "batch" else LayerNorm)(columns, bias)


def batch_norms(model: nn.Module) -> Iterator[tuple[str, BatchNorm]]:
    """All batch normalisations of a model by name, in order."""
    return ((name, part) for name, part in model.named_modules() if isinstance(part, BatchNorm))


def apply_statistics(model: nn.Module) -> None:
    """Take the batch of a step that was applied into the running statistics."""
    for _, norm in batch_norms(model):
        norm.apply_statistics()


def start_statistics(model: nn.Module, device: torch.device) -> None:
    """Give running statistics on the meta device memory on `device`: mean 0, variance 1."""
    for _, norm in batch_norms(model):
        if norm.running_mean.is_meta:
            norm.running_mean = torch.zeros(norm.running_mean.shape, device=device)
            norm.running_var = torch.ones(norm.running_var.shape, device=device)
