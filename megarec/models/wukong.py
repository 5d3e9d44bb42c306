"""Wukong (Zhang et al., ICML 2024, arXiv 2403.02545): stacked factorization machines.

    X_{i+1} = LayerNorm(concat(FMB(X_i), LCB(X_i)) + residual(X_i))
    FMB(X)  = reshape(MLP(LayerNorm(flatten(FM(X)))), [n_F, d])
    FM(X)   = X (X^T Y), or the full X X^T
    LCB(X)  = W_L X

Layer i holds interactions of order 1 .. 2^i. An MLP maps the flattened last X to the logit.

Shape suffixes: B examples, N embeddings that enter a layer, F and L embeddings that its FM block and its linear
compression block emit, M = F + L, D width of an embedding, K rank (columns of Y), C embeddings that the attentive
projection compresses to.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megarec.config.sections import WukongConfig
from megarec.errors import UserError
from megarec.models.blocks import MLP, init_fan_in_, number_dropouts

LayerNormFactory = Callable[[int, bool], nn.Module]


def torch_layer_norm(width: int, bias: bool) -> nn.Module:
    """LayerNorm over the last dimension of `width` elements."""
    return nn.LayerNorm(width, bias=bias)


@dataclass(frozen=True)
class LayerSizes:
    """The sizes of one interaction layer; names as in WukongConfig, `inputs` is the n that enters it."""

    inputs: int
    num_fm: int
    num_lcb: int
    rank: int
    mlp: list[int]

    @property
    def outputs(self) -> int:
        return self.num_fm + self.num_lcb


def layer_sizes(n: int, config: WukongConfig) -> list[LayerSizes]:
    """The sizes of every interaction layer over n input embeddings.

    Raises:
        UserError: a list in the config has another length than `model.layers`.
    """
    nested = any(isinstance(widths, list) for widths in config.mlp)
    num_fm = _per_layer("num_fm", config.num_fm, config.layers)
    num_lcb = _per_layer("num_lcb", config.num_lcb, config.layers)
    rank = _per_layer("rank", config.rank, config.layers)
    mlp = cast(list[list[int]], config.mlp if nested else [config.mlp] * config.layers)
    _check_length("mlp", len(mlp), config.layers)
    inputs = [n] + [fm + lcb for fm, lcb in zip(num_fm, num_lcb, strict=True)]
    return [LayerSizes(*sizes) for sizes in zip(inputs[:-1], num_fm, num_lcb, rank, mlp, strict=True)]


def _per_layer(key: str, sizes: int | list[int], layers: int) -> list[int]:
    if isinstance(sizes, int):
        return [sizes] * layers
    _check_length(key, len(sizes), layers)
    return sizes


def _check_length(key: str, given: int, layers: int) -> None:
    if given != layers:
        raise UserError(
            f"model.{key} has sizes for {given} layers, but model.layers={layers}: "
            "give one for all layers, or a list with one per layer"
        )


class Projection(nn.Module):
    """Every linear map over the N embeddings that a layer needs, as one GEMM in the layout [B, D, N].

    Parameters, each [outputs, N] and normal with variance 1 / N; absent ones are None:
        lcb: W_L of the linear compression block.
        fm: Y^T of the optimized FM, or the compression in front of the attentive Y.
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

    def forward(self, x_BDN: Tensor) -> dict[str, Tensor]:
        """[B, D, N] -> by parameter name [B, D, outputs]: views of one result."""
        weights = dict(self.named_parameters(recurse=False))
        fused = F.linear(x_BDN, torch.cat(list(weights.values())))
        parts = fused.split([weight.shape[0] for weight in weights.values()], dim=-1)
        return dict(zip(weights, parts, strict=True))


class FactorizationMachineBlock(nn.Module):
    """FMB: reshape(MLP(LayerNorm(flatten(FM(X)))), [F, D])."""

    def __init__(self, sizes: LayerSizes, config: WukongConfig, layer_norm: LayerNormFactory) -> None:
        super().__init__()
        self.sizes = sizes
        self.dim = config.dim
        self.full = config.fm == "full"
        interactions = sizes.inputs * (sizes.inputs if self.full else sizes.rank)
        self.attention = None
        if not self.full and config.projection == "attentive":
            self.attention = MLP(
                config.attentive.compressed * config.dim,
                config.attentive.mlp,
                sizes.inputs * sizes.rank,
                bias=config.bias,
                dropout=config.dropout,
            )
        self.norm = layer_norm(interactions, config.bias)
        self.mlp = MLP(interactions, sizes.mlp, sizes.num_fm * config.dim, bias=config.bias, dropout=config.dropout)

    def forward(self, x_BDN: Tensor, projected: Tensor | None, keys: Tensor | None) -> Tensor:
        """X^T and its projection, X^T Y [B, D, K] (attentive: the compressed X^T, [B, D, C]) -> [B, F, D]."""
        interactions = self._interact(x_BDN, projected, keys)
        return self.mlp(self.norm(interactions.flatten(1)), keys).unflatten(1, (self.sizes.num_fm, self.dim))

    def _interact(self, x_BDN: Tensor, projected: Tensor | None, keys: Tensor | None) -> Tensor:
        """FM(X): [B, N, K], or [B, N, N] when full."""
        if self.full:
            return torch.bmm(x_BDN.mT, x_BDN)
        assert projected is not None
        if self.attention is not None:
            y_BNK = self.attention(projected.mT.flatten(1), keys).unflatten(1, (self.sizes.inputs, self.sizes.rank))
            projected = torch.bmm(x_BDN, y_BNK)
        return torch.bmm(x_BDN.mT, projected)


class InteractionLayer(nn.Module):
    """One Wukong layer, post-norm: LayerNorm(concat(FMB(X), LCB(X)) + residual(X))."""

    def __init__(self, sizes: LayerSizes, config: WukongConfig, layer_norm: LayerNormFactory) -> None:
        super().__init__()
        optimized = config.attentive.compressed if config.projection == "attentive" else sizes.rank
        self.projection = Projection(
            sizes.inputs,
            lcb=sizes.num_lcb,
            fm=optimized if config.fm == "optimized" else None,
            residual=sizes.outputs if sizes.outputs != sizes.inputs else None,
        )
        self.fmb = FactorizationMachineBlock(sizes, config, layer_norm)
        self.norm = layer_norm(config.dim, config.bias)

    def forward(self, x_BND: Tensor, keys: Tensor | None = None) -> Tensor:
        """[B, N, D] -> [B, M, D]."""
        x_BDN = x_BND.mT.contiguous()  # the one copy of X: every product of the layer reads this layout as it lies
        projected = self.projection(x_BDN)
        fmb_BFD = self.fmb(x_BDN, projected.get("fm"), keys)
        residual_BMD = projected["residual"].mT if "residual" in projected else x_BND
        return self.norm(torch.cat([fmb_BFD, projected["lcb"].mT], dim=1).add_(residual_BMD))


class Wukong(nn.Module):
    """The dense model over n embeddings of width d per example; it knows no process group.

    Args:
        n: embeddings per example in X_0.
        config: the sizes.
        layer_norm: makes a LayerNorm over (width, with bias or not), such as a fused one.

    Raises:
        UserError: a list of sizes has another length than `model.layers`.
    """

    def __init__(self, n: int, config: WukongConfig, layer_norm: LayerNormFactory = torch_layer_norm) -> None:
        super().__init__()
        sizes = layer_sizes(n, config)
        self.layers = nn.ModuleList(InteractionLayer(layer, config, layer_norm) for layer in sizes)
        self.head = MLP(sizes[-1].outputs * config.dim, config.head, 1, bias=config.bias, dropout=config.dropout)
        number_dropouts(self)

    def forward(self, x_BND: Tensor, keys: Tensor | None = None) -> Tensor:
        """X_0 [B, n, d] and the examples' dropout keys int64 [B] -> logits [B]."""
        for layer in self.layers:
            x_BND = layer(x_BND, keys)
        return self.head(x_BND.flatten(1), keys).squeeze(1)
