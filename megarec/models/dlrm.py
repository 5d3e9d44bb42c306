"""DLRM (Naumov et al. 2019, arXiv 1906.00091): pairwise dot products of all embeddings.

    p     = (x_i . x_j) for all i > j                    the lower triangle of X X^T, row by row
    logit = MLP(concat(x_dense, p))                      "top MLP"

x_dense are the embeddings that the input layer's numeric MLP emits ("bottom MLP"; one in the paper), and they take
part in the dot products like all others. Data without numeric features has none: the dot products go up alone.

Shape suffixes: B examples, N embeddings of one example, D width of an embedding, P = N (N - 1) / 2 pairs.
"""

import torch
from torch import Tensor, nn

from megarec.config.models import DlrmConfig
from megarec.errors import UserError
from megarec.models.blocks import head_of, number_dropouts


def head_inputs(n: int, dense: int, dim: int) -> int:
    """Columns that enter the head: `dense` of the n embeddings, and the dot products of all pairs.

    Raises:
        UserError: one embedding that is not dense: there is no pair and nothing to predict from.
    """
    columns = dense * dim + n * (n - 1) // 2
    if columns == 0:
        raise UserError(
            "model.name='dlrm' over one embedding and no numeric feature has no pair to multiply; "
            "use more features, or another model"
        )
    return columns


class Dlrm(nn.Module):
    """The dense model over n embeddings of width d per example; it knows no process group.

    Args:
        n: embeddings per example in X_0.
        dense: how many of them, the last ones, come from numeric features.
        config: the sizes; `head` is the top MLP.
        headless: stop before the maps that make the logit: `columns` of them leave (multi_task.py).

    Raises:
        UserError: there is neither a pair of embeddings nor a dense one.
    """

    def __init__(self, n: int, dense: int, config: DlrmConfig, headless: bool = False) -> None:
        super().__init__()
        self.n = n
        self.dense = dense
        self.columns = head_inputs(n, dense, config.dim)
        self.head = None if headless else head_of(config, self.columns, config.head)
        number_dropouts(self)

    def forward(self, x_BND: Tensor, keys: Tensor | None = None) -> Tensor:
        """X_0 [B, n, d] and the examples' dropout keys int64 [B] -> logits [B]; headless: [B, columns]."""
        products_BNN = torch.bmm(x_BND, x_BND.mT)
        row_P, column_P = torch.tril_indices(self.n, self.n, -1, device=x_BND.device)
        pairs_BP = products_BNN.flatten(1).index_select(1, row_P * self.n + column_P)
        dense_BE = x_BND[:, self.n - self.dense :].flatten(1)  # E = dense x D
        x_BE = torch.cat([dense_BE, pairs_BP], dim=1)
        return x_BE if self.head is None else self.head(x_BE, keys).squeeze(1)
