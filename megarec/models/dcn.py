"""DCNv2 (Wang et al. 2021, arXiv 2008.13535): cross layers over the flattened embeddings, and an MLP behind or beside.

    x_{l+1} = x_0 * (W x_l + b) + x_l                    full rank, W [E, E]
    x_{l+1} = x_0 * (U (V x_l) + b) + x_l                low rank, V [R, E], U [E, R]
    logit   = MLP(x_L)                                   stacked
    logit   = MLP(x_0) + w . x_L                         parallel: a linear map of both streams' last columns

Layer l holds interactions of order 1 .. l + 1. With three layers of rank 512 it is the interaction of MLPerf's
DLRM-DCNv2, whose bottom MLP is the input layer's numeric MLP and whose top MLP is the head.

Shape suffixes: B examples, N embeddings of one example, D width of an embedding, E = N D elements of one example,
R rank.
"""

import torch
from torch import Tensor, nn

from megarec.config.models import DcnConfig
from megarec.models.blocks import MLP, head_of, number_dropouts


class CrossLayer(nn.Module):
    """x_0 * (W x_l + b) + x_l, where W may be a low-rank product U V.

    Args:
        width: E.
        rank: R; None: full rank.
        bias: whether there is a b; it starts at 0.
    """

    bias: nn.Parameter | None

    def __init__(self, width: int, rank: int | None, bias: bool) -> None:
        super().__init__()
        self.product = MLP(width, [] if rank is None else [rank], width, bias=False, relu=False)
        self.register_parameter("bias", nn.Parameter(torch.zeros(width)) if bias else None)

    def forward(self, first_BE: Tensor, x_BE: Tensor) -> Tensor:
        """x_0 and x_l -> x_{l+1}, all [B, E]."""
        crossed_BE = self.product(x_BE)
        if self.bias is not None:
            crossed_BE = crossed_BE + self.bias
        return torch.addcmul(x_BE, first_BE, crossed_BE)


class Dcn(nn.Module):
    """The dense model over n embeddings of width d per example; it knows no process group.

    Args:
        n: embeddings per example in X_0.
        config: the sizes.
        headless: stop before the maps that make the logit: `columns` of them leave (multi_task.py).
    """

    def __init__(self, n: int, config: DcnConfig, headless: bool = False) -> None:
        super().__init__()
        self.columns = width = n * config.dim
        self.layers = nn.ModuleList(CrossLayer(width, config.rank, config.bias) for _ in range(config.layers))
        self.parallel = config.structure == "parallel"
        self.columns = 2 * width if self.parallel else width
        self.linear = MLP(width, [], 1, bias=False) if self.parallel and not headless else None
        self.head = None if headless else head_of(config, width, config.head)
        number_dropouts(self)

    def forward(self, x_BND: Tensor, keys: Tensor | None = None) -> Tensor:
        """X_0 [B, n, d] and the examples' dropout keys int64 [B] -> logits [B]; headless: [B, columns]."""
        x_BE = first_BE = x_BND.flatten(1)
        for layer in self.layers:
            x_BE = layer(first_BE, x_BE)
        if self.head is None:
            return torch.cat([first_BE, x_BE], dim=1) if self.parallel else x_BE
        if self.linear is None:
            return self.head(x_BE, keys).squeeze(1)
        return (self.linear(x_BE) + self.head(first_BE, keys)).squeeze(1)
