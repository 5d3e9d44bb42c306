"""One MLP over the flattened embeddings; without hidden layers it is logistic regression.

    DNN: logit = MLP(x)                                  x = flatten(X_0)
    LR:  logit = sum over i of w_i . x_i + b             x_i row i of X_0

An embedding x_i of an id is E_i[id], so the LR's term w_i . E_i[id] is a weight of its own for each id: with tables
of any width it is a linear model in the ids, as plain logistic regression, only over-parametrised (d numbers for one).

Shape suffixes: B examples, N embeddings of one example, D width of an embedding.
"""

from torch import Tensor, nn

from megarec.config.models import DnnConfig, LrConfig
from megarec.models.blocks import head_of, number_dropouts


class Dnn(nn.Module):
    """The dense model over n embeddings of width d per example; it knows no process group.

    Args:
        n: embeddings per example in X_0.
        config: the sizes; the head of an LR is empty.
        headless: stop before the maps that make the logit: `columns` of them leave (multi_task.py).
    """

    def __init__(self, n: int, config: DnnConfig | LrConfig, headless: bool = False) -> None:
        super().__init__()
        self.columns = n * config.dim
        self.head = None if headless else head_of(config, self.columns, config.head)
        number_dropouts(self)

    def forward(self, x_BND: Tensor, keys: Tensor | None = None) -> Tensor:
        """X_0 [B, n, d] and the examples' dropout keys int64 [B] -> logits [B]; headless: [B, columns]."""
        x_BE = x_BND.flatten(1)
        return x_BE if self.head is None else self.head(x_BE, keys).squeeze(1)
