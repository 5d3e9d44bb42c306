"""FinalMLP (Mao et al. 2023, arXiv 2304.00902): two MLPs over gated embeddings, fused bilinearly.

    g_s     = 2 sigmoid(MLP(c_s)),  h_s = g_s * flatten(X_0)                   stream-specific feature gating, s = 1, 2
    o_s     = ReLU(MLP_s(h_s))                                                 the two streams
    logit   = b + w_1 . o_1 + w_2 . o_2 + sum over heads j of o_1j^T W_j o_2j  stream-level fusion, multi-head

o_sj is the j-th of k equal parts of o_s. The context c_s is some of the embeddings of X_0, such as those of the user
and those of the item, or a learned vector. The ReLU at the end of a stream is that of the authors' implementation;
batch normalisation of theirs is left out (it would make the numbers depend on how a batch is cut).

Shape suffixes: B examples, N embeddings of one example, D width of an embedding, E = N D, J heads of the fusion,
P and Q columns of one head of o_1 and o_2.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from megarec.config.models import FinalMlpConfig
from megarec.errors import UserError
from megarec.models.blocks import MLP, activation_function, head_of, init_fan_in_, mlp_of, number_dropouts
from megarec.models.initial import draw_normal_
from megarec.models.norms import norm_of


class FusionSizes(NamedTuple):
    """J, P and Q."""

    heads: int
    first: int
    second: int


def fusion_sizes(config: FinalMlpConfig) -> FusionSizes:
    """How the streams' outputs are cut into heads.

    Raises:
        UserError: the heads do not divide a stream's last width.
    """
    for name, widths in (("mlp1", config.mlp1), ("mlp2", config.mlp2)):
        if widths[-1] % config.fusion_heads:
            raise UserError(
                f"model.fusion_heads={config.fusion_heads} does not divide the last width {widths[-1]} of "
                f"model.{name}; take a divisor of both streams' last widths"
            )
    return FusionSizes(
        config.fusion_heads, config.mlp1[-1] // config.fusion_heads, config.mlp2[-1] // config.fusion_heads
    )


def gate_contexts(n: int, config: FinalMlpConfig) -> tuple[list[int], ...]:
    """By stream, the places in X_0 that gate it; () without gates.

    Raises:
        UserError: a place outside X_0.
    """
    for places in config.gates or ():
        for place in places:
            if not 0 <= place < n:
                raise UserError(
                    f"model.gates names place {place}, but X_0 has {n} embeddings here: places are 0 to {n - 1}"
                )
    return config.gates or ()


class Gate(nn.Module):
    """g = 2 sigmoid(MLP(context)).

    Args:
        places: of the embeddings in X_0 that are the context; none: a learned vector of width d.
        n: embeddings per example in X_0.
        config: the sizes.
    """

    context: nn.Parameter | None

    def __init__(self, places: list[int], n: int, config: FinalMlpConfig) -> None:
        super().__init__()
        self.places = places
        self.register_parameter("context", None if places else nn.Parameter(torch.empty(1, config.dim)))
        if self.context is not None:
            draw_normal_(self.context, 1.0)
        inputs = (len(places) or 1) * config.dim
        self.mlp = mlp_of(config, inputs, config.gate_mlp, n * config.dim)

    def forward(self, x_BND: Tensor, keys: Tensor | None) -> Tensor:
        """X_0 -> gates [B, E], 1 on average where nothing is learned."""
        if self.context is None:
            context = torch.cat([x_BND[:, place] for place in self.places], dim=1)
        else:
            context = self.context.expand(x_BND.shape[0], -1)
        return 2 * torch.sigmoid(self.mlp(context, keys))


class Fusion(nn.Module):
    """sum over heads j of o_1j^T W_j o_2j.

    Parameters:
        weight: [J P, Q], the W_j one below the other.
    """

    def __init__(self, sizes: FusionSizes) -> None:
        super().__init__()
        self.sizes = sizes
        self.weight = nn.Parameter(torch.empty(sizes.heads * sizes.first, sizes.second))
        init_fan_in_(self.weight, self.weight.numel())

    def forward(self, first_BP: Tensor, second_BQ: Tensor) -> Tensor:
        """[B, J P] and [B, J Q] -> [B, J Q], whose sum over the columns is the fusion."""
        heads, p, q = self.sizes
        first_JBP = first_BP.unflatten(1, (heads, p)).transpose(0, 1)
        products_JBQ = torch.bmm(first_JBP, self.weight.view(heads, p, q))
        return products_JBQ.transpose(0, 1).flatten(1) * second_BQ


class FinalMlp(nn.Module):
    """The dense model over n embeddings of width d per example; it knows no process group.

    Args:
        n: embeddings per example in X_0.
        config: the sizes.
        headless: stop before the maps that make the logit: `columns` of them leave (multi_task.py).

    Raises:
        UserError: heads that do not divide the streams, or gates by embeddings that are not there.
    """

    def __init__(self, n: int, config: FinalMlpConfig, headless: bool = False) -> None:
        super().__init__()
        width = n * config.dim
        self.gates = nn.ModuleList(Gate(places, n, config) for places in gate_contexts(n, config))
        streams = (config.mlp1, config.mlp2)
        bias = config.bias and config.norm != "batch"  # self.norms has it, as in an MLP
        self.streams = nn.ModuleList(head_of(config, width, widths[:-1], widths[-1], bias) for widths in streams)
        self.norms = nn.ModuleList(norm_of(config.norm, widths[-1], config.bias) or nn.Identity() for widths in streams)
        self.activation = activation_function(config.activation)
        self.fusion = Fusion(fusion_sizes(config))
        inputs = config.mlp1[-1] + config.mlp2[-1]
        self.columns = inputs + config.mlp2[-1]
        self.head = None if headless else MLP(inputs, [], 1, bias=config.bias)  # w_1, w_2 and b
        number_dropouts(self)

    def forward(self, x_BND: Tensor, keys: Tensor | None = None) -> Tensor:
        """X_0 [B, n, d] and the examples' dropout keys int64 [B] -> logits [B]; headless: [B, columns]."""
        x_BE = x_BND.flatten(1)
        inputs = [x_BE * gate(x_BND, keys) for gate in self.gates] or [x_BE, x_BE]
        streams = zip(self.streams, self.norms, inputs, strict=True)
        first, second = (self.activation(norm(mlp(x, keys))) for mlp, norm, x in streams)
        fused = self.fusion(first, second)
        if self.head is None:
            return torch.cat([first, second, fused], dim=1)
        return self.head(torch.cat([first, second], dim=1)).squeeze(1) + fused.sum(1)
