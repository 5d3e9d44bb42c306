"""AFN+ (Cheng et al. 2020, arXiv 1909.03276): learned products of powers of the embeddings beside an MLP.

    z_j     = exp(sum over i of w_ji ln |x_i|)  =  |x_1|^w_j1 * .. * |x_n|^w_jn      j = 1 .. N, element by element
    logit   = MLP(concat(z_1, .., z_N)) + MLP(flatten(X_0))

|x| is kept above epsilon, for ln (the paper takes the absolute value too, and a small positive number). Its
default, 1e-5, is FuxiCTR's, so that results compare; the gradient of ln |x| is 1 / |x|, which makes AFN
ill-conditioned in fp32: where topologies must agree in the last digits, use a larger one (docs/models.md).
The paper normalises ln |x| and z over the batch; that would make the numbers depend on how a batch is cut over
ranks, so here LayerNorm does it over all elements of an example. AFN and DNN train together, and their last layers
hold the two weights with which the paper adds up the logits.

AFN+ with `separate` embeddings, as in the paper, takes two embeddings of every feature: the first of each pair goes to
the neurons, the second to the MLP. With `shared` ones both see all of X_0.

Shape suffixes: B examples, N embeddings of one example, D width of an embedding, J logarithmic neurons.
"""

import torch
from torch import Tensor, nn

from megarec.config.models import AfnConfig
from megarec.errors import UserError
from megarec.models.blocks import head_of, init_fan_in_, number_dropouts, shift_vanishes
from megarec.models.wukong import LayerNormFactory, torch_layer_norm


def embeddings_of_each(n: int, config: AfnConfig) -> int:
    """How many of X_0's n embeddings the neurons see; the MLP sees as many.

    Raises:
        UserError: separate embeddings, but an odd number of them.
    """
    if config.embeddings == "shared":
        return n
    if n % 2:
        raise UserError(
            f"model.embeddings='separate' takes X_0's embeddings in pairs, but there are {n}: give every feature two "
            "(embedding.features.*.embeddings=2, model.numeric_embeddings=2), or take 'shared'"
        )
    return n // 2


def last_bias(config: AfnConfig, headless: bool = False) -> bool:
    """Whether a bias of the logarithmic transformation's output could change a logit (`shift_vanishes`)."""
    return not shift_vanishes(config, config.head if headless else config.mlp, headless)


class LogarithmicLayer(nn.Module):
    """The logarithmic transformation: J products of powers of the embeddings, element by element.

    Args:
        n: embeddings that enter.
        config: the sizes.
        layer_norm: makes a LayerNorm over (width, with bias or not).
        last_bias: whether the LayerNorm of its output has the bias that `config.bias` gives every map.
    """

    def __init__(self, n: int, config: AfnConfig, layer_norm: LayerNormFactory, last_bias: bool) -> None:
        super().__init__()
        self.epsilon = config.epsilon
        self.log_norm = layer_norm(n * config.dim, config.bias)
        self.powers = nn.Linear(n, config.neurons, bias=False)  # w
        init_fan_in_(self.powers.weight, n)
        self.exp_norm = layer_norm(config.neurons * config.dim, config.bias and last_bias)

    def forward(self, x_BND: Tensor) -> Tensor:
        """[B, N, D] -> [B, D J]."""
        logs_BND = self.log_norm(x_BND.abs().clamp(min=self.epsilon).log().flatten(1)).view_as(x_BND)
        products_BDJ = self.powers(logs_BND.mT).exp()
        normed: Tensor = self.exp_norm(products_BDJ.flatten(1))
        return normed


class Afn(nn.Module):
    """The dense model over n embeddings of width d per example; it knows no process group.

    Args:
        n: embeddings per example in X_0.
        config: the sizes.
        layer_norm: makes a LayerNorm over (width, with bias or not).
        headless: stop before the maps that make the logit: `columns` of them leave (multi_task.py).

    Raises:
        UserError: separate embeddings, but an odd number of them.
    """

    def __init__(
        self,
        n: int,
        config: AfnConfig,
        layer_norm: LayerNormFactory = torch_layer_norm,
        headless: bool = False,
    ) -> None:
        super().__init__()
        each = embeddings_of_each(n, config)
        self.separate = config.embeddings == "separate"
        self.layers = nn.ModuleList([LogarithmicLayer(each, config, layer_norm, last_bias(config, headless))])
        self.columns = (each + config.neurons) * config.dim
        self.headless = headless
        if not headless:
            self.mlp = head_of(config, config.neurons * config.dim, config.mlp)
            self.head = head_of(config, each * config.dim, config.head)
        number_dropouts(self)

    def forward(self, x_BND: Tensor, keys: Tensor | None = None) -> Tensor:
        """X_0 [B, n, d] and the examples' dropout keys int64 [B] -> logits [B]; headless: [B, columns]."""
        logarithmic, deep = (x_BND[:, ::2], x_BND[:, 1::2]) if self.separate else (x_BND, x_BND)
        (layer,) = self.layers
        if self.headless:
            return torch.cat([deep.flatten(1), layer(logarithmic)], dim=1)
        return (self.mlp(layer(logarithmic), keys) + self.head(deep.flatten(1), keys)).squeeze(1)
