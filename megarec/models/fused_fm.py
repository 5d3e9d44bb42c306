"""The factorization machine by Triton kernels (kernels/fm.py), for GPUs: FM with its LayerNorm, the gradient of W.

    FM = X Y^T,  LayerNorm(flatten(FM))     one program an example: X is read once, FM is written once, and normalised
                                            while it lies in the cache
    dW = sum over the examples of dP X^T    X and dP are read as they lie; a GEMM wants the examples side by side, which
                                            is a copy of both

They are tested against the plain path (projection.py, torch's LayerNorm), which runs everywhere else. Sums
are float32, in a fixed order. FM is rounded to the type of X before it is normalised, as in the plain path.

Shape suffixes: B examples, N embeddings, D their width, K rank, O = K + R rows of W, G groups of examples.
"""

from typing import Any

import torch
import triton
from torch import Tensor, nn

from megarec.kernels.fm import FLAT, fm_norm_kernel, tile, weight_gradient_kernel
from megarec.models.projection import stacked
from megarec.models.wukong import InteractionLayer

_PROGRAMS = 512  # that share the sum over the examples: a few for every multiprocessor of today's GPUs


@torch.library.custom_op("megarec::fm_norm", mutates_args=())
def fm_norm(
    x_BND: Tensor, y_BKD: Tensor, weight: Tensor, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(LayerNorm of FM, FM) both [B, N K], (mean, 1 / standard deviation) both float32 [B, 1]; no gradient."""
    batch, n, dim = x_BND.shape
    k = y_BKD.shape[1]
    fm, output = (x_BND.new_empty(batch, n * k) for _ in range(2))
    mean, rstd = (x_BND.new_empty(batch, 1, dtype=torch.float32) for _ in range(2))
    if batch:
        sizes = {"N": n, "K": k, "D": dim, "BIAS": bias is not None, "FLAT": FLAT, **tile(n, k, dim)}
        fm_norm_kernel[(batch,)](
            x_BND.contiguous(), y_BKD, weight, weight if bias is None else bias, fm, output, mean, rstd, eps, **sizes
        )
    return output, fm, mean, rstd


@fm_norm.register_fake
def _(
    x_BND: Tensor, y_BKD: Tensor, weight: Tensor, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    fm = x_BND.new_empty(len(x_BND), x_BND.shape[1] * y_BKD.shape[1])
    mean = x_BND.new_empty(len(x_BND), 1, dtype=torch.float32)
    return torch.empty_like(fm), fm, mean, torch.empty_like(mean)


@torch.library.custom_op("megarec::weight_gradient", mutates_args=())
def weight_gradient(dp_BOD: Tensor, x_BND: Tensor) -> Tensor:
    """Sum over the examples of dP X^T: [O, N]; no gradient."""
    batch, rows, dim = dp_BOD.shape
    n = x_BND.shape[1]
    sizes = tile(rows, n, dim)
    tiles = triton.cdiv(n, sizes["COLUMNS"]), triton.cdiv(rows, sizes["ROWS"])
    in_group = max(1, triton.cdiv(batch, max(1, _PROGRAMS // (tiles[0] * tiles[1]))))
    groups = triton.cdiv(batch, in_group)
    sums_GON = x_BND.new_empty(groups, rows, n, dtype=torch.float32)
    if batch:
        weight_gradient_kernel[(*tiles, groups)](
            dp_BOD.contiguous(), x_BND.contiguous(), sums_GON, batch, in_group, O=rows, N=n, D=dim, **sizes
        )
    return sums_GON.sum(0).to(x_BND.dtype)


@weight_gradient.register_fake
def _(dp_BOD: Tensor, x_BND: Tensor) -> Tensor:
    return x_BND.new_empty(dp_BOD.shape[1], x_BND.shape[1])


class _Products(torch.autograd.Function):
    """W X, and X itself: the gradient for X is the matrix that the product behind dX is added to."""

    @staticmethod
    def forward(ctx: Any, x_BND: Tensor, interact: bool, *weights: Tensor) -> tuple[Tensor, ...]:
        assert interact
        ctx.rows = [len(weight) for weight in weights]
        weight_ON = stacked(weights)
        ctx.save_for_backward(x_BND, weight_ON)
        y_BKD, *parts = torch.bmm(weight_ON.expand(len(x_BND), -1, -1), x_BND).split(ctx.rows, dim=1)
        return *parts, y_BKD.contiguous(), x_BND.view_as(x_BND)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        *dparts, dy_BKD, dx_BND = grads
        x_BND, weight_ON = ctx.saved_tensors
        dp_BOD = torch.cat([dy_BKD, *dparts], dim=1)
        dx_BND = torch.baddbmm(dx_BND, weight_ON.T.expand(len(x_BND), -1, -1), dp_BOD)
        return dx_BND, None, *weight_gradient(dp_BOD, x_BND).split(ctx.rows)


class _FmNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_BND: Tensor, y_BKD: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
        output, fm, mean, rstd = fm_norm(x_BND, y_BKD, weight, bias, eps)
        ctx.save_for_backward(x_BND, y_BKD, weight, bias, fm, mean, rstd)
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x_BND, y_BKD, weight, bias, fm, mean, rstd = ctx.saved_tensors
        dfm, dweight, dbias = torch.ops.aten.native_layer_norm_backward(
            grads[0].contiguous(), fm, [fm.shape[1]], mean, rstd, weight, bias, [True, True, bias is not None]
        )
        dfm_BNK = dfm.view(len(x_BND), x_BND.shape[1], y_BKD.shape[1])
        return torch.bmm(dfm_BNK, y_BKD), torch.bmm(dfm_BNK.mT, x_BND), dweight, dbias, None


class FmLayerNorm(nn.Module):
    """LayerNorm(flatten(X Y^T)) with the parameters, and their names, of a LayerNorm."""

    def __init__(self, norm: nn.LayerNorm) -> None:
        super().__init__()
        self.weight, self.bias, self.eps = norm.weight, norm.bias, norm.eps

    def forward(self, x_BND: Tensor, y_BKD: Tensor) -> Tensor:
        """[B, N, D] and [B, K, D] -> [B, N K]."""
        output: Tensor = _FmNorm.apply(x_BND, y_BKD, self.weight, self.bias, self.eps)
        return output


def fuse(layer: InteractionLayer) -> None:
    """Let an interaction layer with a static Y use these kernels, in place; its parameters keep their names."""
    layer.projection.products = _Products.apply
    layer.fmb.norm = FmLayerNorm(layer.fmb.norm)  # type: ignore[arg-type]
    layer.interact = _interact


def _interact(layer: InteractionLayer, x_BND: Tensor, keys: Tensor | None) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    projected, y_BKD, x_BND = layer.projection(x_BND, interact=True)
    return x_BND, projected, layer.fmb.of_normalised(layer.fmb.norm(x_BND, y_BKD), keys)
