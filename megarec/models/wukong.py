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
from torch import Tensor, nn

from megarec.config.models import WukongConfig
from megarec.errors import UserError
from megarec.models.blocks import head_of, mlp_of, number_dropouts, shift_vanishes
from megarec.models.projection import Projection

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


def last_biases(config: WukongConfig, headless: bool = False) -> list[bool]:
    """By layer, whether a bias of its output could change a logit (`shift_vanishes`)."""
    return [True] * (config.layers - 1) + [not shift_vanishes(config, config.head, headless)]


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
            self.attention = mlp_of(
                config, config.attentive.compressed * config.dim, config.attentive.mlp, sizes.inputs * sizes.rank
            )
        self.norm = layer_norm(interactions, config.bias)
        self.mlp = mlp_of(config, interactions, sizes.mlp, sizes.num_fm * config.dim)

    def forward(self, x_BND: Tensor, projected: Tensor | None, keys: Tensor | None) -> Tensor:
        """X and, static Y: FM(X) [B, N, K]; attentive: the compressed X [B, C, D]; full: None -> [B, F, D]."""
        interactions = self._interact(x_BND, projected, keys)
        return self.of_normalised(self.norm(interactions.flatten(1)), keys)

    def of_normalised(self, interactions: Tensor, keys: Tensor | None) -> Tensor:
        """LayerNorm(flatten(FM(X))) -> [B, F, D]."""
        return self.mlp(interactions, keys).unflatten(1, (self.sizes.num_fm, self.dim))

    def _interact(self, x_BND: Tensor, projected: Tensor | None, keys: Tensor | None) -> Tensor:
        """FM(X): [B, N, K], or [B, N, N] when full."""
        if self.full:
            return torch.bmm(x_BND, x_BND.mT)
        assert projected is not None
        if self.attention is None:
            return projected
        y_BNK = self.attention(projected.flatten(1), keys).unflatten(1, (self.sizes.inputs, self.sizes.rank))
        return torch.bmm(x_BND, torch.bmm(x_BND.mT, y_BNK))


class InteractionLayer(nn.Module):
    """One Wukong layer, post-norm: LayerNorm(concat(FMB(X), LCB(X)) + residual(X)).

    Args:
        last_bias: whether the LayerNorm of its output has the bias that `config.bias` gives every map.

    Attributes:
        interact: makes (X, the maps of X by name, FMB(X)) of (this layer, X, keys): `interact`, or the replacement of
            fused_fm.py.
    """

    interact: Callable[["InteractionLayer", Tensor, Tensor | None], tuple[Tensor, dict[str, Tensor], Tensor]]

    def __init__(
        self, sizes: LayerSizes, config: WukongConfig, layer_norm: LayerNormFactory, last_bias: bool = True
    ) -> None:
        super().__init__()
        self.static = config.fm == "optimized" and config.projection == "static"
        self.projection = Projection(
            sizes.inputs,
            lcb=sizes.num_lcb,
            fm=None if config.fm == "full" else sizes.rank if self.static else config.attentive.compressed,
            residual=sizes.outputs if sizes.outputs != sizes.inputs else None,
        )
        self.fmb = FactorizationMachineBlock(sizes, config, layer_norm)
        self.norm = layer_norm(config.dim, config.bias and last_bias)
        self.interact = interact

    def forward(self, x_BND: Tensor, keys: Tensor | None = None) -> Tensor:
        """[B, N, D] -> [B, M, D]."""
        x_BND, projected, fmb_BFD = self.interact(self, x_BND, keys)
        both_BMD = torch.cat([fmb_BFD, projected["lcb"]], dim=1)
        return self.norm(both_BMD.add_(projected.get("residual", x_BND)))


def interact(layer: InteractionLayer, x_BND: Tensor, keys: Tensor | None) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    """X [B, N, D] itself, the maps of X by name, and FMB(X) [B, F, D], in plain torch."""
    projected, *fm_BNK = layer.projection(x_BND, interact=layer.static)
    return x_BND, projected, layer.fmb(x_BND, fm_BNK[0] if layer.static else projected.get("fm"), keys)


class Wukong(nn.Module):
    """The dense model over n embeddings of width d per example; it knows no process group.

    Args:
        n: embeddings per example in X_0.
        config: the sizes.
        layer_norm: makes a LayerNorm over (width, with bias or not), such as a fused one.
        headless: stop before the maps that make the logit: `columns` of them leave (multi_task.py).

    Raises:
        UserError: a list of sizes has another length than `model.layers`.
    """

    def __init__(
        self,
        n: int,
        config: WukongConfig,
        layer_norm: LayerNormFactory = torch_layer_norm,
        headless: bool = False,
    ) -> None:
        super().__init__()
        sizes = layer_sizes(n, config)
        biases = last_biases(config, headless)
        self.layers = nn.ModuleList(
            InteractionLayer(layer, config, layer_norm, bias) for layer, bias in zip(sizes, biases, strict=True)
        )
        self.columns = sizes[-1].outputs * config.dim
        self.head = None if headless else head_of(config, self.columns, config.head)
        number_dropouts(self)

    def forward(self, x_BND: Tensor, keys: Tensor | None = None) -> Tensor:
        """X_0 [B, n, d] and the examples' dropout keys int64 [B] -> logits [B]; headless: [B, columns]."""
        for layer in self.layers:
            x_BND = layer(x_BND, keys)
        x_BE = x_BND.flatten(1)
        return x_BE if self.head is None else self.head(x_BE, keys).squeeze(1)
