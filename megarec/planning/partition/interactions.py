"""How strongly features interact, measured on a trained dense model and the pooled embeddings in front of it.

difference    the mean |mixed second difference| of the logit: how much of a feature's effect another one changes. It is
              ours, and asks nothing of the model's form
cosine        the mean |cosine| of their pooled embeddings (DMT, arXiv 2403.00877). It means something where the model
              multiplies embeddings with each other, as DLRM does

Shape suffixes: B examples, C columns of the layout, F features.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from megarec.errors import UserError
from megarec.sparse.layout import EmbeddingLayout

Matrix = NDArray[np.float64]
Measure = Literal["difference", "cosine"]
MEASURES = get_args(Measure)

MOST = 1e100  # of an interaction: products of row sums stay finite
CHUNK_COSINES = 1 << 24  # cosines held at a time: 64 MiB
CHUNK_COLUMNS = 1 << 22  # embedding numbers that pass through the dense model at a time

Logits = Callable[[Tensor], Tensor]


def second_differences(logits: Logits, layout: EmbeddingLayout, x_BC: Tensor, other_BC: Tensor) -> Matrix:
    """[F, F], symmetric, features in layout order, 0 on the diagonal: how much features change each other's effect.

    With x \\ i an example x whose feature i has the embedding of another example x':

        D_ij = mean over examples |(grad_j f(x) - grad_j f(x \\ i)) . (x_j - x'_j)|

    the mixed second difference f(x) - f(x \\ i) - f(x \\ j) + f(x \\ i, j), to first order in j: F + 1 backward passes
    in place of F^2 / 2 forward passes. The result is the mean of D and its transpose.

    Args:
        logits: [B, C] -> [B]; row by row, no row sees another.
        x_BC, other_BC: pooled embeddings of different examples.
    """
    features = layout.features
    owner = torch.empty(layout.width, dtype=torch.int64, device=x_BC.device)
    for place, feature in enumerate(features):
        owner[feature.start : feature.start + feature.columns] = place
    total = torch.zeros(len(features), len(features), dtype=torch.float64)
    rows = max(1, CHUNK_COLUMNS // layout.width)
    for x_bC, other_bC in zip(x_BC.split(rows), other_BC.split(rows), strict=True):
        here_bC, step_bC = _gradient(logits, x_bC), x_bC - other_bC
        for place, feature in enumerate(features):
            columns = slice(feature.start, feature.start + feature.columns)
            without_bC = x_bC.clone()
            without_bC[:, columns] = other_bC[:, columns]
            change_bC = (here_bC - _gradient(logits, without_bC)) * step_bC
            of_feature_bF = change_bC.new_zeros(len(change_bC), len(features)).index_add_(1, owner, change_bC)
            total[place] += of_feature_bF.abs().sum(0).double().cpu()
    mean = (total + total.T) / (2 * len(x_BC))
    return mean.fill_diagonal_(0).numpy()


def _gradient(logits: Logits, x_BC: Tensor) -> Tensor:
    x_BC = x_BC.detach().clone().requires_grad_(True)
    (found,) = torch.autograd.grad(logits(x_BC).float().sum(), x_BC)
    return found.float()


class InteractionMean:
    """The mean |cosine| of every pair of features, over the examples in which neither embedding is zero.

    A zero embedding, such as that of an empty list, has no direction. A pair that never met counts as 0, a feature
    with itself as 1.

    Embeddings of different widths (several embeddings of one feature, flattened, or small ones) are compared over the
    columns that both have: the narrower one is filled up with zeros. Two random vectors of widths m and n have a mean
    |cosine| near sqrt(2 / (pi max(m, n))), so a narrow pair looks closer than a wide one by chance alone.
    """

    def __init__(self, layout: EmbeddingLayout) -> None:
        features = layout.features
        self._width = max(feature.columns for feature in features)
        padding = layout.width  # the column of zeros that `add` appends
        columns = [[*range(f.start, f.start + f.columns)] + [padding] * (self._width - f.columns) for f in features]
        self._columns = torch.tensor(columns).flatten()
        self._sum = torch.zeros(len(features), len(features), dtype=torch.float64)
        self._count = torch.zeros_like(self._sum)
        self.examples = 0

    def add(self, pooled: Tensor) -> None:
        """Pooled embeddings [B, layout.width], columns in layout order."""
        features = len(self._sum)
        for chunk in pooled.split(max(1, CHUNK_COSINES // features**2)):
            padded = torch.nn.functional.pad(chunk, (0, 1))
            x = padded[:, self._columns.to(chunk.device)].unflatten(1, (features, self._width))
            norm = torch.linalg.vector_norm(x, dim=2, keepdim=True)
            unit = torch.where(norm > 0, x / norm, 0)
            self._sum += torch.bmm(unit, unit.transpose(1, 2)).abs_().sum(0).double().cpu()
            there = (norm > 0).squeeze(2).float()
            self._count += (there.T @ there).double().cpu()
        self.examples += pooled.shape[0]

    def mean(self) -> Matrix:
        """[F, F], symmetric, features in layout order."""
        mean = torch.where(self._count > 0, self._sum / self._count, 0)
        mean = ((mean + mean.T) / 2).clamp_(0, 1).fill_diagonal_(1)
        return mean.numpy()


def read_interactions(path: Path, features: int) -> Matrix:
    """[F, F] of an .npy file, such as a probe wrote.

    Raises:
        UserError: no such file, or it holds no symmetric matrix of so many features without negative values.
    """
    try:
        matrix = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        why = getattr(error, "strerror", None) or "no .npy file of numbers"
        raise UserError(f"--interactions {path}: cannot be read ({why})") from error
    if not isinstance(matrix, np.ndarray) or matrix.dtype.kind not in "fiu":
        raise UserError(f"--interactions {path}: holds no numbers; expected a matrix [{features}, {features}]")
    if matrix.shape != (features, features):
        raise UserError(
            f"--interactions {path}: a matrix {list(matrix.shape)}, but the run has {features} categorical features: "
            f"expected [{features}, {features}], in schema order, those of smaller width last"
        )
    matrix = matrix.astype(np.float64)
    if not (np.isfinite(matrix).all() and 0 <= matrix.min() <= matrix.max() <= MOST and np.allclose(matrix, matrix.T)):
        raise UserError(
            f"--interactions {path}: expected a symmetric matrix of finite values, from 0 to {MOST:g}, as a probe "
            "writes it"
        )
    return matrix
