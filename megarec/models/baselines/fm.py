"""Factorization machines: FM (Rendle 2010, eq. 1) and DeepFM (Guo et al. 2017, arXiv 1703.04247, eq. 1 and 2).

    first  = b + sum over i of w_i . x_i
    second = sum over i < j of x_i . x_j  =  1/2 sum over d of ((sum_i x_id)^2 - sum_i x_id^2)
    FM:      logit = first + second
    DeepFM:  logit = first + second + MLP(flatten(X_0))

Where the papers have a scalar weight for every id (first order), a table of its own, we take a linear map of the
embeddings: w_i . E_i[id] is such a number for each id, but it shares its parameters with the second order.

Shape suffixes: B examples, N embeddings of one example, D width of an embedding.
"""

import torch
from torch import Tensor, nn

from megarec.config.models import DeepFmConfig, FmConfig
from megarec.models.blocks import MLP, head_of, number_dropouts


def pair_products(x_BND: Tensor) -> Tensor:
    """The sum of x_i . x_j over all i < j, in O(N D) (Rendle 2010, lemma 3.1): [B, N, D] -> [B]."""
    return _squares(x_BND).sum(1) / 2


def paired(x_BND: Tensor) -> Tensor:
    """flatten(X_0), and the products of all pairs before they are summed over d: [B, N, D] -> [B, (N + 1) D]."""
    return torch.cat([x_BND.flatten(1), _squares(x_BND) / 2], dim=1)


def _squares(x_BND: Tensor) -> Tensor:
    return x_BND.sum(1).square() - x_BND.square().sum(1)


class Fm(nn.Module):
    """The dense model over n embeddings of width d per example; it knows no process group.

    Args:
        n: embeddings per example in X_0.
        config: the sizes.
        headless: stop before the maps that make the logit: `columns` of them leave (multi_task.py).
    """

    def __init__(self, n: int, config: FmConfig, headless: bool = False) -> None:
        super().__init__()
        self.columns = (n + 1) * config.dim
        self.head = None if headless else MLP(n * config.dim, [], 1, bias=config.bias)

    def forward(self, x_BND: Tensor, keys: Tensor | None = None) -> Tensor:
        """X_0 [B, n, d] -> logits [B]; headless: [B, columns]. There is no dropout that would need keys."""
        if self.head is None:
            return paired(x_BND)
        logits: Tensor = self.head(x_BND.flatten(1)).squeeze(1) + pair_products(x_BND)
        return logits


class DeepFm(nn.Module):
    """A factorization machine and an MLP over the same embeddings; it knows no process group.

    Args:
        n: embeddings per example in X_0.
        config: the sizes.
        headless: stop before the maps that make the logit: `columns` of them leave (multi_task.py).
    """

    def __init__(self, n: int, config: DeepFmConfig, headless: bool = False) -> None:
        super().__init__()
        self.columns = (n + 1) * config.dim
        self.linear = None if headless else MLP(n * config.dim, [], 1, bias=False)
        self.head = None if headless else head_of(config, n * config.dim, config.head)
        number_dropouts(self)

    def forward(self, x_BND: Tensor, keys: Tensor | None = None) -> Tensor:
        """X_0 [B, n, d] and the examples' dropout keys int64 [B] -> logits [B]; headless: [B, columns]."""
        if self.linear is None or self.head is None:
            return paired(x_BND)
        x_BE = x_BND.flatten(1)
        logits: Tensor = (self.linear(x_BE) + self.head(x_BE, keys)).squeeze(1) + pair_products(x_BND)
        return logits
