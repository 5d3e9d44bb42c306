"""AutoInt+ (Song et al. 2019, arXiv 1810.11921): multi-head self-attention over the embeddings beside an MLP.

    a^h_mk  = softmax over k of (W_Q^h x_m) . (W_K^h x_k)       section 4.4, interacting layer; not scaled
    y^h_m   = sum over k of a^h_mk W_V^h x_k
    x'_m    = ReLU(concat over h of y^h_m + W_Res x_m)
    logit   = w . flatten(X_L) + MLP(flatten(X_0))              section 4.5, with the MLP of AutoInt+

W_Res is there in every layer, also where the widths agree. The projections of a layer (4 width^2 weights at most) are
not sharded by tensor parallelism; the MLP and the map w are.

Shape suffixes: B examples, N embeddings of one example, D width of an embedding, W = H A columns that H heads of
width A emit for an embedding.
"""

import torch
from torch import Tensor, nn

from megarec.config.base import Activation
from megarec.config.models import AutoIntConfig
from megarec.models.blocks import MLP, activation_function, head_of, init_fan_in_, number_dropouts


class AttentionLayer(nn.Module):
    """One interacting layer.

    Args:
        inputs: width of the embeddings that enter.
        heads: H.
        width: A, of one head.
        activation: of the output.
    """

    def __init__(self, inputs: int, heads: int, width: int, activation: Activation = "relu") -> None:
        super().__init__()
        self.heads = heads
        self.activation = activation_function(activation)
        self.projection = nn.Linear(inputs, 4 * heads * width, bias=False)  # rows: W_Q, W_K, W_V, W_Res
        init_fan_in_(self.projection.weight, inputs)

    def forward(self, x_BND: Tensor) -> Tensor:
        """[B, N, D] -> [B, N, W]."""
        query, key, value, residual_BNW = self.projection(x_BND).chunk(4, dim=2)
        scores = torch.bmm(self._by_head(query), self._by_head(key).mT)  # [B H, N, N]
        attended = torch.bmm(scores.softmax(2), self._by_head(value))  # [B H, N, A]
        attended_BNW = attended.unflatten(0, (-1, self.heads)).transpose(1, 2).flatten(2)
        return self.activation(attended_BNW + residual_BNW)

    def _by_head(self, x_BNW: Tensor) -> Tensor:
        """[B, N, H A] -> [B H, N, A]."""
        return x_BNW.unflatten(2, (self.heads, -1)).transpose(1, 2).flatten(0, 1)


class AutoInt(nn.Module):
    """The dense model over n embeddings of width d per example; it knows no process group.

    Args:
        n: embeddings per example in X_0.
        config: the sizes.
        headless: stop before the maps that make the logit: `columns` of them leave (multi_task.py).
    """

    def __init__(self, n: int, config: AutoIntConfig, headless: bool = False) -> None:
        super().__init__()
        width = config.heads * config.attention_dim
        self.layers = nn.ModuleList(
            AttentionLayer(width if index else config.dim, config.heads, config.attention_dim, config.activation)
            for index in range(config.layers)
        )
        self.columns = n * (width + config.dim)
        self.headless = headless
        if not headless:
            self.attention_output = MLP(n * width, [], 1, bias=False)
            self.head = head_of(config, n * config.dim, config.head)
        number_dropouts(self)

    def forward(self, x_BND: Tensor, keys: Tensor | None = None) -> Tensor:
        """X_0 [B, n, d] and the examples' dropout keys int64 [B] -> logits [B]; headless: [B, columns]."""
        x_BNW = x_BND
        for layer in self.layers:
            x_BNW = layer(x_BNW)
        if self.headless:
            return torch.cat([x_BND.flatten(1), x_BNW.flatten(1)], dim=1)
        return (self.attention_output(x_BNW.flatten(1)) + self.head(x_BND.flatten(1), keys)).squeeze(1)
