"""How strongly features interact: the mean |cosine| of their pooled embeddings (DMT, arXiv 2403.00877).

Embeddings of different widths (several embeddings of one feature, flattened, or small ones) are compared over the
columns that both have: the narrower one is filled up with zeros. Two random vectors of widths m and n have a mean
|cosine| near sqrt(2 / (pi max(m, n))), so a narrow pair looks closer than a wide one by chance alone.
"""

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from megarec.embeddings.layout import EmbeddingLayout
from megarec.errors import UserError

Matrix = NDArray[np.float64]

CHUNK_COSINES = 1 << 24  # cosines held at a time: 64 MiB


class InteractionMean:
    """The mean |cosine| of every pair of features, over the examples in which neither embedding is zero.

    A zero embedding, such as that of an empty list, has no direction. A pair that never met counts as 0, a feature
    with itself as 1.
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
        UserError: no such file, or it holds no symmetric matrix of so many features with values in [0, 1].
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
    if not (np.isfinite(matrix).all() and matrix.min() >= 0 and matrix.max() <= 1 and np.allclose(matrix, matrix.T)):
        raise UserError(f"--interactions {path}: expected a symmetric matrix of values in [0, 1], the mean |cosine|")
    return matrix
