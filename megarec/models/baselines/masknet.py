"""MaskNet (Wang et al. 2021, arXiv 2102.07619), parallel: instance-guided masks on the normalised embeddings.

    mask_b  = W_b2 ReLU(W_b1 flatten(X_0) + c_b1) + c_b2                       section 3.2
    out_b   = ReLU(LN(W_b (mask_b * LN_EMB(X_0))))                             section 3.3, mask block on the embeddings
    logit   = MLP(concat(out_1, .., out_u))                                    section 3.4, parallel MaskNet
    LN_EMB(X_0) = concat(LN(x_1), .., LN(x_n))                                 every embedding over its own d numbers

All LN of LN_EMB share one gain and one bias of width d. The serial MaskNet is not here.

Shape suffixes: B examples, N embeddings of one example, D width of an embedding, E = N D, Q columns of a block.
"""

import torch
from torch import Tensor, nn

from megarec.config.models import MaskNetConfig
from megarec.models.blocks import MLP, activation_function, head_of, mlp_of, number_dropouts
from megarec.models.wukong import LayerNormFactory, torch_layer_norm


class MaskBlock(nn.Module):
    """One mask block on the embeddings.

    Args:
        inputs: E.
        config: the sizes.
        layer_norm: makes a LayerNorm over (width, with bias or not).
    """

    def __init__(self, inputs: int, config: MaskNetConfig, layer_norm: LayerNormFactory) -> None:
        super().__init__()
        self.mask = mlp_of(config, inputs, [config.mask], inputs)
        self.hidden = MLP(inputs, [], config.width, bias=False)
        self.norm = layer_norm(config.width, config.bias)
        self.activation = activation_function(config.activation)

    def forward(self, x_BE: Tensor, normed_BE: Tensor, keys: Tensor | None) -> Tensor:
        """flatten(X_0) and LN_EMB(X_0) -> [B, Q]."""
        return self.activation(self.norm(self.hidden(self.mask(x_BE, keys) * normed_BE)))


class MaskNet(nn.Module):
    """The dense model over n embeddings of width d per example; it knows no process group.

    Args:
        n: embeddings per example in X_0.
        config: the sizes.
        layer_norm: makes a LayerNorm over (width, with bias or not).
        headless: stop before the maps that make the logit: `columns` of them leave (multi_task.py).
    """

    def __init__(
        self,
        n: int,
        config: MaskNetConfig,
        layer_norm: LayerNormFactory = torch_layer_norm,
        headless: bool = False,
    ) -> None:
        super().__init__()
        self.norm = layer_norm(config.dim, config.bias)
        self.layers = nn.ModuleList(MaskBlock(n * config.dim, config, layer_norm) for _ in range(config.blocks))
        self.columns = config.blocks * config.width
        self.head = None if headless else head_of(config, self.columns, config.head)
        number_dropouts(self)

    def forward(self, x_BND: Tensor, keys: Tensor | None = None) -> Tensor:
        """X_0 [B, n, d] and the examples' dropout keys int64 [B] -> logits [B]; headless: [B, columns]."""
        x_BE, normed_BE = x_BND.flatten(1), self.norm(x_BND).flatten(1)
        blocks = torch.cat([layer(x_BE, normed_BE, keys) for layer in self.layers], dim=1)
        return blocks if self.head is None else self.head(blocks, keys).squeeze(1)
