"""Sequences in front of a dense model: attention of a target over what came before it (docs/sequences.md).

    DIN   y = sum over positions of MLP([h, t, h' - t, h' * t]) h      (Zhou et al. 2018, arXiv 1706.06978, eq. 3)
    HSTU  u, q = silu(f1 t);  k, v = silu(f1 h), of every position and of the target
          y = t + f2(norm(sum of silu(q k + b) / n v) * u)             (Zhai et al. 2024, arXiv 2402.17152, eq. 1 to 3)

h has the embeddings of all features at a position, one after another; t the target's, of as many features
or fewer: h' is the same part of h, and HSTU's t ends in zeros for features that only the past has.
y has the width of h and enters the dense model as that many embeddings. DIN's weights are not normalised, as published.
HSTU's layer computes only the row of the target, because nothing else is read; n is the number of positions,
empty ones and the target included; b is a learned number a position.

Neither is a softmax, so that torch's scaled_dot_product_attention computes neither.

Shape suffixes: B examples, P positions, H columns of a position (features x width), T of the target, S heads, E columns
of a head.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, pad, silu

from megarec.config.base import ModelConfig, SequenceConfig
from megarec.models.blocks import MLP, init_fan_in_
from megarec.models.wukong import LayerNormFactory

DIN_MLP = [80, 40]  # as published


@dataclass(frozen=True)
class SequenceInput:
    """The place of a sequence in the incoming matrix, [B, columns].

    Attributes:
        config: the block and its sizes.
        width: columns of an embedding, N.
        start: first column of its positions, [B, positions, features, N].
        mask: first column of [B, positions]: 1 where there is one, else 0.
        targets: first columns of the target's embeddings.
    """

    config: SequenceConfig
    width: int
    start: int
    mask: int
    targets: tuple[int, ...]

    @property
    def embeddings(self) -> int:
        """How many embeddings it adds to X_0."""
        return len(self.config.features)

    @property
    def columns(self) -> int:
        """H."""
        return self.embeddings * self.width

    @property
    def target_columns(self) -> int:
        """T."""
        return len(self.targets) * self.width


class DinBlock(nn.Module):
    """DIN's activation unit and weighted sum.

    Args:
        columns, target_columns: H and T.
        config: of the whole model: bias and activation.
    """

    def __init__(self, columns: int, target_columns: int, hidden: Sequence[int], config: ModelConfig) -> None:
        super().__init__()
        self.unit = MLP(columns + 3 * target_columns, hidden, 1, bias=config.bias, activation=config.activation)

    def forward(self, h_BPH: Tensor, t_BT: Tensor, mask_BP: Tensor) -> Tensor:
        """[B, H]."""
        compared_BPT = h_BPH[:, :, : t_BT.shape[1]]
        t_BPT = t_BT.unsqueeze(1).expand_as(compared_BPT)
        weight_BP1 = self.unit(torch.cat([h_BPH, t_BPT, compared_BPT - t_BPT, compared_BPT * t_BPT], dim=2))
        weight_B1P = weight_BP1.transpose(1, 2) * mask_BP.unsqueeze(1)
        return (weight_B1P @ h_BPH).squeeze(1)


class HstuBlock(nn.Module):
    """The target's row of one HSTU layer.

    Args:
        columns: H.
        positions: P.
        heads: divides H.
    """

    def __init__(
        self,
        columns: int,
        positions: int,
        heads: int,
        position_bias: bool,
        config: ModelConfig,
        layer_norm: LayerNormFactory,
    ) -> None:
        super().__init__()
        self.heads, self.positions = heads, positions + 1
        self.f1 = nn.Linear(columns, 4 * columns, bias=config.bias)  # k, v, u, q
        self.f2 = nn.Linear(columns, columns, bias=config.bias)
        self.norm = layer_norm(columns, config.bias)
        self.position_bias = nn.Parameter(torch.zeros(positions + 1)) if position_bias else None
        for layer in (self.f1, self.f2):
            init_fan_in_(layer.weight, columns)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)

    def forward(self, h_BPH: Tensor, t_BT: Tensor, mask_BP: Tensor) -> Tensor:
        """[B, H]."""
        columns = h_BPH.shape[2]
        t_BH = pad(t_BT, (0, columns - t_BT.shape[1]))
        weight, bias = self.f1.weight, self.f1.bias
        of_all, of_target = (None, None) if bias is None else bias.split(2 * columns)
        x_BQH = torch.cat([t_BH.unsqueeze(1), h_BPH], dim=1)  # the target, then the newest, ...
        k_BQH, v_BQH = silu(linear(x_BQH, weight[: 2 * columns], of_all)).chunk(2, dim=2)
        u_BH, q_BH = silu(linear(t_BH, weight[2 * columns :], of_target)).chunk(2, dim=1)
        k_BSEQ = k_BQH.unflatten(2, (self.heads, -1)).permute(0, 2, 3, 1)
        v_BSQE = v_BQH.unflatten(2, (self.heads, -1)).transpose(1, 2)
        scores_BS1Q = q_BH.unflatten(1, (self.heads, 1, -1)) @ k_BSEQ
        if self.position_bias is not None:
            scores_BS1Q = scores_BS1Q + self.position_bias
        there_BQ = torch.cat([torch.ones_like(mask_BP[:, :1]), mask_BP], dim=1)
        attention_BS1Q = silu(scores_BS1Q) * (there_BQ / self.positions)[:, None, None]
        y_BH = (attention_BS1Q @ v_BSQE).flatten(1)
        made: Tensor = self.f2(self.norm(y_BH) * u_BH)
        return t_BH + made


class SequenceLayer(nn.Module):
    """From the incoming matrix to the input layer's input: embeddings of sequences behind those of full width.

    Args:
        inputs: every sequence.
        arriving: columns of what is pooled (or of what tower modules emit), the first ones.
        full_columns: those of its embeddings of full width.
        config: of the model; where its width differs from that of the tables, a linear map brings embeddings to it.

    Attributes:
        width: columns that arrive.
    """

    def __init__(
        self,
        inputs: Sequence[SequenceInput],
        arriving: int,
        full_columns: int,
        config: ModelConfig,
        layer_norm: LayerNormFactory,
    ) -> None:
        super().__init__()
        self.inputs, self.arriving, self.full_columns = tuple(inputs), arriving, full_columns
        self.blocks, self.maps = nn.ModuleList(), nn.ModuleList()
        ends = [arriving]
        for own in inputs:
            settings = own.config
            if settings.block == "din":
                hidden = DIN_MLP if settings.mlp is None else settings.mlp
                self.blocks.append(DinBlock(own.columns, own.target_columns, hidden, config))
            else:
                heads, bias = settings.heads or 1, settings.position_bias is not False
                self.blocks.append(HstuBlock(own.columns, settings.max_length, heads, bias, config, layer_norm))
            same = own.width == config.dim
            self.maps.append(nn.Identity() if same else MLP(own.width, [], config.dim, bias=config.bias))
            ends += [own.mask + settings.max_length, *(target + own.width for target in own.targets)]
        self.width = max(ends)

    def forward(self, embedded: Tensor) -> Tensor:
        """[B, width] -> [B, columns of X_0 before the numeric ones]."""
        made = []
        for own, block, to_dim in zip(self.inputs, self.blocks, self.maps, strict=True):
            positions = own.config.max_length
            h_BPH = embedded[:, own.start : own.start + positions * own.columns].unflatten(1, (positions, own.columns))
            t_BT = torch.cat([embedded[:, start : start + own.width] for start in own.targets], dim=1)
            mask_BP = embedded[:, own.mask : own.mask + positions].detach()
            made.append(to_dim(block(h_BPH, t_BT, mask_BP).unflatten(1, (own.embeddings, own.width))).flatten(1))
        pooled = embedded[:, : self.arriving]
        return torch.cat([pooled[:, : self.full_columns], *made, pooled[:, self.full_columns :]], dim=1)
