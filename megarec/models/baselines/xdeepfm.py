"""xDeepFM (Lian et al. 2018, arXiv 1803.05170): a compressed interaction network (CIN) beside an MLP.

    X^0     = X_0, [n, d]
    X^k_h   = sum over i, j of W^k_h,ij (X^{k-1}_i * X^0_j)     section 3.1, h = 1 .. H_k; no activation on top
    p^k_h   = sum over d of X^k_hd                              sum pooling
    logit   = w . flatten(X_0) + w_cin . concat(p^1, ..) + MLP(flatten(X_0))      section 3.3, combination

Layer k holds interactions of order k + 1. As in fm.py the linear part maps embeddings where the paper's maps raw
ids. The CIN is not sharded by tensor parallelism (its weights are few beside its work); linear maps and MLP are.

Shape suffixes: B examples, N embeddings of one example, D width of an embedding, H feature maps of a layer.
"""

import torch
from torch import Tensor, nn

from megarec.config.models import XDeepFmConfig
from megarec.models.blocks import MLP, head_of, init_fan_in_, number_dropouts


class CinLayer(nn.Module):
    """One layer of the compressed interaction network.

    Args:
        inputs: H_{k-1} feature maps that enter.
        n: embeddings in X_0.
        outputs: H_k feature maps.
    """

    def __init__(self, inputs: int, n: int, outputs: int) -> None:
        super().__init__()
        self.compress = nn.Linear(inputs * n, outputs, bias=False)
        init_fan_in_(self.compress.weight, inputs * n)

    def forward(self, x_BDH: Tensor, first_BDN: Tensor) -> Tensor:
        """X^{k-1} and X^0, each transposed, -> X^k transposed [B, D, H_k]."""
        products = x_BDH.unsqueeze(3) * first_BDN.unsqueeze(2)  # [B, D, H, N]
        maps_BDH: Tensor = self.compress(products.flatten(2))
        return maps_BDH


class XDeepFm(nn.Module):
    """The dense model over n embeddings of width d per example; it knows no process group.

    Args:
        n: embeddings per example in X_0.
        config: the sizes.
        headless: stop before the maps that make the logit: `columns` of them leave (multi_task.py).
    """

    def __init__(self, n: int, config: XDeepFmConfig, headless: bool = False) -> None:
        super().__init__()
        widths = [n, *config.cin]
        self.layers = nn.ModuleList(
            CinLayer(inputs, n, outputs) for inputs, outputs in zip(widths[:-1], config.cin, strict=True)
        )
        self.columns = n * config.dim + sum(config.cin)
        self.headless = headless
        if not headless:
            self.linear = MLP(n * config.dim, [], 1, bias=False)
            self.cin_output = MLP(sum(config.cin), [], 1, bias=False)
            self.head = head_of(config, n * config.dim, config.head)
        number_dropouts(self)

    def forward(self, x_BND: Tensor, keys: Tensor | None = None) -> Tensor:
        """X_0 [B, n, d] and the examples' dropout keys int64 [B] -> logits [B]; headless: [B, columns]."""
        maps_BDH = first_BDN = x_BND.mT
        pooled = []
        for layer in self.layers:
            maps_BDH = layer(maps_BDH, first_BDN)
            pooled.append(maps_BDH.sum(1))
        x_BE = x_BND.flatten(1)
        if self.headless:
            return torch.cat([x_BE, *pooled], dim=1)
        logit = self.linear(x_BE) + self.cin_output(torch.cat(pooled, dim=1)) + self.head(x_BE, keys)
        return logit.squeeze(1)
