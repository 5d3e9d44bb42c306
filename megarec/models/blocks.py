"""What dense models are made of: the MLP, its activation and initialisation, and dropout that no topology can change.

Shape suffixes: B examples, H columns of one example.
"""

import itertools
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, leaky_relu, silu

from megarec.config.base import Activation, ModelConfig, Norm
from megarec.models.initial import draw_normal_
from megarec.models.norms import norm_of

_LANE_BITS = 16
_LANES = 64 // _LANE_BITS  # one 64-bit hash serves four columns
_WORD_BITS = 64


def _signed(constant: int) -> int:
    """An integer modulo 2^64 as the int64 that torch takes; torch's own products wrap the same way."""
    constant %= 1 << _WORD_BITS
    return constant - (1 << _WORD_BITS) if constant >> (_WORD_BITS - 1) else constant


_GOLDEN = _signed(0x9E3779B97F4A7C15)
_COLUMN_STREAM = _signed(0x6A09E667F3BCC909)
_MIX_1 = _signed(0xBF58476D1CE4E5B9)
_MIX_2 = _signed(0x94D049BB133111EB)
_PAIR_1 = _signed(0xD6E8FEB86659FD93)
_PAIR_2 = _signed(0xFF51AFD7ED558CCD)


def _mix(x: Tensor) -> Tensor:
    """The finaliser of splitmix64, element by element: every input bit reaches every output bit."""
    for shift, factor in ((30, _MIX_1), (27, _MIX_2)):
        x = (x ^ _shift_right(x, shift)) * factor
    return x ^ _shift_right(x, 31)


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Logical shift; torch's own `>>` copies the sign."""
    return (x >> bits) & ((1 << (_WORD_BITS - bits)) - 1)


def hashed_lanes(keys: Tensor, salt: int, columns: int, first_column: int = 0) -> Tensor:
    """Uniform 16-bit numbers, each a pure function of (key, salt, column).

    Rows and columns are mixed well but apart, in O(B + H); a pair costs a xor, two products and a shift, and
    serves four columns. So the dropout of a layer stays small beside its GEMM.

    Args:
        keys: int64 [B].
        salt: a number per module.
        columns: H.
        first_column: the global column of the first one (a tensor-parallel shard starts further right).

    Returns:
        int16 [B, H], uniform over -32768 .. 32767.
    """
    first_word = first_column // _LANES
    words = torch.arange(first_word, -(-(first_column + columns) // _LANES), device=keys.device)
    row_B1 = _mix(_mix(keys + _GOLDEN) + _signed(salt * _GOLDEN)).unsqueeze(1)
    pair = row_B1 ^ _mix(words * _GOLDEN + _COLUMN_STREAM)
    pair.mul_(_PAIR_1)
    pair ^= pair >> 32  # the copied signs cost one bit of 64
    pair.mul_(_PAIR_2)
    start = first_column - first_word * _LANES
    return pair.view(torch.int16)[:, start : start + columns]


class KeyedDropout(nn.Module):
    """Dropout whose mask is a pure function of (key of the example, salt, column), not of a random state.

    However a batch is cut over ranks and micro-batches, and in whatever order the layers run, an example meets
    the same mask: the loss curve does not depend on the topology. Kept values are scaled by 1 / (1 - p); p is
    rounded to a multiple of 2^-16.

    Attributes:
        salt: distinguishes this module's mask from others'; `number_dropouts` gives each module of a model its own.
        first_column: global column of the input's first one; tensor parallelism sets it on a shard.
    """

    def __init__(self, p: float, salt: int = 0) -> None:
        super().__init__()
        self.p = p
        self.salt = salt
        self.first_column = 0

    def forward(self, x: Tensor, keys: Tensor | None) -> Tensor:
        """x [B, ...] and keys int64 [B] -> [B, ...] in x's dtype; identity in evaluation and for p = 0."""
        if not self.training or self.p == 0:
            return x
        if keys is None:
            raise ValueError("dropout in training needs the keys of the examples (Batch.keys)")
        x_BH = x.flatten(1)
        threshold = min(round(self.p * 2**_LANE_BITS), 2**_LANE_BITS - 1) - 2 ** (_LANE_BITS - 1)
        dropped_BH = hashed_lanes(keys, self.salt, x_BH.shape[1], self.first_column) < threshold
        return (x_BH * (1 / (1 - self.p))).masked_fill_(dropped_BH, 0).view_as(x)

    def extra_repr(self) -> str:
        return f"p={self.p}, salt={self.salt}"


def number_dropouts(model: nn.Module) -> None:
    """Give every KeyedDropout of a model its own salt: its place in `model.modules()`, the same on every rank."""
    dropouts = (module for module in model.modules() if isinstance(module, KeyedDropout))
    for salt, dropout in enumerate(dropouts):
        dropout.salt = salt


def activation_function(name: Activation) -> Callable[[Tensor], Tensor]:
    """What `model.activation` names: ReLU, or SiLU, x / (1 + e^-x) (Elfwing et al. 2018, arXiv 1702.03118), GELU, ReLU
    with a slope of 0.01 below 0, tanh or the logistic function."""
    named: dict[Activation, Callable[[Tensor], Tensor]] = {
        "relu": torch.relu,
        "silu": silu,
        "gelu": gelu,
        "leaky_relu": leaky_relu,
        "tanh": torch.tanh,
        "sigmoid": torch.sigmoid,
    }
    return named[name]


def init_fan_in_(weight: Tensor, fan_in: int, gain: float = 1.0) -> None:
    """Normal with standard deviation gain / sqrt(fan_in): unit variance in gives variance gain^2 out."""
    draw_normal_(weight, gain / math.sqrt(fan_in))


class MLP(nn.Module):
    """Linear layers, each but the last one with normalisation, activation and keyed dropout behind it, in this order.

    Weights are normal with variance 2 / fan-in before an activation (He et al. 2015) and 1 / fan-in elsewhere; biases
    start at 0.

    Args:
        inputs, hidden, outputs: widths; without hidden ones it is one linear layer.
        bias: whether the layers have a bias; one for all, or one for each. Before BatchNorm its own is the bias.
        dropout: probability after every hidden layer.
        relu: whether an activation lies between the layers; without one it is a factorised (low-rank) linear map.
        activation: which one.
        norm: the normalisation before it.
    """

    def __init__(
        self,
        inputs: int,
        hidden: Sequence[int],
        outputs: int,
        *,
        bias: bool | Sequence[bool] = True,
        dropout: float = 0.0,
        relu: bool = True,
        activation: Activation = "relu",
        norm: Norm = "none",
    ) -> None:
        super().__init__()
        self.relu = relu
        self.activation = activation_function(activation)
        widths = [inputs, *hidden, outputs]
        biases = [bias] * (len(widths) - 1) if isinstance(bias, bool) else bias
        # BatchNorm cancels a bias before it: Adam would turn its gradient, rounding errors, into whole steps.
        kept = [has and (norm != "batch" or layer == len(hidden)) for layer, has in enumerate(biases)]
        self.linears = nn.ModuleList(
            nn.Linear(fan_in, fan_out, bias=has_bias)
            for (fan_in, fan_out), has_bias in zip(itertools.pairwise(widths), kept, strict=True)
        )
        norms = (norm_of(norm, width, has_bias) for width, has_bias in zip(hidden, biases, strict=False))
        self.norms = nn.ModuleList(part for part in norms if part is not None)
        self.dropouts = nn.ModuleList(KeyedDropout(dropout) for _ in hidden)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw all weights again."""
        for index, linear in enumerate(self.linears):
            assert isinstance(linear, nn.Linear)
            gain = math.sqrt(2) if self.relu and index < len(self.dropouts) else 1.0
            init_fan_in_(linear.weight, linear.in_features, gain)
            if linear.bias is not None:
                nn.init.zeros_(linear.bias)

    def forward(self, x: Tensor, keys: Tensor | None = None) -> Tensor:
        """[B, inputs] -> [B, outputs]."""
        *hidden, last = self.linears
        for index, (linear, dropout) in enumerate(zip(hidden, self.dropouts, strict=True)):
            x = linear(x)
            if self.norms:
                x = self.norms[index](x)
            x = dropout(self.activation(x) if self.relu else x, keys)
        return last(x)


def mlp_of(
    config: ModelConfig, inputs: int, hidden: Sequence[int], outputs: int, bias: Sequence[bool] | None = None
) -> MLP:
    """An MLP with the dropout and the activation of a dense model's config; `bias`: by layer, else model.bias."""
    biases = config.bias if bias is None else bias
    return MLP(inputs, hidden, outputs, bias=biases, dropout=config.dropout, activation=config.activation)


def shift_vanishes(config: ModelConfig, hidden: Sequence[int], headless: bool = False) -> bool:
    """Whether a constant added to the input of `head_of`, the same for every example, leaves every logit unchanged.

    It does if BatchNorm follows the first layer. The gradient of a bias that adds one would be only rounding
    errors, which Adam turns into whole steps that evaluation sees: its running means lag. So there is none.

    Args:
        hidden: of the MLP.
        headless: the MLPs are those of several labels (multi_task.py).
    """
    direct = not headless or config.tasks.name in ("shared", "esmm")
    return config.norm == "batch" and bool(hidden) and direct


def head_of(
    config: ModelConfig, inputs: int, hidden: Sequence[int], outputs: int = 1, last_bias: bool | None = None
) -> MLP:
    """The same with `model.norm`, for MLPs that end in the logit; `last_bias`: in the last layer, else model.bias."""
    last = config.bias if last_bias is None else last_bias
    return MLP(
        inputs,
        hidden,
        outputs,
        bias=[config.bias] * len(hidden) + [last],
        dropout=config.dropout,
        activation=config.activation,
        norm=config.norm,
    )
