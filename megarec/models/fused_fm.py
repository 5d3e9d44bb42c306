"""Triton kernels around the factorization machine, for GPUs: FM and its LayerNorm in one, and the gradient of W.

    FM = X Y^T,  LayerNorm(flatten(FM))     one program an example: X is read once, FM is written once, and normalised
                                            while it lies in the cache
    dW = sum over the examples of dP X^T    X and dP are read as they lie; a GEMM wants the examples side by side, which
                                            is a copy of both

The plain way (projection.py, torch's LayerNorm) is what they are tested against, and what everything else runs. Sums
are float32, in a fixed order. FM is rounded to the type of X before it is normalised, as it is the plain way.

Shape suffixes: B examples, N embeddings, D their width, K rank, O = K + R rows of W, G groups of examples.
"""

# mypy: disable-error-code="untyped-decorator"
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor, nn

from megarec.models.projection import stacked
from megarec.models.wukong import InteractionLayer

_ELEMENTS = 8192  # of a tile of sums: 64 registers a thread of 128
_FLAT = 1024  # elements that are normalised at a time
_PROGRAMS = 512  # that share the sum over the examples: a few for every multiprocessor of today's GPUs


@triton.jit
def fm_norm_kernel(
    x: tl.tensor,
    y: tl.tensor,
    weight: tl.tensor,
    bias: tl.tensor,
    fm: tl.tensor,
    output: tl.tensor,
    means: tl.tensor,
    rstds: tl.tensor,
    eps: tl.tensor,
    N: tl.constexpr,
    K: tl.constexpr,
    D: tl.constexpr,
    BIAS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    FLAT: tl.constexpr,
) -> None:
    """FM [N, K] of one example, its mean and 1 / standard deviation, and the normalised FM. Grid: examples."""
    example = tl.program_id(0).to(tl.int64)
    x += example * (N * D)
    y += example * (K * D)
    fm += example * (N * K)
    output += example * (N * K)
    depth = tl.arange(0, DEPTH)
    count, mean, squares = 0.0, 0.0, 0.0  # of the elements so far; squares of their deviations from the mean
    for first_row in range(0, N, ROWS):
        row = first_row + tl.arange(0, ROWS)
        for first_column in range(0, K, COLUMNS):
            column = first_column + tl.arange(0, COLUMNS)
            product = tl.zeros([ROWS, COLUMNS], tl.float32)
            for first in range(0, D, DEPTH):
                d = first + depth
                x_tile = tl.load(x + row[:, None] * D + d[None, :], (row < N)[:, None] & (d < D)[None, :], other=0.0)
                y_tile = tl.load(
                    y + column[None, :] * D + d[:, None], (column < K)[None, :] & (d < D)[:, None], other=0.0
                )
                product = tl.dot(x_tile, y_tile, product, input_precision="ieee")
            inside = (row < N)[:, None] & (column < K)[None, :]
            rounded = product.to(fm.dtype.element_ty)
            tl.store(fm + row[:, None] * K + column[None, :], rounded, inside)
            # Chan, Golub, LeVeque: the deviations of two parts from their common mean.
            value = rounded.to(tl.float32)
            new = (min(ROWS, N - first_row) * min(COLUMNS, K - first_column)) * 1.0
            new_mean = tl.sum(tl.sum(value, axis=1), axis=0) / new  # what lies outside is zero
            deviation = tl.where(inside, value - new_mean, 0.0)
            apart = new_mean - mean
            both = count + new
            squares += tl.sum(tl.sum(deviation * deviation, axis=1), axis=0) + apart * apart * (count * new / both)
            mean += apart * (new / both)
            count = both
    rstd = 1.0 / tl.sqrt(squares / (N * K) + eps)
    tl.store(means + example, mean)
    tl.store(rstds + example, rstd)
    tl.debug_barrier()  # other threads of the program wrote what is read now
    for first in range(0, N * K, FLAT):
        place = first + tl.arange(0, FLAT)
        value = tl.load(fm + place, place < N * K, other=0.0).to(tl.float32)
        normal = (value - mean) * rstd * tl.load(weight + place, place < N * K, other=0.0).to(tl.float32)
        if BIAS:
            normal += tl.load(bias + place, place < N * K, other=0.0).to(tl.float32)
        tl.store(output + place, normal.to(output.dtype.element_ty), place < N * K)


@triton.jit
def weight_gradient_kernel(
    dp: tl.tensor,
    x: tl.tensor,
    sums: tl.tensor,
    examples: tl.tensor,
    in_group: tl.tensor,
    O: tl.constexpr,  # noqa: E741
    N: tl.constexpr,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
) -> None:
    """A tile of the sum of dP X^T over a group of examples, float32 [G, O, N]. Grid: tiles of N, tiles of O, G."""
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    group = tl.program_id(2)
    depth = tl.arange(0, DEPTH)
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for nth in range(group * in_group, min(group * in_group + in_group, examples)):
        example = tl.cast(nth, tl.int64)
        for first in range(0, D, DEPTH):
            d = first + depth
            dp_tile = tl.load(
                dp + example * (O * D) + row[:, None] * D + d[None, :],
                (row < O)[:, None] & (d < D)[None, :],
                other=0.0,
            )
            x_tile = tl.load(
                x + example * (N * D) + column[None, :] * D + d[:, None],
                (column < N)[None, :] & (d < D)[:, None],
                other=0.0,
            )
            total = tl.dot(dp_tile, x_tile, total, input_precision="ieee")
    place = (tl.cast(group, tl.int64) * O + row[:, None]) * N + column[None, :]
    tl.store(sums + place, total, (row < O)[:, None] & (column < N)[None, :])


def tile(rows: int, columns: int, depth: int) -> dict[str, int]:
    """The sides of a tile of sums of rows x columns, and how much of the inner dimension is read at a time."""
    wide = min(128, max(16, triton.next_power_of_2(columns)))
    high = min(128, _ELEMENTS // wide, max(16, triton.next_power_of_2(rows)))
    return {"ROWS": high, "COLUMNS": wide, "DEPTH": 16 if depth % 32 else 32}


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
        sizes = {"N": n, "K": k, "D": dim, "BIAS": bias is not None, "FLAT": _FLAT, **tile(n, k, dim)}
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
    """W X, and X itself: what comes back for X is the matrix that the product behind dX is added to."""

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
