"""The linear maps over an interaction layer's embeddings, and the factorization machine over one of them.

    P  = W X              W [O, N]: the rows of Y^T, W_L and W_R, one below the other
    FM = X (X^T Y)        = X P_Y^T, P_Y the K rows of P that belong to Y

X arrives as [B, N, D] and all results are needed example by example, so every product is one per example with the
weight shared: nothing is transposed in memory, and X is read by a few products that follow one another. Autograd
would materialise the shared weight's gradient for every example, and the gradient of X once a product; so there is a
backward pass of its own.

A CPU goes through the batch in blocks that stay in its cache. An accelerator takes it whole: outputs are then not
copied, and the sum over examples that is dW is one GEMM, over dP and X with the examples side by side. Its GEMMs read
16 bytes at a time where rows start at a multiple of 16, so W's are padded to one (N = 723 is odd).

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
        products: `project`, or its replacement (fused_fm.py).
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
        """Draw all weights again."""
        for weight in self.parameters(recurse=False):
            init_fan_in_(weight, weight.shape[1])

    def forward(self, x_BND: Tensor, interact: bool = False) -> tuple[dict[str, Tensor], *tuple[Tensor, ...]]:
        """[B, N, D] -> by parameter name [B, outputs, D].

        Args:
            interact: in place of the map `fm`, let `products` compute FM(X) [B, N, K] of X and its weight.
        """
        weights = dict(self.named_parameters(recurse=False))
        first = [weights.pop("fm")] if interact else []
        made = self.products(x_BND, interact, *first, *weights.values())
        parts = dict(zip(weights, made, strict=False))
        return parts, *made[len(weights) :]


def project(x_BND: Tensor, interact: bool, *weights: Tensor) -> tuple[Tensor, ...]:
    """W X for each of the weights; with `interact` of all but the first, and behind them X (W_first X)^T, [B, N, K]."""
    if torch.compiler.is_exporting():  # the graph has a free batch size, and no loop over blocks of a known one
        return _traced(x_BND, interact, weights)
    made: tuple[Tensor, ...] = _Project.apply(x_BND, interact, *weights)
    return made


def _traced(x_BND: Tensor, interact: bool, weights: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """`project` in plain products, for an exported graph."""
    made_BRD = torch.matmul(torch.cat(list(weights)), x_BND).split([len(weight) for weight in weights], dim=1)
    return (*made_BRD[1:], torch.bmm(x_BND, made_BRD[0].mT)) if interact else made_BRD


class _Project(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_BND: Tensor, interact: bool, *weights: Tensor) -> tuple[Tensor, ...]:
        ctx.interact, ctx.rows = interact, [len(weight) for weight in weights]
        weight_ON = stacked(weights)
        rank = ctx.rows[0] if interact else 0
        forward = _forward_in_blocks if in_blocks(x_BND) else _forward
        projected_BRD, y_BKD, fm_BNK = forward(x_BND, weight_ON, rank)
        ctx.save_for_backward(x_BND, weight_ON, y_BKD)
        return *projected_BRD.split(ctx.rows[interact:], dim=1), *([fm_BNK] if interact else ())

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x_BND, weight_ON, y_BKD = ctx.saved_tensors
        dparts, dfm_BNK = (list(grads[:-1]), grads[-1]) if ctx.interact else (list(grads), None)
        backward = _backward_in_blocks if in_blocks(x_BND) else _backward
        dx_BND, dweight_ON = backward(x_BND, weight_ON, y_BKD, dfm_BNK, dparts)
        return dx_BND, None, *dweight_ON.split(ctx.rows)


def stacked(weights: Sequence[Tensor]) -> Tensor:
    """W from its parts [rows, N]; on an accelerator every row starts at a multiple of 16 bytes."""
    whole = torch.cat(list(weights))
    # On the meta device bytes are counted, those of a CPU as well.
    return whole if whole.device.type in ("cpu", "meta") else padded(whole)


def padded(weight_ON: Tensor) -> Tensor:
    """The same numbers in rows that start at multiples of 16 bytes."""
    n = weight_ON.shape[1]
    return F.pad(weight_ON, (0, -n % _ALIGNMENT))[:, :n]


def _forward(x_BND: Tensor, weight_ON: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    all_BOD = torch.bmm(weight_ON.expand(len(x_BND), -1, -1), x_BND)
    y_BKD = all_BOD[:, :rank].contiguous()  # kept for the backward pass, without the rest
    return all_BOD[:, rank:], y_BKD, torch.bmm(x_BND, y_BKD.mT)


def _backward(
    x_BND: Tensor, weight_ON: Tensor, y_BKD: Tensor, dfm_BNK: Tensor | None, dparts: list[Tensor]
) -> tuple[Tensor, Tensor]:
    dy = [] if dfm_BNK is None else [torch.bmm(dfm_BNK.mT, x_BND)]
    dp_OBD = torch.cat([part.transpose(0, 1) for part in [*dy, *dparts]])
    dx_BND = torch.bmm(weight_ON.T.expand(len(x_BND), -1, -1), dp_OBD.transpose(0, 1))
    if dfm_BNK is not None:
        dx_BND = torch.baddbmm(dx_BND, dfm_BNK, y_BKD)
    return dx_BND, summed_over_examples(dp_OBD, x_BND)


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
    return projected_BRD, y_BKD, fm_BNK


def _backward_in_blocks(
    x_BND: Tensor, weight_ON: Tensor, y_BKD: Tensor, dfm_BNK: Tensor | None, dparts: list[Tensor]
) -> tuple[Tensor, Tensor]:
    dx_BND = torch.empty_like(x_BND)
    weight = widened(weight_ON)
    dweight = torch.zeros_like(weight)
    for block in example_blocks(x_BND):
        x = widened(x_BND[block])
        dfm = None if dfm_BNK is None else widened(dfm_BNK[block])
        dy = [] if dfm is None else [torch.bmm(dfm.mT, x)]
        dp = torch.cat([*dy, *(widened(part[block]) for part in dparts)], dim=1)
        dweight += summed_products(dp, x)
        dx = dx_BND[block] if x.dtype == dx_BND.dtype else torch.empty_like(x)
        torch.bmm(weight.T.expand(len(x), -1, -1), dp, out=dx)
        if dfm is not None:
            torch.baddbmm(dx, dfm, widened(y_BKD[block]), out=dx)
        if dx.dtype != dx_BND.dtype:
            dx_BND[block] = dx
    return dx_BND, dweight.to(weight_ON.dtype)
