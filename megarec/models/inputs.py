"""From looked-up embeddings and numeric features to X_0 (arXiv 2403.02545, section 3.2, embedding layer).

Every over-arch starts from it; for DLRM and DCNv2 its numeric MLP is the bottom MLP (linear at its end, as Wukong's).

Shape suffixes: B examples, N embeddings of one example, D width of an embedding.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from megarec.config.base import ModelConfig
from megarec.errors import UserError
from megarec.models.blocks import KeyedDropout, mlp_of, number_dropouts


class EmbeddedColumns(Protocol):
    """The layout of the incoming matrix [B, width]: embeddings of width dim first, then smaller ones."""

    @property
    def dim(self) -> int: ...
    @property
    def full_embeddings(self) -> int: ...
    @property
    def small_columns(self) -> int: ...
    @property
    def width(self) -> int: ...


@dataclass(frozen=True)
class OverArchInput:
    """EmbeddedColumns without tables: what a layout or tower modules put in front of the over-arch.

    Attributes:
        dim: d, the width of one embedding.
        full_embeddings: how many embeddings of width d lead the matrix.
        small_columns: columns of the grouped small embeddings that follow them.
    """

    dim: int
    full_embeddings: int
    small_columns: int

    @property
    def width(self) -> int:
        return self.full_embeddings * self.dim + self.small_columns


class InputLayer(nn.Module):
    """X_0: embeddings of full width as they are, then those of the grouped small ones, then those of the numbers.

    The small embeddings of an example, concatenated, pass an MLP that emits embeddings of width d; so do its
    numeric features. A part that the data does not have is absent.

    Args:
        layout: how the looked-up embeddings lie in [B, layout.width].
        numeric: how many numeric features there are.
        config: widths and sizes of the two MLPs.
        embedding_dropout: probability per element of the looked-up embeddings.
        last_bias: whether the last layers of the two MLPs have the bias that the config gives them.

    Attributes:
        width: columns of the looked-up embeddings.
        embeddings: N, how many embeddings X_0 has.
        numeric_embeddings: how many of them, the last ones, come from numeric features.

    Raises:
        UserError: there is neither a categorical nor a numeric feature.
    """

    def __init__(
        self,
        layout: EmbeddedColumns,
        numeric: int,
        config: ModelConfig,
        embedding_dropout: float = 0.0,
        last_bias: bool = True,
    ) -> None:
        super().__init__()
        assert layout.dim == config.dim, f"layout.dim={layout.dim}, config.dim={config.dim}"
        self.dim = config.dim
        self.width = layout.width
        self.full_columns = layout.full_embeddings * config.dim
        self.embeddings = input_embeddings(layout, numeric, config)
        self.numeric_embeddings = config.numeric_embeddings if numeric else 0
        self.dropout = KeyedDropout(embedding_dropout)
        self.small_mlp = self.numeric_mlp = None
        of_small, of_numeric = input_biases(config, last_bias)
        if layout.small_columns:
            emitted = config.small_embeddings * config.dim
            self.small_mlp = mlp_of(config, layout.small_columns, config.small_mlp, emitted, of_small)
        if numeric:
            emitted = config.numeric_embeddings * config.dim
            self.numeric_mlp = mlp_of(config, numeric, config.numeric_mlp, emitted, of_numeric)
        number_dropouts(self)

    def forward(self, numeric: Tensor, embedded: Tensor, keys: Tensor | None = None) -> Tensor:
        """Numeric [B, f], looked-up embeddings [B, layout.width] and dropout keys int64 [B] -> X_0 [B, N, D]."""
        embedded = self.dropout(embedded, keys)
        parts = []
        if self.full_columns or self.small_mlp is None:  # [B, 0] of numeric features alone: the gradient has its shape
            # A slice of all columns would cost a copy of its gradient.
            parts.append(embedded if self.full_columns == self.width else embedded[:, : self.full_columns])
        if self.small_mlp is not None:
            parts.append(self.small_mlp(embedded[:, self.full_columns :], keys))
        if self.numeric_mlp is not None:
            parts.append(self.numeric_mlp(numeric, keys))
        flat = torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]
        return flat.unflatten(1, (self.embeddings, self.dim))


def input_biases(config: ModelConfig, last_bias: bool) -> tuple[list[bool], list[bool]]:
    """By layer, whether the MLP over small embeddings and that over numeric features have a bias.

    Args:
        last_bias: false takes that of their last layers.
    """
    small = [config.bias] * (len(config.small_mlp) + 1)
    numeric = config.numeric_bias or [config.bias] * (len(config.numeric_mlp) + 1)
    return [*small[:-1], small[-1] and last_bias], [*numeric[:-1], numeric[-1] and last_bias]


def input_embeddings(layout: EmbeddedColumns, numeric: int, config: ModelConfig) -> int:
    """n: how many embeddings of width d X_0 has.

    Raises:
        UserError: there is neither a categorical nor a numeric feature.
    """
    n = layout.full_embeddings
    n += config.small_embeddings if layout.small_columns else 0
    n += config.numeric_embeddings if numeric else 0
    if n == 0:
        raise UserError("data.features leaves neither a categorical nor a numeric feature: the model has no input")
    return n
