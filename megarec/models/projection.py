"""The linear maps over an interaction layer's embeddings, and the factorization machine over one of them.

    P  = W X              W [O, N]: the rows of Y^T, W_L and W_R, one below the other
    FM = X (X^T Y)        = X P_Y^T, P_Y the K rows of P that belong to Y

X arrives as [B, N, D] and all results are wanted example by example, so every product is one per example with the
weight shared: nothing is transposed in memory, and X is read by a few products that follow one another. Autograd
would materialise the shared weight's gradient for every example, and the gradient of X once a product; hence a
backward pass of its own.

A CPU goes through the batch in blocks that stay in its cache. An accelerator takes it whole: its GEMMs read 16 bytes at
a time where rows start at a multiple of 16, so W's are padded to one (N = 723 is odd). The sum over examples that is dW
is one GEMM there, over dP and X with the examples side by side.

Shape suffixes: B examples, N embeddings that enter, D width of an embedding, O = K + R rows of W.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megarec.models.blocks import init_fan_in_
from megarec.models.cpu_gemm import example_blocks, in_blocks, summed_products, widened

_ALIGNMENT = 8  # elements of two bytes in the 16 bytes that a GPU reads at a time


class Projection(nn.Module):
    """Every linear map over the N embeddings that a layer needs.

    Parameters, each [outputs, N] and normal with variance 1 / N; absent ones are None:
        fm: Y^T of the optimized FM, or the compression in front of the attentive Y.
        lcb: W_L of the linear compression block.
        residual: the linear compression of the residual, where the number of embeddings changes.

    Attributes:
        products: `project`, or what stands in for it (fused_fm.py).
    """

    lcb: nn.Parameter
    fm: nn.Parameter | None
    residual: nn.Parameter | None
    products: Callable[..., tuple[Tensor, ...]]

    def __init__(self, inputs: int, *, lcb: int, fm: int | None, residual: int | None) -> None:
        super().__init__()
        for name, outputs in (("lcb", lcb), ("fm", fm), ("residual", residual)):
            self.register_parameter(name, nn.Parameter(torch.empty(outputs, inputs)) if outputs else None)
        self.products = project
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw all weights anew."""
        for weight in self.parameters(recurse=False):
            init_fan_in_(weight, weight.shape[1])

    def forward(self, x_BND: Tensor, interact: bool = False) -> tuple[dict[str, Tensor], *tuple[Tensor, ...]]:
        """[B, N, D] -> by parameter name [B, outputs, D].

        Args:
            interact: in place of the map `fm`, what else `products` makes of X and its weight: FM(X) [B, N, K].
        """
        weights = dict(self.named_parameters(recurse=False))
        first = [weights.pop("fm")] if interact else []
        rank = len(first[0]) if first else 0
        projected_BRD, *others = self.products(x_BND, rank, *first, *weights.values())
        parts = projected_BRD.split([len(weight) for weight in weights.values()], dim=1)
        return dict(zip(weights, parts, strict=True)), *(others if interact else ())


def project(x_BND: Tensor, rank: int, *weights: Tensor) -> tuple[Tensor, Tensor]:
    """W X without its first `rank` rows, [B, R, D], and X (W_rank X)^T, [B, N, rank]; `weights`: W's rows in order."""
    projected_BRD, fm_BNK = _Project.apply(x_BND, rank, *weights)
    return projected_BRD, fm_BNK


class _Project(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_BND: Tensor, rank: int, *weights: Tensor) -> tuple[Tensor, Tensor]:
        ctx.rows = [len(weight) for weight in weights]
        weight_ON = stacked(weights)
        y_BKD, projected_BRD, fm_BNK = (_forward_in_blocks if in_blocks(x_BND.device) else _forward)(
            x_BND, weight_ON, rank
        )
        ctx.save_for_backward(x_BND, weight_ON, y_BKD)
        return projected_BRD, fm_BNK

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x_BND, weight_ON, y_BKD = ctx.saved_tensors
        backward = _backward_in_blocks if in_blocks(x_BND.device) else _backward
        dx_BND, dweight_ON = backward(x_BND, weight_ON, y_BKD, *grads)
        return dx_BND, None, *dweight_ON.split(ctx.rows)


def stacked(weights: Sequence[Tensor]) -> Tensor:
    """W from its parts [rows, N]; on an accelerator every row starts at a multiple of 16 bytes."""
    whole = torch.cat(list(weights))
    if in_blocks(whole.device) or whole.is_meta:  # on the meta device bytes are counted, those of a CPU as well
        return whole
    n = whole.shape[1]
    return F.pad(whole, (0, -n % _ALIGNMENT))[:, :n]


def _forward(x_BND: Tensor, weight_ON: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    all_BOD = torch.bmm(weight_ON.expand(len(x_BND), -1, -1), x_BND)
    y_BKD = all_BOD[:, :rank].contiguous()  # kept for the backward pass, without the rest
    return y_BKD, all_BOD[:, rank:], torch.bmm(x_BND, y_BKD.mT)


def _backward(
    x_BND: Tensor, weight_ON: Tensor, y_BKD: Tensor, dprojected_BRD: Tensor, dfm_BNK: Tensor
) -> tuple[Tensor, Tensor]:
    dy_BKD = torch.bmm(dfm_BNK.mT, x_BND)
    dp_OBD = torch.cat([dy_BKD.transpose(0, 1), dprojected_BRD.transpose(0, 1)])
    dx_BND = torch.bmm(weight_ON.T.expand(len(x_BND), -1, -1), dp_OBD.transpose(0, 1))
    return torch.baddbmm(dx_BND, dfm_BNK, y_BKD), summed_over_examples(dp_OBD, x_BND)


def summed_over_examples(dp_OBD: Tensor, x_BND: Tensor) -> Tensor:
    """dW [O, N], the sum over the examples of dP X^T, as one GEMM over rows of B x D, aligned whatever N is."""
    return dp_OBD.flatten(1) @ x_BND.transpose(0, 1).flatten(1).T


def _forward_in_blocks(x_BND: Tensor, weight_ON: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    batch, n, dim = x_BND.shape
    others = len(weight_ON) - rank
    y_BKD, projected_BRD, fm_BNK = (x_BND.new_empty(batch, *shape) for shape in ((rank, dim), (others, dim), (n, rank)))
    weight = widened(weight_ON)
    for block in example_blocks(x_BND):
        x = widened(x_BND[block])
        y, projected = torch.bmm(weight.expand(len(x), -1, -1), x).split([rank, others], dim=1)
        y_BKD[block], projected_BRD[block] = y, projected
        fm_BNK[block] = torch.bmm(x, widened(y_BKD[block]).mT)
    return y_BKD, projected_BRD, fm_BNK


def _backward_in_blocks(
    x_BND: Tensor, weight_ON: Tensor, y_BKD: Tensor, dprojected_BRD: Tensor, dfm_BNK: Tensor
) -> tuple[Tensor, Tensor]:
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
    return dx_BND, dweight.to(weight_ON.dtype)
