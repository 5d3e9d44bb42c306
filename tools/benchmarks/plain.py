"""Wukong as public implementations write it: the peer of the dense benchmark.

The equations one by one, nn.Linear on permuted tensors, a matmul for each product, as in
github.com/clabrugere/wukong-recommendation (model/pytorch/wukong.py). Y is static.
"""

import copy

import torch
from torch import Tensor, nn

from megarec.models.wukong import InteractionLayer, Wukong


class PlainLayer(nn.Module):
    """One interaction layer with copies of the weights of ours."""

    def __init__(self, layer: InteractionLayer) -> None:
        super().__init__()
        weights = layer.projection
        assert weights.fm is not None
        self.y = nn.Parameter(weights.fm.detach().T.clone())
        self.lcb = _linear(weights.lcb)
        self.residual = None if weights.residual is None else _linear(weights.residual)
        self.fm_norm, self.mlp, self.norm = copy.deepcopy([layer.fmb.norm, layer.fmb.mlp, layer.norm])

    def forward(self, x: Tensor) -> Tensor:
        batch, _, dim = x.shape
        fm = torch.matmul(x, torch.matmul(x.permute(0, 2, 1), self.y))
        fmb = self.mlp(self.fm_norm(fm.reshape(batch, -1))).reshape(batch, -1, dim)
        lcb = self.lcb(x.permute(0, 2, 1)).permute(0, 2, 1)
        residual = x if self.residual is None else self.residual(x.permute(0, 2, 1)).permute(0, 2, 1)
        return self.norm(torch.cat([fmb, lcb], dim=1) + residual)


class PlainWukong(nn.Module):
    """The given Wukong with copies of its weights, implemented plainly."""

    def __init__(self, model: Wukong) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(PlainLayer(layer) for layer in model.layers))  # type: ignore[arg-type]
        assert model.head is not None
        self.head = copy.deepcopy(model.head)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layers(x).flatten(1)).squeeze(1)


def _linear(weight: Tensor) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    linear.weight.data.copy_(weight)
    return linear
