"""The linear maps over an interaction layer's embeddings, and the factorization machine over one of them.

    P  = W X              W [O, N]: the rows of Y^T, W_L and W_R, one below the other
    FM = X (X^T Y)        = X P_Y^T, P_Y the K rows of P that belong to Y

X arrives as [B, N, D] and all results are wanted example by example, so every product is one per example with the
weight shared: nothing is transposed in memory, and X is read by a few products that follow one another. Autograd
would materialise the shared weight's gradient for every example, and the gradient of X once a product; hence a
backward pass of its own.

Shape suffixes: B examples, N embeddings that enter, D width of an embedding, O = K + R rows of W.
"""

from typing import Any

import torch
from torch import Tensor, nn

from megarec.models.blocks import init_fan_in_
from megarec.models.cpu_gemm import example_blocks, summed_products, widened


class Projection(nn.Module):
    """Every linear map over the N embeddings that a layer needs.

    Parameters, each [outputs, N] and normal with variance 1 / N; absent ones are None:
        fm: Y^T of the optimized FM, or the compression in front of the attentive Y.
        lcb: W_L of the linear compression block.
        residual: the linear compression of the residual, where the number of embeddings changes.
    """

    lcb: nn.Parameter
    fm: nn.Parameter | None
    residual: nn.Parameter | None

    def __init__(self, inputs: int, *, lcb: int, fm: int | None, residual: int | None) -> None:
        super().__init__()
        for name, outputs in (("lcb", lcb), ("fm", fm), ("residual", residual)):
            self.register_parameter(name, nn.Parameter(torch.empty(outputs, inputs)) if outputs else None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw all weights anew."""
        for weight in self.parameters(recurse=False):
            init_fan_in_(weight, weight.shape[1])

    def forward(self, x_BND: Tensor, interact: bool = False) -> tuple[dict[str, Tensor], Tensor | None]:
        """[B, N, D] -> by parameter name [B, outputs, D]; `interact`: FM(X) [B, N, K] in place of the map `fm`."""
        weights = dict(self.named_parameters(recurse=False))
        first = {"fm": weights.pop("fm")} if interact else {}
        rank = sum(len(weight) for weight in first.values())
        projected_BRD, fm_BNK = project(x_BND, torch.cat([*first.values(), *weights.values()]), rank)
        parts = projected_BRD.split([len(weight) for weight in weights.values()], dim=1)
        return dict(zip(weights, parts, strict=True)), fm_BNK if interact else None


def project(x_BND: Tensor, weight_ON: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """W X without its first `rank` rows, [B, R, D], and X (W_rank X)^T, [B, N, rank]."""
    projected_BRD, fm_BNK = _Project.apply(x_BND, weight_ON, rank)
    return projected_BRD, fm_BNK


class _Project(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_BND: Tensor, weight_ON: Tensor, rank: int) -> tuple[Tensor, Tensor]:
        batch, n, dim = x_BND.shape
        others = len(weight_ON) - rank
        y_BKD, projected_BRD, fm_BNK = (
            x_BND.new_empty(batch, *shape) for shape in ((rank, dim), (others, dim), (n, rank))
        )
        weight = widened(weight_ON)
        for block in example_blocks(x_BND):
            x = widened(x_BND[block])
            y, projected = torch.bmm(weight.expand(len(x), -1, -1), x).split([rank, others], dim=1)
            y_BKD[block], projected_BRD[block] = y, projected
            fm_BNK[block] = torch.bmm(x, widened(y_BKD[block]).mT)
        ctx.save_for_backward(x_BND, weight_ON, y_BKD)
        return projected_BRD, fm_BNK

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        dprojected_BRD, dfm_BNK = grads
        x_BND, weight_ON, y_BKD = ctx.saved_tensors
        dx_BND = torch.empty_like(x_BND)
        weight = widened(weight_ON)
        dweight = torch.zeros_like(weight)
        for block in example_blocks(x_BND):
            x, dfm = widened(x_BND[block]), widened(dfm_BNK[block])
            dp = torch.cat([torch.bmm(dfm.mT, x), widened(dprojected_BRD[block])], dim=1)
            dweight += summed_products(dp, x)
            dx = dx_BND[block] if x.dtype == dx_BND.dtype else torch.empty_like(x)
            torch.bmm(weight.T.expand(len(x), -1, -1), dp, out=dx)
            torch.baddbmm(dx, dfm, widened(y_BKD[block]), out=dx)
            if dx.dtype != dx_BND.dtype:
                dx_BND[block] = dx
        return dx_BND, dweight.to(weight_ON.dtype), None
