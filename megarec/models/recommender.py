"""The whole dense model: input layer and over-arch, from looked-up embeddings to the logit."""

from torch import Tensor, nn

from megarec.config.sections import OverArchConfig
from megarec.models.blocks import number_dropouts
from megarec.models.gemm import fast_cpu_gemm
from megarec.models.inputs import EmbeddedColumns, InputLayer
from megarec.models.over_arch import build_over_arch
from megarec.models.wukong import LayerNormFactory, torch_layer_norm


class Recommender(nn.Module):
    """What the DeepSpeed engine wraps: all dense parameters; the tables stay outside.

    Args:
        layout: how the looked-up embeddings lie in [B, layout.width].
        numeric: how many numeric features there are.
        config: the over-arch and the input MLPs.
        embedding_dropout: probability per element of the looked-up embeddings.
        layer_norm: makes a LayerNorm over (width, with bias or not).

    Raises:
        UserError: sizes that do not fit together, or data without features.
    """

    def __init__(
        self,
        layout: EmbeddedColumns,
        numeric: int,
        config: OverArchConfig,
        embedding_dropout: float = 0.0,
        layer_norm: LayerNormFactory = torch_layer_norm,
    ) -> None:
        super().__init__()
        self.inputs = InputLayer(layout, numeric, config, embedding_dropout)
        self.over_arch = build_over_arch(self.inputs.embeddings, self.inputs.numeric_embeddings, config, layer_norm)
        number_dropouts(self)

    def forward(self, numeric: Tensor, embedded: Tensor, keys: Tensor | None = None) -> Tensor:
        """Numeric [B, f], looked-up embeddings [B, layout.width], dropout keys int64 [B] -> logits float32 [B].

        The inputs are cast to the parameters' dtype. Keys are needed in training when there is dropout.
        """
        dtype = next(self.parameters()).dtype
        with fast_cpu_gemm(embedded.device, dtype):
            x_BND = self.inputs(numeric.to(dtype), embedded.to(dtype), keys)
            return self.over_arch(x_BND, keys).float()
